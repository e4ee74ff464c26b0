"""The command line of the published system, so that a printed command gives here what it gave there.

`python main.py ...` takes the report's flags, and `python train.py ...` takes them too where one is given that only the
report has. They are translated into our own (`translate`), and a line says which; the rest of the settings is the
recipe comp5329-swin-l, the report's defaults. Flags that the report has not are ours and pass through: --workers 2.
`python bert_train.py` and `python bert_test.py` are the report's caption model: the recipe comp5329-bert.

Three things need more than other names. `--data_dir` holds CSVs and images, which are packed on first use. The weights
that a training left are a run here: `swin_large_224_best.pth`, unless there is such a file, means the best weights of
the run swin_large_224. Captions are read by Hugging Face's BERT, or the folder of --text-model.
"""

import csv
import os
import shlex
import sys
import time
from argparse import SUPPRESS, ArgumentTypeError, Namespace
from itertools import pairwise
from pathlib import Path

import torch
import yaml

from mlc import predict, train
from mlc.flags import read_config
from mlc.models.build import build_model, fast_memory_format, load_weights, resolve_name
from mlc.models.export import timm_config
from mlc.parallel import launch
from shards import pack
from shards.console import Parser, UserError, say
from shards.dataset import JSON_NAME, load_dataset
from shards.image_folder import ImageFolder

RECIPE = "comp5329-swin-l"
TEXT_MODEL = "bert-base-uncased"  # its size is said, its case is not; --text-model is another, or its folder
CLEAN = ("symbols", "mentions", "punctuation")
BERT_RECIPE, BERT_RUN = "comp5329-bert", "bert"
VAL_FRACTION = "0.1"  # stratified, as the report says; it does not say how large
IMAGES = (".", "data", "images")  # where --data_dir may keep them
SUBMISSIONS = Path("submissions")
WAIT = launch.FIRST_TIMEOUT  # seconds for another process to pack

# The report's name: (ours, what it is).
RENAMED = {
    "exp_name": ("experiment", "name of the run (default: training)"),
    "epochs": ("epochs", "passes over the data (20)"),
    "batch_size": ("batch-size", "samples per device (32)"),
    "img_size": ("img-size", "pixels of a side (224)"),
    "lr": ("lr", "learning rate of AdamW (1e-5)"),
    "gamma": ("decay-rate", "factor of each cut of the learning rate (0.5)"),
    "seed": ("seed", "of everything random (3407)"),
    "model": ("model", "timm's name, older ones too; NAME_linear (swin_large_patch4_window7_224_linear)"),
    "label_smoothing": ("smoothing", "targets y (1 - s) + s / 2 (0)"),
    "threshold": ("threshold", "a label is predicted above this probability (0.5)"),
}
SWITCHES = {
    "mixup": "mix pairs of samples (True)",
    "weighted_loss": "weigh classes by the effective number of their samples (False)",
    "autoaug": "AutoAugment instead of RandAugment (False)",
    "focal_loss": "focal loss instead of binary cross-entropy (False)",
    "tta": "predict the flipped image as well (True)",
    "bilinear_text": "join image and caption by a bilinear layer (False)",
    "concat_text": "join image and caption by concatenation (False)",
}
NUMBERS = {
    "step_size": "epochs between two cuts of the learning rate (8)",
    "mixup_alpha": "of mixup's Beta distribution (0.4)",
    "freeze_epochs": "train only the classifier for so many epochs first (0)",
    "after_freeze_lr": "learning rate after that (--lr)",
    "kd_alpha": "share of the distillation loss; 0 loads no teacher (0)",
    "kd_temp": "temperature of the distillation (2)",
}
FILES = {
    "test": "predict the test split with these weights and write the submission; the flags of a training do nothing",
    "load": "start from these weights instead of the published ones",
    "kd_teacher": "weights of the teacher",
    "load_combine": "weights of a model of images and captions",
}
_OWN_TOO = {"epochs", "batch_size", "img_size", "lr", "seed", "model", "threshold", "mixup", "weighted_loss"}
_OWN_TOO |= {"kd_alpha", "kd_temp", "kd_teacher"}
_WITH_CAPTIONS = {"load", "load_combine"}  # ours too, beside a flag that only we have: of a model with captions
_BOOLEANS = {"true": True, "false": False}


