"""What does a fault cost, at any moment of a run? Random (fault, moment, rank, step) trials, each resumed to its end.

Two real processes train a tiny SwinV2 for two epochs, with a checkpoint every third step and an evaluation every
fourth; one of them suffers the fault (tests/injector.py), no launcher helps the other, and the run is resumed until it
is finished. It must leave what an uninterrupted run leaves, to the last bit; whatever carries its final name at any
time must be whole; and all processes must be gone within a minute (tests/trials.py). A prediction is simply repeated.
"""

import random
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import common

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from injector import FAULTS, FIRST_RANK_ONLY, MOMENTS, TIMES, Fault, cells
from trials import BOUND, STEPS, WORLD, Bench

Found = dict[str, Any]
ENDS = {
    "ran on": "every process reached the end of the run",
    "saved": "all ranks saved a checkpoint at the same step and stopped, exit code 0",
    "ended": "all ranks ended by themselves with an error, or one was killed and the other noticed",
    "FAILED": "hung, left something half-written, said nothing clear, or came out different",
}


def draw(count: int, seed: int) -> list[Fault]:
    """Every meaningful pair of fault and moment once in random order, then pairs at random; rank and step at random."""
    source = random.Random(seed)
    pairs = source.sample(cells(), len(cells()))
    pairs += source.choices(cells(), k=max(0, count - len(pairs)))
    return [
        Fault(
            fault=fault,
            moment=moment,
            rank=0 if moment in FIRST_RANK_ONLY else source.randrange(WORLD),
            at=source.randint(1, TIMES[moment]),
        )
        for fault, moment in pairs[:count]
    ]


def end(found: Found) -> str:
    if found["problem"]:
        return "FAILED"
    if any(found["codes"]):
        return "ended"
    return "saved" if found["resumes"] else "ran on"


def cell(found: Iterable[Found]) -> str:
    """`ended 2x, 0.3 s`: how, how often, the longest time from the fault until all processes were gone."""
    parts = []
    for how in ENDS:
        seconds = [one.get("seconds", 0.0) for one in found if end(one) == how]
        if seconds:
            parts.append(f"{how}{f' {len(seconds)}x' * (len(seconds) > 1)}, {max(seconds):.1f} s")
    return "; ".join(parts)


def grid(found: list[Found]) -> str:
    moments = [moment for moment in MOMENTS if any(one["moment"] == moment for one in found)]
    rows = []
    for fault in FAULTS:
        own = [one for one in found if one["fault"] == fault]
        if own:
            rows.append([fault, *(cell([one for one in own if one["moment"] == moment]) for moment in moments)])
    return common.table(["", *moments], rows)


def say(number: int, count: int, one: Found) -> None:
    where = f"{one['fault']}, {one['moment']} {one['at']}, rank {one['rank']}"
    print(f"{number}/{count}  {where}: {end(one)}  {one['problem'] or one.get('last')}", file=sys.stderr, flush=True)


def main() -> int:
    parser = common.arguments(__doc__, rounds=1)
    parser.add_argument("--trials", type=int, default=120, help="how many faults (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: %(default)s)")
    parser.add_argument("--pause", type=float, default=20.0, help="seconds that SIGSTOP lasts (default: %(default)s)")
    args = parser.parse_args()
    faults = draw(8 if args.quick else args.trials, args.seed)
    root = Path(tempfile.mkdtemp(prefix="mlc-faults-"))  # not a context manager: the ranks are forked within
    bench = Bench(root, pause=2.0 if args.quick else args.pause)
    found = []
    for number, fault in enumerate(faults, 1):
        found.append(bench.trial(fault))
        say(number, len(faults), found[-1])
    shutil.rmtree(root)
    failed = [one for one in found if end(one) == "FAILED"]
    versions = common.versions("torch", "accelerate")
    print(f"{common.machine()}; {', '.join(f'{name} {version}' for name, version in versions.items())}")
    print(
        f"{len(found)} faults in runs of {STEPS} steps on {WORLD} processes, {len(failed)} failed; seconds from the "
        f"fault until all processes were gone, allowed are {BOUND:.0f}\n"
    )
    print(grid(found))
    print("\n" + "; ".join(f"{how}: {what}" for how, what in ENDS.items() if any(end(one) == how for one in found)))
    common.write_json(args.json, versions=versions, seed=args.seed, trials=found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
