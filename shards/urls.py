"""Files behind `http(s)://`, `s3://` and `hf://`: byte ranges that are either exactly what was asked for or an error.

A training run reads millions of ranges over days, so a server that drops a connection, answers 503, stalls or stops in
mid-answer must cost a pause and nothing else. fsspec speaks the protocols; here are its timeouts, the patience, and the
care that no password of a URL reaches a message. Credentials come from the environment alone: AWS_*, HF_TOKEN, ~/.netrc
(or NETRC). Local paths never import any of this.
"""

import errno
import functools
import hashlib
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from shards import owner
from shards.console import UserError, did_you_mean, say

PROTOCOLS = ("http", "https", "s3", "hf")
TRIES, TRIES_AT_START, TRIES_WHEN_SHORT = 12, 4, 3  # a typing error must not take minutes to be reported
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between tries, doubling: two to three minutes of patience in all
CONNECT_SECONDS, SILENT_SECONDS, ANSWER_SECONDS = 10, 20, 120  # to connect, between two packets, for one range
CHUNK = 8 << 20  # bytes of one request of a download: small enough for ANSWER_SECONDS on a slow line
PASSING = (408, 425, 429)  # the only answers in the 400s that another try can change
ENDS_EARLY = "the file is shorter than the index says; it is truncated or another one"
LIBRARIES = ("aiohttp", "aiobotocore", "botocore", "httpx", "httpcore", "requests", "urllib3", "huggingface_hub")

Result = TypeVar("Result")


class RangeIgnored(UserError):
    """The server sends whole files whatever is asked for."""


class TooShort(UserError):
    """The file ends before the bytes that were asked for, also when asked again."""


class Shortened(OSError):
    """An answer with fewer bytes than were asked for."""


def is_url(path: str | Path) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", str(path)) is not None


def check_url(url: str) -> str:
    """The URL of a folder without its last slash.

    Raises:
        UserError: another protocol, or a secret in the URL; the message does not repeat the secret.
    """
    protocol, _, rest = url.partition("://")
    if protocol not in PROTOCOLS:
        raise UserError(
            f"{redact(url)}: unknown kind of URL; known: {', '.join(f'{name}://' for name in PROTOCOLS)}"
            f"{did_you_mean(protocol, PROTOCOLS)}"
        )
    if "?" in rest or "#" in rest:
        raise UserError(
            f"{redact(url)}: a data set's URL is a folder and has no query; a token in it would end up in logs: "
            "credentials come from the environment (AWS_*, HF_TOKEN, ~/.netrc)"
        )
    if "@" in rest.partition("/")[0]:
        raise UserError(
            f"{redact(url)}: no user or password in a URL, it would end up in logs; credentials come from the "
            "environment (AWS_*, HF_TOKEN, ~/.netrc)"
        )
    return url.rstrip("/")


def redact(text: str) -> str:
    """`text` with users, passwords and queries taken out of every URL in it."""
    text = re.sub(r"(://)[^/\s@'\"]*@", r"\1***@", text)
    return re.sub(r"(://[^\s?#'\"]*)[?#][^\s'\"]*", r"\1?***", text)


def check_names(url: str, names: list[str]) -> None:
    """Raises UserError where a data set from outside names a file that is not below its own folder."""
    for name in names:
        parts = name.split("/")
        if is_url(name) or "" in parts or ".." in parts or set(name) & set("\\?#"):
            raise UserError(f"{url}: its dataset.json names a file outside its folder: {redact(name)!r}")