def main(argv: list[str] | None = None) -> int | None:
    """`train.py`, `mlc train`: the report's flags or ours."""
    argv = sys.argv[1:] if argv is None else argv
    return run(argv) if is_published(argv) else train.main(argv)


@launch.peers()
def run(argv: list[str] | None = None) -> int | None:
    """`main.py`: the report's flags."""
    argv = sys.argv[1:] if argv is None else argv
    options, _ = _parse(argv)
    verb, *ours = translate(argv)
    if verb == "train":
        read_config(ours)  # a mistake is cheaper before packing than after it
    _pack_once(Path(options.data_dir))
    if os.environ.get("RANK", "0") == "0":
        say(f"in this program's own flags: mlc {verb} {shlex.join(ours)}")
    if verb == "train":
        return train.main(ours)
    file = Path(options.test)
    return predict.main(ours, load=(lambda: _load_file(file, options)) if file.is_file() else None)


@launch.peers()
def bert_train(argv: list[str] | None = None) -> int | None:
    """`bert_train.py`: the report's model of captions, as the run bert; flags are those of train.py."""
    options, own = _bert_options("bert_train.py", f"Trains {BERT_RECIPE}; all other flags are those of train.py.", argv)
    ours = ["-c", BERT_RECIPE, "--data", str(_shards(Path(options.data_dir))), "--output", options.output]
    ours += ["--experiment", BERT_RUN, "--resume", "auto", *own]
    read_config(ours)
    _pack_once(Path(options.data_dir))
    if os.environ.get("RANK", "0") == "0":
        say(f"in this program's own flags: mlc train {shlex.join(ours)}")
    return train.main(ours)


@launch.peers()
def bert_test(argv: list[str] | None = None) -> int | None:
    """`bert_test.py`: predicts the test split with the weights that bert_train.py left."""
    options, own = _bert_options(
        "bert_test.py", "Predicts by that run; all other flags are those of `mlc predict`.", argv
    )
    run_folder = Path(options.output) / BERT_RUN
    if not (run_folder / "best").is_dir():
        raise UserError(f"{run_folder}: no trained weights in it; run `python bert_train.py` first")
    ours = ["--run", str(run_folder), "--data", str(_shards(Path(options.data_dir)))]
    ours += ["--out", str(SUBMISSIONS / "bert_best"), "--threshold", str(read_config(["-c", BERT_RECIPE]).threshold)]
    return predict.main([*ours, *own])


def is_published(argv: list[str]) -> bool:
    """Whether a flag is there that only the report has, or one of ours with the report's True or False."""
    known = {*RENAMED, *SWITCHES, *NUMBERS, *FILES, "data_dir"}
    words = [word for arg in argv for word in arg.split("=", 1)]
    own = _OWN_TOO
    if {"--text-model", "--text_model", "--fusion", "-c", "--config"} & {*words}:
        own = own | _WITH_CAPTIONS
    for word, value in pairwise([*words, ""]):
        name = word.removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in known:
            if name not in own:
                return True
            if name in SWITCHES and value in ("True", "False"):
                return True
    return False


def translate(argv: list[str]) -> list[str]:
    """The verb and flags of `mlc` for a command line of the report.

    Raises:
        UserError: flags that exclude each other, or weights that are nowhere.
    """
    options, own = _parse(argv)
    if options.bilinear_text and options.concat_text:
        raise UserError("--bilinear_text and --concat_text are two ways of the same; keep one")
    if options.load_combine and not (options.bilinear_text or options.concat_text or options.test):
        raise UserError(f"--load_combine {options.load_combine} needs --bilinear_text True or --concat_text True")
    if options.test:
        return ["predict", *_prediction(options), *own]
    given = [part for name, (ours, _) in RENAMED.items() if name in options for part in (f"--{ours}", options[name])]
    return ["train", "-c", RECIPE, "--data", str(_shards(Path(options.data_dir))), *given, *_training(options), *own]


class _Options(Namespace):
    """Flags by their name; of those that are only renamed, the ones that were given."""

    def __getitem__(self, name: str) -> str:
        return getattr(self, name)


