"""Token ids of 200 steps, stopped at step 100 and continued on other numbers of ranks and workers."""

import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from pretrain.data import Cursor, Division, ShardsConfig
from tests.data_cases import documents, make_shards, make_tokenizer

LENGTH, ROWS, STEPS, STOP, SEED = 16, 8, 200, 100, 7
STEP_BYTES = ROWS * LENGTH * 8

SECTIONS = {
    "streams": {"order": "streams", "reset_memory": True},
    "rows": {"order": "rows"},
    "documents, padded": {"order": "documents", "reset_memory": True},
    "best fit": {"packing": "best_fit", "reset_memory": True},
}
SETTINGS = [(2, 0), (1, 1), (8, 3)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two sets, each read through more than once in 200 steps, the smaller one up to its cap."""
    folder = tmp_path_factory.mktemp("sets")
    tokenizer = make_tokenizer(folder)
    web = make_shards(folder / "web", tokenizer, documents(36, seed=1, words=40))
    code = make_shards(folder / "code", tokenizer, documents(12, seed=2, words=40))
    assert ROWS * LENGTH * STEPS / 2 > 2 * web.tokens
    return {"web": {"train": web.folder, "weight": 0.55}, "code": {"train": code.folder, "weight": 0.45}}


def section(sources, name, workers):
    """With a cap where there can be one: lanes have none to go over to."""
    capped = {"streams": None}.get(name, 3)
    chosen = {key: {**value, "max_epochs": capped if key == "code" else None} for key, value in sources.items()}
    return ShardsConfig(sources=chosen, num_workers=workers, **SECTIONS[name])


def open_loader(config, world_size, rank, cursor):
    division = Division(LENGTH, 1, ROWS // world_size, rank, world_size)
    return config.open(SEED, grid=8).train.open_loader(division, cursor)


def ids_of(batches):
    """A rank's tokens of a step, int64 [rows, LENGTH]."""
    return np.concatenate([batch.tokens.numpy() for batch in batches])


def by_sample(ranks):
    """Tokens of all ranks [ranks, steps, rows, LENGTH] by step and global sample: [steps, ROWS, LENGTH]."""
    return np.stack(ranks, 2).reshape(len(ranks[0]), ROWS, LENGTH)


def read(config, world_size, steps, cursor=None):
    """Tokens of the steps by global sample, and the cursor behind them."""
    ranks = []
    for rank in range(world_size):
        with open_loader(config, world_size, rank, cursor) as loader:
            ranks.append(np.stack([ids_of(next(loader)) for _ in range(steps)]))
            behind = loader.cursor()
    return by_sample(ranks), Cursor.model_validate_json(behind.model_dump_json())


@pytest.mark.parametrize("name", SECTIONS)
def test_200_steps_are_the_same_when_they_go_on_on_other_ranks_and_workers(sources, name):
    whole, _ = read(section(sources, name, 2), 4, STEPS)
    first, cursor = read(section(sources, name, 2), 4, STOP)
    assert np.array_equal(first, whole[:STOP])
    assert any(source.epoch for source in cursor.sources.values())
    for world_size, workers in SETTINGS:
        found, behind = read(section(sources, name, workers), world_size, STEPS - STOP, cursor)
        assert np.array_equal(found, whole[STOP:]), (world_size, workers)
    epochs = [(cursor.sources[source].epoch, behind.sources[source].epoch) for source in sources]
    assert any(later > earlier for earlier, later in epochs), "an epoch ends behind the stop, too"
    if name != "streams":
        rows = behind.sources["code"].position
        assert rows == cursor.sources["code"].position or behind.sources["code"].epoch <= 3


def rank_of_a_run(sources, name, workers, world_size, rank, folder, text):
    """One rank: each step's tokens into its file, rank 0's cursor behind step STOP; then it goes on, and waits."""
    cursor = None if text is None else Cursor.model_validate_json(text)
    with (
        open_loader(section(sources, name, workers), world_size, rank, cursor) as loader,
        open(folder / f"rank-{rank}", "wb", buffering=0) as file,
    ):
        for step in range(1, (STOP if cursor else STOP + 3) + 1):
            file.write(ids_of(next(loader)).tobytes())
            if rank == 0 and step == STOP:
                (folder / "cursor.json").write_text(loader.cursor().model_dump_json())
        if cursor is None:
            signal.pause()


def run_processes(sources, name, workers, world_size, folder, text=None):
    """Tokens of the steps by global sample; a run without a cursor is killed with SIGKILL beyond step STOP."""
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=rank_of_a_run, args=(sources, name, workers, world_size, rank, folder, text))
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    files = [folder / f"rank-{rank}" for rank in range(world_size)]
    if text is None:
        wanted, deadline = (STOP + 3) * STEP_BYTES // world_size, time.monotonic() + 120
        while not all(file.exists() and file.stat().st_size == wanted for file in files):
            assert time.monotonic() < deadline and all(rank.is_alive() for rank in ranks)
            time.sleep(0.01)
        for rank in ranks:
            os.kill(rank.pid, signal.SIGKILL)
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == (-signal.SIGKILL if text is None else 0)
    return by_sample([np.fromfile(file, np.int64).reshape(-1, ROWS // world_size, LENGTH) for file in files])


@pytest.mark.parametrize("name", SECTIONS)
def test_processes_killed_beyond_a_checkpoint_go_on_on_other_numbers_of_them(sources, tmp_path, name):
    whole, _ = read(section(sources, name, 0), 1, STEPS)
    first = run_processes(sources, name, 2, 4, tmp_path / "first")
    assert np.array_equal(first, whole[: STOP + 3])
    text = (tmp_path / "first/cursor.json").read_text()
    for world_size, workers in SETTINGS:
        found = run_processes(sources, name, workers, world_size, tmp_path / f"of-{world_size}", text)
        assert np.array_equal(found, whole[STOP:]), world_size
