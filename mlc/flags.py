"""Reading a `Config`: YAML files (`-c`), then the command line, which wins; mistakes name the file and the field."""

import argparse
import ast
import dataclasses
import functools
import inspect
import re
import types
import typing
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml

from mlc.config import Config, flag
from shards.console import Parser, UserError, did_you_mean
from shards.files import whole

SHORT = {"batch_size": "-b", "workers": "-j", "validation_batch_size": "-vb"}
RECIPES = Path(__file__).parent / "recipes"


def read_config(argv: list[str] | None = None, prog: str = "train.py") -> Config:
    """The configuration of a command line: defaults, then each -c file in order, then the flags.

    Raises:
        UserError: an unknown key, a wrong type or an impossible combination, naming the field.
    """
    given = read_flags(argv, prog)
    settings: dict[str, Any] = {}
    for source in given.pop("config", []):
        settings |= read_yaml(source)
    return Config(**(settings | given))


def read_flags(argv: list[str] | None, prog: str) -> dict[str, Any]:
    """What a command line gives: settings by their fields' names, and `config`, the list of its -c."""
    return vars(_parser(prog).parse_args(argv))


def read_yaml(source: str | Path) -> dict[str, Any]:
    """Checked settings of a YAML file, or of a packaged recipe by its name."""
    path = Path(source)
    if not path.is_file():
        path = RECIPES / f"{source}.yaml"
    if not path.is_file():
        names = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
        raise UserError(
            f"-c {source}: neither a file nor a recipe{did_you_mean(str(source), names)} (recipes: {', '.join(names)})"
        )
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8-sig")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected `name: value` lines, found a {type(loaded).__name__}")
    return checked(loaded, str(path))


def checked(loaded: dict[Any, Any], where: str) -> dict[str, Any]:
    """Settings as YAML gives them -> by their fields' names, as their fields' types.

    Raises:
        UserError: an unknown key or a wrong type, after `where`, naming the key.
    """
    types_of = typing.get_type_hints(Config)
    settings = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in types_of:
            raise UserError(f"{where}: unknown setting {key!r}{did_you_mean(name, list(types_of))}")
        try:
            settings[name] = convert(value, types_of[name])
        except ValueError as error:
            raise UserError(f"{where}: {key}: {error}") from error
    return settings


def write_yaml(config: Config, path: Path) -> None:
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(config).items()}
    with whole(path) as building:
        building.write_text(yaml.safe_dump(settings, sort_keys=False))


def convert_field(name: str, value: Any) -> Any:
    """The value of a setting as the type of its field; ValueError says what was expected."""
    return convert(value, typing.get_type_hints(Config)[name])


