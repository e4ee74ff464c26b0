"""`mlc stats --html`: a page to look at before a week of training, for counts do not show that test leaks into train.

The page is one file: thumbnails, charts, style and the few lines of script are in it, it loads nothing, and it opens
from a disk, a mail or a cluster's web view. Names and captions come from outside: jinja escapes them all,
and the page's own content security policy allows no script but the one whose hash it names.
"""

import base64
import hashlib
import os
import re
from pathlib import Path

from jinja2 import BaseLoader, ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from shards import stats_sections as sections
from shards.console import UserError, say
from shards.dataset import Dataset, open_index
from shards.duplicates import find_copies
from shards.files import replacing
from shards.pictures import survey, thumbnails
from shards.stats import overview

TOP = 60  # classes shown before a fold-out
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]+")  # also marks that turn text around


def check_target(path: Path) -> None:
    """Raises UserError where the page could not be written, before an hour is spent on it."""
    if path.is_dir():
        raise UserError(f"--html {path} is a folder; name a file, such as {path / 'stats.html'}")
    if not path.parent.is_dir():
        raise UserError(f"--html {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--html {path}: the folder {path.parent} cannot be written; name another")


def write_page(dataset: Dataset, found: dict[str, dict], out: Path, *, most: int, workers: int) -> None:
    """Writes the page to `out` in one step.

    Args:
        found: `stats.split_stats` of every split that the page is about.
        most: pictures that are opened; of more, as many evenly spread.
    """
    indexes = {name: open_index(dataset, name) for name in found}
    pictures = survey(indexes, most=most, workers=workers)
    copies = find_copies(pictures)
    chosen = sections.class_samples(dataset, indexes)
    wanted = [(split, row) for _, split, row in chosen] + sections.copies_shown(pictures, copies)
    data = sections.Data(dataset, found, indexes, pictures, thumbnails(indexes, wanted, workers=workers))
    page = render(
        title=Path(dataset.root).resolve().name,
        fingerprint=dataset.fingerprint,
        splits=list(found),
        overview=[(label, cells) for label, cells in overview(found) if set(cells) != {"-"}],
        warnings=sections.warnings(data, copies),
        leaks=sections.copies(data, [group for group in copies if group.leak]),
        repeats=sections.copies(data, [group for group in copies if not group.leak]),
        classes=sections.classes(data),
        together=sections.together(data),
        captions=sections.captions(data),
        sizes=sections.sizes(data),
        problems=sections.problems(data),
        samples=sections.samples(data, chosen),
        looked=len(pictures),
        total=pictures.total,
    )
    with replacing(out) as temporary:
        temporary.write_bytes(page)
    say(f"page: {out} ({len(page) / 1e6:.1f} MB)")


def render(template: str = "stats.html.j2", *folders: BaseLoader, **context) -> bytes:
    """The page as UTF-8; a name the template uses and the context lacks is an error.

    folders: where else than here to look for the template, and for a `.css` of its name that comes after ours.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("shards", "page"), *folders]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "percent": percent, "thousands": "{:,}".format}
    names = dict.fromkeys(["stats.js", "stats.css", template.replace(".html.j2", ".css")])
    script, *styles = (environment.loader.get_source(environment, name)[0] for name in names)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = Markup("\n".join(styles))
    page = environment.get_template(template)
    text = page.render(context, script=Markup(script), style=style, script_sha256=digest, TOP=TOP)
    return text.encode("utf-8", "replace")


def short(text: str, most: int = 100) -> str:
    """A name from outside on one line, without characters that turn or hide text, at most `most` characters."""
    clean = CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
    return clean if len(clean) <= most else clean[: most - 1] + "…"


def percent(share: float) -> str:
    """0.1234 -> 12.3 %; a share below a thousandth keeps two digits."""
    return f"{100 * share:.2g} %" if 0 < share < 0.001 else f"{100 * share:.1f} %"
