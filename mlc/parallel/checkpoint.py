"""Sharded checkpoints: one format, each rank writes its part, loadable at any world size, written behind the training.

What a run needs to go on is in a checkpoint and nowhere else, in this order: 1. weights, 2. optimizer state, 3. EMA,
4. `samples_seen`, `step` and the loop's few scalars (`meta.json`). Data order, augmentation, learning rate, weight
decay and dropout are functions of those numbers and of the settings, so the sharded files hold nothing but tensors.

The loop waits only while the tensors are copied to host memory. Under DDP every rank has all of them and copies (and
writes) its share, so that the wait becomes shorter with more ranks. A thread does the rest; it has a process group of
its own, because the loop's collectives go on meanwhile.
"""

import functools
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from mlc.parallel import storage, zero
from mlc.parallel.storage import Place
from shards.console import UserError
from shards.json_text import to_json

GROUP = 256 << 20  # bytes
NOTICED = 0.1  # seconds of waiting for the checkpoint before that are worth a line
# One process is a normal way to train, not something to be warned of at every checkpoint.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class _Agreed(RuntimeError):
    """A failure that all ranks know of."""


class Saver:
    """Writes a run's checkpoints; every rank makes one and calls `save` and `finish` at the same steps."""

    def __init__(self, root: Place, *, keep: int, background: bool, say: Callable[[str], None]):
        """root: their folder or URL; keep: how many; say: prints a line (of rank 0), also from the thread."""
        self.root, self._keep, self._say = root, keep, say
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._world = dist.get_world_size() if dist.is_initialized() else 1
        self._group = dist.new_group(backend="gloo") if self._world > 1 else None
        self._host = HostCopy() if background else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[str] | None = None
        self._step, self._failure = 0, ""
        self._blocked = self._write_seconds = 0.0

    def save(
        self,
        step: int,
        meta: dict[str, Any],
        *,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        ema: torch.nn.Module | None,
        more: dict[str, dict[str, torch.Tensor]] | None = None,
    ) -> None:
        """Begins to write a checkpoint, once the one before is written; the tensors may change after the return.
        `more`: further tensors, the same on every rank, for `load_more`.

        A failure is said in one line and training goes on: the next interval tries again.
        """
        begin = time.perf_counter()
        self._wait()
        if (waited := time.perf_counter() - begin) > NOTICED:
            self._say(f"waited {waited:.1f} s for the checkpoint of step {self._step} to be written")
        meta = json.loads(to_json(meta))  # a copy: the loop goes on changing it
        self._step = step
        if zero.is_engine(model):  # DeepSpeed writes its own files, and only while the loop waits
            meta["shapes"] = zero.shapes(model.module, ema)
            self._failure = self._write(step, meta, functools.partial(self._write_engine, model, ema, more or {}))
        else:
            state = share(state_of(model, optimizer, ema) | (more or {}), self._rank, self._world)
            if self._host:
                write = functools.partial(self._write_tensors, self._host.copy(state), staged=True)
                self._writing = self._thread.submit(self._write, step, meta, write)
            else:
                self._failure = self._write(step, meta, functools.partial(self._write_tensors, state, staged=False))
        self._blocked += time.perf_counter() - begin

    def finish(self) -> None:
        """Waits for the last checkpoint of a run.

        Raises:
            UserError: it was not written.
        """
        begin = time.perf_counter()
        self._wait()
        self._blocked += time.perf_counter() - begin
        if self._failure:
            raise UserError(
                f"the last checkpoint, of step {self._step}, could not be written to {self.root}: {self._failure}; "
                "--resume auto goes on from the one before"
            )

    def take_seconds(self) -> dict[str, float]:
        """`ckpt/blocked_s` that the loop has waited since the last call, `ckpt/write_s` of the last write; for the log.

        Empty where no checkpoint was begun or written since.
        """
        blocked, written = self._blocked, self._write_seconds
        self._blocked = self._write_seconds = 0.0
        return {k: v for k, v in (("ckpt/blocked_s", blocked), ("ckpt/write_s", written)) if v}

    def _wait(self) -> None:
        if self._writing is not None:
            self._failure, self._writing = self._writing.result(), None

    def _write_tensors(self, state: dict[str, Any], building: Place, *, staged: bool) -> dict[str, Any]:
        writer, own = storage.writer(building, staged=staged)
        dcp.save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
        return own

    def _write_engine(self, engine, ema: torch.nn.Module | None, more: dict, building: Place) -> dict[str, Any]:
        """DeepSpeed's files, and beside them weights, buffers and EMA in the format of the other strategies."""
        failure = ""
        try:
            if not isinstance(building, Path):
                raise UserError("DeepSpeed cannot write to a URL; --checkpoint-dir must be a folder")
            zero.save_engine(engine, building)
        except Exception as error:
            failure = _reason(error)
        if failed := [text for text in self._gathered(failure) if text]:
            raise _Agreed(failed[0])
        written = storage.described(building / zero.FILES, part=self._rank, parts=self._world)
        own = {f"{zero.FILES}/{name}": file for name, file in written.items()}
        state = share(zero.parts(engine.module, ema) | more, self._rank, self._world)
        return own | self._write_tensors(state, building, staged=False)

    def _write(self, step: int, meta: dict[str, Any], write: Callable[[Place], dict[str, Any]]) -> str:
        """'' when the checkpoint is published, else why not; the same on all ranks.

        write: writes this process's part into a folder and describes its files, see `storage.writer`.

        A failure that only one rank knows of is raised: the others wait for it here, and only its end tells them.
        """
        begin = time.perf_counter()
        folder = storage.at(self.root, storage.folder_name(step))
        building = storage.building_place(folder)
        try:
            self._on_first(lambda: storage.begin(building))
            files = {name: file for part in self._gathered(write(building)) for name, file in part.items()}
            written = datetime.now(UTC).isoformat(timespec="seconds")
            self._on_first(lambda: storage.publish(building, folder, meta | {"written": written, "files": files}))
        except (dcp.api.CheckpointException, _Agreed) as error:
            failure = _reason(error)
            self._say(f"checkpoint of step {step} could not be written: {failure}; the next interval tries again")
            if self._rank == 0:
                with suppress(Exception):  # half a checkpoint on a full disk is in the way of the log as well
                    storage.delete(building)
            return failure
        self._write_seconds = time.perf_counter() - begin
        if self._rank == 0:
            try:
                storage.tidy(self.root, step)
                storage.prune(self.root, self._keep)
            except Exception as error:
                self._say(f"old checkpoints in {self.root} could not be deleted: {_reason(error)}")
        return ""

    def _on_first(self, action: Callable[[], None]) -> None:
        """Does something on rank 0; its failure is a failure of all."""
        failure = [""]
        if self._rank == 0:
            try:
                action()
            except Exception as error:
                failure = [_reason(error)]
        if self._group:
            dist.broadcast_object_list(failure, src=0, group=self._group)
        if failure[0]:
            raise _Agreed(failure[0])

    def _gathered(self, value: Any) -> list[Any]:
        values = [value] * self._world
        if self._group:
            dist.all_gather_object(values, value, group=self._group)
        return values


