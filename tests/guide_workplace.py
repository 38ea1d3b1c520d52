"""A folder that has what the guides' commands name, all of it tiny, and the commands run in it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
import yaml

from tests.data_cases import documents, write_jsonl
from tests.distributed_helper import ROOT, run_ranks
from tests.tools.evaluation.evaluation_cases import PUBLISHED, write_babi, write_records
from tests.tools.trials.run_cases import TEXT_SIZES, TEXT_STUDY, write_suite
from tests.training_cases import MODEL, make_data, recipe_fields
from tools.encoding import Tokenizer

SECONDS = 600.0
"""After which a command that has not ended is one that hangs."""
TINY = "tiny"
"""The folder of recipes that are trained here, under the names of those in launch/recipes."""
STEP = 4
"""Of the first of the two checkpoints that the run has."""

# In the workplace as if `python -m MODULE` were typed there; a number of seconds before it is when Ctrl-C is.
_TYPED = """
import os, runpy, signal, sys
_, place, seconds, *words = sys.argv
os.chdir(place)
os.environ["PATH"] = os.path.join(place, "bin") + os.pathsep + os.environ["PATH"]
sys.path.insert(0, "")
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, float(seconds))
sys.argv = words
runpy.run_module(words[0], run_name="__main__", alter_sys=True)
"""

# It takes a job script, or says what it would do with it; that the script is one of bash is all that it looks at.
_SBATCH = """#!/bin/bash
set -e
case $1 in
--test-only) bash -n /dev/stdin; echo "sbatch: Job 4242 to start at once" >&2 ;;
--parsable) bash -n "$2"; echo 4242 ;;
*) exit 1 ;;
esac
"""


class Workplace:
    """A folder in which commands are run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def copy(self, folder: Path) -> Workplace:
        """The same things in another folder, for a command that may do with them what it likes."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Workplace(folder)

    def assert_runs(self, command: str, *, interrupt_after: float = 0.0) -> str:
        """Runs a command of a guide to its end; returns what it printed on its standard output.

        Args:
            interrupt_after: seconds after which Ctrl-C is pressed, for one that goes on until then.

        Raises AssertionError, with what it printed, where it ends with another code than 0 or does not end.
        """
        words = shlex.split(command)
        if words[:2] == ["python", "-m"]:
            arguments = ["-c", _TYPED, str(self.folder), str(interrupt_after), *words[2:]]
            finished = run_ranks(arguments, ranks=1, timeout=SECONDS, check=False)
            assert finished.codes == [0], f"{command}\n{finished.report()}"
            return finished.outputs[0]
        ended = subprocess.run(
            [str(Path(sys.executable).with_name(words[0])), *words[1:]], cwd=self.folder, env=_environment(),
            capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
        assert ended.returncode == 0, f"{command}\nexit {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        return ended.stdout

    @contextmanager
    def launched(self, command: str, *, log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """While the body runs, so does a command, from the moment on at which its file `log` has a step."""
        words = [sys.executable, *shlex.split(command)[1:]]
        with subprocess.Popen(words, cwd=self.folder, env=_environment(), stderr=subprocess.PIPE) as process:
            try:
                deadline = time.monotonic() + SECONDS
                while not (log.exists() and '"event": "step"' in log.read_text()):
                    assert process.poll() is None and time.monotonic() < deadline, f"{command}: no step in {log}"
                    time.sleep(0.05)
                yield process
            finally:
                process.kill()

    def clear_output(self, command: str) -> None:
        """Removes what a command would make, where it is there already."""
        words = shlex.split(command)
        if "--overwrite" in words:
            return
        for option in ("--output", "--save-memory"):
            if option in words and words[words.index(option) + 1] not in _loaded(words):
                made = self.folder / words[words.index(option) + 1]
                shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)


def _loaded(words: list[str]) -> list[str]:
    return words[words.index("--load-memory") + 1 :][:1] if "--load-memory" in words else []


def _environment() -> dict[str, str]:
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"PATH": programs, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return {**os.environ, **own}


def make_workplace(folder: Path) -> Workplace:
    """Texts, recipes, and what the guides' own commands make of them: shards, a run, a model, a session."""
    folder.mkdir(parents=True)
    place = Workplace(folder)
    (folder / "bin").mkdir()
    (folder / "bin" / "sbatch").write_text(_SBATCH)
    (folder / "bin" / "sbatch").chmod(0o755)
    texts = documents(150, words=60)
    for name in ("corpus", "books", "path/to/books"):
        (folder / name).mkdir(parents=True)
        (folder / name / "book.txt").write_text(" ".join(texts))
    write_jsonl(folder / "corpus" / "more.jsonl", documents(1000, seed=1, words=10))
    for name in ("book.txt", "chapter.txt"):
        (folder / name).write_text(" ".join(texts[:3]))
    data = make_data(folder / "made", number=150)
    shutil.copytree(data, folder / "data")
    shutil.copy(folder / "made" / "tokenizer.model", folder)
    eos = Tokenizer.open(folder / "tokenizer.model").eos_id
    (folder / "old-tars").mkdir()
    with webdataset.TarWriter(str(folder / "old-tars" / "old.tar")) as tar:
        tar.write({"__key__": "one", "npy": np.array([5, 6, 7, eos], np.uint16)})
    _write_benchmarks(folder / "data")
    write_suite(folder / "suite", text=TEXT_SIZES, of_recall={"seeds": [0]}, of_text=TEXT_STUDY)
    shutil.copytree(ROOT / "launch" / "recipes", folder / "launch" / "recipes")
    _write_recipes(folder / TINY)
    place.assert_runs(f"python -m pretrain {TINY}/titans-340m.yaml")
    shutil.copytree(folder / "runs" / "mac-340m", folder / "runs" / "mac-760m")
    (folder / "runs" / "mac-760m" / "logs").mkdir()
    (folder / "runs" / "mac-760m" / "logs" / "rank0.log").write_text("what rank 0 said\n")
    place.assert_runs("python -m tools.export runs/mac-340m --output model")
    place.assert_runs("python -m tools.evaluate model --shards data/validation --json evaluation.json")
    for made in ("session", "book.memory", "other.memory"):
        place.assert_runs(
            f"python -m tools.generate model --prompt-file chapter.txt --max-new-tokens 1 --save-memory {made}"
        )
    return place