def _parse(argv: list[str]) -> tuple[_Options, list[str]]:
    """(the report's flags, what is left over)"""
    parser = Parser(
        prog="main.py",
        description="Trains or predicts with the command line of the COMP5329 report. Flags that it has not are those "
        "of train.py (to train) or `mlc predict` (with --test).",
        epilog="example: python main.py --exp_name swin_large_224 --model swin_large_patch4_window7_224_linear\n"
        "then:    python main.py --test swin_large_224_best.pth",
    )

    def add(name: str, text: str, **more) -> None:
        parser.add_argument(f"--{name}", *([f"--{name.replace('_', '-')}"] if "_" in name else []), help=text, **more)

    for name, (_, text) in RENAMED.items():
        kind = _number if name not in ("exp_name", "model") else str
        add(name, text, default={"exp_name": "training"}.get(name, SUPPRESS), type=kind, metavar=name.upper())
    for name, text in SWITCHES.items():
        add(name, text, type=_boolean, default=name in ("mixup", "tta"), metavar="True|False")
    for name, text in NUMBERS.items():
        default = {"step_size": "8", "mixup_alpha": "0.4", "kd_temp": "2", "after_freeze_lr": None}.get(name, "0")
        add(name, text, type=_number, default=default, metavar=name.upper())
    for name, text in FILES.items():
        add(name, text, default="", metavar="FILE")
    add("data_dir", "folder with train.csv, test.csv and the images, packed on first use (data)", default="data")
    add("output", "folder of the runs (runs)", default="runs")
    return parser.parse_known_args(argv, _Options())


def _bert_options(prog: str, description: str, argv: list[str] | None) -> tuple[Namespace, list[str]]:
    parser = Parser(prog=prog, description=description, epilog=f"example: python {prog} --data_dir data")
    text = "folder with train.csv, test.csv and the images, packed on first use (data)"
    parser.add_argument("--data_dir", "--data-dir", default="data", metavar="DIR", help=text)
    parser.add_argument("--output", default="runs", metavar="DIR", help="folder of the runs (runs)")
    return parser.parse_known_args(sys.argv[1:] if argv is None else argv)


def _number(text: str) -> str:
    try:
        float(text)
    except ValueError:
        raise ArgumentTypeError(f"expected a number, not {text!r}") from None
    return text