def load(
    folder: Place, *, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: torch.nn.Module | None
) -> None:
    """Restores in place; every rank calls this. Learning rate, betas and weight decay stay those of the optimizer.

    Raises:
        UserError: the files do not fit the model, naming what differs.
    """
    if zero.is_engine(model):
        _read(folder, zero.rest(model.module, ema))
        zero.load_engine(model, folder, storage.read_meta(folder)["world_size"])
        return
    state = state_of(model, optimizer, ema)
    _refuse_other_optimizer(folder, state["optimizer"])
    _read(folder, state)
    set_model_state_dict(model, state["model"])
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    set_optimizer_state_dict(model, optimizer, state["optimizer"] | {"param_groups": groups})
    if ema is not None:
        set_model_state_dict(ema, state["ema"])


def _refuse_other_optimizer(folder: Place, state: dict[str, Any]) -> None:
    """Raises UserError where the state of a parameter is missing that is there itself."""
    described = tensors(folder)
    for path, _ in _leaves(state, ("optimizer",)):
        if ".".join(path) not in described and f"model.{path[-2]}" in described:
            then = storage.read_meta(folder).get("config", {}).get("opt", "another optimizer")
            raise UserError(
                f"{folder} has no {path[-1]} of {path[-2]}: it was made with --opt {then}, or with another --momentum "
                "or --freeze; use the same, or start a new --experiment with --resume-weights-only"
            )


def load_more(folder: Place, state: dict[str, dict[str, torch.Tensor]]) -> None:
    """Restores in place what `save` was given as `more`. Raises UserError where the checkpoint has not got it."""
    _read(folder, state)


def load_weights(folder: Place, *, model: torch.nn.Module, ema: torch.nn.Module | None) -> None:
    """Restores weights and their average and nothing else; a checkpoint without an average starts it at its weights.

    model, ema: the bare ones, before a strategy divides them; the checkpoint may be of any strategy.

    Raises:
        UserError: the files do not fit the model.
    """
    described = tensors(folder)
    averaged = any(name.startswith("ema.") for name in described)
    for module, part in ((model, "model"), (ema, "ema" if averaged else "model")):
        if module is None:
            continue
        own = {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}
        for name, tensor in own.items():
            if name not in described or described[name].size != tensor.shape:
                found = list(described[name].size) if name in described else "missing"
                raise UserError(
                    f"checkpoint {folder} does not fit this run: {name} is {found}, here {list(tensor.shape)}"
                )
        for name, tensor in read_tensors(folder, list(own)):
            own[name].copy_(tensor)


