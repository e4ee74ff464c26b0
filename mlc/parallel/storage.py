"""Where checkpoints lie: a folder, or any URL that fsspec can write (`s3://`, `gs://`, ...).

    ROOT/step-00000500/
        __0_0.distcp  __1_0.distcp  .metadata     the tensors, by torch.distributed.checkpoint
        meta.json                                 written last: without it this is no checkpoint

A folder is built under another name and renamed when it is whole. A URL has no rename; there `meta.json` alone is the
publication. It holds size and sha256 of every other file, taken while they were written, so that a byte which flips
later is found. Nothing that is read here can run code: torch's own reader unpickles `.metadata`, this one allows in it
only what a checkpoint consists of.
"""

import hashlib
import json
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from shards.console import UserError
from shards.json_text import to_json
from shards.urls import is_url, redact

try:
    from torch.distributed.checkpoint.fsspec_filesystem import FsspecReader, FsspecWriter
except ImportError:  # its name in torch 2.11
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

Place = Path | str  # a local folder or file, or a URL
META = "meta.json"
STEP = re.compile(r"step-(\d{8,})")
BLOCK = 8 << 20  # bytes read at a time


# ---- files -----------------------------------------------------------------------------------------------------------


def place(text: Place) -> Place:
    """A path, or a URL that can be opened and has no secret in it.

    Raises:
        UserError: an unknown kind of URL, a missing package, a password in the URL.
    """
    if not is_url(text):
        return Path(text)
    url = str(text).rstrip("/")
    if "@" in url.partition("://")[2].partition("/")[0] or "?" in url or "#" in url:
        raise UserError(
            f"{redact(url)}: no user, password or query in a URL, it would end up in logs; credentials come from the "
            "environment (AWS_*)"
        )
    try:
        _files(url)
    except ValueError as error:
        raise UserError(f"{redact(url)}: unknown kind of URL ({error})") from error
    except ImportError as error:
        raise UserError(f'{url}: URLs need more packages: pip install "mlc[remote]" ({error})') from error
    return url


def at(folder: Place, *names: str) -> Place:
    return folder.joinpath(*names) if isinstance(folder, Path) else "/".join([folder, *names])


def name_of(file: Place) -> str:
    return str(file).rpartition("/")[2]


def names(folder: Place) -> list[str]:
    """What lies in a folder, sorted; nothing where there is no folder."""
    files = _files(folder)
    files.invalidate_cache()
    try:
        return sorted({name_of(path.rstrip("/")) for path in files.ls(str(folder), detail=False)})
    except (FileNotFoundError, NotADirectoryError):
        return []


def sizes(folder: Place) -> dict[str, int]:
    """Bytes of each file below a folder, {path in it: size}."""
    files, root = fsspec.core.url_to_fs(str(folder))
    files.invalidate_cache()
    found = files.find(root, detail=True)
    return {path.removeprefix(root.rstrip("/") + "/"): info["size"] for path, info in found.items()}


def described(folder: Path, *, part: int, parts: int) -> dict[str, dict[str, Any]]:
    """{path: {"bytes", "sha256"}} of each `parts`-th file below a folder from number `part` on; as `writer` returns."""
    found = sorted(sizes(folder).items())[part::parts]
    return {name: {"bytes": size, "sha256": sha256(at(folder, name))} for name, size in found}


def delete(folder: Place) -> None:
    """`meta.json` goes first: what is left of an interrupted deletion must not look like a checkpoint."""
    files = _files(folder)
    for path, recursive in ((at(folder, META), False), (folder, True)):
        with suppress(FileNotFoundError):
            files.rm(str(path), recursive=recursive)


def sha256(file: Place) -> str:
    digest = hashlib.sha256()
    with _files(file).open(str(file), "rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _files(folder: Place) -> fsspec.AbstractFileSystem:
    return fsspec.core.url_to_fs(str(folder))[0]


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Place) -> int:
    return int(STEP.fullmatch(name_of(folder))[1])


def complete(root: Place) -> list[Place]:
    """The complete checkpoints below a folder, oldest first."""
    found = [at(root, name) for name in names(root) if STEP.fullmatch(name)]
    return sorted((folder for folder in found if META in names(folder)), key=step_of)


def read_meta(folder: Place) -> dict[str, Any]:
    """Raises UserError where `meta.json` is missing or damaged."""
    try:
        meta = json.loads(_files(folder).cat_file(str(at(folder, META))))
        if isinstance(meta, dict):
            return meta
        reason = "not an object"
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
    raise UserError(f"{folder}: its {META} is missing or damaged ({reason})")


