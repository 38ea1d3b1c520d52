"""What a Slurm job survives: each scenario does one thing to a running job and sees it end as one that nobody touched.

`python -m tests.slurm.scenarios [NAME...]` runs them on a cluster of two nodes and a spare on this machine and prints
the table of launch/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.distributed_helper import ROOT
from tests.slurm.cluster import Cluster, reason_to_skip
from tests.slurm.lab import Lab, Loss
from tests.training_cases import events

STEPS, EVERY = 40, 8
"""Of each run, and between its checkpoints."""
PACE = 0.25
"""Seconds that a step sleeps: long enough for a signal to meet a run in the middle, on any machine."""

SLEEP = """
import os
if "RANK" in os.environ and "SECONDS_A_STEP" in os.environ:
    import time
    from parallel.engine import Engine

    def sleeping_step(self, *arguments, step=Engine.train_step, **options):
        self.taken = getattr(self, "taken", 0) + 1
        time.sleep(float(os.environ["SECONDS_A_STEP"]))
        once = os.environ.get("HANG_ONCE")
        if once and self.taken == 20 and os.environ["RANK"] == "1" and not os.path.exists(once):
            open(once, "w").close()
            time.sleep(3600)
        return step(self, *arguments, **options)

    Engine.train_step = sleeping_step