def read_range(url: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file.

    Raises:
        UserError: what another try does not mend, or TRIES tries did not; RangeIgnored, TooShort: see there.
    """

    def once() -> bytes:
        data = _filesystem(url).cat_file(url, start=start, end=end)
        if len(data) > end - start:
            raise RangeIgnored(
                f"{url}: the server ignores range requests and sends the whole file; --cache-dir DIR downloads the "
                "shards instead"
            )
        if len(data) < end - start:
            raise Shortened(f"{len(data)} of {end - start} bytes from byte {start} on")
        return data

    return patiently(once, url) if end > start else b""


def read_file(url: str) -> bytes:
    """A small file, whole; the first contact, so less patient."""
    size, _ = identity(url)

    def once() -> bytes:
        data = _filesystem(url).cat_file(url)
        if size is not None and len(data) != size:
            raise Shortened(f"{len(data)} of {size} bytes")
        return data

    return patiently(once, url, TRIES_AT_START)


def identity(url: str) -> tuple[int | None, str]:
    """(bytes if the server says so, text that changes when the file does)."""

    def once() -> dict[str, Any]:
        filesystem = _filesystem(url)
        filesystem.invalidate_cache()
        return filesystem.info(url)

    info = patiently(once, url, TRIES_AT_START)
    marks = [f"{name}={info[name]}" for name in ("ETag", "LastModified", "Last-Modified", "blob_id") if info.get(name)]
    return info.get("size"), " ".join([str(info.get("size")), *marks])


def has_ranges(small_file: str) -> bool:
    """Whether the server of this file answers range requests; found out on a file that is cheap to send whole."""
    try:
        read_range(small_file, 0, 1)
    except RangeIgnored:
        return False
    return True


def download(url: str, to: Path, size: int | None, *, ranges: bool = True) -> None:
    """Brings `to` to the first `size` bytes of the file, going on from those it has; not atomic, see `mirror`.

    With `ranges` a dropped connection costs one chunk; without, or where the size is unknown, the file is sent whole.
    """
    if not ranges or size is None:
        patiently(lambda: _download_whole(url, to, size), url)
        return
    with open(to, "ab") as file:
        while (done := file.tell()) < size:
            file.write(read_range(url, done, min(size, done + CHUNK)))
        file.flush()
        os.fsync(file.fileno())


def _download_whole(url: str, to: Path, size: int | None) -> None:
    _filesystem(url, answer_seconds=None).get_file(url, str(to))
    if size is not None and to.stat().st_size != size:
        raise Shortened(f"{to.stat().st_size} of {size} bytes")


def mirror(url: str, folder: Path) -> Path:
    """A local copy of one file, fetched when it is not there or has changed; one process on a node fetches it."""
    size, mark = identity(url)
    stem, dot, ext = url.rpartition("/")[2].partition(".")
    path = folder / f"{stem}-{hashlib.sha256(mark.encode()).hexdigest()[:12]}{dot}{ext}"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with owner.owned(path.with_name(f"{path.name}.lock")):
        if not path.exists():
            part = path.with_name(f"{path.name}.part")
            part.unlink(missing_ok=True)  # nothing would find out that the rest of a killed download is damaged
            try:
                download(url, part, size)
            except RangeIgnored:
                part.unlink(missing_ok=True)
                download(url, part, size, ranges=False)
            part.replace(path)
    return path


def cache_home() -> Path:
    """Where the indexes of data sets behind URLs are kept without `--cache-dir`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlc"


def patiently(action: Callable[[], Result], url: str, tries: int = TRIES) -> Result:
    """What `action` returns, tried again with exponentially longer pauses while the failure may pass."""
    wait, tried, short = FIRST_WAIT, 0, 0
    while True:
        tried += 1
        try:
            return action()
        except Exception as raised:
            error = _cause(raised)
            reason = redact(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
            if hint := _permanent(error):
                raise (TooShort if hint is ENDS_EARLY else UserError)(f"{redact(url)}: {hint} ({reason})") from None
            if not _of_the_network(error):
                raise
            short += isinstance(error, Shortened)
            if short >= TRIES_WHEN_SHORT:
                raise TooShort(f"{redact(url)}: {ENDS_EARLY} ({reason})") from None
            if tried >= tries:
                raise UserError(f"{redact(url)}: {tried} tries failed, the last with {reason}") from None
        if wait == LONGEST_WAIT:
            say(f"{redact(url)}: {reason}; trying again (try {tried + 1} of {tries})")
        time.sleep(wait * random.uniform(0.5, 1))  # hundreds of workers must not come back at the same moment
        wait = min(2 * wait, LONGEST_WAIT)


def _cause(error: Exception) -> Exception:
    """fsspec's http says that there is no such file when it could not even connect."""
    hidden = isinstance(error, FileNotFoundError) and type(error.__cause__).__module__.startswith("aiohttp")
    return error.__cause__ if hidden else error


def _permanent(error: Exception) -> str:
    """What to do about a failure that another try does not mend; '' for the others."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "there is no such file"
    if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
        return "access denied; credentials come from the environment (AWS_*, HF_TOKEN, ~/.netrc)"
    if status == 416:
        return ENDS_EARLY
    if isinstance(error, ImportError):
        return 'reading URLs needs more packages: pip install "mlc[remote]"'
    if isinstance(status, int) and 400 <= status < 500 and status not in PASSING:
        return "the server refuses"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return "cannot be written here"
    return ""


def _of_the_network(error: Exception) -> bool:
    """Timeouts, dropped connections and answers of servers, as the libraries below fsspec raise them."""
    library = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError | EOFError) or library in LIBRARIES


def _filesystem(url: str, *, answer_seconds: float | None = ANSWER_SECONDS):
    return _open_filesystem(url.partition("://")[0], answer_seconds, os.getpid())


@functools.cache
def _open_filesystem(protocol: str, answer_seconds: float | None, process: int):
    """One per process, since neither connections nor event loops outlive a fork."""
    import fsspec

    if protocol.startswith("http"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=answer_seconds, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
        # Some servers compress what they send, which makes nonsense of ranges.
        return fsspec.filesystem(
            protocol,
            headers={"Accept-Encoding": "identity"},
            client_kwargs={"timeout": timeout, "trust_env": True},
            skip_instance_cache=True,
        )
    if protocol == "s3":
        config = {"connect_timeout": CONNECT_SECONDS, "read_timeout": SILENT_SECONDS}
        return fsspec.filesystem(protocol, config_kwargs=config, skip_instance_cache=True, use_listings_cache=False)
    return fsspec.filesystem(protocol)
