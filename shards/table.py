"""The user's tables: the CSV of images, labels and captions, and the class list.

A CSV that parses into the wrong rows is worse than one that does not parse: real competition files hold captions with
bare quotes, which a lenient reader turns into merged rows without a word. So the reader is strict, and whatever it
cannot be sure of it reports by line. What is wrong with one row is collected, to be shown together with what is wrong
with others; what makes the rows themselves doubtful stops at once.
"""

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from shards.cells import check_separator, nfc, split_labels
from shards.console import UserError, did_you_mean
from shards.files import check_download

SWALLOWED_ROW = re.compile(r"\n\s*[^\s,\"]+\.(?:jpe?g|png|webp|bmp|gif|tiff?)\s*,", re.IGNORECASE)
BOM = "\ufeff"  # some programs put it before a text, and `cat` leaves it in the middle of a file
LONGEST = 2**31 - 1  # characters of a field: the file is in memory anyway
PREDICTION_ID = "ImageID"  # in files of probabilities, whatever the user's tables call it
QUOTES_HELP = 'put the field in quotes and double every quote inside it: "a ""red"" car"'


@dataclass(frozen=True)
class Columns:
    """How the user's CSV names its columns and joins its labels (`separator` " " means any white space;
    None the same, unless the cells look as if it were another)."""

    image_id: str = "ImageID"
    labels: str = "Labels"
    caption: str = "Caption"
    weight: str = "Weight"
    separator: str | None = None


USUAL_COLUMNS = Columns(separator=" ")


@dataclass(frozen=True, slots=True)
class Row:
    """One sample as its CSV states it; `labels` is None where the table has no labels."""

    source: str
    line: int
    image_id: str
    labels: tuple[str, ...] | None
    caption: str
    weight: float = 1.0


class Problems:
    """What is wrong with single rows, kept until everything has been looked at. A row may have several."""

    def __init__(self) -> None:
        self._texts: dict[tuple[str, int], list[str]] = {}

    def __len__(self) -> int:
        """Bad rows, not texts."""
        return len(self._texts)

    def add(self, source: str, line: int, text: str) -> None:
        self._texts.setdefault((source, line), []).append(text)

    def has(self, row: Row) -> bool:
        return (row.source, row.line) in self._texts

    def lines(self) -> list[str]:
        """One line per problem, in the order of the files."""
        return [
            f"{source} line {line}: {text}" for (source, line), texts in sorted(self._texts.items()) for text in texts
        ]


def read_rows(path: Path, columns: Columns, problems: Problems, *, need_labels: bool) -> list[Row]:
    """Reads a CSV in UTF-8, with or without a byte-order mark. Raises UserError where the rows cannot be told apart."""
    records = _records(path, problems)
    _, header = next(records, (1, None))
    if header is None:
        raise UserError(
            f"{path} is empty; its first line must name the columns, such as {columns.image_id},"
            f"{columns.labels},{columns.caption}"
        )
    where = _find_columns(path, header, columns, need_labels=need_labels)
    rows, cells = [], []
    for line, record in records:
        if len(record) != len(header):
            problems.add(str(path), line, f"{len(record)} fields where the header has {len(header)}; {QUOTES_HELP}")
            continue
        record = [field.lstrip(BOM) for field in record]
        rows.append(_row(path, line, record, where, columns, problems))
        if "labels" in where and columns.separator is None:
            cells.append(record[where["labels"]])
    if not rows and not problems:
        raise UserError(f"{path} has a header and no rows")
    check_separator(path, columns.labels, cells)
    return rows


def _row(path: Path, line: int, record: list[str], where: dict[str, int], columns: Columns, problems: Problems) -> Row:
    caption = record[where["caption"]] if "caption" in where else ""
    if SWALLOWED_ROW.search(caption):
        raise UserError(f"{path} line {line}: a quote opened here runs over the rows below it; {QUOTES_HELP}")
    labels = split_labels(record[where["labels"]], columns.separator) if "labels" in where else None
    image_id = record[where["image_id"]].strip()
    if not image_id:
        problems.add(str(path), line, f"the {columns.image_id} is empty")
    if labels and len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        problems.add(str(path), line, f"label {twice!r} is there twice")
    weight = _weight(record[where["weight"]]) if "weight" in where else 1.0
    if weight is None:
        problems.add(str(path), line, f"the {columns.weight} {record[where['weight']]!r} is not a number from 0 on")
    return Row(str(path), line, image_id, labels, caption, 1.0 if weight is None else weight)


