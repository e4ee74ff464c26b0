"""Captions through the whole story: trained, stopped and resumed, evaluated, exported, predicted with, a teacher."""

import csv
import json
import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from caption_runs import BIGRU, NO_DROPOUT, argv, hub_folder, same, table, weights
from conftest import log_of
from tiny_text import tiny
from torch.nn.modules.module import register_module_forward_hook

from mlc import ckpt, evaluate, predict, published, soup, train
from mlc.captions import open_reading, refuse_untrainable
from mlc.config import Config
from mlc.data.batch import prepare, train_transform
from mlc.data.dataset import EvalDataset, TrainDataset
from mlc.data.reader import TarReader
from mlc.data.sources import open_sources
from mlc.data.text import load_tokenizer
from mlc.data.transforms import EvalTransform, normalize
from mlc.flags import read_config
from mlc.models.export import load_exported
from mlc.models.fusion import FUSIONS, Fused
from mlc.models.text import build_text_model
from mlc.optim.losses import bce
from mlc.parallel import launch
from mlc.parallel.recompute import recompute
from mlc.setup import model_of, optimizer_of
from shards import pack
from shards.captions import most_captions, split_captions
from shards.console import UserError
from shards.dataset import load_dataset, open_index


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    return hub_folder("bert-uncased", tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize("text", ["bert", "bigru"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_trains_evaluates_and_predicts(shards, tmp_path, bert, fusion, text):
    told = BIGRU if text == "bigru" else ["--text-model", str(bert)]
    assert train.main(argv(shards, tmp_path, fusion, *told)) == 0
    run = tmp_path / "run"
    assert all(np.isfinite(line["train/loss"]) for line in log_of(run) if "train/loss" in line)
    best = json.loads((run / "best" / "config.json").read_text())
    assert best["mlc"]["fusion"] == fusion and (run / "best" / "text" / "config.json").is_file()
    data = ["--run", str(run), "--data", str(shards), "-j", "0", "-b", "8"]
    evaluate.main([*data, "--json"])
    found = json.loads((run / "predictions" / "val.json").read_text())
    logged = [line for line in log_of(run) if "val/loss" in line][-1]
    which = max(("val", "val_ema"), key=lambda name: logged[f"{name}/f1_samples"])
    assert found["map"] == pytest.approx(logged[f"{which}/map"], abs=1e-6)
    ckpt.main(["export", str(run), str(tmp_path / "out"), "--ema"])
    assert same(weights(tmp_path / "out"), weights(run / "last"))
    predict.main([*data, "--split", "test"])
    predict.main(["--run", str(tmp_path / "out"), *data[2:], "--split", "test", "--out", str(tmp_path / "other")])
    assert table(run / "predictions" / "test.csv").shape == table(tmp_path / "other" / "test.csv").shape


# ---- the loss --------------------------------------------------------------------------------------------------------


EXACT = ["--drop-path", "0", "--no-model-ema", "--max-steps", "1", "--seed", "3"]


def first_batch(flags: list[str]):
    """(settings, how captions are read, the model as it begins, image, target, batch, mix) of a run's first step."""
    config = read_config(flags)
    sources = open_sources(config)
    reading = open_reading(config, sources, None, Path("nowhere"))
    torch.manual_seed(config.seed)
    launch.seed_everything(config.seed)
    model = model_of(config, sources, reading, published=True)
    norm = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    stream = TrainDataset(
        sources.sampler,
        sources.readers,
        train_transform(config, norm[0]),
        config.seed,
        captions=reading.training(config, sources),
        images=config.fusion != "none",
    )
    batch = stream.__getitems__(range(8))
    return config, reading, model, *prepare(batch, config, *norm, mixing=True), batch


def alone(model, reading, batch, place: int) -> torch.Tensor:
    """A caption's pooled features, by the encoder itself and without padding."""
    tokens = batch["tokens"][place][batch["token_mask"][place]]
    if tokens.tolist() == reading.empty:
        return model.text.no_caption
    return model.text.encoder(tokens[None], torch.ones_like(tokens[None], dtype=torch.bool))[1][0]


@pytest.mark.parametrize("mixing", ["embeddings", "off"])
@pytest.mark.parametrize("fusion", ["none", "concat", "gated"])
def test_the_logged_loss_is_that_of_the_parts(shards, tmp_path, bert, fusion, mixing):
    more = ["--text-model", str(bert), *NO_DROPOUT, "--mix-captions", mixing, *EXACT, "--caption-dropout", "0.3"]
    flags = argv(shards, tmp_path, fusion, *more)
    _, reading, model, image, target, mix, batch = first_batch(flags)
    texts = [alone(model, reading, batch, place) for place in range(8)]
    assert any(x is model.text.no_caption for x in texts) and (mix.lam < 1).any()
    if mixing == "embeddings":
        share = mix.lam.tolist()
        texts = [share[n] * texts[n] + (1 - share[n]) * texts[n ^ 1] for n in range(8)]
    x = torch.stack(texts)
    if fusion == "none":
        assert image is None
        logits = model.text.classifier(x)
    elif fusion == "concat":
        logits = model.fusion.linear(torch.cat([model.image(image), model.text.classifier(x)], 1))
    else:
        logits = model.fusion(model.image(image), x)
    train.main(flags)
    assert log_of(tmp_path / "run")[0]["train/loss"] == pytest.approx(bce(logits, target).mean().item(), rel=2e-5)


def test_joined_captions_are_one_text(shards, tmp_path, bert):
    more = ["--text-model", str(bert), *NO_DROPOUT, "--mix-captions", "join", *EXACT, "--text-pool", "mean"]
    flags = argv(shards, tmp_path, "concat", *more)
    _, _, model, image, target, mix, batch = first_batch(flags)
    rows = [tokens[mask].tolist() for tokens, mask in zip(batch["tokens"], batch["token_mask"], strict=True)]
    joined = [rows[n] + (rows[n ^ 1][1:] if mix.lam[n] < 1 else []) for n in range(8)]
    features = [
        model.text.encoder(torch.tensor([row]), torch.ones(1, len(row), dtype=torch.bool))[1][0] for row in joined
    ]
    logits = model.fusion(model.image(image), model.text.classifier(torch.stack(features)))
    train.main(flags)
    assert log_of(tmp_path / "run")[0]["train/loss"] == pytest.approx(bce(logits, target).mean().item(), rel=2e-5)


# ---- similar lengths together ----------------------------------------------------------------------------------------


def test_similar_lengths_together_change_padding_alone(shards, tmp_path, bert, monkeypatch):
    """The same positions, mixed with the same partners, and the same gradient: by SGD, weights show it."""
    more = ["--text-model", str(bert), *NO_DROPOUT, *EXACT, "--opt", "sgd", "--lr", "0.1", "--caption-dropout", "0.2"]
    more += ["-b", "4", "--global-batch-size", "32"]
    met, found = [], {}
    monkeypatch.setattr(train, "prepare", lambda batch, *told, **how: met.append(batch) or prepare(batch, *told, **how))
    for name, flags in (("plain", []), ("grouped", ["--group-by-length"])):
        met.clear()
        log = tmp_path / f"{name}.jsonl"
        train.main([*argv(shards, tmp_path, "gated", *more, name=name), "--log-samples", str(log), *flags])
        positions = [batch["position"].tolist() for batch in met]
        line = log_of(tmp_path / name)[0]
        found[name] = positions, sum(batch["tokens"].numel() for batch in met), line, log.read_text()
    (plain, padded, then, log), (grouped, less, now, same_log) = found.values()
    assert np.concatenate(plain).tolist() == sorted(np.concatenate(grouped)) == list(range(32)) and plain != grouped
    assert all(pair[0] % 2 == 0 and pair[1] == pair[0] + 1 for own in grouped for pair in (own[:2], own[2:]))
    assert less < 0.9 * padded and log == same_log
    assert now["train/loss"] == pytest.approx(then["train/loss"], rel=1e-5)
    assert now["train/grad_norm"] == pytest.approx(then["train/grad_norm"], rel=1e-4)
    one, other = weights(tmp_path / "plain" / "last"), weights(tmp_path / "grouped" / "last")
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    "fusion, flags, norm",
    [
        ("early", BIGRU, "fusion.image.1"),
        ("gated", ["--text-model", "bigru", "--text-kwargs", "norm=true"], "text.encoder.norm"),
        ("gated", [*BIGRU, "--model", "resnet10t", "--img-size", "64", "--model-kwargs", "in_chans=3"], "image."),
    ],
)
def test_batch_norm_is_not_shown_one_length_at_a_time(shards, tmp_path, fusion, flags, norm):
    flags = argv(shards, tmp_path, fusion, *flags, "--group-by-length")
    with pytest.raises(UserError, match=rf"--group-by-length: batch norm \({norm}"):
        train.main(flags)
    if norm == "image.":  # frozen, they go by what they have learned
        train.main([*flags, "--freeze", "^image"])


# ---- stopped and resumed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, fusion", [("bert", "cross-attention"), ("bert", "none"), ("bigru", "early")])
def test_stopped_and_resumed_is_never_stopped(shards, tmp_path, bert, text, fusion):
    """The tokenizer, the encoder's description and the vocabulary come from the run itself."""
    told = [*BIGRU, "--clean", "lower,punctuation"]
    if text == "bert":
        told = ["--text-model", str(shutil.copytree(bert, tmp_path / "hub"))]
        told += ["--group-by-length", "-b", "4", "--global-batch-size", "12"]
    more = [*told, "--max-steps", "4", "--checkpoint-every", "2st", "--eval-every", "4st", "--splicemix", "0.5"]
    more += ["--word-dropout", "0.2", "--caption-dropout", "0.2", "--resume", "auto"]
    flags = argv(shards, tmp_path / "a", fusion, *more)
    train.main(flags)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    straight = tmp_path / "b" / "run"
    shutil.rmtree(tmp_path / "a" / "run" / "checkpoints" / "step-00000004", ignore_errors=True)
    left = [place.name for place in (tmp_path / "a" / "run" / "checkpoints").iterdir()]
    assert len(left) == 1 and left[0].endswith("2"), left
    shutil.rmtree(tmp_path / "a" / "run" / "last")
    if text == "bert":
        for name in ("vocab.txt", "model.safetensors", "config.json"):
            (tmp_path / "hub" / name).unlink()
    train.main([flag.replace("lower,punctuation", "punctuation,lower") for flag in flags])  # which is the same
    assert same(weights(tmp_path / "a" / "run" / "last"), weights(straight / "last"))
    assert [line["train/loss"] for line in log_of(tmp_path / "a" / "run") if "train/loss" in line] == [
        line["train/loss"] for line in log_of(straight) if "train/loss" in line
    ]


def test_another_text_model_or_vocabulary_is_refused(shards, tmp_path):
    flags = argv(shards, tmp_path, "concat", *BIGRU, "--resume", "auto")
    train.main(flags)
    for more, words in (
        (["--fusion", "bilinear"], "another fusion"),
        (["--clean", "lower"], "another clean"),
        (["--max-tokens", "9"], "another max_tokens"),
    ):
        with pytest.raises(UserError, match=words):
            train.main([*flags, *more])
    path = tmp_path / "run" / "text" / "vocabulary.json"
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | {"words": known["words"][::-1]}))
    with pytest.raises(UserError, match="numbers words in another way"):
        train.main(flags)