"""
"""Makes steps longer without work, and the 20th of rank 1 hang, once."""


def submit(
    lab: Lab, name: str, *options: str, pace: float = PACE, hang_once: Path | None = None, **sections: Any
) -> str:
    """Submit a run whose steps sleep `pace` seconds, and of which one hangs until the file `hang_once` is there."""
    patches = lab.folder / "patches"
    patches.mkdir(parents=True, exist_ok=True)
    (patches / "sitecustomize.py").write_text(SLEEP)
    environment = {"PYTHONPATH": f"{patches}:{ROOT}", "SECONDS_A_STEP": str(pace)}
    if hang_once is not None:
        environment["HANG_ONCE"] = str(hang_once)
    return lab.submit(name, *options, environment=environment, **sections)


def untouched(lab: Lab) -> Loss:
    """Submitted, trained, done."""
    job = submit(lab, "untouched")
    lab.wait_end("untouched", job)
    assert [a["exit_code"] for a in lab.attempts("untouched")] == [0]
    return lab.cost("untouched")


def preempted(lab: Lab) -> Loss:
    """USR1 three times."""
    job = submit(lab, "preempted")
    for number in (1, 2, 3):
        lab.wait_step("preempted", 10 * number)
        lab.cluster.command("scancel", "--batch", "--signal=USR1", job)
        lab.wait_for(lambda n=number: len(events(lab.folder / "preempted", "preempt")) == n, "the stop")
    lab.wait_end("preempted", job)
    assert [a["exit_code"] for a in lab.attempts("preempted")] == [75, 75, 75, 0]
    cost = lab.cost("preempted")
    assert cost.steps == 0
    return cost


def time_limit(lab: Lab) -> Loss:
    """A time limit of three minutes, of which the last one is for saving, for a run whose steps alone take longer than
    what is left. Slurm sends the signal up to a minute early: an attempt has one minute to two to start and train in.
    """
    job = submit(lab, "limited", "--time", "3", "--signal-seconds", "60", pace=4.0)
    lab.wait_end("limited", job, seconds=1500)
    codes = [a["exit_code"] for a in lab.attempts("limited")]
    assert len(codes) > 1 and set(codes[:-1]) == {75} and codes[-1] == 0, codes
    cost = lab.cost("limited")
    assert cost.steps == 0
    return cost


def killed_rank(lab: Lab) -> Loss:
    """SIGKILL to a rank."""
    job = submit(lab, "killed")
    lab.wait_step("killed", 20)
    os.kill(lab.rank_process("killed", 1), signal.SIGKILL)
    lab.wait_end("killed", job)
    first, last = lab.attempts("killed")
    assert (first["exit_code"], first["rank"], last["exit_code"]) == (137, 1, 0)
    (crash,) = events(lab.folder / "killed", "crash")
    assert (crash["rank"], crash["exit_code"], crash["message"]) == (1, 137, "rank 1: killed by SIGKILL")
    return lab.cost("killed")


def lost_node(lab: Lab) -> Loss:
    """All processes of the node with rank 0 and the job script killed at once; a spare takes its place."""
    job = submit(lab, "lost")
    lab.wait_step("lost", 20)
    node = lab.nodes_of(job)[0]
    lab.cluster.kill_node(node)
    lab.wait_for(lambda: lab.job_state(job) == "RUNNING" and node not in lab.nodes_of(job), "the spare")
    lab.wait_end("lost", job)
    assert [a["exit_code"] for a in lab.attempts("lost")] == [None, 0]
    lab.cluster.start_node(node)
    lab.cluster.wait_idle(lab.cluster.nodes)
    return lab.cost("lost")


def cut_network(lab: Lab) -> Loss:
    """The network of the only node cut while the job runs on there, and healed when its next copy runs elsewhere. The
    older copy is fenced off: it ends by itself, and changes nothing.
    """
    job = submit(lab, "cut", "--nodes", "1", "--tasks-per-node", "2", pace=3.0)
    lab.wait_step("cut", 12)
    (node,) = lab.nodes_of(job)
    old = [lab.rank_process("cut", rank) for rank in (0, 1)]
    lab.cluster.cut(node)
    since = time.time()
    lab.wait_for(lambda: len(events(lab.folder / "cut", "resume")) == 1, "the next copy")
    lab.wait_for(lambda: not any(alive(pid) for pid in old), "the end of the older copy, while it is cut off")
    # Its script writes down how it ended, before Slurm can reach it again and end it.
    lab.wait_for(lambda: lab.attempts("cut")[0]["exit_code"] is not None, "the end of the older copy's attempt")
    assert lab.job_state(job) == "RUNNING"
    lab.cluster.heal(node)
    lab.wait_end("cut", job, seconds=1500)
    assert "took its folder over" in (lab.folder / "cut" / "logs" / "rank0.log").read_text()
    first, *others = [a["exit_code"] for a in lab.attempts("cut")]
    # Slurm may move the job once more.
    assert first == 77 and others[-1] == 0 and set(others[:-1]) <= {75}, lab.attempts("cut")
    lab.cluster.wait_idle(lab.cluster.nodes)
    resumed, *_ = events(lab.folder / "cut", "resume")
    return dataclasses.replace(lab.cost("cut"), seconds=datetime.fromisoformat(resumed["time"]).timestamp() - since)


def cut_between_nodes(lab: Lab) -> Loss:
    """The network between the two nodes of a job cut for good: each rank waits for the other, and the watchdog, which
    has 60 s, ends what Slurm does not. The job goes on with the spare in place of the node that is out of reach.
    """
    job = submit(lab, "between", parallel={"step_timeout_seconds": 60})
    lab.wait_step("between", 12)
    near, far = lab.nodes_of(job)
    lab.cluster.cut(far)
    lab.wait_for(lambda: len(events(lab.folder / "between", "resume")) == 1, "the next attempt")
    assert far not in lab.nodes_of(job)
    lab.cluster.heal(far)
    lab.wait_end("between", job, seconds=1500)
    assert lab.attempts("between")[-1]["exit_code"] == 0
    lab.cluster.wait_idle(lab.cluster.nodes)
    return lab.cost("between")


def stopped(lab: Lab) -> Loss:
    """`launch stop`, and the run submitted again."""
    job = submit(lab, "stopped")
    lab.wait_step("stopped", 10)
    asked = lab.launch(["stop", str(lab.folder / "stopped")])
    assert asked.returncode == 0 and f"asked job {job} to save and end" in asked.stderr, asked
    lab.wait_end("stopped", job)
    (attempt,) = lab.attempts("stopped")
    assert (attempt["exit_code"], attempt["reason"]) == (75, "stopped for good, as was asked")
    status = lab.status("stopped")
    assert (status["state"], status["step"]) == ("stopped", lab.step("stopped"))
    assert Path(status["checkpoint"]).name == f"step-{status['step']:08d}" and status["last_error"] is None
    again = submit(lab, "stopped")
    assert again != job
    lab.wait_end("stopped", again)
    assert [a["exit_code"] for a in lab.attempts("stopped")] == [75, 0]
    cost = lab.cost("stopped")
    assert cost.steps == 0
    return cost


def restarted_controller(lab: Lab) -> Loss:
    """slurmctld killed, and started again ten seconds later."""
    job = submit(lab, "controller")
    lab.wait_step("controller", 10)
    lab.cluster.stop_controller()
    time.sleep(10)
    lab.cluster.start_controller()
    lab.wait_for(lambda: bool(events(lab.folder / "controller", "done")), "the run's end")
    lab.wait_end("controller", job)
    assert [a["exit_code"] for a in lab.attempts("controller")] == [0]
    return lab.cost("controller")


def hanging_rank(lab: Lab) -> Loss:
    """A rank asleep while the other waits for it in a collective; the watchdog has 30 s."""
    job = submit(lab, "hanging", hang_once=lab.folder / "hung-once", parallel={"step_timeout_seconds": 30})
    lab.wait_end("hanging", job)
    assert [a["exit_code"] for a in lab.attempts("hanging")] == [124, 0]
    logs = [(lab.folder / "hanging" / "logs" / f"rank{rank}.log").read_text() for rank in (0, 1)]
    assert all("hangs: step 20 is not done after 30 s" in log for log in logs)
    assert "in sleeping_step" in logs[1] and "all_reduce" in logs[0]
    return lab.cost("hanging")


def alive(pid: int) -> bool:
    """Whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


