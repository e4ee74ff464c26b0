"""`mlc features`: what it writes is what the encoders say themselves, once for every sample."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiny_clip
import torch
from caption_runs import BIGRU, argv, hub_folder
from conftest import run
from safetensors.torch import save_file

from mlc import features, train
from mlc.data.dataset import EvalDataset
from mlc.data.features import FeatureFile
from mlc.data.reader import TarReader
from mlc.data.text import load_tokenizer, pretrained_tokenizer
from mlc.data.transforms import EvalTransform, normalize
from mlc.models.build import build_model
from mlc.models.encoders import text_encoder
from mlc.models.export import load_exported
from mlc.models.text import build_text_model
from shards import pack
from shards.captions import split_captions
from shards.console import UserError
from shards.dataset import Index, load_dataset, open_index


@pytest.fixture(scope="session")
def hub(tmp_path_factory) -> Path:
    """bert/, clip/ and resnet.safetensors"""
    folder = tmp_path_factory.mktemp("hub")
    hub_folder("bert-uncased", folder)
    tiny_clip.clip(folder / "clip")
    torch.manual_seed(1)
    save_file(build_model(name="test_resnet", num_classes=7).state_dict(), folder / "resnet.safetensors")
    return folder


@pytest.fixture(scope="session")
def several(demo_csv, tmp_path_factory) -> Path:
    """The data with none, one, two or three captions for a sample."""
    folder = tmp_path_factory.mktemp("several")
    with (demo_csv / "train.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:40]
    for number, row in enumerate(rows):
        row["Caption"] = "\n".join(rows[number - other]["Caption"] for other in range(number % 4))
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    flags = ["--csv", str(folder / "train.csv"), "--images", str(demo_csv / "images"), "--val-fraction", "0.3"]
    pack.main([*flags, "--out", str(folder / "shards"), "-j", "1"])
    return folder / "shards"


def resnet(hub: Path) -> list[str]:
    return ["--model", "test_resnet", "--pretrained-path", str(hub / "resnet.safetensors"), "--img-size", "32"]


def make(data: Path, out: Path, *more: str) -> FeatureFile:
    features.main(["--data", str(data), "--out", str(out), "-j", "0", "-b", "8", *more])
    return FeatureFile(out)


def pictures(index: Index, mean, std, crop: str = "squish") -> torch.Tensor:
    data = EvalDataset(TarReader(index), EvalTransform(size=32, mean=tuple(mean), crop=crop))
    return normalize(data.__getitems__(range(len(index)))["image"], mean, std)


def means(index: Index, encoder, tokenizer) -> np.ndarray:
    """The mean of the features of each row's captions one at a time, zeros where there is none."""
    rows = []
    for row in range(len(index)):
        tokens = [tokenizer([caption])[0] for caption in split_captions(index.caption(row))]
        with torch.no_grad():
            each = [encoder(torch.from_numpy(t), torch.ones(t.shape, dtype=torch.bool))[1] for t in tokens]
        rows.append(torch.cat(each).mean(0) if each else torch.zeros(encoder.num_features))
    return torch.stack(rows).numpy()


