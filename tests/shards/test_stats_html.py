"""The page: its numbers against plain counts over the CSV, hostile text kept as text, one file that loads nothing."""

import base64
import csv
import hashlib
import json
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise, permutations

import numpy as np
import pytest
from packing import encoded, pack_raw, picture, write_raw, write_table
from test_duplicates import crop

from shards import stats, stats_facts, stats_sections
from shards.console import run
from shards.dataset import load_dataset, open_index
from shards.stats_html import percent, short

VOID = {"meta", "link", "img", "br", "input", "path", "use", "rect"}
HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>&\"'"


class Page(HTMLParser):
    """Elements and tables of a page; a tag that is not closed in order fails at once."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.tables, self.scripts, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag == "script":
            self.scripts.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}>"

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts[-1] += data
            return
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    def table(self, *head: str) -> list[list[str]]:
        """Body of the first table whose heading begins so."""
        return next(rows[1:] for rows in self.tables if rows[0][: len(head)] == list(head))


def page_of(data, *flags) -> tuple[str, Page]:
    out = data.parent / "page.html"
    assert run(stats.main, [str(data), "--html", str(out), "-j", "1", *map(str, flags)]) == 0
    text = out.read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def made(shards):
    return page_of(shards)


def demo_labels(path) -> list[list[str]]:
    with path.open(newline="") as file:
        return [row["Labels"].split() for row in csv.DictReader(file)]


def test_one_file_that_loads_nothing(made):
    text, page = made
    own = re.sub(r"data:image/jpeg;base64,[\w+/=]*", "", text)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", own)
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    assert len(text) < 3_000_000


def test_the_policy_allows_our_script_and_no_other(made):
    _, page = made
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert len(page.scripts) == 1
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_everybody_can_read_it(made):
    _, page = made
    assert all(image["alt"] for image in page.all("img"))
    assert all(svg["aria-label"] and svg["role"] == "img" for svg in page.all("svg"))
    assert len(page.all("caption")) == len(page.all("table"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = {link["href"][1:] for link in page.all("a")}
    assert anchors <= set(ids)


def test_class_counts(made, shards, demo_csv):
    _, page = made
    dataset = load_dataset(shards)
    rows = {split: open_index(dataset, split) for split in ("train", "val")}
    names = {split: {index.image_id(i) for i in range(len(index))} for split, index in rows.items()}
    with (demo_csv / "train.csv").open(newline="") as file:
        samples = list(csv.DictReader(file))
    counts = {
        split: Counter(label for row in samples if row["ImageID"] in ids for label in row["Labels"].split())
        for split, ids in names.items()
    }
    shown = [row for table in page.tables if table[0][:3] == ["class", "train", "val"] for row in table[1:]]
    assert {row[0] for row in shown} == set(dataset.classes)
    for name, train, val, share in shown:
        assert (int(train), int(val)) == (counts["train"][name], counts["val"][name])
        assert share == percent(counts["train"][name] / len(names["train"]))
    for members in dataset.groups.values():
        order = [counts["train"][row[0]] for row in shown if row[0] in members]
        assert order == sorted(order, reverse=True)


def test_labels_together(shards):
    dataset = load_dataset(shards)
    index = open_index(dataset, "train")
    labels = [index.labels(row).tolist() for row in range(len(index))]
    both = Counter(pair for row in labels for pair in permutations(row, 2))
    single = Counter(column for row in labels for column in row)
    matrix = stats_facts.label_matrix(index)
    found = stats_facts.together(matrix).toarray()
    wanted = np.zeros_like(found)
    for (one, other), count in both.items():
        wanted[one, other] = count
    assert (found == wanted + np.diag([single[column] for column in range(len(dataset.classes))])).all()
    lonely = Counter(row[0] for row in labels if len(row) == 1)
    assert stats_facts.alone(matrix).tolist() == [lonely[column] for column in range(len(dataset.classes))]
    some = [column for column in single if single[column]][:5]
    shares = stats_facts.shares(stats_facts.together(matrix), some)
    assert shares[1, 3] == pytest.approx((both[some[1], some[3]]) / single[some[1]])
    pairs = stats_facts.strongest_pairs(stats_facts.together(matrix), len(index), dataset.classes, 5)
    best = pairs[0]
    one, other = dataset.classes.index(best.one), dataset.classes.index(best.other)
    assert best.images == both[one, other]
    assert best.times_chance == pytest.approx(both[one, other] * len(index) / single[one] / single[other])
    surprise = [
        (pair.images - pair.images / pair.times_chance) / (pair.images / pair.times_chance) ** 0.5 for pair in pairs
    ]
    assert surprise == sorted(surprise, reverse=True)


def test_heat_map_shows_the_shares(made, shards):
    _, page = made
    index = open_index(load_dataset(shards), "train")
    targets = index.targets(np.arange(len(index)))
    table = next(rows for rows in page.tables if rows[0][-1] == "no other label")
    classes = list(load_dataset(shards).classes)
    columns = [classes.index(name) for name in table[0][1:-1]]
    for row, one in zip(table[1:], columns, strict=True):
        for cell, other in zip(row[1:-1], columns, strict=True):
            share = targets[targets[:, one] > 0][:, other].mean()
            assert cell == ("–" if one == other else "" if share == 0 else f"{100 * share:.0f}")


def test_cleaning_of_captions():
    assert stats_facts.clean_words("A Red-brick  PALACE, and it's the old man's house!") == [
        "red", "brick", "palace", "old", "man's", "house"
    ]  # fmt: skip
    assert stats_facts.clean_words("is it the one?") == []
    assert stats_facts.clean_words("Ünïcode_naïve 12 — 日本") == ["ünïcode", "naïve", "12", "日本"]


def test_caption_lengths(made, demo_csv):
    _, page = made
    with (demo_csv / "test.csv").open(newline="") as file:
        captions = [row["Caption"] for row in csv.DictReader(file) if row["Caption"]]
    before = [len(caption.split()) for caption in captions]
    after = [len(stats_facts.clean_words(caption)) for caption in captions]
    row = next(row for row in page.table("split", "captions") if row[0] == "test")
    wanted = [len(captions), np.median(before), np.median(after), max(before), max(after), after.count(0)]
    assert [float(cell) for cell in row[1:]] == wanted


def test_sizes(made, shards):
    _, page = made
    rows = {row[0]: row[1:] for row in page.table("split", "pictures")}
    assert int(rows["train"][0]) == len(open_index(load_dataset(shards), "train"))
    assert all(re.fullmatch(r"\d+ × \d+", cell) for cell in rows["test"][1:4])


def test_hostile_text_stays_text(tmp_path):
    raw = tmp_path / "raw"
    (raw / "images").mkdir(parents=True)
    name = "<img src=x onerror=alert(1)>.jpg"
    (raw / "images" / name).write_bytes(encoded(picture(1)))
    (raw / "images" / "b.jpg").write_bytes(encoded(picture(1), quality=60))
    write_table(raw / "train.csv", ["ImageID", "Labels", "Caption"], [[name, HOSTILE, HOSTILE], ["b.jpg", "x|$y$", ""]])
    (raw / "classes.yaml").write_text(json.dumps({"classes": [HOSTILE, "x", "$y$"], "groups": {"_$g$<b>": ["x"]}}))
    assert pack_raw(raw, tmp_path / "out", "--label-separator", "|") == 0
    text, page = page_of(tmp_path / "out")
    assert len(page.scripts) == 1 and "alert" not in page.scripts[0]
    assert "<script>alert" not in text and "<img src=x" not in text
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert not [attribute for _, attributes in page.tags for attribute in attributes if attribute.startswith("on")]
    assert any(HOSTILE in cell for table in page.tables for row in table for cell in row)
    assert any(HOSTILE in image["alt"] for image in page.all("img"))


def test_names_are_cut_and_stripped_of_what_hides_text():
    assert short("a\u202egpj.exe\x00\n b") == "a\ufffdgpj.exe\ufffd b"
    assert short("x" * 300) == "x" * 99 + "…"
    assert [percent(share) for share in (0, 1, 0.1234, 0.00012)] == ["0.0 %", "100.0 %", "12.3 %", "0.012 %"]


def test_a_thousand_classes(tmp_path):
    raw = write_raw(tmp_path / "raw", samples=40)
    labels = [[f"{i}.jpg", " ".join(f"class-{c}" for c in range(i, 1000, 40))] for i in range(40)]
    write_table(raw / "train.csv", ["ImageID", "Labels"], labels)
    assert pack_raw(raw, tmp_path / "out") == 0
    text, page = page_of(tmp_path / "out")
    assert len(page.table("class", "train")) == 1000
    assert [table["data-top"] for table in page.all("table") if "data-top" in table] == ["60"]
    assert "940 rarer classes" in text
    heat = next(rows for rows in page.tables if rows[0][-1:] == ["no other label"])
    assert len(heat) == 1 + stats_sections.HEAT
    assert len(text) < 10_000_000


def test_thumbnails_keep_within_their_room(shards, monkeypatch):
    monkeypatch.setattr(stats_sections, "THUMB_BYTES", 40_000)
    text, page = page_of(shards)
    sizes = [len(image["src"]) for image in page.all("img")]
    assert 30_000 < sum(sizes) <= 40_000
    assert "no picture" in text


def test_leaks_are_shown_side_by_side(tmp_path):
    raw = write_raw(tmp_path / "raw", samples=8, test=3)
    (raw / "images" / "5.jpg").write_bytes(encoded(crop(5)))
    (raw / "images" / "t1.jpg").write_bytes(encoded(crop(5).resize((120, 90)), quality=60))
    (raw / "images" / "3.jpg").write_bytes((raw / "images" / "2.jpg").read_bytes())
    assert pack_raw(raw, tmp_path / "out", "--test-csv", raw / "test.csv") == 0
    _, page = page_of(tmp_path / "out")
    words = " ".join("".join(page.text).split())
    assert "1 picture in more than one split (train and test: 1)." in words
    assert "1 picture more than once in the same split." in words
    leak = [row[1:3] for row in page.table("group", "split")]
    assert leak == [["train", "5.jpg"], ["test", "t1.jpg"]]
    assert [image["alt"].split(",")[0] for image in page.all("img")[:2]] == ["5.jpg (train)", "t1.jpg (test): test 1"]


def test_broken_pictures_are_listed(tmp_path):
    raw = write_raw(tmp_path / "raw", samples=5)
    assert pack_raw(raw, tmp_path / "out") == 0
    index = open_index(load_dataset(tmp_path / "out"), "train")
    with index.shard_path(0).open("r+b") as file:
        for row in range(5):
            file.seek(index.offset[row])
            file.write(b"\0" * 40)
    _, page = page_of(tmp_path / "out")
    assert [row[1] for row in page.table("split", "image")] == [f"{i}.jpg" for i in range(5)]
    assert "No picture could be opened." in "".join(page.text)


def test_without_labels_and_captions(tmp_path):
    raw = write_raw(tmp_path / "raw", samples=4, test=3)
    write_table(raw / "test.csv", ["ImageID"], [[f"t{i}.jpg"] for i in range(3)])
    assert pack_raw(raw, tmp_path / "out", "--test-csv", raw / "test.csv") == 0
    _, page = page_of(tmp_path / "out", "--split", "test")
    words = "".join(page.text)
    for sentence in ("Nothing stands out", "No split has labels.", "No sample has a caption.", "one split only"):
        assert sentence in words


def test_the_same_page_from_several_processes(shards, made):
    assert page_of(shards, "-j", "2")[0] == made[0]


def test_the_file_is_refused_before_the_work(shards, tmp_path, capsys):
    for out, problem in ((tmp_path, "is a folder; name a file"), (tmp_path / "no" / "x.html", "there is no folder")):
        assert run(stats.main, [str(shards), "--html", str(out)]) == 2
        assert problem in capsys.readouterr().err
    with pytest.raises(SystemExit):
        stats.main([str(shards), "--html", "x.html", "--most-images", "0"])
