"""What is looked at before the first step: ranks that differ, full disks, clocks and slow links are found and named."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.process import World
from pretrain.checkpoints import Checkpoints
from pretrain.gpu_health import memory_errors, wrong_products
from pretrain.guards_config import GuardsConfig
from pretrain.preflight import Facts, left_bytes, source_hash, warnings_of
from tests.distributed_helper import run_ranks
from tests.pretrain.preflight_worker import CASES
from tests.training_cases import events, pretrain, write_recipe

HOST = socket.gethostname()
FACTS = Facts("a", {}, 100.0, 10**9, {}, "gpu", None, 0, 50e9)


@pytest.fixture(scope="module")
def seen(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks found in each case; the same on both."""
    folder = tmp_path_factory.mktemp("preflight")
    recipe = write_recipe(data, folder / "run")
    output = folder / "seen.json"
    run_ranks(["tests/pretrain/preflight_worker.py", str(output), str(recipe), *CASES], ranks=2, timeout=120)
    found = json.loads(output.read_text())
    for first, second in found.values():
        assert first.get("error") == second.get("error"), "all ranks end alike"
        assert first.get("fields", {}).get("warnings") == second.get("fields", {}).get("warnings")
    return {case: results[0] for case, results in found.items()}


def test_ranks_that_are_alike_pass_in_no_time(seen: dict[str, Any]) -> None:
    fields = seen["well"]["fields"]
    assert fields["warnings"] == [] and fields["hosts"] == {HOST: 2}
    assert (
        fields["versions"]["torch"] == torch.__version__.split("+")[0]
        or fields["versions"]["torch"] in torch.__version__
    )
    assert set(fields["versions"]) == {"python", "torch", "deepspeed", "triton", "source", "recipe"}
    assert 0.01 < fields["bandwidth_gigabytes_per_second"] < 1000 and fields["all_reduce_megabytes"] == 4
    assert 0 <= fields["clock_skew_seconds"] < 1 and fields["free_gigabytes"] > 0
    (line,) = seen["well"]["lines"]
    assert line.startswith("preflight: 2 rank(s) on 1 host(s), versions equal, all-reduce of 4 MB at ")


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("torch", "torch is 2.11.0, and {torch} on rank 0 ({host}): install the same torch on all nodes"),
        ("source", "source is 000000000000, and {source} on rank 0 ({host}): give all nodes the same copy"),
        ("disk", "/run has 1e-06 GB free, and one checkpoint takes about "),
    ],
)
def test_what_spoils_a_run_ends_it_with_rank_host_and_fix(seen: dict[str, Any], case: str, expected: str) -> None:
    message = seen[case]["error"]
    assert message.startswith(f"preflight:\n  rank 1 on {HOST}: ")
    assert expected.format(host=HOST, source=source_hash(), torch=version("torch")) in message


def test_what_killed_saves_left_counts_as_free(
    seen: dict[str, Any], tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "error" not in seen["left"] and 2e-3 <= seen["left"]["fields"]["free_gigabytes"] < 2.2e-3
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1, world)

    def write(folder: Path) -> list[Path]:
        (folder / "weights").write_bytes(bytes(10**6))
        return [folder / "weights"]

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    assert left_bytes(checkpoints.folder) == 0, "there is no such folder yet"
    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr("pretrain.checkpoints.publish", killed)
        patches.setattr("pretrain.checkpoints._write_manifest", killed)
        checkpoints.save(1, write)
    assert 10**6 <= left_bytes(checkpoints.folder) < 1.1 * 10**6
    checkpoints.save(2, write)
    assert left_bytes(checkpoints.folder) == 0, "the next save has removed it"
    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr("shutil.rmtree", killed)
        checkpoints.save(3, write)
    assert left_bytes(checkpoints.folder) >= 10**6


def test_folders_that_are_not_shared_are_found_before_the_first_step(seen: dict[str, Any]) -> None:
    message = seen["apart"]["error"]
    assert f"/rank1/run on {HOST} is not the one that rank 0 has on {HOST}" in message
    assert "give a --folder on a file system that all nodes share" in message
    assert seen["apart"]["files"] == ["run/.lock", "run/fence.json"], "nothing was begun"


def test_a_clock_that_is_ahead_is_warned_of(seen: dict[str, Any]) -> None:
    (warning,) = seen["clock"]["fields"]["warnings"]
    assert warning.startswith(f"the clock of rank 1 on {HOST} is 60.0 s ahead of that of rank 0 on {HOST}")
    assert seen["clock"]["lines"][1] == f"preflight: warning: {warning}"


def test_a_variable_that_differs_is_warned_of(seen: dict[str, Any]) -> None:
    (warning,) = seen["variable"]["fields"]["warnings"]
    assert f"OMP_NUM_THREADS is 7 on rank 1 ({HOST}), and 1 on rank 0" in warning


def test_a_slow_link_and_a_failing_memory_are_warned_of() -> None:
    facts = [FACTS, replace(FACTS, host="b", bandwidth=2e9), replace(FACTS, host="c", memory_errors=3)]
    slow, memory = warnings_of(facts, GuardsConfig(min_bandwidth=10.0))
    assert "takes rank 1 on b at 2.00 GB/s, below guards.min_bandwidth 10" in slow
    assert "the GPU of rank 2 on c has counted 3 memory error(s)" in memory
    assert len(warnings_of(facts, GuardsConfig())) == 1, "without a bound it is measured alone"
    own = [replace(FACTS, variables={"NCCL_SOCKET_IFNAME": name}) for name in ("eth0", "ib0")]
    assert warnings_of(own, GuardsConfig()) == [], "a node may call its parts as it likes"


def test_products_that_are_wrong_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert wrong_products(device) is None
    multiply = torch.Tensor.__matmul__

    def flawed(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        product = multiply(left, right)
        if product.dtype == torch.bfloat16:
            product[17, 1001] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", flawed)
    assert wrong_products(device) == f"1 of {2048 * 2048} numbers of a matrix product in torch.bfloat16 are wrong"


def test_a_run_on_a_full_disk_does_not_begin(data: Path, mount_disk: Callable[[str], Path]) -> None:
    folder = mount_disk("64k") / "run"
    recipe = write_recipe(data, folder.parent.parent / "run")
    finished = pretrain(recipe, "--folder", str(folder), check=False)
    assert finished.codes == [74], "which a launcher tries again"
    assert f"error: preflight:\n  rank 0 on {HOST}: {folder} has " in finished.errors[0]
    assert "one checkpoint takes about" in finished.errors[0]


def test_it_runs_alone_and_ahead_of_a_run(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = write_recipe(data, folder, steps=2)
    alone = pretrain(recipe, "--preflight", ranks=2)
    assert alone.outputs[0].startswith("preflight: 2 rank(s) on 1 host(s)") and alone.outputs[1] == ""
    assert not folder.exists(), "nothing is begun"
    finished = pretrain(recipe, "--guards.min_bandwidth", "1e6")
    (event,) = events(folder, "preflight")
    assert event["ranks"] == 1 and event["bandwidth_gigabytes_per_second"] is None and event["warnings"] == []
    assert [each["event"] for each in events(folder)][:2] == ["start", "preflight"]
    assert "preflight: 1 rank(s)" in finished.outputs[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_healthy_gpu_is_found_so() -> None:
    device = torch.device("cuda", 0)
    assert wrong_products(device) is None
    assert memory_errors(device) in (None, 0)
