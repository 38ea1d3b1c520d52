"""Starting with and without a launcher, and ending: no rank waits for one that is gone."""

from __future__ import annotations

import pytest

from parallel import process
from tests.distributed_helper import run_ranks

FAILING = """
import torch
from parallel.process import initialize
world = initialize("cpu")
if world.rank == 1:
    raise RuntimeError("the second rank is broken")
torch.distributed.all_reduce(torch.zeros(1))
"""


def test_a_rank_that_raises_ends_at_once_with_its_traceback() -> None:
    finished = run_ranks(["-c", FAILING], ranks=2, timeout=60, check=False)
    assert finished.codes[1] == 1
    assert "rank 1 failed:" in finished.errors[1]
    assert "the second rank is broken" in finished.errors[1]
    assert finished.codes[0] != 0
    assert finished.seconds < 30


def test_a_process_that_nobody_launched_is_a_world_of_one() -> None:
    code = "from parallel.process import *; w = initialize('cpu'); print(w.rank, w.size, w.device); exit_now(0)"
    assert run_ranks(["-c", code], ranks=1, timeout=60).outputs == ["0 1 cpu\n"]


@pytest.mark.parametrize("said", [None, "1", "2", "3"])
def test_ranks_know_how_many_share_their_node(monkeypatch: pytest.MonkeyPatch, said: str | None) -> None:
    """Whatever the launcher says: DeepSpeed's and srun set no LOCAL_WORLD_SIZE."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if said is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", said)
    code = "from parallel.process import *; w = initialize('cpu'); print(w.local_size, w.local_index); shutdown(); "
    assert run_ranks(["-c", code + "exit_now(0)"], ranks=2, timeout=60).outputs == ["2 0\n", "2 1\n"]


@pytest.mark.parametrize("hosts", [["a", "a", "a", "b", "b", "b"], ["a", "b", "a", "b", "b", "c"]])
def test_the_ranks_of_each_host_divide_its_work_whatever_order_they_have(
    monkeypatch: pytest.MonkeyPatch, hosts: list[str]
) -> None:
    monkeypatch.setattr(process, "gather_objects", lambda own: hosts)
    places = [process._place_on_node(rank, len(hosts)) for rank in range(len(hosts))]
    for host in set(hosts):
        of_host = [place for place, name in zip(places, hosts, strict=True) if name == host]
        assert of_host == [(len(of_host), index) for index in range(len(of_host))]
    assert process._place_on_node(0, 1) == (1, 0)


def test_half_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE are set but RANK, MASTER_ADDR, MASTER_PORT, LOCAL_RANK are not"):
        process.initialize("cpu")


def test_cuda_without_a_gpu_is_refused() -> None:
    if process.torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="parallel.device"):
        process.choose_device("cuda", 0)


def test_the_first_error_names_its_rank_unless_all_agree() -> None:
    assert process._first([None, "broken", None]) == "rank 1: broken"
    assert process._first(["same", "same"]) == "same"
    assert process._first([None, None]) is None
