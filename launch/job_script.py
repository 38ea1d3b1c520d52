"""The batch script of a Slurm job: text that a person can read, keep, edit and submit again.

What is decided between attempts is decided in Python (`python -m launch attempt`); the script starts the tasks, hands
signals on, and requeues the job when it is told to.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from launch.attempts import STOP_FILE
from pretrain.errors import UserError


@dataclass(frozen=True)
class JobScript:
    """What a job's script says."""

    name: str
    run_folder: Path
    """Absolute, as are the other paths."""

    directory: Path
    """Where the job runs: what the recipe's paths are relative to."""

    python: str
    training: tuple[str, ...]
    """The recipe and what follows it."""

    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    cpus_per_task: int | None
    signal_seconds: int
    max_restarts: int
    sbatch: tuple[tuple[str, str], ...] = ()
    """Further options of sbatch: (name, value)."""

    container: str | None = None
    container_mounts: str | None = None

    @property
    def tasks(self) -> int:
        """All of them: the run's ranks."""
        return self.nodes * self.tasks_per_node

    def text(self) -> str:
        """The script. Raises UserError for a name or value that no line of it can hold."""
        return _TEMPLATE.format(
            title=_one_line(f"{self.name}: {self.nodes} x {self.tasks_per_node} tasks"),
            directives="\n".join(f"#SBATCH {line}" for line in self._directives()),
            directory=quote(str(self.directory)),
            run=quote(str(self.run_folder)),
            python=quote(self.python),
            training=" ".join(quote(word) for word in self.training),
            srun=" ".join(self._srun()),
            container=" ".join(self._container()),
            max_restarts=self.max_restarts,
            stop_file=STOP_FILE,
        )

    def _directives(self) -> list[str]:
        output = str(self.run_folder / "logs" / "job-").replace("%", "%%") + "%j.log"
        given = [
            ("job-name", self.name),
            ("nodes", str(self.nodes)),
            ("ntasks", str(self.tasks)),
            ("ntasks-per-node", str(self.tasks_per_node)),
            *([("gpus-per-node", str(self.gpus_per_node))] if self.gpus_per_node else []),
            *([("cpus-per-task", str(self.cpus_per_task))] if self.cpus_per_task else []),
            *self.sbatch,
            ("signal", f"B:USR1@{self.signal_seconds}"),
            ("output", output),
        ]
        # sbatch takes quotes and backslashes as a shell does.
        return [*(f"--{name}={quote(value)}" for name, value in given), "--open-mode=append", "--requeue"]

    def _srun(self) -> list[str]:
        words = [f"--nodes={self.nodes}", f"--ntasks={self.tasks}", f"--ntasks-per-node={self.tasks_per_node}"]
        if self.cpus_per_task:  # srun does not take it over from sbatch
            words.append(f"--cpus-per-task={self.cpus_per_task}")
        return [*words, "--kill-on-bad-exit=1"]

    def _container(self) -> list[str]:
        if self.container is None:
            return []
        words = [f"--container-image={self.container}", f"--container-workdir={self.directory}"]
        if self.container_mounts is not None:
            words.append(f"--container-mounts={self.container_mounts}")
        return [quote(word) for word in words]


def quote(text: str) -> str:
    """One word of a shell. Raises UserError for a line's end, which would begin another line of the script."""
    return shlex.quote(_one_line(text))


def _one_line(text: str) -> str:
    if any(not character.isprintable() for character in text):
        raise UserError(f"{text!r}: has a line's end or another character that cannot be printed; remove it")
    return text


