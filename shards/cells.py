"""A cell of labels in a table: names between separators, or a list as Python and JSON write it.

A cell that is split in the wrong way is an error to nobody: `cat|dog` is one more class, and the
model learns it. So a table whose cells look as if they were meant otherwise is refused, unless its
owner says what separates the labels.
"""

import ast
import json
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from shards.console import UserError, few

OTHERS = ("|", ";", ",")  # separators that a table may well have where none was named
RARE = 0.05  # of the cells: below that it is part of a name, such as the tag ;)
ENDS = {"[": "]", "(": ")", "{": "}", '"': '"', "'": "'"}
ITEM = re.compile(r"""u?'(?:[^'\\]|\\.)*'|u?"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d*)?""", re.DOTALL)
LIST = re.compile(rf"\[\s*(?:(?:{ITEM.pattern})\s*(?:,\s*(?:{ITEM.pattern})\s*)*(?:,\s*)?)?\]", re.DOTALL)


def nfc(text: str) -> str:
    """One spelling of names that look alike: `é` may be one code point, or two as on macOS."""
    return unicodedata.normalize("NFC", text)


def split_labels(text: str, separator: str | None) -> tuple[str, ...]:
    """The labels of one cell, in NFC: the items of a Python or JSON list, whatever the separator; else
    " " (or None) splits at any white space, another separator also trims around the labels."""
    text = nfc(text)
    parts = listed_labels(text)
    if parts is None:
        parts = text.split() if separator in (None, " ") else text.split(separator)
    return tuple(part.strip() for part in parts if part.strip())


def listed_labels(text: str) -> list[str] | None:
    """The items of a list of texts or numbers; None for any other text."""
    text = text.strip()
    if not (text.startswith("[") and LIST.fullmatch(text)):
        return None
    try:
        return [_item(item) for item in ITEM.findall(text)]
    except (ValueError, SyntaxError):  # an escape that nobody can read
        return None


def _item(text: str) -> str:
    if text[-1] not in "'\"":
        whole, _, rest = text.partition(".")
        return whole if not rest.strip("0") else text  # pandas writes whole numbers as 2.0
    if "\\" not in text:
        return text.removeprefix("u")[1:-1]
    try:
        value = json.loads(text)
    except ValueError:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # '\d' is read as it stands
            value = ast.literal_eval(text)
    value.encode()  # half a surrogate pair cannot be written to any file
    return nfc(value)


def survives(name: str, separator: str) -> bool:
    """Whether a class of that name is read from a cell as it was written into it."""
    return split_labels(name, separator) == (nfc(name),)


def free_separator(classes: Sequence[str]) -> str:
    """The first of the usual separators that no class contains: a blank, where that will do."""
    usual = (" ", *OTHERS, "\t", "||")
    return next((sign for sign in usual if all(survives(name, sign) for name in classes)), usual[-1])


def check_separator(path: Path, column: str, cells: Iterable[str]) -> None:
    """For cells whose separator nobody has named: raises UserError where most look as if they had
    another one than white space, or are in brackets or quotes and no list."""
    filled = [text for cell in cells if (text := cell.strip()) and listed_labels(text) is None]
    odd = [text for text in filled if len(text) > 1 and ENDS.get(text[0]) == text[-1]]
    if 2 * len(odd) > len(filled):
        raise UserError(
            f"{path}: {len(odd)} of {len(filled)} cells of {column} have brackets or quotes at their ends and are no "
            f'Python or JSON list, such as {_short(odd[0])}; write ["a", "b"], or give --label-separator \' \' if '
            "they belong to the names"
        )
    for sign in OTHERS:
        having = [text for text in filled if sign in text]
        share = len(having) / max(1, len(filled))
        if share >= 0.5 or (share > RARE and _shared(filled, sign)):
            now, then = _classes(filled, None), _classes(filled, sign)
            raise UserError(
                f"{path}: {len(having)} of {len(filled)} cells of {column} have {sign!r}, such as {_short(having[0])}; "
                f"give --label-separator {sign!r} ({len(then)} classes: {few(then, 4)}), or --label-separator ' ' to "
                f"split at blanks alone ({len(now)}: {few(now, 4)})"
            )


def _shared(cells: Sequence[str], sign: str) -> bool:
    """Whether the parts of such labels are labels of other images: split, there are fewer of them."""
    labels = _classes(cells, None)
    return len(_classes(labels, sign)) < len(labels)


def _classes(cells: Sequence[str], separator: str | None) -> list[str]:
    return sorted({label for cell in cells for label in split_labels(cell, separator)})


def _short(text: str) -> str:
    return repr(text if len(text) < 60 else text[:56] + " ...")