def tensors(folder: Place) -> dict[str, Any]:
    """{name of each tensor in a checkpoint, such as `model.head.fc.weight`: torch's TensorStorageMetadata}.

    Raises:
        UserError: what describes them is missing or damaged.
    """
    try:
        found = storage.reader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # a damaged pickle fails in many ways
        raise UserError(f"checkpoint {folder} is damaged: .metadata: {_reason(error)}") from error
    for name, shape in storage.read_meta(folder).get("shapes", {}).items():  # ZeRO-3 has them flat
        found[name].size = torch.Size(shape)
    return found


def read_tensors(folder: Place, wanted: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of each, in order, on the CPU; about GROUP bytes of them are in memory at a time, or the largest.

    Raises:
        UserError: a file is missing or damaged.
    """
    described, flat = tensors(folder), storage.read_meta(folder).get("shapes", {})
    group: dict[str, torch.Tensor] = {}
    for name in wanted:
        size, dtype = described[name].size, described[name].properties.dtype
        group[name] = torch.empty(size.numel() if name in flat else size, dtype=dtype)
        if sum(tensor.nbytes for tensor in group.values()) >= GROUP:
            _read(folder, group)
            yield from _shaped(group, described)
            group = {}
    if group:
        _read(folder, group)
        yield from _shaped(group, described)


def _shaped(group: dict[str, torch.Tensor], described: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    return ((name, tensor.view(described[name].size)) for name, tensor in group.items())


def _read(folder: Place, state: dict[str, Any]) -> None:
    tensors(folder)
    try:
        dcp.load(state, storage_reader=storage.reader(folder))
    except (dcp.api.CheckpointException, Exception) as error:  # the former is no Exception
        raise UserError(f"checkpoint {folder} does not fit this run or is damaged: {_reason(error)}") from error


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: torch.nn.Module | None) -> dict[str, Any]:
    """{"model", "optimizer", "ema"}: nested dicts of tensors that share memory with the run's own."""
    state = {"model": get_model_state_dict(model), "ema": get_model_state_dict(ema) if ema is not None else {}}
    return state | {"optimizer": {"state": get_optimizer_state_dict(model, optimizer)["state"]}}


def share(state: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    """What this rank writes of nested dicts: all that is sharded, and its part of what every rank has whole.

    The whole tensors go, largest first, each to the rank that has the fewest bytes so far.
    """
    leaves = dict(_leaves(state))
    whole = {path: t.nbytes for path, t in leaves.items() if not isinstance(t, DTensor)}
    load, owner = [0] * world, {}
    for path in sorted(whole, key=lambda path: (-whole[path], path)):
        owner[path] = load.index(min(load))
        load[owner[path]] += whole[path]
    mine: dict[str, Any] = {}
    for path, tensor in leaves.items():
        if owner.get(path, rank) == rank:
            inner = mine
            for key in path[:-1]:
                inner = inner.setdefault(key, {})
            inner[path[-1]] = tensor
    return mine


def _leaves(state: dict[str, Any], path: tuple[str, ...] = ()):
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _leaves(value, (*path, key))
        else:
            assert isinstance(value, torch.Tensor), f"{(*path, key)} is a {type(value).__name__}, not a tensor"
            yield (*path, key), value


class HostCopy:
    """Host memory that is kept from one checkpoint to the next: pinned for a GPU, and without page faults on a CPU.

    As torch's BlockingAsyncStager does it, which cannot do without pinned memory; DefaultStager of torch 2.11 keeps
    nothing and cannot be used twice.
    """

    def __init__(self):
        self._memory: dict[str, Any] = {}
        self._kinds: list[tuple] = []

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """The tensors as they are now; the copy before is overwritten."""
        kinds = [(path, tensor.shape, tensor.dtype) for path, tensor in _leaves(state)]
        gpu = any(tensor.is_cuda for _, tensor in _leaves(state))
        if kinds != self._kinds:
            self._memory, self._kinds = _create_cpu_state_dict(state, pin_memory=gpu), kinds
        _copy_state_dict(state, self._memory, non_blocking=gpu)
        if gpu:
            torch.cuda.synchronize()
        return self._memory


def _reason(error: BaseException) -> str:
    """One line; of several ranks' failures the first."""
    for rank, (cause, _) in sorted(getattr(error, "failures", {}).items()):
        return f"rank {rank}: {_reason(cause)}"
    text = " ".join(str(error).split())
    return (
        text[:300] if isinstance(error, UserError | RuntimeError) and text else f"{type(error).__name__}: {text}"[:300]
    )
