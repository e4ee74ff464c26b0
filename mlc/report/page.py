"""`mlc report`: one page about one or several runs that people can look at, mail and keep: a single file, offline.

The page style, the tables that sort and the content security policy are those of `mlc stats --html`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import PackageLoader

from mlc.data.remote import open_reader
from mlc.metrics import bootstrap
from mlc.report import decisions, gallery, sections
from mlc.report.runs import Run, Scored, Subject, open_runs, scored, subject_of
from shards.console import Parser, UserError, say
from shards.files import whole
from shards.stats_html import check_target, render

MOST_BYTES = 10_000_000
MOST_RUNS = 6  # colours of a chart


def main(argv: list[str] | None = None) -> None:
    options = _parser().parse_args(argv)
    out = Path(options.out)
    check_target(out)
    runs = open_runs(options.runs, options.split)
    write_report(runs, out, data=options.data, split=options.split, draws=options.bootstrap, maps=options.maps)


def write_report(runs: Sequence[Run], out: Path, *, data: str | None, split: str, draws: int, maps: int) -> None:
    """Writes the page to `out` in one step; `maps` Grad-CAM overlays for each run. Raises UserError."""
    if len(runs) > MOST_RUNS:
        raise UserError(f"{len(runs)} runs: a page shows at most {MOST_RUNS}; `mlc sweep` compares many")
    subject = subject_of(runs, data, split)
    found = [scored(run, subject) for run in runs]
    page = page_of(subject, found, draws=draws, maps=maps)
    if len(page) > MOST_BYTES:
        raise UserError(
            f"the page would have {len(page) / 1e6:.1f} MB, {MOST_BYTES / 1e6:.0f} at most; name fewer runs"
        )
    with whole(out) as building:
        building.write_bytes(page)
    say(f"report: {out} ({len(page) / 1e6:.1f} MB)")


def page_of(subject: Subject, found: list[Scored], *, draws: int, maps: int) -> bytes:
    """The page as UTF-8."""
    runs, target = [one.run for one in found], subject.truth.target
    weights = bootstrap.draws(len(target), draws)
    images = gallery.pictures(found, subject)
    return render(
        "report.html.j2",
        PackageLoader("mlc", "report/templates"),
        runs=runs,
        split=subject.split,
        images=len(target),
        draws=draws,
        zero_division=subject.zero_division,
        summary=sections.summary(found, weights),
        curves=sections.curves(runs),
        groups=sections.groups(subject, found, weights),
        classes=sections.classes(subject, found),
        rules=decisions.rules(found, subject),
        thresholds=decisions.curves(found, subject),
        calibration=sections.calibrated(found, target),
        together=sections.together(subject),
        confusions=[made for one in found if (made := sections.confusion(one, subject))],
        galleries=[(one.run.name, gallery.gallery(one, subject, images)) for one in found],
        attention=[_attention(one, subject, maps) for one in found] if maps else [],
        data=sections.data(subject, runs),
        speed=sections.speed(runs),
        environment=list(dict.fromkeys(name for run in runs for name in run.environment)),
        settings=sections.settings(runs),
    )


def _attention(one: Scored, subject: Subject, count: int) -> dict[str, Any]:
    """{name, cards, why, places}: cards with a map for a class of some images, the likeliest of the best ones and the
    wrong one of the surest; why there are none; (h, w) of the maps."""
    from mlc.report.attention import overlays

    kinds = gallery.chosen(one, subject)
    wrong = kinds["sure_absent"][: count // 2]
    columns = {place: int(one.scores[place].argmax()) for place in kinds["best"][: count - len(wrong)]}
    absent = np.where(subject.truth.target, -1.0, one.scores)
    columns |= {place: int(absent[place].argmax()) for place in wrong}
    wanted = {place: (int(subject.rows[place]), column) for place, column in columns.items()}
    made, why = overlays(one.run, open_reader(subject.index), list(wanted.values()))
    cards = [
        gallery.card(one, subject, place, made[key].seen)
        | {"map": made[key].hot, "of": subject.truth.classes[key[1]], "score": float(one.scores[place, key[1]])}
        | {"right": bool(subject.truth.target[place, key[1]]), "empty": made[key].empty}
        for place, key in wanted.items()
        if key in made
    ]
    places = next((overlay.places for overlay in made.values()), None)
    return {"name": one.run.name, "cards": cards, "why": why, "places": places}


def _parser() -> Parser:
    parser = Parser(
        prog="mlc report",
        description="Writes one HTML page about runs that `mlc eval` has scored: curves, numbers, classes, pictures.",
        epilog="example: mlc eval --run runs/demo --data data/demo-shards && mlc report runs/demo --out report.html",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folders of runs; further ones are compared with the first"
    )
    parser.add_argument("--out", default="report.html", help="the page (default: report.html)")
    parser.add_argument("--data", help="packed data set they were scored on (default: the first run's own)")
    parser.add_argument("--split", default="val", help="the split (default: val)")
    add_size_flags(parser)
    return parser


def add_size_flags(parser: Parser) -> None:
    from mlc.scores import count

    parser.add_argument("--bootstrap", type=count, default=1000, metavar="N", help="draws for the intervals (1000)")
    parser.add_argument("--maps", type=int, default=6, help="Grad-CAM overlays for each run, 0 for none (6)")
