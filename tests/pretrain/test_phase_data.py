"""Reading the data of all phases through at the start: each set once, and what one phase leaves out may end another."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from pretrain.data import ShardsConfig, Share
from pretrain.data.stores import store as local
from pretrain.errors import UserError
from pretrain.phase_data import verify_data
from tests.data_cases import documents, make_shards, make_tokenizer


@pytest.fixture
def sets(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    return {
        name: make_shards(tmp_path / name, tokenizer, documents(20, seed=seed), shard_tokens=500)
        for seed, name in enumerate("abv")
    }


@pytest.fixture
def hashed(monkeypatch):
    """Paths of the shards whose hashes have been taken."""
    found, hash_of = [], local.file_sha256

    def counted(path):
        found.extend([path] if path.suffix == ".tar" else [])
        return hash_of(path)

    monkeypatch.setattr(local, "file_sha256", counted)
    return found


def phase(*sets, validation=None, **fields):
    sources = {f"s{number}": {"train": shards.folder, "weight": 1} for number, shards in enumerate(sets)}
    config = ShardsConfig(sources=sources, validation=validation and validation.folder, num_workers=0, **fields)
    recipe = SimpleNamespace(data=config, data_seed=lambda: 0, model=SimpleNamespace(grid=8))
    return SimpleNamespace(recipe=recipe, named_in_errors=nullcontext)


def tars(*sets):
    return [shards.folder / entry.name for shards in sets for entry in shards.manifest.shards]


def flip(path):
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)


def test_each_set_is_read_once_whatever_phases_share_it(sets, hashed):
    a, b, v = sets.values()
    said = []
    phases = [phase(a, validation=v), phase(a, b, validation=v), phase(b, validation=a)]
    assert verify_data(phases, Share(0, 1), said.append) == []
    assert sorted(hashed) == sorted(tars(a, b, v))
    hashed.clear()
    assert verify_data([phase(a, validation=a)], Share(0, 1), said.append) == []
    assert sorted(hashed) == sorted(tars(a))


@pytest.mark.parametrize("verify", ["hashes", "sizes"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_shard_that_one_phase_leaves_out_ends_another_that_does_not(sets, verify, turned):
    a, b, v = sets.values()
    flip(tars(a)[1])
    skips, stops = phase(a, on_damage="skip"), phase(b, a, verify=verify)
    (damage,) = verify_data([skips], Share(0, 1), str)
    assert (damage.place, damage.number) == (str(a.folder), 1)
    with pytest.raises(UserError, match=str(a.folder)):
        verify_data([stops, skips] if turned else [skips, stops], Share(0, 1), str)


def test_no_damage_of_a_validation_set_is_left_out(sets):
    a, b, _ = sets.values()
    flip(tars(a)[1])
    for phases in ([phase(a, on_damage="skip", validation=a)], [phase(a, on_damage="skip"), phase(b, validation=a)]):
        with pytest.raises(UserError, match="of validation none is left out"):
            verify_data(phases, Share(0, 1), str)