def _weight(text: str) -> float | None:
    try:
        weight = float(text)
    except ValueError:
        return None
    return weight if 0 <= weight < math.inf else None


def _records(path: Path, problems: Problems) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) per record; a record that breaks on its own line is a problem, over several it is fatal."""
    csv.field_size_limit(LONGEST)  # else 131,072 characters, and a longer caption looks like a quoting mistake
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error:
            if reader.line_num > line or line == 1:
                raise UserError(
                    f"{path} line {line}: a quote opened here does not end where a field ends "
                    f"(noticed in line {reader.line_num}); {QUOTES_HELP}"
                ) from None
            problems.add(str(path), line, f"a quote in the middle of a quoted field; {QUOTES_HELP}")
            continue
        if record:
            yield line, record


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if data:
        check_download(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line} is not UTF-8 (byte 0x{data[error.start]:02x}); save it as UTF-8") from None


def _find_columns(path: Path, header: Sequence[str], columns: Columns, *, need_labels: bool) -> dict[str, int]:
    """Position by role. Raises UserError naming the columns that exist."""
    names = [name.lstrip(BOM).strip() for name in header]
    wanted = {role: getattr(columns, role) for role in ("image_id", "labels", "caption", "weight")}
    required = ("image_id", "labels") if need_labels else ("image_id",)
    defaults = Columns()
    for role, name in wanted.items():
        flag = f"--{role.replace('image_', '')}-column"
        if names.count(name) > 1:
            raise UserError(f"{path} has {names.count(name)} columns called {name!r}; rename one")
        named = role != "labels" and name != getattr(defaults, role)  # labels are not for every table
        if name not in names and (role in required or named):
            same = [other for other in names if other.lower() == name.lower()]
            raise UserError(
                f"{path} has no column {name!r}, it has: {', '.join(names)}"
                f"{did_you_mean(same[0] if same else name, names)}; name yours with {flag}"
            )
    return {role: names.index(name) for role, name in wanted.items() if name in names}


def read_classes(path: Path) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """(classes in column order, groups) of a YAML file with `classes: [...]` and perhaps `groups: {name: [...]}`."""
    check_download(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict) or not data.get("classes") or not set(data) <= {"classes", "groups"}:
        raise UserError(f"{path} must hold `classes: [...]` and, if wanted, `groups: {{name: [...]}}`, nothing else")
    classes = _names(path, "classes", data["classes"])
    groups = data.get("groups") or {}
    if not isinstance(groups, dict):
        raise UserError(f"{path}: groups must be {{name: [class, ...]}}")
    groups = {nfc(str(group)): _names(path, f"group {group}", members) for group, members in groups.items()}
    _check_groups(path, classes, groups)
    return classes, groups


def _names(path: Path, what: str, values: object) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise UserError(f"{path}: {what} must be a list of names")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise UserError(f"{path}: {value!r} in {what} is not a name for YAML; put it in quotes")
    names = tuple(nfc(str(value)) for value in values)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: {twice!r} is twice in {what}")
    return names


def _check_groups(path: Path, classes: tuple[str, ...], groups: dict[str, tuple[str, ...]]) -> None:
    owner: dict[str, str] = {}
    for group, members in groups.items():
        for name in members:
            if name not in classes:
                raise UserError(f"{path}: {name!r} of group {group} is not in classes{did_you_mean(name, classes)}")
            if name in owner:
                raise UserError(f"{path}: {name!r} is in the groups {owner[name]} and {group}; a class has one group")
            owner[name] = group


def found_classes(label_sets: Iterator[Sequence[str]]) -> tuple[str, ...]:
    """Every label that occurs: in the order of numbers where all are numbers, else of the alphabet."""
    names = {nfc(label) for labels in label_sets for label in labels}
    if all(name.isascii() and name.isdigit() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))
