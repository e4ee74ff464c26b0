"""Which rows of a split take part: folds, conditions on the columns of the index, lists of images to leave out.

Every filter gives row numbers, ascending, and sampling goes over those. Conditions have Python's syntax but are never
run as Python: a handful of node types becomes an Arrow expression, and everything else is refused.
"""

import ast
import csv
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.cells import nfc
from shards.console import UserError, did_you_mean
from shards.dataset import Index
from shards.table import LONGEST

CHUNK = 1 << 20  # rows looked at together: bounds the memory of a filter over any index
COLUMNS = ("key", "image_id", "shard", "size", "ext", "caption", "fold", "weight", "n_labels")
NAME_COLUMNS = ("ImageID", "image_id", "key")  # a CSV's column of names, the first that it has
COMPARISONS: dict[type, Callable] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def select_rows(
    index: Index,
    classes: Sequence[str],
    *,
    where: str = "",
    fold: int | None = None,
    without_fold: int | None = None,
    drop: np.ndarray | None = None,
) -> np.ndarray | None:
    """Row numbers int64, ascending, that pass every filter given; None where no filter is given: all rows.

    Args:
        where: condition such as `fold != 0 and n_labels > 1` or `"cat" in labels`.
        fold, without_fold: only the rows of this fold, or only the others.
        drop: bool [n], the rows to leave out, see `named`.
    Raises:
        UserError: naming the flag, where a filter is not understood or nothing is left.
    """
    kept, given = np.ones(len(index), bool), []
    if fold is not None or without_fold is not None:
        given.append(f"--fold {fold if without_fold is None else without_fold}")
        kept &= _fold_rows(index, fold) if without_fold is None else ~_fold_rows(index, without_fold)
    if where:
        given.append(f"--where {where}")
        kept &= matches(index, classes, where)
    if drop is not None:
        given.append("--drop-rows")
        kept &= ~drop
    if not kept.any():
        raise UserError(f"{' '.join(given)}: none of the {len(index)} rows of {index.path.stem} is left")
    return np.flatnonzero(kept) if given else None


def _fold_rows(index: Index, fold: int) -> np.ndarray:
    rows = index.fold == fold
    if not rows.any():
        folds = [str(number) for number in np.unique(index.fold) if number >= 0]
        raise UserError(
            f"--fold {fold}: no row is in it; {index.path.stem} has "
            + (f"folds {', '.join(folds)}" if folds else "no folds, `mlc pack --folds 5` makes them")
        )
    return rows


# ---- conditions ------------------------------------------------------------------------------------------------------


def matches(index: Index, classes: Sequence[str], where: str) -> np.ndarray:
    """bool [n]: the rows for which the condition is true. Raises UserError for what it cannot mean."""
    condition = _Condition(where, classes)
    found = np.zeros(len(index), bool)
    for first, table in _tables(index, condition):
        try:
            true = table.filter(condition.expression)["row"].to_numpy()
        except (pa.ArrowException, NotImplementedError) as error:
            raise UserError(f"--where {where}: {str(error).splitlines()[0]}") from None
        found[first + true] = True
    return found


def _tables(index: Index, condition: "_Condition") -> Iterator[tuple[int, pa.Table]]:
    """(first row, the columns that the condition names, `row` counting from 0) of each chunk of the index."""
    for first in range(0, len(index), CHUNK):
        batch = index.batch.slice(first, CHUNK)
        labels = batch.column("labels")
        columns: dict[str, pa.Array] = {"row": pa.array(np.arange(batch.num_rows))}
        for name in condition.columns:
            columns[name] = pc.list_value_length(labels) if name == "n_labels" else batch.column(name)
        for name, column in condition.class_columns.items():
            has = np.zeros(batch.num_rows, bool)
            has[pc.list_parent_indices(labels).to_numpy()[pc.list_flatten(labels).to_numpy() == column]] = True
            columns[name] = pa.array(has)
        yield first, pa.table(columns)