_TEMPLATE = r"""#!/bin/bash
# {title}. Written by `python -m launch slurm`; edit it and submit it again with sbatch as you like.
{directives}

# What the ranks see. NCCL and gloo take the first network that looks right; where that is the wrong one, name it.
export NCCL_DEBUG="${{NCCL_DEBUG:-WARN}}"
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
# export GLOO_SOCKET_IFNAME=eth0

cd {directory} || exit 1
run={run}
python={python}
training=({training})
container=({container}) # options of srun for every command that runs in it

launcher() {{ # on this node, in the container where there is one
  if [ ${{#container[@]}} -gt 0 ]; then
    srun --overlap --nodes=1 --ntasks=1 "${{container[@]}}" "$python" -m launch "$@"
  else
    "$python" -m launch "$@"
  fi
}}

state() {{ squeue --noheader --job="$SLURM_JOB_ID" --format="%T %r"; }} # nothing while Slurm does not answer

# `requeue TRIES SECONDS`: until Slurm takes it, so many times, so far apart. Not after `launch stop`. Who cancels a job
# does not want it again; at its time limit, too, it is no longer RUNNING, but that is the reason. And a copy whose node
# Slurm took for lost would kill the copy that was started in its place.
requeue() {{
  local try now
  for ((try = 1; try <= $1; try++)); do
    if grep -qxF -e "$SLURM_JOB_ID" "$run/launch/{stop_file}" 2>/dev/null; then
      echo "job: not requeued, as launch stop has ended it"
      return 1
    fi
    case $(scontrol show job "$SLURM_JOB_ID") in
      *" Restarts=${{SLURM_RESTART_COUNT:-0}} "*)
        now=$(state)
        case $now in
          RUNNING* | *TimeLimit) scontrol requeue "$SLURM_JOB_ID" && return 0 ;;
          ?*) echo "job: not requeued, as it is $now" && return 1 ;;
        esac
        ;;
      *" Restarts="*) echo "job: not requeued, as a newer copy of it was started" && return 1 ;;
    esac
    sleep "$2"
  done
  echo "job: not requeued: Slurm does not answer, or refuses"
  return 1
}}

# Slurm signals this shell alone; srun hands USR1 on to the tasks, which save and exit with 75.
asked= step=
stop() {{
  asked=$1
  local try now=
  echo "job: SIG$1 at $(date +%T)"
  [ -n "$step" ] && kill -USR1 "$step" 2>/dev/null
  [ "$1" = TERM ] || return
  # At the limit the ranks did not save in time, and this script ends with them: the next attempt will see that this
  # one was lost. Slurm kills what is left some 30 s later.
  for try in 1 2 3 4 5; do
    now=$(state)
    [ -n "$now" ] && break
    sleep 1
  done
  [[ $now == *TimeLimit ]] && requeue 5 1
}}
trap 'stop USR1' USR1
trap 'stop TERM' TERM
wait_for() {{ # its exit code, whatever signals come in between
  while kill -0 "$1" 2>/dev/null; do wait "$1"; done
  wait "$1"
}}

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((12000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

begun=$(launcher attempt begin --run "$run" --job "$SLURM_JOB_ID" --nodes "$SLURM_JOB_NODELIST" \
  --max-restarts {max_restarts}) || exit
read -r attempt resume <<< "$begun" # its number, and --resume auto where an earlier one of this job has saved
echo "job: attempt $attempt on $SLURM_JOB_NODELIST at $(date +%T)"

if [ -n "$asked" ]; then
  code=75 # nothing runs yet that could save
else
  srun {srun} "${{container[@]}}" \
    "$python" -m launch task --run "$run" --attempt "$attempt" "${{training[@]}}" $resume &
  step=$!
  if [ -n "$asked" ]; then # by a signal that came before this shell knew whom to hand it to
    sleep 5                # srun must have begun to listen, or it dies of the signal
    kill -USR1 "$step" 2>/dev/null
  fi
  wait_for "$step"
  code=$?
  step=
fi

# Where nobody can say what comes next, the next attempt says it: it takes this one for lost, and counts it as a crash.
verdict=$(launcher attempt end --run "$run" --attempt "$attempt" --exit-code "$code" \
  --max-restarts {max_restarts}) || verdict="again 60"
read -r verdict number <<< "$verdict"
if [ "$verdict" != again ]; then exit "$number"; fi
if [ "$number" != 0 ] && [ -z "$asked" ]; then
  sleep "$number" & # a signal ends the wait
  step=$!
  if [ -n "$asked" ]; then kill "$step"; fi
  wait "$step"
  step=
fi
requeue 120 10 && exec sleep 300 # until Slurm ends this script
exit "$code"
"""