def test_a_timm_model_and_an_encoder_of_hugging_face(several, hub, tmp_path):
    told = ["--text-model", str(hub / "bert"), "--text-pool", "mean", "--max-tokens", "32", "--tta", "hflip"]
    made = make(several, tmp_path / "f.arrow", *resnet(hub), *told, "--split", "train,val")
    image = build_model(name="test_resnet", num_classes=7, pretrained_path=hub / "resnet.safetensors").eval()
    text = build_text_model(str(hub / "bert"), pool="mean").eval()
    tokenizer = pretrained_tokenizer(str(hub / "bert"), 32)
    dataset = load_dataset(several)
    assert made.splits == ["train", "val"] and made.data == dataset.fingerprint and len(made.encoders) == 2
    for split in made.splits:
        index = open_index(dataset, split)
        batch, (values, seen) = made.split(split), made.values(split)
        assert batch.column("key").equals(index.batch.column("key")) and seen.all()
        assert batch.column("split").unique().to_pylist() == [split]
        x = pictures(index, image.pretrained_cfg["mean"], image.pretrained_cfg["std"])
        with torch.no_grad():
            views = [image.forward_head(image.forward_features(v), pre_logits=True) for v in (x, x.flip(-1))]
        width = views[0].shape[1]
        assert made.sizes == [width, 32]
        np.testing.assert_allclose(values[:, :width], (views[0] + views[1]).numpy() / 2, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(values[:, width:], means(index, text, tokenizer), rtol=1e-4, atol=1e-5)
        empty = [not split_captions(index.caption(row)) for row in range(len(index))]
        np.testing.assert_array_equal(~values[:, width:].any(1), empty)
        assert any(empty)


def test_both_towers_of_clip(several, hub, tmp_path):
    from transformers import AutoTokenizer, CLIPModel

    told = ["--model", str(hub / "clip"), "--text-model", str(hub / "clip"), "--max-tokens", "20"]
    made = make(several, tmp_path / "f.arrow", *told, "--split", "val", "--val-crop", "center")
    model = CLIPModel.from_pretrained(hub / "clip").eval()
    tokenizer = AutoTokenizer.from_pretrained(hub / "clip")
    index, (values, _) = open_index(load_dataset(several), "val"), made.values("val")
    assert made.sizes == [12, 12]
    with torch.no_grad():
        x = pictures(index, tiny_clip.MEAN, tiny_clip.STD, "center")
        image = model.get_image_features(pixel_values=x).pooler_output
        np.testing.assert_allclose(values[:, :12], image.numpy(), rtol=1e-4, atol=1e-5)
        for row in range(len(index)):
            found = split_captions(index.caption(row))
            if found:
                tokens = tokenizer(found, padding=True, truncation=True, max_length=20, return_tensors="pt")
                mean = model.get_text_features(**tokens).pooler_output.mean(0)
                np.testing.assert_allclose(values[row, 12:], mean.numpy(), rtol=1e-4, atol=1e-5)
            else:
                assert not values[row, 12:].any()


def test_siglip_is_padded_as_it_was_trained(tmp_path):
    from transformers import SiglipModel

    tower = text_encoder(str(tiny_clip.siglip(tmp_path / "siglip")), "cls", 60)
    tokens = torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    padded = torch.tensor([[5, 6, 7] + 7 * [1], [8, 9, 10, 11] + 6 * [1]])
    with torch.no_grad():
        found = tower(tokens, mask)[1]
        model = SiglipModel.from_pretrained(tmp_path / "siglip").eval()
        torch.testing.assert_close(found, model.get_text_features(input_ids=padded).pooler_output)
    assert tower.num_features == found.shape[1]


@pytest.mark.parametrize("fusion", ["none", "gated", "cross-attention"])
def test_the_parts_of_a_run(several, tmp_path, fusion):
    train.main(argv(several, tmp_path, fusion, *BIGRU, "--clean", "lower", "--val-crop", "center"))
    made = make(several, tmp_path / "f.arrow", "--run", str(tmp_path / "run"), "--split", "val")
    model, info = load_exported(tmp_path / "run" / "best")
    index, (values, _) = open_index(load_dataset(several), "val"), made.values("val")
    tokenizer = load_tokenizer(tmp_path / "run" / "best" / "text")
    text = means(index, model.text.encoder, lambda texts: tokenizer([text.lower() for text in texts]))
    np.testing.assert_allclose(values[:, -text.shape[1] :], text, rtol=1e-4, atol=1e-5)
    if fusion == "none":
        assert len(made.encoders) == 1
        return
    x = pictures(index, info["pretrained_cfg"]["mean"], info["pretrained_cfg"]["std"], "center")
    with torch.no_grad():
        image = model.image.forward_features(x).mean((1, 2))  # Swin's map, [B, H, W, D], as its own pooling has it
    np.testing.assert_allclose(values[:, : image.shape[1]], image.numpy(), rtol=1e-3, atol=1e-4)


def test_half_precision_and_two_processes(several, hub, tmp_path):
    told = [*resnet(hub), "--text-model", str(hub / "bert"), "--split", "train"]
    make(several, tmp_path / "1.arrow", *told)
    half = make(several, tmp_path / "half.arrow", *told, "--dtype", "float16")
    exact = FeatureFile(tmp_path / "1.arrow").values("train")[0]
    assert half.values("train")[0].dtype == np.float16
    np.testing.assert_array_equal(half.values("train")[0], exact.astype(np.float16))
    flags = ["--data", str(several), "--out", str(tmp_path / "2.arrow"), "-j", "0", "-b", "8", *told]
    run("-m", "mlc", "features", *flags, processes=2)
    assert (tmp_path / "2.arrow").read_bytes() == (tmp_path / "1.arrow").read_bytes()


def test_a_bad_image_has_no_features(several, hub, tmp_path):
    shutil.copytree(several, tmp_path / "data")
    index = open_index(load_dataset(tmp_path / "data"), "val")
    with (tmp_path / "data" / "val-000000.tar").open("r+b") as file:
        file.seek(int(index.offset[3]) + 50)
        file.write(bytes(40))
    made = make(tmp_path / "data", tmp_path / "f.arrow", *resnet(hub), "--split", "val")
    values, seen = made.values("val")
    assert np.flatnonzero(~seen).tolist() == [3] and not values[3].any()
    with pa.ipc.open_file(str(tmp_path / "f.arrow")) as file:
        assert file.read_all().column("features").null_count == 1
    with pytest.raises(UserError, match="--max-bad-samples allows 0"):
        make(tmp_path / "data", tmp_path / "g.arrow", *resnet(hub), "--split", "val", "--max-bad-samples", "0")
    assert not (tmp_path / "g.arrow").exists()


@pytest.mark.parametrize(
    "told, words",
    [
        ([], "name an encoder"),
        (["--model", "test_resnet"], "random weights see nothing"),
        (["--model", "no_such_net", "--pretrained"], "timm .* has no model"),
        (["--model", "./nowhere"], "--model ./nowhere: there is no such folder"),
        (["--model", "{hub}/bert"], "--model .*bert: transformers cannot build it"),
        (["--text-model", "bigru"], "train one and give --run"),
        (["--model", "{hub}/clip", "--img-size", "64"], "--img-size is for timm"),
        (["--model", "{hub}/clip", "--split", "train,tset"], "no split 'tset'; .*did you mean test"),
        (["--model", "{hub}/clip", "--tta", "vflip"], "unknown view"),
        (["--text-model", "{hub}/bert", "--tta", "hflip"], "no encoder looks at any"),
        (["--text-model", "{hub}/bert", "--img-size", "64"], "--img-size needs --model"),
        (["--text-model", "{hub}/clip", "--text-pool", "mean"], "pools for itself"),
        (["--model", "{hub}/clip", "--clean", "lower"], "--clean needs --text-model"),
        (["--model", "{hub}/clip", "--split", ","], "--split names no split"),
        (["--model", "{hub}/clip", "--val-crop", "middle"], "crop 'middle'"),
    ],
)
def test_mistakes_are_one_line(shards, hub, tmp_path, told, words):
    told = [text.format(hub=hub) for text in told]
    with pytest.raises(UserError, match=words) as caught:
        make(shards, tmp_path / "f.arrow", *told)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
