"""`mlc ckpt`: what checkpoints a run has, whether they are sound, and plain weights from one of them.

All of it works on a machine without GPUs and in bounded memory, whatever number of processes wrote the checkpoint.
"""

import struct
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from shutil import copyfile, copytree
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mlc.captions import text_of_run
from mlc.metrics import thresholds
from mlc.models.export import write_config
from mlc.models.heads import fold
from mlc.parallel import checkpoint, storage
from mlc.parallel.storage import Place
from mlc.resume import at_path, roots
from mlc.runlog import read_log
from shards.console import Parser, UserError, progress, say, shown
from shards.files import whole
from shards.json_text import to_json

# https://github.com/huggingface/safetensors#format
SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def main(argv: list[str] | None = None) -> int | None:
    options = _parser().parse_args(argv)
    return options.verb(options)


# ---- ls, show --------------------------------------------------------------------------------------------------------


def ls(options: Namespace) -> None:
    rows = list(_rows(options.run))
    if options.json:
        print(to_json(rows))
        return
    table = Table(title=f"checkpoints of {options.run}")
    for name in ("checkpoint", "epoch", "size", "written (UTC)", "state", "last evaluation"):
        wraps = name in ("state", "last evaluation")
        table.add_column(name, justify="right" if name in ("epoch", "size") else "left", no_wrap=not wraps)
    for row in rows:
        epoch = "" if row["epoch"] is None else f"{row['epoch']:.2f}"
        written = row["written"][:16].replace("T", " ")  # UTC
        table.add_row(row["name"], epoch, _size(row["bytes"]), written, row["state"], row["evaluation"])
    Console().print(table)


def _rows(run: str) -> Iterator[dict[str, Any]]:
    root = _root(run)
    log = [line for line in read_log(Path(run) / "log.jsonl") if any(name.startswith("val") for name in line)]
    for name in storage.names(root):
        if not storage.STEP.fullmatch(name.removeprefix(".").removesuffix(".tmp")):
            continue
        folder = storage.at(root, name)
        found = storage.sizes(folder)
        row = {"name": name, "epoch": None, "bytes": sum(found.values()), "written": "", "evaluation": ""}
        if storage.META not in found or name.startswith("."):
            yield row | {"state": "incomplete: being written, or left by a crash"}
            continue
        if reason := storage.damage(folder, contents=False):
            yield row | {"state": f"damaged: {reason}"}
            continue
        meta = storage.read_meta(folder)
        row |= {"epoch": meta.get("epoch"), "written": meta.get("written", ""), "state": "complete"}
        yield row | {"evaluation": _evaluation(log, storage.step_of(folder), meta["config"]["eval_metric"])}


def _evaluation(log: Sequence[dict[str, Any]], step: int, metric: str) -> str:
    """The last one before the checkpoint, of the weights and of their average."""
    for line in reversed(log):
        if line["step"] <= step:
            values = {name.partition("/")[0]: value for name, value in line.items() if name.endswith(f"/{metric}")}
            return f"{metric} " + " ".join(f"{name} {shown(value)}" for name, value in values.items())
    return ""


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _root(run: str) -> Place:
    """The folder of a run's checkpoints, complete or not. Raises UserError where there is none."""
    for root in roots(storage.place(run)):
        if any(storage.STEP.search(name) for name in storage.names(root)):
            return root
    raise UserError(f"{run}: no checkpoints there; give the folder of a run")


def show(options: Namespace) -> None:
    folder = at_path(options.checkpoint)[0]
    meta = storage.read_meta(folder)
    meta["files"] = {name: _size(file["bytes"]) for name, file in meta.get("files", {}).items()}
    described = checkpoint.tensors(folder)
    parts = {part: [t for name, t in described.items() if name.startswith(f"{part}.")] for part in _PARTS}
    counts = {part: f"{len(own)} tensors, {sum(map(_bytes, own)) / 1e6:.1f} MB" for part, own in parts.items()}
    print(to_json({"checkpoint": str(folder), **counts, **meta}, indent=1))


_PARTS = ("model", "optimizer", "ema")


def _bytes(described: Any) -> int:
    return described.size.numel() * described.properties.dtype.itemsize


# ---- verify, prune ---------------------------------------------------------------------------------------------------


def verify(options: Namespace) -> int:
    """Reads every file and loads every tensor; exit code 1 where a checkpoint is damaged."""
    damaged = 0
    for folder in at_path(options.checkpoint)[::-1]:
        reason = storage.damage(folder) or _not_loadable(folder)
        damaged += bool(reason)
        print(f"{folder}: {f'DAMAGED: {reason}' if reason else f'sound, {_size(sum(storage.sizes(folder).values()))}'}")
    return 1 if damaged else 0


def _not_loadable(folder: Place) -> str:
    try:
        described = checkpoint.tensors(folder)
        with progress(f"load {storage.name_of(folder)}", len(described)) as advance:
            for _ in checkpoint.read_tensors(folder, list(described)):
                advance()
    except UserError as error:
        return str(error)
    return ""


