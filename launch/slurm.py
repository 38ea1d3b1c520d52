"""`python -m launch slurm`: a run as a Slurm job that requeues itself until the recipe's tokens are done."""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from launch.attempts import LAUNCH_FOLDER
from launch.job_script import JobScript
from launch.jobs import SubmittedJob, queue_state
from launch.local import prepare_log, say, writable
from launch.room import explain_unwritten
from launch.run_events import LOGS_FOLDER
from pretrain.errors import UserError

HELP = """\
Write a job script to <run folder>/launch/job.sbatch and submit it.

One task a GPU. The job saves and requeues itself when Slurm ends it (USR1 ahead of the time limit, preemption), when a
rank crashes or hangs, and when a node dies, until the recipe's tokens are done. It is not requeued when something has
to be mended first (exit code 2), when it fails at the same step with the same error twice in a row, after
--max-restarts crashes in a row without a new checkpoint, or when it is cancelled. Rank 0's output and the last lines of
a rank that fails are in <run folder>/logs/job-ID.log, every rank's in rankN.log beside it."""

SCRIPT_FILE = "job.sbatch"
_TIME = re.compile(r"\d+(:\d\d?){0,2}|\d+-\d{1,2}(:\d\d?){0,2}")
_PASSED_ON = {
    "partition": "partition to run in",
    "time": "time limit of each attempt, as sbatch takes it: minutes, hours:minutes:seconds, days-hours",
    "account": "account to charge",
    "qos": "quality of service",
    "constraint": "features that the nodes must have",
    "reservation": "reservation to run in",
    "mem": "memory of each node, such as 500G",
    "exclude": "nodes to leave out",
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the subcommand."""
    parser = subparsers.add_parser(
        "slurm",
        help="submit a Slurm job that requeues itself",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="example: python -m launch slurm --nodes 4 --gpus-per-node 8 --time 1-00 launch/recipes/long-760m.yaml",
    )
    number, text = {"type": int, "metavar": "N"}, {"metavar": "TEXT"}
    parser.add_argument("--nodes", default=1, **number, help="nodes (default 1)")
    parser.add_argument("--gpus-per-node", default=0, **number, help="GPUs of each node (default 0: a run on CPUs)")
    parser.add_argument("--tasks-per-node", **number, help="ranks on each node (default: one a GPU; 1 without GPUs)")
    parser.add_argument("--cpus-per-task", **number, help="CPUs of each rank (default: the cluster's, often 1)")
    for name, words in _PASSED_ON.items():
        parser.add_argument(f"--{name}", **text, help=words)
    parser.add_argument("--job-name", **text, help="the job's name (default: the recipe's)")
    parser.add_argument("--container", metavar="IMAGE", help="run in this image, by pyxis (--container-image of srun)")
    parser.add_argument("--container-mounts", metavar="A:B,...", help="what the container sees; the repository too")
    parser.add_argument(
        "--signal-seconds", default=120, **number, help="how long before the limit the run saves (default 120)"
    )
    parser.add_argument(
        "--max-restarts", default=3, **number, help="crashes in a row without a new checkpoint (default 3)"
    )
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--print", action="store_true", dest="show", help="print the script and do nothing")
    way.add_argument(
        "--dry-run",
        action="store_true",
        help="check recipe, layout and options, show the plan, ask sbatch whether it takes the job, no more",
    )
    way.add_argument("--no-submit", action="store_true", help="write the script and do not submit it")
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="the recipe; this command's own options go before it")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="for python -m pretrain: --section.field value"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check everything, then write and submit the job; returns the exit status. Raises UserError."""
    from pretrain import command_line  # late: other subcommands need no torch
    from pretrain.phases import load_phases

    check_options(options)
    training = command_line.parse([options.recipe, *options.arguments])
    phases = load_phases(training.recipe, training.overrides)
    script = script_of(options, phases.run.name, phases.run.folder, phases.run.parallel.device)
    if phases.run.parallel.device == "cuda" and not options.gpus_per_node:
        raise UserError("parallel.device is cuda, but the job has no GPUs: give --gpus-per-node")
    phases.require_fit(script.tasks)
    text = script.text()
    if options.show:
        print(text, end="")
        return 0
    if options.dry_run or training.dry_run:
        return show_plan(script, text)
    folder = script.run_folder
    refuse_while_active(folder)
    prepare_log(folder / LOGS_FOLDER / "rank0.log")
    path = folder / LAUNCH_FOLDER / SCRIPT_FILE
    with writable(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if options.no_submit:
        say(f"{path} is written and not submitted: sbatch {path}")
        return 0
    job = submit(path)
    say(f"job {job}: {script.nodes} x {script.tasks_per_node} ranks; its output: {folder / LOGS_FOLDER}/job-{job}.log")
    submitted = SubmittedJob.now(job, script.name)
    try:
        submitted.write(folder)
    except OSError as error:  # an error would have the launch tried again, and a second job beside this one
        say(
            f"the job is submitted, but not written down: {explain_unwritten(error, folder)}; it does so when it starts"
        )
    say(f"python -m launch status {folder}    (or logs, or stop)")
    return 0


def script_of(options: argparse.Namespace, name: str, folder: Path, device: str) -> JobScript:
    """The job's script, of checked options.

    Args:
        name, folder: the run's.
        device: the recipe's `parallel.device`. "auto" is "cuda" in a job with GPUs: on a node that has lost its GPUs
            ranks would train on CPUs, and nothing would tell.
    """
    words = [word for word in options.arguments if word != "--dry-run"]
    if options.gpus_per_node and device == "auto":
        words += ["--parallel.device", "cuda"]
    passed_on = [(each, getattr(options, each)) for each in _PASSED_ON]
    return JobScript(
        name=options.job_name or name,
        run_folder=folder.absolute(),
        directory=Path.cwd(),
        python="python" if options.container else sys.executable,
        training=(options.recipe, *words),
        nodes=options.nodes,
        tasks_per_node=options.tasks_per_node or options.gpus_per_node or 1,
        gpus_per_node=options.gpus_per_node,
        cpus_per_task=options.cpus_per_task,
        signal_seconds=options.signal_seconds,
        max_restarts=options.max_restarts,
        sbatch=tuple((each, value) for each, value in passed_on if value is not None),
        container=options.container,
        container_mounts=options.container_mounts,
    )


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that cannot work, before anything is written. Raises UserError."""
    least = {"nodes": 1, "gpus_per_node": 0, "tasks_per_node": 1, "cpus_per_task": 1, "max_restarts": 0}
    for name, smallest in {**least, "signal_seconds": 1}.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name.replace('_', '-')} {value}: give a number of {smallest} or more")
    if options.signal_seconds > 65535:
        raise UserError(f"--signal-seconds {options.signal_seconds}: Slurm allows 65535 at most")
    if options.gpus_per_node and options.tasks_per_node and options.tasks_per_node != options.gpus_per_node:
        raise UserError(
            f"--tasks-per-node {options.tasks_per_node} with --gpus-per-node {options.gpus_per_node}: a rank has one "
            "GPU; leave --tasks-per-node out"
        )
    if options.time is not None and not _TIME.fullmatch(options.time):
        raise UserError(
            f"--time {options.time}: is no time of Slurm's: give minutes, hours:minutes:seconds or days-hours:minutes"
        )
    limit = 0 if options.time is None else limit_seconds(options.time)
    if 0 < limit <= options.signal_seconds:  # 0 is none
        raise UserError(
            f"--time {options.time} ends before the run has begun: --signal-seconds {options.signal_seconds} of it are "
            "for saving; raise the one or lower the other"
        )
    if options.container_mounts is not None and options.container is None:
        raise UserError("--container-mounts belongs to --container IMAGE")
    own = [f"--{name.replace('_', '-')}" for name in (*least, *_PASSED_ON, "signal_seconds", "container", "job_name")]
    for argument in options.arguments:
        if argument.split("=")[0] in own:
            raise UserError(
                f"{argument.split('=')[0]} stands after the recipe, where options are training's: write it before "
                f"{options.recipe}"
            )


def limit_seconds(time: str) -> int:
    """A time limit as sbatch takes it (which `_TIME` matches), in seconds."""
    days, dash, rest = time.partition("-") if "-" in time else ("0", "", time)
    parts = [int(part) for part in rest.split(":")]
    if dash:  # hours come first
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, minutes, seconds = (0, *parts, 0)[:3]
    return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds


def show_plan(script: JobScript, text: str) -> int:
    """What would run, by training's own dry run and, where there is one, by sbatch's test; returns the exit status."""
    plan = [script.python, "-m", "pretrain", *script.training, "--dry-run", "--ranks", str(script.tasks)]
    status = subprocess.run(plan).returncode
    if status:
        return status
    devices = f"{script.gpus_per_node} GPUs each" if script.gpus_per_node else "CPUs"
    print(f"\njob {script.name}: {script.nodes} nodes x {script.tasks_per_node} ranks on {devices}", flush=True)
    if shutil.which("sbatch") is None:
        print("sbatch is not on the PATH, so that it was not asked whether it takes the job")
        return 0
    result = subprocess.run(["sbatch", "--test-only"], input=text, capture_output=True, text=True)
    print(result.stderr.strip() or result.stdout.strip())
    return 2 if result.returncode else 0


def refuse_while_active(folder: Path) -> None:
    """Raises UserError where a job of the run is pending or running."""
    job = SubmittedJob.read(folder)
    state = None if job is None else queue_state(job.job)
    if job is not None and state is not None:
        raise UserError(
            f"{folder}: job {job.job} is {state.lower()} for this run; end it with `python -m launch stop {folder}`, "
            "or give another --folder"
        )


def submit(path: Path) -> str:
    """Hand a script to sbatch; the job's number. Raises UserError."""
    if shutil.which("sbatch") is None:
        raise UserError(
            f"sbatch is not on the PATH: run this on a login node of the cluster; {path} is written, and --no-submit "
            "does no more than that"
        )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_JOB", "SBATCH_"))}
    result = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, env=environment)
    if result.returncode:
        raise UserError(f"sbatch refused {path}: {result.stderr.strip()}")
    return result.stdout.strip().split(";")[0]