def _write_benchmarks(folder: Path) -> None:
    """Records enough for five examples beside each, and stories."""
    many = {name: rows * 3 for name, rows in PUBLISHED.items()}
    for name in ("arc_easy", "arc_challenge"):
        many[name] = [{**row, "question": f"{row['question']} {turn}"} for turn in range(3) for row in PUBLISHED[name]]
    write_records(folder / "evals", many)
    inner = write_babi(folder / "babi") / "tasks_1-20_v1-2" / "en"
    for path in list(inner.glob("qa1_*")):
        for task in ("qa2", "qa3"):
            shutil.copy(path, path.with_name(path.name.replace("qa1", task)))


def _write_recipes(folder: Path) -> None:
    """Runs of a few steps with the names and folders of the real ones, and their phases."""
    folder.mkdir()
    data = Path("data")
    fields = recipe_fields(data, Path("runs/mac-340m"), steps=2 * STEP, model={"preset": "mac-340m"})
    for name in ("segment", "num_persistent"):  # which not all presets have
        del fields["model"][name]
    _write(folder / "titans-340m.yaml", {**fields, "name": "mac-340m"})
    endless = {**fields["training"], "tokens": 10**9}
    _write(folder / "titans-760m.yaml", {**fields, "name": "mac-760m", "folder": "runs/mac-760m", "training": endless})
    real = yaml.safe_load((ROOT / "launch" / "recipes" / "long-340m.yaml").read_text(encoding="utf-8"))
    phases: list[Mapping[str, Any]] = []
    for number, phase in enumerate(phase for phase in real["phases"] if phase["name"] in ("4k", "32k", "2m")):
        segments = {"segment_length": 32} if number else {}
        length = 32 << number
        training = {"tokens": 4 * length, "sequence_length": length, "batch_tokens": 2 * length, "micro_batch_size": 1}
        phases.append({"name": phase["name"], "training": {**training, **segments}})
    small = {**fields["model"], "segment": MODEL["segment"]}
    long = {**fields, "model": small, "name": "long-mac-340m", "folder": "runs/long-mac-340m", "phases": phases}
    long["schedule"] = {**long["schedule"], "warmup_tokens": 64}
    _write(folder / "long-340m.yaml", long)
    tiny = yaml.safe_load((ROOT / "launch" / "recipes" / "long-tiny.yaml").read_text(encoding="utf-8"))
    tiny["phases"] = tiny["phases"][:2]
    _write(folder / "long-tiny.yaml", tiny)


def _write(path: Path, recipe: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(dict(recipe)), encoding="utf-8")
