"""The report: its numbers against the metrics, hostile names kept as text, one file that loads nothing, refusals."""

import base64
import csv
import hashlib
import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml

from mlc.metrics import multilabel
from mlc.report import compare, page
from mlc.report.runs import open_runs
from shards.console import run
from shards.dataset import load_dataset, open_index

sys.path.insert(0, str(Path(__file__).parent.parent / "shards"))
from packing import encoded, pack_raw, picture, write_raw, write_table
from test_stats_html import HOSTILE, Page


def make_run(folder: Path, data: Path, *, skill: float = 1.0, seed: int = 0, split: str = "val", **settings) -> Path:
    """A folder like a finished and scored run's, without a model in it: the report must not need one."""
    dataset = load_dataset(data)
    index = open_index(dataset, split)
    target = index.targets(np.arange(len(index)))
    logits = skill * (4 * target - 2) + np.random.default_rng(seed).normal(size=target.shape) * 1.5
    logits[::2, :2] = logits[::2, 1::-1]  # a confusion to be found
    scores = 1 / (1 + np.exp(-logits))
    (folder / "predictions").mkdir(parents=True)
    (folder / "best").mkdir()
    with (folder / "predictions" / f"{split}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["ImageID", *dataset.classes])
        writer.writerows([index.image_id(i), *(f"{p:.9g}" for p in scores[i])] for i in range(len(index)))
    (folder / "predictions" / f"{split}.json").write_text(json.dumps({"map": 0.5, "ms_per_sample": 1.5}))
    (folder / "best" / "config.json").write_text(
        json.dumps({"label_names": list(dataset.classes), "mlc": {"data": dataset.fingerprint}})
    )
    (folder / "best" / "thresholds.json").write_text('{"metric": "f1_samples", "global": 0.4, "value": 0.5}')
    lines = [{"step": i, "samples_seen": 8 * i, "epoch": i / 4, "train/loss": 1 / i} for i in range(1, 9)]
    evaluated = {"loss": 0.3, "map": 0.5, "f1_samples@tuned": 0.6}
    averaged = {"loss": 0.2, "f1_samples@tuned": 0.5}
    for line in lines[3::4]:
        for weights, values in (("val", evaluated), ("val_ema", averaged)):
            line |= {f"{weights}/{name}": value for name, value in values.items()}
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = {"data": [str(data)], "eval_metric": "f1_samples@tuned", "train_split": "train", "lr": 0.1, "seed": seed}
    (folder / "args.yaml").write_text(yaml.safe_dump(told | settings))
    return folder


def report_of(*argv, verb=page) -> tuple[str, Page]:
    out = Path(argv[0]).parent / "report.html"
    assert run(verb.main, [*map(str, argv), "--out", str(out), "--bootstrap", "40", "--maps", "0"]) == 0
    text = out.read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def pair(shards, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    plain = make_run(folder / "plain", shards)
    return [plain, make_run(folder / "better", shards, skill=2.0, seed=1, mixup=0.4)]


@pytest.fixture(scope="module")
def one(pair):
    return report_of(pair[0])


@pytest.fixture(scope="module")
def both(pair):
    return report_of(*pair)


@pytest.mark.parametrize("made", ["one", "both"])
def test_one_file_that_loads_nothing(made, request):
    text, found = request.getfixturevalue(made)
    own = re.sub(r"data:image/jpeg;base64,[\w+/=]*", "", text)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", own)
    for tag, attributes in found.tags:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    policy = next(meta["content"] for meta in found.all("meta") if "http-equiv" in meta)
    digest = base64.b64encode(hashlib.sha256(found.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy and len(found.scripts) == 1
    assert len(text) < 3_000_000


@pytest.mark.parametrize("made", ["one", "both"])
def test_everybody_can_read_it(made, request):
    _, found = request.getfixturevalue(made)
    assert found.all("img") and all(image["alt"] for image in found.all("img"))
    assert all(svg["aria-label"] and svg["role"] == "img" for svg in found.all("svg"))
    assert len(found.all("caption")) == len(found.all("table"))
    assert all(heading.get("scope") in ("col", "row") for heading in found.all("th"))
    levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in found.all("a")} <= set(ids)
    assert found.all("a")[0]["class"] == "skip" and found.all("html")[0]["lang"] == "en"


def truth(shards) -> tuple[np.ndarray, list[str]]:
    dataset = load_dataset(shards)
    index = open_index(dataset, "val")
    return index.targets(np.arange(len(index))) > 0.5, list(dataset.classes)


def scores_of(folder: Path) -> np.ndarray:
    with (folder / "predictions" / "val.csv").open(newline="") as file:
        return np.array([row[1:] for row in list(csv.reader(file))[1:]], np.float32)


def test_numbers_are_those_of_the_metrics(one, pair, shards):
    _, found = one
    target, classes = truth(shards)
    scores = scores_of(pair[0])
    rows = {row[0]: row[1] for table in found.tables if table[0][0] == "metric" for row in table[1:]}
    for title, value in (
        ("F1 over samples", multilabel.f1_samples(scores > 0.4, target)),
        ("F1 macro", multilabel.f1_macro(scores > 0.4, target)),
        ("mAP", multilabel.mean_average_precision(scores, target)),
    ):
        assert rows[title].startswith(f"{value:.4f}"), title
        low, high = re.findall(r"\d\.\d{4}", rows[title])[1:]
        assert float(low) <= value <= float(high)
    shown = {row[0]: row for row in found.table("class", "group")}
    assert set(shown) == set(classes)
    for column, name in enumerate(classes):
        assert int(shown[name][2].replace(",", "")) == target[:, column].sum()
        assert int(shown[name][7]) == (scores[:, column] > 0.4).sum() and shown[name][8] == "0.400"


def test_confusions_are_counted(one, pair, shards):
    _, found = one
    target, classes = truth(shards)
    said = scores_of(pair[0]) > 0.4
    pairs = found.table("missed", "predicted instead")
    assert set(classes[:2]) <= {name for row in pairs[:3] for name in row[:2]}
    for missed, wrong, images, of, _ in pairs:
        a, b = classes.index(missed), classes.index(wrong)
        gone = target[:, a] & ~said[:, a]
        assert int(of) == gone.sum() and int(images) == (gone & said[:, b] & ~target[:, b]).sum()


def test_runs_are_compared(both, pair):
    text, found = both
    heads = [table[0] for table in found.tables]
    assert ["metric", "plain", "better"] in heads and ["setting", "plain", "better"] in heads
    differ = {row[0]: row[1:] for row in found.table("setting", "plain")}
    assert differ == {"mixup": ["–", "0.4"], "seed": ["0", "1"]}
    verdicts = {row[0]: row[3] for row in found.table("metric", "difference")}
    assert verdicts["F1 over samples"] == verdicts["mAP"] == "better"
    heads = found.table("class", "group")
    header = next(table[0] for table in found.tables if table[0][0] == "class")
    assert header[3:7] == ["AP plain", "AP better", "F1 plain", "F1 better"] and header[-1] == "threshold better"
    assert all(len(row) == len(header) for row in heads)
    assert "Validation loss; dashed: averaged weights." in text


def test_compare_prints_and_writes_the_same_page(pair, capsys, both):
    text, _ = report_of(*pair, verb=compare)
    out = capsys.readouterr().out
    assert "mixup" in out and "0.5000" in out and "prediction, ms" in out
    assert text == both[0]
    assert run(compare.main, [*map(str, pair), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["mixup"] == ["-", "0.4"]


def chart(text: str, begin: str) -> str:
    """The SVG of the figure whose title begins so."""
    return text[text.index(f"<figcaption>{begin}") :].split("<svg", 1)[1].split("</svg>", 1)[0]


def test_a_run_has_one_colour_and_its_averaged_weights_are_dashed(both):
    drawn = re.findall(
        r'<path[^>]*style="fill: none; ([^"]*var\(--series-(\d)\)[^"]*)"', chart(both[0], "Validation loss")
    )
    assert [(int(color), "dasharray" in style) for style, color in drawn] == [(1, 0), (1, 1), (2, 0), (2, 1)]


def test_what_was_measured_once_is_a_number_and_no_chart(tmp_path, shards):
    made = make_run(tmp_path / "run", shards)
    lines = [json.loads(line) for line in (made / "log.jsonl").read_text().splitlines()]
    once = [line if line["step"] == 8 else {k: v for k, v in line.items() if k[:3] != "val"} for line in lines]
    (made / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in once))
    text, found = report_of(made)
    rows = {row[0]: row[1] for table in found.tables for row in table[1:]}
    assert rows["Validation loss"] == "0.3000, 0.2000 (averaged weights)" and rows["Validation mAP"] == "0.5000"
    assert "<figcaption>Training loss" in text and "<figcaption>Validation" not in text


def test_losses_of_different_kinds_say_so(pair, shards, tmp_path):
    text = report_of(make_run(tmp_path / "a", shards, loss="bce"), make_run(tmp_path / "b", shards, loss="asl"))[0]
    assert "Validation loss, of different kinds (asl, bce): not to be compared" in text


def tuned(run_folder: Path, shards: Path) -> dict:
    from mlc import tune

    assert run(tune.main, ["--run", str(run_folder), "--data", str(shards), "--min-positives", "2"]) == 0
    return json.loads((run_folder / "best" / "thresholds.json").read_text())


def test_the_honest_value_of_a_tuned_rule_stands_beside_the_other(tmp_path, shards):
    made = make_run(tmp_path / "run", shards)
    assert "tuned on these very images" not in report_of(made)[0]  # 0.5 is not what its threshold gives here
    written = tuned(made, shards)
    curves = json.loads((made / "best" / "thresholds-curves.json").read_text())
    text, found = report_of(made)
    assert f"<strong>{written['honest']:.4f} on images left out of the tuning</strong>" in text
    assert f"f1_samples is {written['value']:.4f} here, where it was tuned" in text
    rows = {row[0].removesuffix(" (chosen)"): row[1:3] for row in found.table("rule", "honest")}
    assert rows == {n: [f"{own['honest']:.4f}", f"{own['in_sample']:.4f}"] for n, own in curves["rules"].items()}
    assert f'<strong><span class="name">{curves["chosen"]}</span></strong>' in text
    tops = {group: max(curve["value"]) for group, curve in curves["groups"].items()}
    label = re.search(r'aria-label="(f1_samples by threshold[^"]*)"', text)[1]
    assert [float(top) for top in re.findall(r"(\d\.\d{3}) at", label)][:-1] == [round(top, 3) for top in tops.values()]
    written["value"] += 0.1  # trained on since: the curves are of another rule
    (made / "best" / "thresholds.json").write_text(json.dumps(written))
    text, found = report_of(made)
    assert "where it was tuned, " in text and not [table for table in found.tables if table[0][0] == "rule"]


def test_what_it_took(tmp_path, shards):
    made = make_run(tmp_path / "run", shards)
    lines = [{"step": n, "samples_seen": n, "epoch": n, "train/img_per_sec": rate} for n, rate in ((30, 1), (90, 0.5))]
    (made / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (made / "environment.json").write_text(json.dumps({"torch": "9.9", "processes": 4}))
    rows = {row[0]: row[1] for table in report_of(made)[1].tables for row in table[1:] if len(row) == 2}
    assert rows["minutes"] == "2.5" and rows["torch"] == "9.9" and rows["processes"] == "4"
    (made / "environment.json").write_text("{")
    assert open_runs([str(made)], "val")[0].environment == {}


def test_a_setting_that_is_not_set_does_not_differ_from_one_that_is_not_there(tmp_path, shards):
    made = [make_run(tmp_path / "a", shards), make_run(tmp_path / "b", shards, load="", kd=None, args={}, drop=0.0)]
    assert [row[0] for row in report_of(*made)[1].table("setting", "a")] == ["drop"]


def test_a_run_that_was_not_scored_is_compared_by_its_log(pair, tmp_path, shards, capsys):
    other = make_run(tmp_path / "other", shards)
    (other / "predictions" / "val.json").unlink()
    assert run(compare.main, [str(pair[0]), str(other)]) == 0
    out = capsys.readouterr().out
    assert "not scored" in out and "0.6000" in out


def test_hostile_text_stays_text(tmp_path):
    raw = tmp_path / "raw"
    (raw / "images").mkdir(parents=True)
    names = [f"<img src=x onerror=alert({i})>.jpg" for i in range(8)]
    for i, name in enumerate(names):
        (raw / "images" / name).write_bytes(encoded(picture(i)))
    rows = [[name, HOSTILE if i % 2 else "x", HOSTILE] for i, name in enumerate(names)]
    write_table(raw / "train.csv", ["ImageID", "Labels", "Caption"], rows)
    (raw / "classes.yaml").write_text(json.dumps({"classes": [HOSTILE, "x", "$y$"], "groups": {"_$g$<b>": ["x"]}}))
    assert pack_raw(raw, tmp_path / "data", "--label-separator", "|") == 0
    made = make_run(tmp_path / "<b>run", tmp_path / "data", skill=0.3, split="train", where=HOSTILE, experiment="<i>")
    text, found = report_of(made, "--split", "train")
    assert len(found.scripts) == 1 and "alert" not in found.scripts[0]
    assert "<script>alert" not in text and "<img src=x" not in text and "<b>run" not in text
    assert all(image["src"].startswith("data:image/jpeg;base64,") for image in found.all("img"))
    assert not [attribute for _, attributes in found.tags for attribute in attributes if attribute.startswith("on")]
    assert any("onerror" in image["alt"] for image in found.all("img"))
    assert any(HOSTILE in cell for table in found.tables for row in table for cell in row)


def test_only_https_becomes_a_link(tmp_path, shards):
    made = make_run(tmp_path / "run", shards)
    (made / "wandb_url").write_text("javascript:alert(1)")
    assert open_runs([str(made)], "val")[0].wandb == ""
    (made / "wandb_url").write_text("https://example.org/run/1\n")
    assert report_of(made)[1].all("a")[-1] == {"href": "https://example.org/run/1", "rel": "noreferrer"}


def test_secrets_in_settings_stay_out(tmp_path, shards):
    made = make_run(tmp_path / "run", shards, cache_dir="https://user:geheim@example.org/data?token=geheim2")
    assert "geheim" not in report_of(made)[0]


def test_too_large_is_refused(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "MOST_BYTES", 20_000)
    assert run(page.main, [str(pair[0]), "--out", str(tmp_path / "r.html"), "--bootstrap", "20", "--maps", "0"]) == 2
    assert "name fewer runs" in capsys.readouterr().err and not (tmp_path / "r.html").exists()


def refused(capsys, *argv, verb=page) -> str:
    assert run(verb.main, [*map(str, argv)]) == 2
    found = capsys.readouterr().err
    assert found.startswith("error: ") and found.count("\n") == 1
    return found


def test_mistakes(pair, shards, tmp_path, capsys):
    out = ["--out", tmp_path / "r.html"]
    assert "no such folder" in refused(capsys, tmp_path / "nowhere", *out)
    assert "is no run" in refused(capsys, shards, *out)
    assert "is a folder" in refused(capsys, pair[0], "--out", tmp_path)
    assert "same run twice" in refused(capsys, pair[0], pair[0], *out)
    assert "at least two runs" in refused(capsys, pair[0], verb=compare)
    unscored = make_run(tmp_path / "unscored", shards)
    (unscored / "predictions" / "val.csv").unlink()
    assert f"mlc eval --run {unscored} --data {shards} --split val" in refused(capsys, unscored, *out)
    assert "has not been scored on test" in refused(capsys, pair[0], "--split", "test", *out)
    assert "no data set at" in refused(capsys, pair[0], "--data", tmp_path / "gone", *out)
    moved = make_run(tmp_path / "moved", shards)
    (moved / "args.yaml").write_text("data: [/gone]\n")
    assert "with --data" in refused(capsys, moved, *out)
    fewer = make_run(tmp_path / "fewer", shards)
    lines = (fewer / "predictions" / "val.csv").read_text().splitlines(keepends=True)
    (fewer / "predictions" / "val.csv").write_text("".join(lines[:-3]))
    assert "no row for 3 of the" in refused(capsys, pair[0], fewer, *out)
    others = make_run(tmp_path / "others", shards)
    (others / "best" / "config.json").write_text(json.dumps({"label_names": ["cat"]}))
    assert "has other classes" in refused(capsys, pair[0], others, *out)
    (others / "args.yaml").write_text("{")
    assert "cannot be read as a run" in refused(capsys, others, *out)


def test_a_run_scored_on_some_of_the_images(shards, tmp_path, capsys):
    fewer = make_run(tmp_path / "fewer", shards)
    lines = (fewer / "predictions" / "val.csv").read_text().splitlines(keepends=True)
    (fewer / "predictions" / "val.csv").write_text("".join([lines[0], *lines[:4:-1]]))
    assert f"{len(lines) - 5} images" in report_of(fewer)[0]


def test_what_has_no_value_is_a_dash(tmp_path, capsys):
    """A split of which no image has a label: no average precision, no reliability, nothing to miss."""
    raw = write_raw(tmp_path / "raw")
    write_table(raw / "val.csv", ["ImageID", "Labels"], [["10.jpg", ""], ["11.jpg", ""]])
    lines = (raw / "train.csv").read_text().splitlines()
    (raw / "train.csv").write_text("\n".join(lines[:11]) + "\n")
    assert pack_raw(raw, tmp_path / "data", "--val-csv", raw / "val.csv") == 0
    runs = [make_run(tmp_path / name, tmp_path / "data", seed=seed) for seed, name in enumerate(("a", "b"))]
    text, found = report_of(*runs, verb=compare)
    rows = {row[0]: row[1:] for table in found.tables if table[0][0] == "metric" for row in table[1:]}
    assert rows["mAP"][0] == "–" and not re.search(r"\bnan\b", text + capsys.readouterr().out, re.IGNORECASE)