# ---- evaluated and predicted -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def several(demo_csv, tmp_path_factory) -> Path:
    """The data with none, one, two or three captions for a sample."""
    folder = tmp_path_factory.mktemp("several")
    with (demo_csv / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows):
        row["Caption"] = "\n".join(rows[number - other]["Caption"] for other in range(number % 4))
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    argv = ["--csv", str(folder / "train.csv"), "--images", str(demo_csv / "images"), "--val-fraction", "0.2"]
    pack.main([*argv, "--out", str(folder / "shards"), "-j", "1"])
    return folder / "shards"


@pytest.mark.parametrize("fusion", ["none", "gated", "late"])
def test_a_prediction_is_the_mean_over_views_and_captions(several, tmp_path, fusion):
    train.main(argv(several, tmp_path, fusion, *BIGRU))
    run = tmp_path / "run"
    flags = ["--run", str(run), "--data", str(several), "--split", "val", "-j", "0", "-b", "7"]
    predict.main([*flags, *(["--tta", "hflip"] if fusion != "none" else [])])
    found = table(run / "predictions" / "val.csv")
    model, info = load_exported(run / "best")
    tokenizer = load_tokenizer(run / "best" / "text")
    index = open_index(load_dataset(several), "val")
    config = info["pretrained_cfg"]
    data = EvalDataset(TarReader(index), EvalTransform(size=32, mean=tuple(config["mean"])))
    assert len(found) == len(index)
    kinds = set()
    for row in range(len(index)):
        captions = split_captions(index.caption(row)) or [""]
        kinds.add(len(captions))
        image = normalize(data.__getitems__([row])["image"], config["mean"], config["std"])
        views = [None] if fusion == "none" else [image, image.flip(-1)]
        with torch.no_grad():
            told = [[torch.from_numpy(part) for part in tokenizer([caption])] for caption in captions]
            each = [model(view, *parts).sigmoid() for view in views for parts in told]
        np.testing.assert_allclose(found[row], torch.stack(each).mean(0)[0], rtol=1e-4, atol=1e-6)
    assert kinds >= {1, 2, 3}


