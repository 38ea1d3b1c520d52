"""The cache of remote files: bounded, atomic, shared by processes, and never taking away what is read."""

import errno
import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pretrain.data import ShardSet
from pretrain.data.files import OpenFiles
from pretrain.data.format import FileEntry
from pretrain.data.stores import DamagedError, NoRoomError, StoreConfig
from pretrain.data.stores.cache import Cache
from pretrain.errors import UserError
from tests.data_cases import documents, make_shards, make_tokenizer
from tests.store_server import Fault, served

ROOT = Path(__file__).parents[2]
READER = """
import sys
from pretrain.data import ShardSet
from pretrain.data.stores import StoreConfig
shards = ShardSet.open(sys.argv[1], config=StoreConfig(cache_folder=sys.argv[2], store_timeout_seconds=60))
total = sum(int(shards.read(number).sum()) for number in range(shards.documents))
print(total)
"""


def content(number, size=1000):
    return bytes([number]) * size


def entry(number, size=1000):
    data = content(number, size)
    return FileEntry(name=f"file-{number}", sha256=hashlib.sha256(data).hexdigest(), bytes=size)


class Source:
    """Gives files, and counts how often."""

    def __init__(self):
        self.fetched = []

    def open(self, cache, number, size=1000, **options):
        def fetch():
            self.fetched.append(number)
            data = content(number, size)
            yield data[: size // 2]
            yield data[size // 2 :]

        return cache.open(entry(number, size), fetch, place=f"file {number}", **options)


@pytest.fixture
def cache(tmp_path):
    """Room for three files."""
    return Cache(tmp_path / "cache", 3500)


def names(cache):
    return {path.name for path in (cache.folder / "objects").iterdir()}


def use(cache, source, number, age):
    """Opens and closes a file, so that it was last used `age` seconds ago."""
    descriptor = source.open(cache, number)
    assert os.pread(descriptor, 2000, 0) == content(number)
    os.close(descriptor)
    os.utime(cache.path(entry(number)), (time.time() - age,) * 2)


def test_the_files_used_longest_ago_make_room(cache):
    source = Source()
    for number, age in ((1, 30), (2, 20), (3, 10)):
        use(cache, source, number, age)
    use(cache, source, 1, 0)  # used again, and not fetched again
    assert source.fetched == [1, 2, 3]
    use(cache, source, 4, 0)
    assert names(cache) == {entry(number).sha256 for number in (1, 3, 4)}
    assert sum(path.stat().st_size for path in (cache.folder / "objects").iterdir()) <= cache.limit


def test_what_is_read_is_not_removed(cache):
    source = Source()
    held = [source.open(cache, number) for number in (1, 2)]
    use(cache, source, 3, 0)
    use(cache, source, 4, 0)  # takes the place of 3, younger than 1 and 2
    assert names(cache) == {entry(number).sha256 for number in (1, 2, 4)}
    held.append(source.open(cache, 4))
    with pytest.raises(NoRoomError, match=r"file 5: 1000 bytes do not fit .* 3000 of 3500 are in use; raise data"):
        source.open(cache, 5)
    assert len(names(cache)) == 3
    os.close(source.open(cache, 5, bounded=False))
    os.close(held.pop(0))
    use(cache, source, 6, 0)
    assert entry(1).sha256 not in names(cache)
    for number, descriptor in zip((2, 4), held, strict=True):
        assert os.pread(descriptor, 2000, 0) == content(number)
        os.close(descriptor)


def test_a_file_larger_than_the_cache_is_not_kept(cache):
    with pytest.raises(NoRoomError, match="4000 bytes do not fit"):
        Source().open(cache, 1, 4000)
    assert names(cache) == set()


def test_a_wrong_hash_is_tried_once_more_and_leaves_nothing(cache):
    fetched = []

    def fetch():
        fetched.append(1)
        yield content(2)

    with pytest.raises(DamagedError, match=f"x: damaged: expected sha256 {entry(1).sha256}, found {entry(2).sha256}"):
        cache.open(entry(1), fetch, place="x")
    assert len(fetched) == 2
    assert names(cache) == set()


def test_a_failed_fetch_leaves_nothing(cache):
    def fetch():
        yield content(1)[:10]
        raise UserError("gone")

    with pytest.raises(UserError, match="gone"):
        cache.open(entry(1), fetch, place="x")
    assert names(cache) == set()
    use(cache, Source(), 1, 0)


def test_what_a_killed_process_left_is_removed_or_taken_over(cache):
    source = Source()
    for number in (1, 2):
        partial = cache.path(entry(number)).with_name(entry(number).sha256 + ".partial")
        partial.write_bytes(bytes(1000))
        os.utime(partial, (0, 0))
    use(cache, source, 2, 0)
    for number in (3, 4):
        use(cache, source, number, 0)
    assert names(cache) == {entry(number).sha256 for number in (2, 3, 4)}


def test_a_kept_file_of_another_size_is_fetched_again(cache, caplog):
    source = Source()
    use(cache, source, 1, 0)
    os.truncate(cache.path(entry(1)), 10)
    use(cache, source, 1, 0)
    assert source.fetched == [1, 1]
    assert "expected 1000 bytes, found 10: removed" in caplog.text


def test_threads_that_want_the_same_files_fetch_each_once(tmp_path):
    cache, source = Cache(tmp_path / "cache", 1 << 20), Source()
    errors = []

    def work(seed):
        for number in np.random.default_rng(seed).permutation(20):
            descriptor = source.open(cache, int(number), 9000)
            if os.pread(descriptor, 10_000, 0) != content(int(number), 9000):
                errors.append(number)
            os.close(descriptor)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [None] * 4, "an exception of a thread is raised here"
    assert not errors
    assert sorted(source.fetched) == list(range(20))


def test_threads_in_a_cache_that_is_too_small_read_what_they_asked_for(cache):
    source, errors = Source(), []

    def work(seed):
        for number in np.random.default_rng(seed).integers(0, 6, 60):
            try:
                descriptor = source.open(cache, int(number))
            except NoRoomError:
                continue
            if os.pread(descriptor, 2000, 0) != content(int(number)):
                errors.append(number)
            os.close(descriptor)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [None] * 3, "an exception of a thread is raised here"
    assert not errors
    assert sum(path.stat().st_size for path in (cache.folder / "objects").iterdir()) <= cache.limit


@pytest.mark.parametrize("what", ["a file", "unlocked"])
def test_a_folder_that_cannot_be_used_is_named(tmp_path, what, monkeypatch):
    folder = tmp_path / "cache"
    if what == "a file":
        folder.write_text("mine")
    else:
        monkeypatch.setattr(fcntl, "flock", refuse_lock)
    with pytest.raises(UserError, match=rf"data\.cache_folder {folder}: cannot be used: .*; give a folder on the node"):
        Cache(folder, 1000)


def refuse_lock(*_):
    raise OSError(37, "No locks available")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    return make_shards(folder, make_tokenizer(folder), documents(60), shard_tokens=4000)


def reader(url, folder):
    command = [sys.executable, "-c", READER, url, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_of_a_node_share_one_fetch_and_outlive_one_that_is_killed(tmp_path, local):
    total = sum(int(local.read(number).sum()) for number in range(local.documents))
    first = local.manifest.shards[0].name
    with served(local.folder) as site:
        # Whoever is first to fetch the first shard hangs, and is killed: another takes over.
        site.faults[first] = [Fault(stall=100, stall_seconds=30)]
        processes = [reader(site.url, tmp_path / "cache") for _ in range(3)]
        deadline = time.monotonic() + 120
        while not site.ranges(first):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (victim,) = [process for process in processes if process.pid == fetching(tmp_path / "cache", processes)]
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        for process in processes:
            if process is not victim:
                output, message = process.communicate(timeout=120)
                assert (process.returncode, output.strip()) == (0, str(total)), message
        assert len(site.ranges(first)) == 2
        assert all(len(site.ranges(shard.name)) == 1 for shard in local.manifest.shards[1:])
    for process in processes:
        process.stdout.close()
        process.stderr.close()


def fetching(folder, processes):
    """The process that holds the lock of a partial file alone, by the kernel's own list."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        inodes = {str(path.stat().st_ino) for path in (folder / "objects").glob("*.partial")}
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if words[1] == "FLOCK" and words[3] == "WRITE" and words[5].rpartition(":")[2] in inodes:
                return int(words[4])
        time.sleep(0.02)
    raise AssertionError("nobody fetches")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KB."""
    if os.geteuid():
        pytest.skip("only root mounts a file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_cache_disk_is_read_past_loudly(small_disk, local, caplog):
    (small_disk / "other").write_bytes(bytes((256 << 10) - 70_000))
    config = StoreConfig(cache_folder=small_disk / "cache", store_timeout_seconds=10)
    with served(local.folder) as site:
        shards = ShardSet.open(site.url, "hashes", config=config)
        # With room for the index and the tokenizer, and no more.
        left = os.statvfs(small_disk)
        (small_disk / "filler").write_bytes(bytes(left.f_bavail * left.f_bsize))
        for number in range(local.documents):
            assert np.array_equal(shards.read(number), local.read(number))
        assert "read by byte ranges, since it cannot be kept" in caplog.text
        assert "its disk is full; free space, or give another data.cache_folder" in caplog.text
        shards.close()


def test_a_disk_without_room_for_the_index_is_named(small_disk, local):
    (small_disk / "other").write_bytes(bytes((256 << 10) - 8192))
    config = StoreConfig(cache_folder=small_disk / "cache", store_timeout_seconds=10)
    with served(local.folder) as site, pytest.raises(UserError, match=r"its disk is full; free space, or give another"):
        ShardSet.open(site.url, config=config)


def test_a_disk_smaller_than_the_limit_bounds_the_cache(small_disk):
    cache, source = Cache(small_disk / "cache", 1 << 30), Source()
    for number in range(8):
        descriptor = source.open(cache, number, 60_000)
        assert os.pread(descriptor, 60_000, 0) == content(number, 60_000)
        os.close(descriptor)
    assert 1 < len(names(cache)) < 5


def test_open_files_that_nobody_reads_make_room(tmp_path, local, caplog):
    manifest = local.manifest
    beside = sum(item.bytes for item in (manifest.index, manifest.token_bytes, manifest.tokenizer))
    limit = beside + 2 * max(shard.bytes for shard in manifest.shards)
    assert len(manifest.shards) > 2
    config = StoreConfig(cache_folder=tmp_path / "cache", cache_gigabytes=limit / 1e9, store_timeout_seconds=10)
    with served(local.folder) as site:
        shards = ShardSet.open(site.url, config=config)
        for number in range(local.documents):
            assert np.array_equal(shards.read(number), local.read(number))
        kept = [path.stat().st_size for path in (tmp_path / "cache" / "objects").iterdir()]
        assert sum(kept) <= limit and len(kept) >= 4
        assert all(site.ranges(shard.name) == [None] for shard in manifest.shards)
    assert "byte ranges" not in caplog.text


def test_a_file_of_another_user_is_left_and_the_cache_folder_named(tmp_path, monkeypatch):
    cache, source = Cache(tmp_path, 10_000), Source()
    os.close(source.open(cache, 1))
    path, os_open = cache.path(entry(1)), os.open

    def refuse(name, *arguments, **options):
        if Path(name) == path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return os_open(name, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr("pretrain.data.stores.cache.file_sha256", lambda name: os.close(os.open(name, os.O_RDONLY)))
    cache.discard_damaged(entry(1))
    assert path.exists()
    with pytest.raises(NoRoomError, match=rf"the cache {tmp_path} holds .*Permission denied; give each user"):
        source.open(cache, 1)
    assert source.fetched == [1]


def test_room_that_is_not_there_is_not_asked_for_at_every_read(monkeypatch):
    asked = []

    def refuse(number):
        asked.append(number)
        raise NoRoomError("full")

    files = OpenFiles(refuse)
    for _ in range(3):
        with pytest.raises(NoRoomError, match="full"):
            files.read(0, 1, 0)
    assert asked == [0, 0]  # once more after closing what is idle
    monkeypatch.setattr("pretrain.data.files.NO_ROOM_SECONDS", -1.0)
    for _ in range(2):
        with pytest.raises(NoRoomError, match="full"):
            files.read(1, 1, 0)
    assert asked == [0, 0, 1, 1, 1, 1]
