"""Far shards: whatever a server does, the bytes are those that were packed, or one line says what is wrong."""

import multiprocessing
import os
import pickle
import shutil
import signal
import threading
import time
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from server import Server

from mlc.data import remote
from mlc.data.reader import TarReader
from mlc.data.remote import CachedReader, RangeReader, ShardCache, open_reader
from shards import owner, urls
from shards.console import UserError
from shards.dataset import load_dataset, open_index
from shards.image import BadImage

fork = multiprocessing.get_context("fork")
# This process has threads: a child forked while one of them holds a lock may wait for ever.
fresh = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module", autouse=True)
def impatient():
    """Once for all: connections are set up with these, and a filesystem that is thrown away takes a second to close."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(urls, "FIRST_WAIT", 0.005)
        patch.setattr(urls, "LONGEST_WAIT", 0.01)
        patch.setattr(urls, "SILENT_SECONDS", 0.5)
        patch.setattr(urls, "CHUNK", 20_000)
        patch.setattr(remote, "WAIT_SECONDS", 0.02)
        patch.setenv("NO_PROXY", "127.0.0.1")
        urls._open_filesystem.cache_clear()
        yield
    urls._open_filesystem.cache_clear()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def server(shards):
    with Server(shards) as server:
        yield server
        server.shutdown()


@pytest.fixture
def local(shards):
    return TarReader(open_index(load_dataset(shards), "train"))


def far_index(server: Server):
    return open_index(load_dataset(server.url + "/"), "train")


def everything(reader: TarReader) -> list[bytes]:
    return [reader.read(row) for row in range(len(reader))]


# ---- range requests --------------------------------------------------------------------------------------------------


def test_a_url_gives_the_bytes_of_the_folder(server, local):
    reader = open_reader(far_index(server))
    assert isinstance(reader, RangeReader) and everything(reader) == everything(local)
    assert [reader.name(3), reader.image_id(3)] == [local.name(3), local.image_id(3)]
    assert load_dataset(server.url).fingerprint == load_dataset(server.folder).fingerprint
    images = [asked for name, asked in server.log if name.endswith(".tar")]
    assert len(images) == len(reader)
    assert images[0] == f"bytes={reader.index.offset[0]}-{reader.index.offset[0] + reader.index.size[0] - 1}"


@pytest.mark.parametrize(
    "faults",
    [
        ["500"],
        ["503", "429", "502"],
        ["drop at once"] * 3,
        ["drop in the middle", "500", "drop in the middle"],
        ["short"],
        ["flipped", "500"],
        ["stall"],
        ["slow"],
    ],
)
def test_faults_that_pass_change_nothing(server, local, faults):
    reader = open_reader(far_index(server))
    server.faults = list(faults)
    assert reader.read(0) == local.read(0) and not server.faults


@pytest.mark.parametrize(
    "faults, error, words",
    [
        (["500"] * 99, UserError, "12 tries failed.*500"),
        (["short"] * 99, BadImage, "ends inside this image; it is truncated"),
        (["404"] * 99, UserError, "there is no such file"),
        (["403"] * 99, UserError, "access denied; credentials come from the environment"),
        (["416"] * 99, BadImage, "ends inside this image; it is truncated"),
        (["flipped"] * 99, BadImage, "the image has changed"),
    ],
)
def test_faults_that_stay_end_in_one_line(server, faults, error, words):
    reader = open_reader(far_index(server))
    server.faults = list(faults)
    with pytest.raises(error, match=words) as caught:
        reader.read(0)
    assert "\n" not in str(caught.value)
    assert len(server.faults) >= 99 - urls.TRIES


def test_a_batch_that_is_expected_arrives_side_by_side(server, local):
    reader = open_reader(far_index(server))
    server.faults = ["late"] * 15
    reader.expect(range(1, 16))
    batch = [reader.read(row) for row in range(1, 16)]
    assert server.most_waiting >= 8
    assert batch == [local.read(row) for row in range(1, 16)] and len(server.log) < 25
    assert reader.read(20) == local.read(20)  # one that nobody expected


def test_a_reader_works_after_a_fork_and_a_pickle(server, local):
    reader = open_reader(far_index(server))
    reader.expect([0, 1])
    assert reader.read(0) == local.read(0)
    copy = pickle.loads(pickle.dumps(reader))
    assert copy.read(5) == local.read(5)
    with fork.Pool(2) as pool:
        assert pool.map(reader.read, range(8)) == [local.read(row) for row in range(8)]


def test_a_server_without_ranges_is_found_out_before_training(shards, tmp_path, local):
    with Server(shards, ranges=False) as server:
        index = far_index(server)
        with pytest.raises(UserError, match="ignores range requests; --cache-dir DIR"):
            open_reader(index)
        server.faults = ["drop in the middle", "short"]
        reader = open_reader(index, cache_dir=tmp_path / "cache")
        assert everything(reader) == everything(local)
        assert sum(name.endswith(".tar") for name, _ in server.log) == len(index.shards) + 2
        server.shutdown()


# ---- dataset.json and the index --------------------------------------------------------------------------------------


def test_the_index_is_fetched_once_and_again_when_it_changes(shards, tmp_path):
    with Server(shutil.copytree(shards, tmp_path / "shards")) as server:
        server.faulty, server.faults = r"\.arrow|\.json", ["500", "short", "", "stall", "drop at once"]
        assert far_index(server).path == far_index(server).path
        fetched = len([name for name, _ in server.log if name == "train.arrow"])
        far_index(server)
        assert len([name for name, _ in server.log if name == "train.arrow"]) == fetched
        before = far_index(server).path
        os.utime(server.folder / "train.arrow", (1, 1))
        assert far_index(server).path != before
        server.shutdown()


@pytest.mark.parametrize("path", ["/nowhere", "/data/nothing"])
def test_a_wrong_url_is_one_line_soon(server, path):
    begin = time.perf_counter()
    with pytest.raises(UserError, match="there is no such file"):
        load_dataset(server.url + path)
    port = server.server_port + 1 if server.server_port < 65_000 else 1
    with pytest.raises(UserError, match="4 tries failed"):
        load_dataset(f"http://127.0.0.1:{port}")
    assert time.perf_counter() - begin < 3


@pytest.mark.parametrize(
    "url, words",
    [
        ("https://me:hunter2@host/data", r"https://\*\*\*@host/data: no user or password in a URL"),
        ("https://host/data?X-Amz-Signature=hunter2", r"https://host/data\?\*\*\*: .*has no query"),
        ("s3://key:hunter2@bucket/data", r"s3://\*\*\*@bucket/data: no user"),
        ("ftp://me:hunter2@host/data", r"ftp://\*\*\*@host/data: unknown kind of URL"),
        ("htp://host/data", r"did you mean http"),
    ],
)
def test_secrets_in_a_url_are_refused_and_never_repeated(url, words):
    with pytest.raises(UserError, match=words) as error:
        load_dataset(url)
    assert "hunter2" not in str(error.value)


def test_messages_of_libraries_are_redacted():
    text = "GET 'https://u:hunter2@cdn/x.tar?X-Amz-Signature=hunter2' -> https://cdn/y#hunter2, bytes=1-2?"
    assert urls.redact(text) == "GET 'https://***@cdn/x.tar?***' -> https://cdn/y?*** bytes=1-2?"


@pytest.mark.parametrize("name", ["../secret.tar", "/etc/passwd", "http://other/x.tar", "a//b.tar", "x.tar?token=1"])
def test_a_data_set_from_outside_names_only_files_of_its_own(shards, tmp_path, name):
    folder = shutil.copytree(shards, tmp_path / "shards")
    text = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(text.replace("train-000000.tar", name))
    with Server(folder) as server:
        with pytest.raises(UserError, match="names a file outside its folder"):
            load_dataset(server.url)
        server.shutdown()


# ---- the cache -------------------------------------------------------------------------------------------------------


def cached_files(folder: Path, suffix: str = ".tar") -> list[Path]:
    return [path for path in (folder / "shards").iterdir() if path.suffix == suffix]


def test_every_shard_is_downloaded_once(server, local, tmp_path):
    reader = open_reader(far_index(server), cache_dir=tmp_path)
    assert isinstance(reader, CachedReader) and everything(reader) == everything(local)
    requests = len(server.log)
    assert everything(open_reader(far_index(server), cache_dir=tmp_path)) == everything(local)
    assert sum(name.endswith(".tar") for name, _ in server.log[requests:]) == 0
    assert len(cached_files(tmp_path)) == len(reader.index.shards)


def test_local_shards_can_be_cached_too(local, shards, tmp_path):
    reader = open_reader(local.index, cache_dir=tmp_path)
    assert everything(reader) == everything(local) and len(cached_files(tmp_path)) == len(local.index.shards)


def test_a_download_goes_on_after_every_kind_of_fault(server, local, tmp_path):
    server.faults = ["drop in the middle", "500", "short", "drop at once", "stall", "", "", "503"]
    assert everything(open_reader(far_index(server), cache_dir=tmp_path)) == everything(local)
    assert not server.faults


def test_a_download_that_arrived_damaged_is_done_again_and_another_file_is_refused(server, local, tmp_path):
    server.faults = ["flipped"]
    assert everything(open_reader(far_index(server), cache_dir=tmp_path)) == everything(local)
    server.faults = ["flipped"] * 99
    with pytest.raises(UserError, match=r"train-000000\.tar is not the file that was packed"):
        open_reader(far_index(server), cache_dir=tmp_path / "other").read(0)
    assert not cached_files(tmp_path / "other") and not cached_files(tmp_path / "other", ".part")


def test_the_cache_stays_below_its_bound_and_forgets_the_longest_unused(server, local, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "TOUCH_SECONDS", 0)
    sizes = sorted(shard.size for shard in local.index.shards)
    room = sizes[-1] + sizes[-2]
    reader = open_reader(far_index(server), cache_dir=tmp_path, cache_gb=room / 1e9)
    first = [int(np.flatnonzero(local.index.shard == shard)[0]) for shard in range(3)]

    def downloads(*shards: int) -> list[str]:
        server.log.clear()
        for shard in shards:
            time.sleep(0.01)
            assert reader.read(first[shard]) == local.read(first[shard])
            assert sum(path.stat().st_size for path in cached_files(tmp_path)) <= room
        return list(dict.fromkeys(name for name, _ in server.log))

    assert downloads(0, 1, 0, 2) == ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert downloads(0, 2) == []  # 1 went, since 0 was used after it
    assert downloads(1, 2) == ["train-000001.tar"]
    with pytest.raises(UserError, match=r"--cache-gb 1e-05 is smaller than the shard train-000000.tar \("):
        open_reader(local.index, cache_dir=tmp_path / "small", cache_gb=1e-5).read(0)


def checksum(reader: TarReader, rows) -> int:
    """The same for every order of the same rows and bytes."""
    return sum(zlib.crc32(reader.read(int(row))) * (int(row) + 1) for row in rows)


def read_all(url: str, cache: Path, gb: float, rows: range, seed: int) -> int:
    """In a process of its own: these rows in an order of its own; returns a checksum of the bytes."""
    reader = open_reader(open_index(load_dataset(url, cache_dir=cache), "train"), cache_dir=cache, cache_gb=gb)
    return checksum(reader, np.random.default_rng(seed).permutation(rows))


def test_processes_share_a_cache_and_download_a_shard_once(server, local, tmp_path):
    expected = checksum(local, range(len(local)))
    with fresh.Pool(4) as pool:
        results = pool.starmap(read_all, [(server.url, tmp_path, 1.0, range(len(local)), seed) for seed in range(4)])
    assert results == [expected] * 4
    asked = Counter(entry for entry in server.log if entry[0].endswith(".tar"))
    assert set(asked.values()) == {1}


def test_processes_share_a_cache_that_is_too_small(server, local, tmp_path):
    expected = checksum(local, range(70, 90))
    biggest = max(shard.size for shard in local.index.shards)
    with fresh.Pool(2) as pool:
        results = pool.starmap(
            read_all, [(server.url, tmp_path, 1.5 * biggest / 1e9, range(70, 90), seed) for seed in range(2)]
        )
    assert results == [expected] * 2 and sum(path.stat().st_size for path in cached_files(tmp_path)) <= 1.5 * biggest


def test_a_kill_in_mid_download_leaves_nothing_false_and_the_next_goes_on(server, local, tmp_path):
    server.faults = [""] * 3 + ["slow"] * 20
    child = fork.Process(target=read_all, args=(server.url, tmp_path, 1.0, range(9), 0))
    child.start()
    deadline = time.time() + 300
    while not (parts := list(tmp_path.glob("shards/*.part"))) or not parts[0].stat().st_size:
        assert time.time() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    left = parts[0].stat().st_size
    assert left >= 20_000 and not cached_files(tmp_path)
    server.faults, server.log[:] = [], []
    reader = open_reader(far_index(server), cache_dir=tmp_path)
    assert everything(reader) == everything(local)
    assert any(asked.startswith(f"bytes={left}-") for name, asked in server.log if name.endswith(".tar"))


def test_an_abandoned_part_makes_room_and_a_living_one_does_not(local, tmp_path):
    biggest = max(shard.size for shard in local.index.shards)
    folder = tmp_path / "shards"
    folder.mkdir()
    part = folder / f"{'0' * 24}.{biggest}.part"
    part.touch()
    reader = CachedReader(local.index, ShardCache(folder, biggest))
    with owner.owned(folder / f"{'0' * 24}.tar.lock"):
        thread = threading.Thread(target=reader.read, args=(0,))
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and part.exists()  # waits for the other download
    thread.join(5)
    assert not thread.is_alive() and not part.exists() and len(cached_files(tmp_path)) == 1


def test_a_hostile_sha256_is_no_path(local, tmp_path):
    local.index.shards = tuple(replace(shard, sha256="../" * 8) for shard in local.index.shards)
    with pytest.raises(UserError, match="no sha256 of this shard"):
        open_reader(local.index, cache_dir=tmp_path).read(0)


# ---- S3 --------------------------------------------------------------------------------------------------------------


def test_s3(shards, local, tmp_path, monkeypatch):
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    moto_server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto_server.start()
    host, port = moto_server.get_host_and_port()
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "an-id"),
        ("AWS_SECRET_ACCESS_KEY", "hunter2"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
        ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
    ):
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="pictures")
    for path in shards.iterdir():
        if path.is_file():
            client.upload_file(str(path), "pictures", f"demo/{path.name}")
    index = open_index(load_dataset("s3://pictures/demo"), "train")
    assert everything(open_reader(index)) == everything(local)
    assert everything(open_reader(index, cache_dir=tmp_path)) == everything(local)
    with pytest.raises(UserError, match=r"s3://pictures/other/dataset.json: there is no such file"):
        load_dataset("s3://pictures/other")
    moto_server.stop()