def test_an_image_is_looked_at_once(several, tmp_path):
    """Not once for each of its captions."""
    train.main(argv(several, tmp_path, "gated", *BIGRU))
    calls = Counter()
    hook = register_module_forward_hook(lambda module, *_: calls.update([type(module).__name__]))
    flags = ["--run", str(tmp_path / "run"), "--data", str(several), "--split", "val", "-j", "0", "-b", "7"]
    predict.main([*flags, "--tta", "hflip"])
    hook.remove()
    index = open_index(load_dataset(several), "val")
    blocks, captions = -(-len(index) // 7), most_captions(index)
    assert captions > 2 and (calls["SwinTransformerV2"], calls["BiGru"]) == (2 * blocks, 2 * blocks * captions)


def test_images_without_captions_are_answered(shards, demo_csv, tmp_path):
    train.main(argv(shards, tmp_path, "early", *BIGRU))
    flags = ["--run", str(tmp_path / "run"), "--images", str(demo_csv / "images"), "-j", "0", "-b", "8"]
    predict.main(flags)
    assert len(table(tmp_path / "run" / "predictions" / "images.csv")) == len(list((demo_csv / "images").iterdir()))
    train.main(argv(shards, tmp_path, "none", *BIGRU, name="text"))
    with pytest.raises(UserError, match="reads captions alone"):
        predict.main([*flags[2:], "--run", str(tmp_path / "text")])


def test_text_alone_reads_no_image(shards, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("an image was read")

    monkeypatch.setattr(TarReader, "read", refuse)
    train.main(argv(shards, tmp_path, "none", *BIGRU, "--cutout", "0.2", "--cutmix", "1", "--reprob", "0.5"))
    predict.main(["--run", str(tmp_path / "run"), "--data", str(shards), "-j", "0"])


# ---- parts, teachers, soups ------------------------------------------------------------------------------------------


def test_runs_to_start_from(shards, tmp_path):
    """The weights that a run begins with are those of the others' exports."""
    train.main([*argv(shards, tmp_path, "none", name="image"), "--no-model-ema"])
    train.main(argv(shards, tmp_path, "none", *BIGRU, "--no-model-ema", name="text"))
    begin = ["--load", str(tmp_path / "image"), "--load-text", str(tmp_path / "text")]
    both = argv(shards, tmp_path, "concat", *BIGRU, *begin, "--no-model-ema", name="both")
    start = first_batch(both)[2].state_dict()
    for part in ("image", "text"):
        own = weights(tmp_path / part / "best")
        for name, tensor in own.items():
            torch.testing.assert_close(start[name if part == "text" else f"image.{name}"], tensor)
    train.main(both)
    combined = argv(shards, tmp_path, "concat", *BIGRU, "--load-combine", str(tmp_path / "both"), name="again")
    assert same(first_batch(combined)[2].state_dict(), weights(tmp_path / "both" / "best"))
    train.main([*combined, "--kd-teacher", str(tmp_path / "both")])
    with pytest.raises(UserError, match="reads captions by a tokenizer of its own"):
        train.main([*argv(shards, tmp_path, "none", name="no"), "--kd-teacher", str(tmp_path / "both")])
    with pytest.raises(UserError, match="looks at images"):
        train.main(argv(shards, tmp_path, "none", *BIGRU, "--kd-teacher", str(tmp_path / "image"), name="no"))
    soups = [str(tmp_path / "both"), str(tmp_path / "again"), "--greedy", "--data", str(shards), "-j", "0"]
    soup.main([*soups, "--out", str(tmp_path / "soup")])
    predict.main(["--run", str(tmp_path / "soup"), "--data", str(shards), "-j", "0"])


def test_a_teacher_sees_what_the_student_reads(shards, tmp_path):
    train.main(argv(shards, tmp_path, "gated", *BIGRU, name="teacher"))
    more = [*BIGRU, *EXACT, "--kd-teacher", str(tmp_path / "teacher"), "--kd-alpha", "1", "--kd-temp", "1"]
    flags = argv(shards, tmp_path, "gated", *more)
    _, _, model, image, _, mix, batch = first_batch(flags)
    told = (image, batch["tokens"], batch["token_mask"], mix.shares())
    with torch.no_grad():
        taught = load_exported(tmp_path / "teacher" / "best")[0](*told).sigmoid()
    train.main(flags)
    logged = log_of(tmp_path / "run")[0]["train/loss"]
    assert logged == pytest.approx(bce(model(*told), taught).mean().item(), rel=2e-5)


def test_checkpoints_elsewhere_are_exported_and_averaged(shards, tmp_path):
    more = ["--checkpoint-dir", str(tmp_path / "far"), "--checkpoint-every", "1st"]
    flags = argv(shards, tmp_path / "runs", "gated", *BIGRU, *more)
    train.main(flags)
    train.main([*flags, "--max-steps", "3", "--resume", "auto"])
    ckpt.main(["export", str(tmp_path / "far" / "run"), str(tmp_path / "out")])
    soup.main([str(tmp_path / "runs" / "run"), "--checkpoints", "2", "--out", str(tmp_path / "soup")])
    for folder in ("out", "soup"):
        predict.main(["--run", str(tmp_path / folder), "--data", str(shards), "-j", "0"])
    shutil.rmtree(tmp_path / "runs" / "run" / "text")
    with pytest.raises(UserError, match="text/ of its run is not at"):
        ckpt.main(["export", str(tmp_path / "far" / "run"), str(tmp_path / "other")])


# ---- learning rates --------------------------------------------------------------------------------------------------


def test_the_encoder_learns_by_its_own_rate(shards, tmp_path, bert):
    more = ["--text-model", str(bert), "--text-lr-mult", "0.1", "--text-layer-decay", "0.5", "--lr-mult", "bias=3"]
    more += ["--layer-decay", "1", "--head-lr-mult", "1"]
    config, _, model, *_ = first_batch(argv(shards, tmp_path, "concat", *more))
    groups = optimizer_of(model, config=config, only_elementwise=False).param_groups
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    named = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert named["text.encoder.model.encoder.layer.1.output.dense.weight"] == pytest.approx(0.1 * 0.5)
    assert named["text.encoder.model.encoder.layer.0.output.dense.bias"] == pytest.approx(3 * 0.1 * 0.25)
    assert named["text.encoder.model.embeddings.word_embeddings.weight"] == pytest.approx(0.1 * 0.125)
    assert named["text.classifier.weight"] == named["fusion.linear.weight"] == 1
    assert all(named[name] == 3 * name.endswith("bias") or 1 for name in named if name.startswith("image."))


def test_stages_and_batch_size_auto(shards, tmp_path):
    stages = "[{for: 1st, freeze: '^text', caption-dropout: 1, mix-captions: join}, {text-lr-mult: 0.5}]"
    more = ["--stages", stages, "-b", "auto", "--global-batch-size", "8"]
    train.main(argv(shards, tmp_path, "gated", *BIGRU, *more))
    assert [line["step"] for line in log_of(tmp_path / "run") if "train/loss" in line] == [1, 2]


def test_starts_from_word_vectors_and_from_weights_alone(shards, tmp_path):
    """And a rehearsal, workers and the published flags."""
    vectors = tmp_path / "words.vec"
    vectors.write_text("2 5\na 1 2 3 4 5\nred 5 4 3 2 1\n")
    told = ["--text-model", "bigru", "--embeddings", str(vectors), "-j", "2", "--clean", "lower"]
    flags = argv(shards, tmp_path, "late", *told)
    reading, model = first_batch(flags)[1:3]
    table_ = model.text.encoder.state_dict()["embedding.weight"]
    assert table_[reading.tokenizer(["red"])[0][0, 0]].tolist() == [5, 4, 3, 2, 1]
    train.main([*flags, "--dry-run"])
    assert not list(tmp_path.glob("*dry*"))
    train.main(flags)
    vectors.unlink()
    more = ["--resume", str(tmp_path / "run"), "--resume-weights-only", "--experiment", "on", "--max-steps", "1"]
    train.main([*flags, *more])
    assert (tmp_path / "on" / "text" / "vocabulary.json").is_file()


def test_the_reports_flags_for_captions():
    own = ["--text-model", "bigru", "--workers", "0"]
    verb, *flags = published.translate(["--exp_name", "a", "--concat_text", "True", *own])
    config = read_config(flags)
    assert verb == "train" and (config.text_model, config.fusion, config.mix_captions) == ("bigru", "concat", "off")
    config = read_config(published.translate(["--exp_name", "a", "--bilinear_text", "True"])[1:])
    assert (config.text_model, config.fusion) == ("bert-base-uncased", "bilinear")


def test_shared_layers_are_not_computed_again_under_zero3(tmp_path):
    config = Config(text_model="hub/model", grad_checkpointing="all")
    for kind in ("bert", "albert"):
        model = Fused(None, build_text_model(str(tiny(kind, tmp_path))), fusion="none", num_classes=3, empty=[0])
        again = recompute(model, "all")
        refuse_untrainable(model, config, recomputed=again, zero_stage=2)
        refuse_untrainable(model, config, recomputed=[], zero_stage=3)
        with pytest.raises(UserError, match="hub/model share") if kind == "albert" else nullcontext():
            refuse_untrainable(model, config, recomputed=again, zero_stage=3)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"fusion": "early"}, "--fusion needs --text-model"),
        ({"group_by_length": True}, "--group-by-length needs --text-model"),
        ({"text_model": "bigru", "fusion": "gatd"}, "--fusion gatd: choose one of .* did you mean gated"),
        ({"text_model": "bigru", "fusion": "gated", "fusion_kwargs": {"widht": 8}}, "did you mean width"),
        ({"load": "run"}, "--pretrained-path RUN/best"),
        ({"text_model": "bigru", "load_combine": "run"}, "--load-combine needs a --fusion"),
        ({"text_model": "bert", "embeddings": "a.vec"}, "word vectors for --text-model bigru"),
        ({"text_model": "bigru", "text_layer_decay": 0.9}, "take --text-lr-mult"),
        ({"text_model": "bigru", "word_dropout": 1.5}, "--word-dropout must be in"),
    ],
)
def test_what_cannot_be_meant_is_one_line(settings, words):
    with pytest.raises(UserError, match=words):
        Config(**settings)