class _Condition:
    """A condition as an Arrow expression, with the columns it is about."""

    def __init__(self, text: str, classes: Sequence[str]):
        self.text, self._classes = text, list(classes)
        self.columns: set[str] = set()
        self.class_columns: dict[str, int] = {}  # made-up column name -> class column, for `"name" in labels`
        try:
            self.expression = self._logic(ast.parse(text.strip(), mode="eval").body)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise UserError(
                f'--where {text}: not a condition; write it like fold != 0 and (n_labels > 1 or "cat" in labels)'
            ) from None

    def _logic(self, node: ast.expr) -> pc.Expression:
        if isinstance(node, ast.BoolOp):
            parts = [self._logic(part) for part in node.values]
            combine = operator.and_ if isinstance(node.op, ast.And) else operator.or_
            result = parts[0]
            for part in parts[1:]:
                result = combine(result, part)
            return result
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self._logic(node.operand)
        if isinstance(node, ast.Compare):
            return self._compare(node)
        raise self._refused(node)

    def _compare(self, node: ast.Compare) -> pc.Expression:
        """`a < b`, `a < b <= c`, `a in (1, 2)`, `"name" in labels`."""
        result, left = None, node.left
        for op, right in zip(node.ops, node.comparators, strict=True):
            part = self._pair(op, left, right)
            result, left = part if result is None else result & part, right
        return result

    def _pair(self, op: ast.cmpop, left: ast.expr, right: ast.expr) -> pc.Expression:
        if isinstance(op, ast.In | ast.NotIn):
            if isinstance(right, ast.Name) and right.id == "labels":
                inside = self._has_class(left)
            elif isinstance(right, ast.Tuple | ast.List | ast.Set):
                inside = self._column(left).isin([self._constant(value) for value in right.elts])
            else:
                raise self._refused(right)
            return inside if isinstance(op, ast.In) else ~inside
        if type(op) not in COMPARISONS:
            raise self._refused(left)
        return COMPARISONS[type(op)](self._value(left), self._value(right))

    def _has_class(self, node: ast.expr) -> pc.Expression:
        name, known = self._constant(node), [nfc(name) for name in self._classes]
        if not isinstance(name, str) or nfc(name) not in known:
            raise UserError(f"--where {self.text}: no class {name!r}{did_you_mean(str(name), self._classes)}")
        column = known.index(nfc(name))
        self.class_columns[f"class {column}"] = column
        return pc.field(f"class {column}")

    def _value(self, node: ast.expr) -> pc.Expression:
        return self._column(node) if isinstance(node, ast.Name) else pc.scalar(self._constant(node))

    def _column(self, node: ast.expr) -> pc.Expression:
        if not isinstance(node, ast.Name):
            raise self._refused(node)
        if node.id not in COLUMNS:
            raise UserError(
                f"--where {self.text}: unknown column {node.id!r}{did_you_mean(node.id, COLUMNS)}; the columns are "
                f'{", ".join(COLUMNS)}, and "class name" in labels'
            )
        self.columns.add(node.id)
        return pc.field(node.id)

    def _constant(self, node: ast.expr) -> int | float | str:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            number = self._constant(node.operand)
            if not isinstance(number, str):
                return -number
        if isinstance(node, ast.Constant) and type(node.value) in (int, float, str):
            return node.value
        raise self._refused(node)

    def _refused(self, node: ast.expr) -> UserError:
        return UserError(
            f"--where {self.text}: {ast.unparse(node)!r} cannot be used here; conditions compare columns with numbers "
            "or texts (== != < <= > >= in), joined by and, or, not"
        )


# ---- lists of images -------------------------------------------------------------------------------------------------


def read_names(file: Path, id_column: str = "ImageID") -> list[str]:
    """Image ids or keys: a CSV's column ImageID, image_id, key or `id_column` (the first it has), or
    else one name a line."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--drop-rows {file} cannot be read: {getattr(error, 'strerror', 'not UTF-8 text')}") from None
    lines = text.splitlines()
    header = next(csv.reader(lines[:1]), [])
    csv.field_size_limit(LONGEST)
    names = (*NAME_COLUMNS, id_column)
    column = next((header.index(name) for name in names if name in header), None)
    if column is None:
        return [line.strip() for line in lines if line.strip()]
    return [cells[column] for cells in csv.reader(lines[1:]) if len(cells) > column and cells[column]]


def named(index: Index, names: Sequence[str]) -> np.ndarray:
    """bool [n]: the rows whose image id or key is among the names."""
    wanted = pa.array(names, pa.large_string())
    found = np.zeros(len(index), bool)
    for first in range(0, len(index), CHUNK):
        batch = index.batch.slice(first, CHUNK)
        hits = [pc.is_in(batch.column(name), value_set=wanted) for name in ("image_id", "key")]
        found[first : first + CHUNK] = pc.or_(*hits).to_numpy(zero_copy_only=False)
    return found
