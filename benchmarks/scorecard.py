"""Seconds for every number of `mlc eval`, and for their 95 % intervals, for the size of a museum's archive.

The data are made up as in thresholds.py: 1,103 classes in two groups, mostly rare, 110,000 images. `numbers` is what
`mlc eval` computes when the files are read, the best threshold and the numbers of each class included; `intervals` is
what `--bootstrap` adds to it. Beside them (`--peers`, and always with `--quick`) scikit-learn's functions for the same
numbers, once, without groups and without calibration, which it has not; the numbers of both are compared first.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median

import common
import numpy as np
from sklearn import metrics as sk
from thresholds import made, seconds

from mlc.metrics import bootstrap
from mlc.metrics.scorecard import Scorecard
from mlc.scores import evaluated

THRESHOLD = 0.2
AVERAGES = ("samples", "micro", "macro", "weighted")


def numbers(scores: np.ndarray, target: np.ndarray, groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
    card = Scorecard(scores, scores > THRESHOLD, target, groups)
    found = evaluated(card, scores, target)
    card.classes()
    return found


def intervals(card: Scorecard, draws: int) -> None:
    bootstrap.intervals(card, bootstrap.draws(len(card), draws))


def by_scikit_learn(scores: np.ndarray, target: np.ndarray) -> dict[str, float]:
    predicted = scores > THRESHOLD
    present = target.any(0)
    found = {"map": sk.average_precision_score(target[:, present], scores[:, present], average="macro")}
    for average in AVERAGES:
        for beta, name in ((1, "f1"), (2, "f2")):
            rates = sk.precision_recall_fscore_support(target, predicted, beta=beta, average=average, zero_division=0)
            found |= {f"precision_{average}": rates[0], f"recall_{average}": rates[1], f"{name}_{average}": rates[2]}
    found["loss"] = np.mean([sk.log_loss(t, p, labels=[0, 1]) for p, t in zip(scores.T, target.T, strict=True)])
    found["ranking_loss"] = sk.label_ranking_loss(target, scores)
    found["coverage_error"] = sk.coverage_error(target, scores)
    found["lrap"] = sk.label_ranking_average_precision_score(target, scores)
    return found


def main() -> None:
    parser = common.arguments(__doc__, rounds=3)
    parser.add_argument("--images", type=int, default=110_000, help="(default: 110000)")
    parser.add_argument("--classes", type=int, default=1103, help="(default: 1103)")
    parser.add_argument("--draws", type=int, default=200, help="of the bootstrap (default: 200)")
    parser.add_argument("--peers", action="store_true", help="also scikit-learn; minutes at the default size")
    args = parser.parse_args()
    images, classes, rounds = (2000, 200, 1) if args.quick else (args.images, args.classes, args.rounds)
    scores, target = made(images, classes)
    groups = {"one": range(classes // 3), "other": range(classes // 3, classes)}
    card = Scorecard(scores, scores > THRESHOLD, target, groups)
    candidates = {
        "numbers": partial(numbers, scores, target, groups),
        f"intervals, {args.draws} draws": partial(intervals, card, args.draws),
    }
    if args.quick or args.peers:
        ours = numbers(scores, target, groups)
        for name, value in by_scikit_learn(scores, target).items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-5, err_msg=name)
        candidates["numbers, scikit-learn"] = partial(by_scikit_learn, scores, target)
    measured = common.interleaved({name: partial(seconds, call) for name, call in candidates.items()}, rounds)
    rows = [[name, f"{median(took):.2f}", f"{common.spread(took):.0%}"] for name, took in measured.items()]
    print(
        f"{images} images x {classes} classes, {target.sum() / images:.2f} labels each, {common.rounds_said(rounds)}\n"
    )
    print(common.table(["what", "s", "spread"], rows))
    versions = common.versions("numpy", "scipy", "scikit-learn")
    print(f"\n{common.machine()}; {', '.join(f'{name} {version}' for name, version in versions.items())}")
    common.write_json(args.json, versions=versions, images=images, classes=classes, draws=args.draws, seconds=measured)


if __name__ == "__main__":
    main()
