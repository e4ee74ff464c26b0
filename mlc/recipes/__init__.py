"""Packaged recipes: YAML files for `-c NAME`, one for each published system.

A file begins with comments: what it is, then `# source:`, `# score:`, `# memory:` and `# hours:`, then notes. They are
comments and not settings, since they say where numbers come from and change nothing; `mlc recipes` reads them.
"""

import re
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shards.console import Parser, UserError, did_you_mean
from shards.json_text import to_json

FOLDER = Path(__file__).parent
WIDTHS = {"name": 31, "score": 36, "memory": 21, "hours": 26}  # of the columns; with their gaps 120


@dataclass(frozen=True)
class Recipe:
    """The header of one file; a fact that it does not state is ''.

    Attributes:
        memory: of one GPU with bf16 at the recipe's batch size.
        hours: of a training on the data of its source, with the GPU and whether that is published or computed.
    """

    name: str
    what: str
    source: str = ""
    score: str = ""
    memory: str = ""
    hours: str = ""


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        prog="mlc recipes",
        description="Lists the recipes for `train.py -c NAME`, or shows one.",
        epilog="example: mlc recipes comp5329-swinv2-l",
    )
    parser.add_argument("name", nargs="?", help="show the YAML of this recipe")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    paths = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
    if options.name and options.name not in paths:
        raise UserError(
            f"no recipe {options.name!r}{did_you_mean(options.name, list(paths))} (`mlc recipes` lists them)"
        )
    chosen = [paths[options.name]] if options.name else paths.values()
    if options.json:
        print(to_json([asdict(read_header(path)) for path in chosen]))
    elif options.name:
        print(paths[options.name].read_text(encoding="utf-8"), end="")
    else:
        _table([read_header(path) for path in chosen])


def read_header(path: Path) -> Recipe:
    """What the comments at the top of a recipe say."""
    what, *rest = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))[0].splitlines()
    facts = dict(match.groups() for line in rest if (match := re.match(r"# (source|score|memory|hours): (.*)", line)))
    return Recipe(path.stem, what.removeprefix("# "), **facts)


def _table(recipes: list[Recipe]) -> None:
    """One table per source, so that a source stands once."""
    console = Console(width=120, highlight=False)
    by_source = sorted(recipes, key=lambda recipe: recipe.source)  # the sort is stable: names stay in order
    for source, group in groupby(by_source, key=lambda recipe: recipe.source):
        table = Table(title=source, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for name, width in WIDTHS.items():
            table.add_column(name, width=width, overflow="fold")
        for recipe in group:
            table.add_row(*(_short(getattr(recipe, name)) for name in WIDTHS))
        console.print(table, "")
    console.print("memory and hours are computed where nothing else is said (docs/recipes.md)")
    console.print("mlc recipes NAME shows one, train.py -c NAME --data DIR trains it")


def _short(fact: str) -> str:
    """A line of the table: the first of several scores, without what goes without saying."""
    return fact.split(";")[0].removesuffix(" (computed)").replace(", threshold 0.5", "")