def damage(folder: Place, *, contents: bool = True, part: int = 0, parts: int = 1) -> str:
    """What is wrong with the files of a checkpoint, or ''.

    Sizes are compared for all files; the sha256 too if `contents`, for each `parts`-th file from number `part` on, so
    that several processes can share the reading. A checkpoint without a list of files is an older one: not compared.
    """
    try:
        expected = read_meta(folder).get("files", {})
        found = sizes(folder)
        for name, file in expected.items():
            if name not in found:
                return f"{name} is missing"
            if found[name] != file["bytes"]:
                return f"{name} has {found[name]} bytes instead of {file['bytes']}"
        for name in sorted(expected)[part::parts] if contents else ():
            if sha256(at(folder, name)) != expected[name]["sha256"]:
                return f"{name} is not what was written (its sha256 differs)"
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error}"
    return ""


def building_place(folder: Place) -> Place:
    """Where a checkpoint is built: beside its folder, or in place where nothing can be renamed."""
    return folder.with_name(f".{folder.name}.tmp") if isinstance(folder, Path) else folder


def begin(building: Place) -> None:
    """An empty place to build in, whatever an earlier try left there."""
    delete(building)
    if isinstance(building, Path):
        building.mkdir(parents=True)


def publish(building: Place, folder: Place, meta: dict[str, Any]) -> None:
    text = to_json(meta, indent=1)
    if not isinstance(building, Path):
        _files(building).pipe_file(at(building, META), text.encode())
        return
    with open(building / META, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    delete(folder)
    building.rename(folder)


def prune(root: Place, keep: int) -> list[Place]:
    """Deletes all but the newest `keep` complete checkpoints and returns them."""
    old = complete(root)[:-keep]
    for folder in old:
        delete(folder)
    return old


def tidy(root: Place, newest: int) -> None:
    """Deletes what a crash left half-written, and checkpoints after step `newest`.

    Those are of a run that was given up by resuming before them; the next `--resume auto` must not go on from them.
    """
    kept = {name_of(folder) for folder in complete(root) if step_of(folder) <= newest}
    for name in names(root):
        if name not in kept and STEP.fullmatch(name.removeprefix(".").removesuffix(".tmp")):
            delete(at(root, name))


# ---- torch's readers and writers -------------------------------------------------------------------------------------


def writer(folder: Place, *, staged: bool) -> tuple[FileSystemWriter, dict[str, dict[str, Any]]]:
    """(torch's writer for a folder or URL, what this process wrote: {file name: {"bytes", "sha256"}}).

    `staged`: all tensors lie in host memory, so that the writing thread has no reason to talk to a GPU.
    """
    ahead = {"per_thread_copy_ahead": 0} if staged else {}
    if isinstance(folder, Path):
        made = FileSystemWriter(folder, **ahead)
    else:
        made = FsspecWriter(folder, sync_files=False, **ahead)
    files, create_stream = {}, made.fs.create_stream

    @contextmanager
    def watched(path: Place, mode: str) -> Iterator[Any]:
        with create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            watching = _Watched(stream)
            yield watching
            if watching.error:
                raise watching.error
        files[name_of(path).removesuffix(".tmp")] = {"bytes": watching.bytes, "sha256": watching.sha.hexdigest()}

    made.fs.create_stream = watched
    return made, files


class _Watched:
    """A file that is written in one go: counts and hashes what passes.

    The first error is kept until the end and nothing more is written: torch's C++ archive writer sits above, and it
    answers an exception in the middle with a second one while it closes.
    """

    def __init__(self, stream):
        self._stream = stream
        self.sha, self.bytes, self.error = hashlib.sha256(), 0, None

    def write(self, data) -> int:
        size = memoryview(data).nbytes
        if self.error is None:
            try:
                self._stream.write(data)
            except OSError as error:
                self.error = error
        self.sha.update(data)
        self.bytes += size
        return size

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self.error = error

    def fileno(self) -> int:
        return self._stream.fileno()

    def close(self) -> None:
        if self.error is None:
            self._stream.close()


def reader(folder: Place) -> FileSystemReader:
    return _LocalReader(folder) if isinstance(folder, Path) else _UrlReader(folder)


class _SafeMetadata:
    def read_metadata(self, *args, **kwargs):
        with self.fs.create_stream(self.fs.concat_path(self.path, ".metadata"), "rb") as file:
            return _Unpickler(file).load()


class _LocalReader(_SafeMetadata, FileSystemReader):
    pass


class _UrlReader(_SafeMetadata, FsspecReader):
    pass


class _Unpickler(pickle.Unpickler):
    """Only the plain records that describe a checkpoint."""

    MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    RECORDS = (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
        "_StorageInfo",
    )
    OTHERS = (("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"))
    PATHS = ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")

    def find_class(self, module: str, name: str):
        record = module in self.MODULES and name in self.RECORDS
        path = module.partition(".")[0] == "pathlib" and name in self.PATHS
        dtype = module == "torch" and re.fullmatch(r"(bfloat|float|uint|int|bool|complex)\w*", name)
        if record or path or dtype or (module, name) in self.OTHERS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a checkpoint has no business with {module}.{name}")