SCENARIOS: dict[str, Callable[[Lab], Loss]] = {
    "nothing happens": untouched,
    "preempted (USR1) three times": preempted,
    "time limit": time_limit,
    "a rank killed with SIGKILL": killed_rank,
    "a node lost, a spare takes over": lost_node,
    "network cut and healed, the old copy fenced off": cut_network,
    "network cut between the nodes of a job": cut_between_nodes,
    "launch stop, and submitted again": stopped,
    "slurmctld restarted": restarted_controller,
    "a rank asleep in a step (watchdog after 30 s)": hanging_rank,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the scenarios and print the table; exits with 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {function.__name__: title for title, function in SCENARIOS.items()}
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of {', '.join(names)} (default: all)")
    chosen = parser.parse_args(argv).names or list(names)
    if unknown := [name for name in chosen if name not in names]:
        parser.error(f"no such scenario: {', '.join(unknown)}; there are {', '.join(names)}")
    if reason := reason_to_skip():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "cluster").mkdir()
        with Cluster(Path(folder) / "cluster") as cluster:
            lab = Lab(cluster, Path(folder) / "runs", steps=STEPS, every=EVERY)
            rows = [row(lab, names[name]) for name in chosen]
    print("| what happens | attempts | steps lost | seconds to resume, at most | losses, checkpoints |")
    print("|---|---|---|---|---|\n" + "\n".join(rows))
    sys.exit(any(text.endswith("FAILED |") for text in rows))


def run(lab: Lab, title: str) -> Loss:
    """What a scenario cost a run, which ends as one that nobody touched: the same losses, whole checkpoints."""
    cost = SCENARIOS[title](lab)
    lab.assert_done_like(cost.run, lab.reference())
    return cost


def row(lab: Lab, title: str) -> str:
    """A scenario's line of the table. What went wrong in one is printed, and the next ones are run."""
    print(f"{title} ...", file=sys.stderr, flush=True)
    try:
        cost = run(lab, title)
    except AssertionError:
        traceback.print_exc()
        return f"| {title} | | | | FAILED |"
    resumed = f"{cost.seconds:.0f}" if cost.attempts > 1 else "-"
    text = f"| {title} | {cost.attempts} | {cost.steps} | {resumed} | bitwise, all whole |"
    print(text, file=sys.stderr, flush=True)
    return text


if __name__ == "__main__":
    main()
