"""`mlc stats DIR --captions [--clean a,b]`: what cleaning makes of the captions, before a model is trained on it.

A switch that looks harmless can take the very words that matter (stop words contain the numbers up to twelve), so
examples and the words that disappear most often stand beside the counts.
"""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from shards.captions import caption_texts, clean, split_captions
from shards.console import UserError
from shards.dataset import Dataset, Index, open_index
from shards.json_text import to_json

SHOWN = 10  # examples, and words taken away


def caption_facts(index: Index, chosen: Sequence[str]) -> dict:
    """Counts of one split's captions before and after `switches`, ready for JSON.

    `captions` are the lines of all samples; `without` and `several`: samples with none and with more than one. Of
    `before` and `after`: `empty` captions, `words` in all, `median` and `longest` in words per caption, `vocabulary`:
    different words, `duplicates`: captions that came before. `removed`: [word, times] that cleaning takes away most
    often. `examples`: [before, after].
    """
    found = [split_captions(text) for text in caption_texts(index)]
    before = [caption for captions in found for caption in captions]
    after = [clean(caption, chosen) for caption in before]
    counts = [Counter(word for caption in captions for word in caption.split()) for captions in (before, after)]
    return {
        "samples": len(found),
        "without": sum(not captions for captions in found),
        "several": sum(len(captions) > 1 for captions in found),
        "captions": len(before),
        "before": _counted(before, counts[0]),
        "after": _counted(after, counts[1]),
        "removed": [list(pair) for pair in (counts[0] - counts[1]).most_common(SHOWN)],
        "examples": _examples(before, after),
    }


def _counted(captions: Sequence[str], words: Counter) -> dict:
    lengths = np.array([len(caption.split()) for caption in captions] or [0])
    return {
        "empty": sum(not caption for caption in captions),
        "words": words.total(),
        "median": float(np.median(lengths)),
        "longest": int(lengths.max()),
        "vocabulary": len(words),
        "duplicates": len(captions) - len(set(captions)),
    }


def _examples(before: Sequence[str], after: Sequence[str]) -> list[list[str]]:
    """Evenly spread over the captions that cleaning changes, over all where it changes none."""
    changed = [place for place, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]]
    places = changed or range(len(before))
    step = max(1, len(places) // SHOWN)
    return [[before[place], after[place]] for place in places[::step][:SHOWN]]


def show(data: str, dataset: Dataset, names: Sequence[str], chosen: Sequence[str], *, as_json: bool) -> None:
    """Prints `caption_facts` of some splits. Raises UserError where no sample has a caption."""
    found = {name: caption_facts(open_index(dataset, name), chosen) for name in names}
    if not any(facts["captions"] for facts in found.values()):
        raise UserError(f"{data}: no captions in {', '.join(names)}; `mlc pack` takes them from the column Caption")
    if as_json:
        print(to_json({"data": data, "clean": list(chosen), "splits": found}, ensure_ascii=False))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    said = f"cleaned: {', '.join(chosen)}" if chosen else "not cleaned; --clean a,b,c shows what its switches do"
    console.print(f"{escape(data)}: captions {said}", highlight=False)
    console.print(_counts(found))
    for name, facts in found.items():
        if facts["removed"]:
            taken = ", ".join(f"{word} {times}" for word, times in facts["removed"])
            console.print(Text(f"{name}, taken away or changed most often: {taken}"))
        if facts["captions"]:
            console.print(_example_table(name, facts["examples"]))


def _counts(found: Mapping[str, dict]) -> Table:
    table = Table("", *found, title="captions, before -> after cleaning", title_justify="left")
    for what in ("samples", "without", "several", "captions"):
        label = {"without": "samples without a caption", "several": "samples with several"}.get(what, what)
        table.add_row(label, *(str(facts[what]) for facts in found.values()))
    for label, what in (
        ("empty captions", "empty"),
        ("words", "words"),
        ("words a caption, median", "median"),
        ("words a caption, most", "longest"),
        ("different words", "vocabulary"),
        ("captions that came before", "duplicates"),
    ):
        table.add_row(
            label, *(f"{facts['before'][what]:.12g} -> {facts['after'][what]:.12g}" for facts in found.values())
        )
    return table


def _example_table(name: str, examples: Sequence[Sequence[str]]) -> Table:
    table = Table("before", "after", title=f"examples from {name}", title_justify="left")
    for before, after in examples:
        table.add_row(Text(before), Text(after))
    return table