def prune(options: Namespace) -> None:
    if options.keep < 1:
        raise UserError(f"--keep must be at least 1, not {options.keep}")
    gone = storage.prune(_root(options.run), options.keep)
    for folder in gone:
        print(f"deleted {folder}")
    say(f"{len(gone)} checkpoints deleted")


# ---- export ----------------------------------------------------------------------------------------------------------


def export(options: Namespace) -> None:
    folder, out = at_path(options.checkpoint)[0], Path(options.out)
    export_weights(folder, out, ema=options.ema)
    say(f"{'averaged weights' if options.ema else 'weights'} of {folder} in {out}")


def export_weights(folder: Place, out: Path, *, ema: bool) -> None:
    """Weights of a checkpoint in the format of a run's `best/` and `last/`, which plain timm loads."""
    meta, part = storage.read_meta(folder), "ema" if ema else "model"
    described = {name: t for name, t in checkpoint.tensors(folder).items() if name.startswith(f"{part}.")}
    if not described:
        raise UserError(f"{folder} has no averaged weights (it was trained with --no-model-ema); leave --ema out")
    if "export" not in meta:
        raise UserError(f"{folder}: its {storage.META} does not say what model it is; it is of an older version")
    out.mkdir(parents=True, exist_ok=True)
    folded = _folded_head(folder, part, described, meta["export"]["pretrained_cfg"]["classifier"])
    write_safetensors(out / "model.safetensors", folder, part, described, folded)
    write_config(meta["export"], out)
    if "fusion" in meta["export"]["mlc"]:
        copytree(text_of_run(folder, meta["config"]), out / "text", copy_function=copyfile, dirs_exist_ok=True)
    best = meta["progress"].get("best") or {}
    threshold = best.get("threshold", meta["config"]["threshold"])
    value = best.get("f1_samples@tuned", float("nan"))
    how = {"metric": "f1_samples", "threshold": threshold, "value": value}
    how["zero_division"] = meta["config"].get("zero_division", 0)
    thresholds.save(out / "thresholds.json", **how)


def _folded_head(folder: Place, part: str, described: dict[str, Any], classifier: Any) -> dict[str, torch.Tensor]:
    """The one classifier that an `extra_linear` head amounts to; its parts leave `described`."""
    names = [f"{part}.{classifier}.{key}" for key in ("0.weight", "0.bias", "1.weight", "1.bias")]
    if not all(name in described for name in names):
        return {}
    parts = {name.removeprefix(f"{part}."): tensor for name, tensor in checkpoint.read_tensors(folder, names)}
    for name in names:
        del described[name]
    return fold(parts, classifier)


def write_safetensors(
    path: Path, folder: Place, part: str, described: dict[str, Any], more: dict[str, torch.Tensor]
) -> None:
    """Copies the `described` tensors of a checkpoint, and `more` from memory, into one file; whole or not at all.

    Wide elements first, as safetensors itself orders them, so that every tensor is aligned.
    """
    kinds = {name: (t.properties.dtype, tuple(t.size)) for name, t in described.items()}
    kinds |= {f"{part}.{name}": (t.dtype, tuple(t.shape)) for name, t in more.items()}
    order = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name in described, name))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        dtype, shape = kinds[name]
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name.removeprefix(f"{part}.")] = {
            "dtype": SAFETENSORS[dtype],
            "shape": shape,
            "data_offsets": [begin, end],
        }
    text = to_json(header).encode()
    text += b" " * (-len(text) % 8)
    loaded = checkpoint.read_tensors(folder, [name for name in order if name in described])
    with whole(path) as building, open(building, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            tensor = next(loaded)[1] if name in described else more[name.removeprefix(f"{part}.")]
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _parser() -> Parser:
    parser = Parser(
        prog="mlc ckpt",
        description="Lists, checks, exports or deletes the checkpoints of a run.",
        epilog="RUN is the folder of a run, CHECKPOINT that of a checkpoint or of a run (then its newest, or all to "
        "verify);\nboth may be URLs. example: mlc ckpt export runs/demo weights --ema",
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    one, run = "CHECKPOINT", "RUN"
    for verb, what, text in (
        (ls, run, "step, epoch, size, date, state and metrics of each"),
        (show, one, "what meta.json says: progress, settings, data, versions"),
        (verify, one, "read every file, compare its sha256, load every tensor"),
        (export, one, "write model.safetensors, config.json and thresholds.json that plain timm loads"),
        (prune, run, "delete all but the newest"),
    ):
        sub = verbs.add_parser(verb.__name__, help=text, description=f"{text[0].upper()}{text[1:]}.")
        sub.add_argument(what.lower(), metavar=what)
        sub.set_defaults(verb=verb)
        if verb is ls:
            sub.add_argument("--json", action="store_true", help="print one JSON list instead of a table")
        if verb is export:
            sub.add_argument("out", metavar="OUT", help="folder to write")
            sub.add_argument("--ema", action="store_true", help="the averaged weights")
        if verb is prune:
            sub.add_argument("--keep", type=int, required=True, metavar="N", help="how many to keep")
    return parser