def _boolean(text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise ArgumentTypeError(f"expected True or False, not {text!r}")
    return _BOOLEANS[text.lower()]


# ---- training --------------------------------------------------------------------------------------------------------


def _training(o: _Options) -> list[str]:
    """What is not only renamed."""
    argv = ["--output", o.output, "--resume", "auto", "--decay-every", f"{o.step_size}ep"]
    argv += ["--mixup", o.mixup_alpha if o.mixup else "0"]
    if o.autoaug:
        argv += ["--aa", "original"]
    if o.focal_loss:
        argv += ["--loss", "focal"]
    if o.weighted_loss:
        argv += ["--weighted-loss", "effective"]
    if float(o.freeze_epochs):
        whole = {"lr": float(o.after_freeze_lr)} if o.after_freeze_lr else {}
        stages = [{"for": f"{o.freeze_epochs}ep", "freeze": "backbone"}, whole]
        argv += ["--stages", yaml.safe_dump(stages, default_flow_style=True, sort_keys=False).strip()]
    if o.load:
        weights = _weights("--load", o.load, o.output)
        weights = weights / "best" / "model.safetensors" if (weights / "best").is_dir() else weights
        argv += ["--no-pretrained", "--pretrained-path", str(weights)]
    if o.bilinear_text or o.concat_text:
        argv += ["--text-model", TEXT_MODEL, "--fusion", "bilinear" if o.bilinear_text else "concat"]
        argv += [part for name in CLEAN for part in ("--clean", name)]
        argv += ["--mix-captions", "off"]  # the report mixes images alone
    if o.load_combine:
        argv += ["--no-pretrained", "--load-combine", str(_weights("--load_combine", o.load_combine, o.output))]
    if float(o.kd_alpha):
        argv += ["--kd-teacher", str(_teacher(o)), "--kd-alpha", o.kd_alpha, "--kd-temp", o.kd_temp]
    return argv


def _teacher(o: _Options) -> Path:
    if not o.kd_teacher:
        raise UserError(f"--kd_alpha {o.kd_alpha} needs --kd_teacher, the run to distil from")
    teacher = _weights("--kd_teacher", o.kd_teacher, o.output)
    if teacher.suffix in (".pth", ".pt"):
        raise UserError(
            f"--kd_teacher {teacher}: a file of weights does not say of which model; name a run or an exported folder"
        )
    return teacher


def _weights(flag: str, file: str, output: str) -> Path:
    """The file or folder itself if it exists, else the folder of the run that the report would have saved there."""
    path = Path(file)
    run = Path(output) / path.stem.removesuffix("_best")
    if path.exists():
        return path
    if (run / "best").is_dir():
        return run
    raise UserError(f"{flag} {file}: no such file, and no weights of a run {run} (train it with --exp_name {run.name})")


# ---- prediction ------------------------------------------------------------------------------------------------------


def _prediction(o: _Options) -> list[str]:
    argv = ["--run", str(_weights("--test", o.test, o.output)), "--data", str(_shards(Path(o.data_dir)))]
    argv += ["--out", str(SUBMISSIONS / Path(o.test).stem), "--threshold", getattr(o, "threshold", "0.5")]
    argv += ["--batch-size", o.batch_size] if "batch_size" in o else []
    return argv + (["--tta", "hflip"] if o.tta else [])


def _load_file(file: Path, o: _Options) -> tuple[torch.nn.Module, dict]:
    """As `load_exported` for bare weights: `--model` says of what, the data set for which classes."""
    name = resolve_name(getattr(o, "model", read_config(["-c", RECIPE]).model))[0]
    classes = load_dataset(_shards(Path(o.data_dir))).classes
    size = int(o.img_size) if "img_size" in o else None
    model = build_model(name=name, num_classes=len(classes), img_size=size)
    before = [p.detach().clone() for p in model.get_classifier().parameters()]
    load_weights(model, file)
    if any(torch.equal(a, b) for a, b in zip(before, model.get_classifier().parameters(), strict=True)):
        raise UserError(f"--test {file}: it has no classifier of the {len(classes)} classes of {o.data_dir}")
    source = model.pretrained_cfg
    info = timm_config(
        model,
        architecture=source["architecture"],
        model_args={},
        num_classes=len(classes),
        label_names=classes,
        img_size=size or source["input_size"][-1],
        mean=source["mean"],
        std=source["std"],
        extra={},
    )
    return model.to(memory_format=fast_memory_format(model)).eval(), info


# ---- data ------------------------------------------------------------------------------------------------------------


def _shards(data_dir: Path) -> Path:
    """Where the packed data is, or will be: the folder itself, if somebody packed it."""
    return data_dir if (data_dir / JSON_NAME).is_file() else data_dir / "shards"


def _pack_once(data_dir: Path) -> None:
    """Packs the CSVs, on the first process; the others wait. `mlc pack` gives the folder its name when it is whole."""
    done = _shards(data_dir) / JSON_NAME
    if done.is_file():
        return
    if os.environ.get("RANK", "0") == "0":
        argv = _pack_flags(data_dir)
        say(f"first use of {data_dir}, a tenth stratified by label for validation: mlc pack {shlex.join(argv)}")
        pack.main(argv)
        return
    deadline = time.monotonic() + WAIT
    while not done.is_file():
        if time.monotonic() > deadline:
            raise UserError(f"waited {WAIT / 60:.0f} minutes for the first process to pack {data_dir}")
        time.sleep(0.2)


def _pack_flags(data_dir: Path) -> list[str]:
    table, test = data_dir / "train.csv", data_dir / "test.csv"
    if not table.is_file():
        raise UserError(f"--data_dir {data_dir}: no train.csv in it, and it is not a data set of `mlc pack`")
    argv = ["--csv", str(table), "--images", str(_images(data_dir, table)), "--out", str(_shards(data_dir))]
    return argv + ["--val-fraction", VAL_FRACTION] + (["--test-csv", str(test)] if test.is_file() else [])


def _images(data_dir: Path, table: Path) -> Path:
    """The folder in which the first image of the table lies."""
    with table.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.reader(file)
        _, first = next(rows, None), next(rows, [""])
    for folder in IMAGES:
        if first and ImageFolder(data_dir / folder).find(first[0]):
            return data_dir / folder
    places = ", ".join(str(data_dir / folder) for folder in IMAGES)
    raise UserError(f"{table}: its first image {(first or [''])[0]!r} is in none of {places}")
