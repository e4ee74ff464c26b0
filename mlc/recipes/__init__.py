"""Packaged recipes: YAML files for `-c NAME`. The first comment line of each says what it is."""

from pathlib import Path

from shards.console import Parser

FOLDER = Path(__file__).parent


def main(argv: list[str] | None = None) -> None:
    """`mlc recipes`: each recipe and its first line."""
    Parser(prog="mlc recipes", description="Lists the recipes for `train.py -c NAME`.").parse_args(argv)
    for path in sorted(FOLDER.glob("*.yaml")):
        print(f"{path.stem:<24} {path.read_text().splitlines()[0].removeprefix('# ')}")
