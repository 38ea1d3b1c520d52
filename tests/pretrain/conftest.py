"""Fixtures: the data of small runs, a process group of one rank, full disks, an S3 server, and uploads."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import from_url

from parallel import process
from parallel.process import World
from pretrain.checkpoint_config import CheckpointConfig
from pretrain.checkpoint_store import CheckpointStore
from pretrain.checkpoints import Checkpoints
from pretrain.uploads import Uploads
from tests.training_cases import make_data
from tests.upload_cases import Asked, Opened, Told, never_asked


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of training and held-out text, as `make_data` makes them; shared by a file's tests, which alter copies."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """This process as the only rank, for a file's tests."""
    alone = process.initialize("cpu")
    yield alone
    process.shutdown()


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """mount_disk("1m"): a folder with a file system of that size; skips where mounting is not allowed."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"mounting a small tmpfs is not allowed here: {result.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of moto's server, as a process of its own."""
    log = tmp_path_factory.mktemp("moto") / "log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", "from moto.server import main; main(['-p', '0'])"], stdout=output, stderr=output
        )
    try:
        deadline, before = time.monotonic() + 60, "Running on http://127.0.0.1:"
        while before not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield "http://127.0.0.1:" + log.read_text().partition(before)[2].split()[0]
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bytes], object]:
    """A bucket `data`, with the environment that a client needs for it; what puts an object there."""
    for name, value in {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    headers = {"Authorization": "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request"}
    urllib.request.urlopen(urllib.request.Request(f"{s3}/data", b"", headers, method="PUT")).close()
    store = from_url("s3://data", client_options={"allow_http": True})
    return lambda name, content: obstore.put(store, name, content)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "store")


@pytest.fixture
def here(tmp_path: Path, world: World) -> Checkpoints:
    """Of a run's folder."""
    return Checkpoints(tmp_path / "here" / "checkpoints", 2, world)


@pytest.fixture
def opened(store: CheckpointStore, told: Told) -> Opened:
    def make(checkpoints: Checkpoints, asked: Asked = never_asked, **fields: Any) -> Uploads:
        config = CheckpointConfig(upload=Path(store.location), **fields)
        return Uploads(checkpoints, store, config, told, lambda _: None, asked)

    return make
