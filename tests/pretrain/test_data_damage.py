"""Shards that are damaged, cut or gone: the run ends with their names, or all ranks leave out the same documents."""

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain.data import Cursor, Division, ShardsConfig, Share
from pretrain.data.damage import DamagedShard
from pretrain.data.stores import DamagedError, UnreachableError, store
from pretrain.errors import UserError
from pretrain.resume import TrainerState
from pretrain.steps import Run
from tests.data_cases import documents, make_shards, make_tokenizer
from tests.order_oracle import stored_documents

LENGTH, SEED, ROWS, STEPS = 24, 5, 12, 6


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path, make_tokenizer(tmp_path), documents(40, words=20), shard_tokens=300)


def section(shards, **fields):
    return ShardsConfig(**{"train": shards.folder, "num_workers": 0, "on_damage": "skip", **fields})


class Ranks:
    """Loaders of several ranks in step: what one finds damaged is told to all, as the collective of a run does."""

    def __init__(self, config, world_size, cursor=None, share=None):
        self._found = [None] * world_size
        self._barrier = threading.Barrier(world_size)
        self._pool = ThreadPoolExecutor(world_size)
        self.sources = [config.open(SEED, share, grid=8).train for _ in range(world_size)]
        self.loaders = []
        for rank, source in enumerate(self.sources):
            division = Division(LENGTH, 1, ROWS // world_size, rank, world_size)
            self.loaders.append(
                source.open_loader(division, cursor, lambda found, rank=rank: self._gather(rank, found))
            )

    def _gather(self, rank, found):
        self._found[rank] = found
        self._barrier.wait(60)
        gathered = list(self._found)
        self._barrier.wait(60)
        return gathered

    def share_damage(self):
        def share(rank):
            self.sources[rank].share_damage(partial(self._gather, rank), [])

        list(self._pool.map(share, range(len(self.sources))))

    def step(self):
        """Tokens and targets of a step's rows by global sample, [2, ROWS, LENGTH]."""
        batches = list(self._pool.map(next, self.loaders))
        return torch.stack(
            [
                torch.cat(
                    [getattr(batches[rank][m], name) for m in range(len(batches[0])) for rank in range(len(batches))]
                )
                for name in ("tokens", "targets")
            ]
        )

    def steps(self, count):
        return torch.stack([self.step() for _ in range(count)])

    def close(self):
        for loader in self.loaders:
            loader.close()
        self._pool.shutdown()


def read(config, steps, *, world_size=1, cursor=None):
    ranks = Ranks(config, world_size, cursor)
    try:
        return ranks.steps(steps)
    finally:
        ranks.close()


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x01
    path.write_bytes(data)


def documents_of(shards, number):
    """The documents of a shard."""
    texts, first = stored_documents(shards), 0
    for shard in range(number):
        first += shards.manifest.shards[shard].documents
    return texts[first : first + shards.manifest.shards[number].documents]


DAMAGES = {
    "deleted": lambda path: path.unlink(),
    "empty": lambda path: os.truncate(path, 0),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "an error page": lambda path: path.write_text("<html>503</html>"),
    "a flipped payload byte": lambda path: flip(path, 600),
    "a flipped header byte": lambda path: flip(path, 10),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_at_the_start_a_run_stops_with_name_and_hashes(shards, damage):
    entry = shards.manifest.shards[2]
    DAMAGES[damage](shards.folder / entry.name)
    with pytest.raises(
        UserError, match=rf"{entry.name}: (missing|damaged).*expected ({entry.sha256}|sha256|{entry.bytes})"
    ):
        section(shards, on_damage="stop").open(SEED, Share(0, 1), grid=8)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("damage", ["deleted", "a flipped payload byte"])
def test_found_at_the_start_its_documents_alone_are_left_out_on_every_rank(shards, damage, reset):
    config = section(shards, reset_memory=reset)
    expected = read(config, STEPS)
    lost = documents_of(shards, 2)
    entry = shards.manifest.shards[2]
    DAMAGES[damage](shards.folder / entry.name)
    # Only rank 2 hashes the shard: its share of them.
    ranks = Ranks(config, 3)
    for rank in range(3):
        ranks.sources[rank] = config.open(SEED, Share(rank, 3), grid=8).train
    ranks.share_damage()
    assert [list(source.shards.skipped) for source in ranks.sources] == [[2]] * 3
    for rank, source in enumerate(ranks.sources):
        ranks.loaders[rank] = source.open_loader(Division(LENGTH, 1, ROWS // 3, rank, 3), None)
    found = ranks.steps(STEPS)
    (skipped,) = ranks.loaders[0].cursor().skipped
    ranks.close()
    assert (skipped.shard, skipped.documents, skipped.expected) == (entry.name, entry.documents, entry.sha256)
    assert_left_out(expected, found, lost, shards.tokenizer.eos_id)


def assert_left_out(expected, found, lost, eos):
    """Where the two differ, EOS without a target stands in place of tokens of the lost documents; some do differ."""
    tokens, targets = expected[:, 0], expected[:, 1]
    masked = (found[:, 1] == -100) & (targets != -100)
    assert torch.equal(found[:, 1][~masked], targets[~masked])
    changed = found[:, 0] != tokens
    assert (found[:, 0][changed] == eos).all()
    assert 0 < int(masked.sum())
    # Each run of masked targets is a part of a lost document; rows begin and end anywhere in them.
    texts = ["," + ",".join(map(str, text)) + "," for text in lost]
    for step, row in {(int(s), int(r)) for s, r, _ in masked.nonzero()}:
        runs, run = [], []
        for at in range(masked.shape[2]):
            if masked[step, row, at]:
                run.append(int(targets[step, row, at]))
                if run[-1] == eos:
                    runs.append(run)
                    run = []
            elif run:
                runs.append(run)
                run = []
        for part in [*runs, run]:
            assert not part or any("," + ",".join(map(str, part)) + "," in text for text in texts)
    # And what is changed among the inputs is what a masked target was one place before, or a row's first token.
    assert not (changed[:, :, 1:] & ~masked[:, :, :-1]).any()


@pytest.mark.parametrize("workers", [0, 2])
def test_found_on_the_way_by_one_rank_all_leave_it_out_from_the_same_step(shards, workers):
    config = section(shards, num_workers=workers, verify="sizes")
    expected = read(config, STEPS)
    ranks = Ranks(config, 3)
    before = ranks.steps(2)
    entry, lost = shards.manifest.shards[2], documents_of(shards, 2)
    for source in ranks.sources:
        source.shards.close()  # as if it had been read long ago; an open file outlives its name
    (shards.folder / entry.name).unlink()
    behind = ranks.steps(STEPS - 2)
    cursors = [loader.cursor() for loader in ranks.loaders]
    curves = ranks.loaders[1].curves()
    ranks.close()
    assert torch.equal(before, expected[:2])
    assert_left_out(expected[2:], behind, lost, shards.tokenizer.eos_id)
    assert cursors[0] == cursors[1] == cursors[2]
    (skipped,) = cursors[0].skipped
    assert skipped.shard == entry.name and skipped.expected == entry.sha256 and "No such file" in skipped.found
    assert curves["data/skipped_shards"] == 1 and curves["data/skipped_documents"] == entry.documents


def test_a_resumed_run_leaves_out_the_same_although_the_shard_is_back(shards):
    config = section(shards, verify="sizes")
    path = shards.folder / shards.manifest.shards[2].name
    ranks = Ranks(config, 2)
    hidden = path.rename(path.with_suffix(".hidden"))
    first = ranks.steps(3)
    cursor = Cursor.model_validate_json(ranks.loaders[0].cursor().model_dump_json())
    rest = ranks.steps(3)
    ranks.close()
    hidden.rename(path)
    assert cursor.skipped
    assert torch.equal(read(config, 3, world_size=4, cursor=cursor), rest)
    assert torch.equal(read(section(shards, on_damage="stop"), 3, cursor=cursor), rest)
    assert not torch.equal(read(config, 3), first)


def test_without_leave_a_shard_deleted_on_the_way_stops_the_run_with_its_name(shards):
    entry = shards.manifest.shards[2]
    ranks = Ranks(section(shards, on_damage="stop"), 1)
    for source in ranks.sources:
        source.shards.close()
    (shards.folder / entry.name).unlink()
    with pytest.raises(DamagedShard, match=rf"{entry.name}: cannot be read: No such file.*{entry.sha256}, found none"):
        ranks.steps(STEPS)
    ranks.close()


def test_a_source_of_which_no_shard_is_left_ends_the_run_at_the_start_and_on_the_way(shards):
    config = section(shards, verify="sizes")
    ranks = Ranks(config, 2)
    for source in ranks.sources:
        source.shards.close()
    for entry in shards.manifest.shards:
        (shards.folder / entry.name).unlink()
    with pytest.raises(UserError, match="every shard is missing or damaged.*nothing is left to train on"):
        ranks.steps(STEPS)
    ranks.close()
    source = config.open(SEED, grid=8).train
    with pytest.raises(UserError, match="every shard is missing or damaged"):
        source.describe(1000, sequence_length=LENGTH, rows_per_step=2)
    with pytest.raises(UserError, match="every shard is missing or damaged"):
        source.open_loader(Division(LENGTH, 1, ROWS, 0, 1), None)


@pytest.mark.parametrize("function", ["stat", "sha256"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOENT, errno.EIO, errno.ESTALE])
def test_what_this_process_may_not_read_is_not_left_out_as_damaged(shards, monkeypatch, function, number):
    entry, stat, sha256 = shards.manifest.shards[2], Path.stat, store.file_sha256

    def failing(of):
        def call(path, **options):
            if path.name == entry.name:
                raise OSError(number, os.strerror(number))
            return of(path, **options)

        return call

    if function == "stat":
        monkeypatch.setattr(Path, "stat", failing(stat))
    else:
        monkeypatch.setattr(store, "file_sha256", failing(sha256))
    if number == errno.EACCES:
        with pytest.raises(UnreachableError, match=rf"{entry.name}: cannot be read: Permission denied"):
            section(shards).open(SEED, Share(0, 1), grid=8)
    else:
        assert list(section(shards).open(SEED, Share(0, 1), grid=8).train.shards.skipped) == [2]
        with pytest.raises(DamagedError, match=entry.name):
            section(shards, on_damage="stop").open(SEED, Share(0, 1), grid=8)


def test_each_shard_is_reported_once_whatever_the_order_in_which_they_are_found(shards):
    config = section(shards, verify="sizes")
    source = config.open(SEED, grid=8).train
    told = []
    log = SimpleNamespace(event=lambda kind, **fields: told.append(fields["shard"]), say=lambda text: None)
    run, reported = SimpleNamespace(log=log), set()
    with source.open_loader(Division(LENGTH, 1, ROWS, 0, 1), None) as loader:
        for number in (4, 1, 3):  # what a cursor says is sorted by number
            source.shards.skipped[number] = "nothing"
            for _ in range(2):
                state = TrainerState(phase="p", ranks=1, tokenizer_sha256=None, cursor=loader.cursor())
                Run.report_damage(run, state, reported)
    assert told == [shards.manifest.shards[number].name for number in (4, 1, 3)]


def test_a_line_says_what_is_left_out(shards):
    entry = shards.manifest.shards[1]
    (shards.folder / entry.name).unlink()
    source = section(shards).open(SEED, grid=8).train
    text = source.describe(1000, sequence_length=LENGTH, rows_per_step=2)
    assert f"; skipped as damaged: {entry.name}: {entry.documents:,} documents, {entry.tokens:,} tokens" in text