def convert(value: Any, kind: Any) -> Any:
    """A value from YAML or the command line as the type of its field; ValueError says what was expected."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return _either(value, *typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if choices[0] == "none" and str(value).lower() in ("true", "false"):  # once was a switch: --weighted_loss True
            return choices[str(value).lower() == "true"]
        if value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}, not {value!r}{did_you_mean(str(value), choices)}")
        return value
    if typing.get_origin(kind) is tuple:
        members = typing.get_args(kind)
        if not isinstance(value, (list, tuple)) or len(value) != len(members):
            raise ValueError(f"expected {len(members)} numbers, not {value!r}")
        return tuple(convert(v, k) for v, k in zip(value, members, strict=True))
    if typing.get_origin(kind) is list:
        values = value if isinstance(value, list) else [] if value == "" else [value]
        return [convert(v, typing.get_args(kind)[0]) for v in values]
    if typing.get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"expected `name: value` pairs, not {value!r}")
        of = typing.get_args(kind)[1]
        return {str(k): v if of is Any else convert(v, of) for k, v in value.items()}
    return _scalar(value, kind)


def _either(value: Any, kind: Any, other: Any) -> Any:
    """X | None or X | Literal["a word"]."""
    if other is type(None):
        return None if value is None or value in ("none", "None") else convert(value, kind)
    words = typing.get_args(other)
    if value in words:
        return value
    try:
        return convert(value, kind)
    except ValueError as error:
        raise ValueError(f"{error}, and not {' or '.join(words)}") from None


def _scalar(value: Any, kind: type) -> Any:
    if kind is bool:
        named = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() not in named:
            raise ValueError(f"expected true or false, not {value!r}")
        return named[str(value).lower()]
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
            if kind is float or number == int(number):
                return kind(number)
        except (ValueError, OverflowError):
            pass
    noun = {int: "a whole number", float: "a number", str: "a text"}[kind]
    raise ValueError(f"expected {noun}, not {value!r}")


def _parser(prog: str) -> Parser:
    """One flag per field; a flag that is not given leaves no attribute, so that YAML and defaults show through."""
    parser = Parser(
        prog=prog,
        argument_default=argparse.SUPPRESS,
        description="Trains a multi-label classifier on shards.",
        epilog="example: accelerate launch --config_file accelerate_config.yaml train.py -c demo --data DIR "
        "--experiment demo",
    )
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        metavar="RECIPE|FILE",
        help="YAML settings: a recipe's name (`mlc recipes`) or a file; may be repeated, later ones win",
    )
    kinds, defaults = typing.get_type_hints(Config), {f.name: f for f in dataclasses.fields(Config)}
    for group, fields in documented_fields(Config).items():
        section = parser.add_argument_group(group)
        for name, text in fields.items():
            _add_flag(section, name, kinds[name], f"{text}{_default_text(defaults[name])}")
    return parser


def _add_flag(section, name: str, kind: Any, text: str) -> None:
    names = [SHORT[name]] if name in SHORT else []
    names.append(flag(name))
    text = text.replace("%", "%%")
    metavar = re.sub(r".*_", "", name).upper()

    def parse(value: str) -> Any:
        try:
            return convert(value, kind)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    if kind is bool:
        section.add_argument(*names, nargs="?", const=True, type=parse, metavar="true|false", help=text)
        section.add_argument(f"--no-{name.replace('_', '-')}", dest=name, action="store_false", help=argparse.SUPPRESS)
    elif typing.get_origin(kind) is tuple:
        section.add_argument(
            *names, nargs=len(typing.get_args(kind)), type=float, metavar=metavar, action=_AsTuple, help=text
        )
    elif kind == list[dict[str, Any]]:
        section.add_argument(*names, type=lambda text: parse(yaml.safe_load(text)), metavar="YAML", help=text)
    elif typing.get_origin(kind) is list:
        section.add_argument(*names, action="append", metavar=metavar, help=text)
    elif typing.get_origin(kind) is dict:
        of = dict[str, typing.get_args(kind)[1]]
        section.add_argument(
            *names, nargs="+", type=functools.partial(_key_value, kind=of), action=_AsDict, metavar="K=V", help=text
        )
    elif typing.get_origin(kind) is Literal:
        section.add_argument(*names, type=parse, metavar="|".join(typing.get_args(kind)), help=text)
    else:
        section.add_argument(*names, type=parse, metavar=metavar, help=text)


class _AsTuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


class _AsDict(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, dict(values))


def _key_value(text: str, kind: Any) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected name=value, not {text!r}")
    try:
        return key, convert({key: yaml.safe_load(value)}, kind)[key]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{key}: {error}") from error


def _default_text(f: dataclasses.Field) -> str:
    if f.default is dataclasses.MISSING or f.default in (None, "") or isinstance(f.default, bool):
        return " (on by default; --no-" + f.name.replace("_", "-") + " turns it off)" if f.default is True else ""
    shown = " ".join(f"{x:g}" for x in f.default) if isinstance(f.default, tuple) else f.default
    return f" (default: {shown})"


def documented_fields(cls: type) -> dict[str, dict[str, str]]:
    """{banner: {field: the text under it}}, read from the source, so that help and code cannot drift apart."""
    source = inspect.getsource(cls)
    banners = [
        (number, match[1])
        for number, line in enumerate(source.splitlines(), 1)
        if (match := re.match(r"\s*# ---- (.*?) -*$", line))
    ]
    groups: dict[str, dict[str, str]] = {title: {} for _, title in banners}
    body = ast.parse(inspect.cleandoc(source)).body[0].body
    for node, text in pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(text, ast.Expr):
            title = [title for number, title in banners if number < node.lineno][-1]
            groups[title][node.target.id] = " ".join(text.value.value.split())
    return groups
