"""What each stage of scripts/imet.sh gave: F2, the mean over images, of one or several folders (seeds) it wrote."""

import argparse
import json
from pathlib import Path
from statistics import mean, stdev

STAGES = ("1-zoo", "2-filter", "3-pseudo", "4-tags", "5-stack")


def values(folder: Path) -> dict[str, tuple[float, float | None]]:
    """{stage: (F2 out of fold on images its thresholds were not tuned on, F2 on test where that is known)}."""
    found = {}
    for stage in STAGES:
        if (file := folder / stage / "thresholds.json").is_file():
            scores = folder / stage / "scores.json"
            test = json.loads(scores.read_text())["f2_samples"] if scores.is_file() else None
            found[stage] = json.loads(file.read_text())["honest"], test
    return found


def spread(numbers: list[float], sign: str = "") -> str:
    more = f" +- {stdev(numbers):.4f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):{sign}.4f}{more}"


def lines(folders: list[Path]) -> list[str]:
    """A Markdown table; `to the stage before` is paired by folder, with how many of them gained."""
    found = [values(folder) for folder in folders]
    shown = ["| stage | F2 out of fold | F2 test | to the stage before (test) | gained |", "|---|---:|---:|---:|---:|"]
    before = None
    for stage in STAGES:
        if not all(stage in own for own in found):
            continue
        honest, test = zip(*(own[stage] for own in found), strict=True)
        cells = [stage, spread(list(honest)), "", "", ""]
        if None not in test:
            cells[2] = spread(list(test))
            if before:
                gains = [now - then for now, then in zip(test, before, strict=True)]
                cells[3:] = [spread(gains, "+"), f"{sum(gain > 0 for gain in gains)} of {len(gains)}"]
            before = test
        shown.append(f"| {' | '.join(cells)} |")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="OUT", help="a folder that scripts/imet.sh wrote")
    print("\n".join(lines(parser.parse_args().folders)))


if __name__ == "__main__":
    main()
