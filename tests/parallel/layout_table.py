"""Runs the table of layouts and writes it into parallel/README.md: `python -m tests.parallel.layout_table`.

All of it takes hours on two cores; `--ranks 2 4` runs the layouts of so many ranks, `--variants mac` of those models
alone. The lines of layouts that are not run stay as they are. A line that also names variants that are not run keeps
them, and the larger of the differences; so the table can be filled one variant at a time.
"""

from __future__ import annotations

import argparse
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.distributed_helper import ROOT
from tests.parallel.layout_runs import differences, run_trials
from tests.parallel.layouts import MODES, VARIANTS, Trial, table

PAGE = ROOT / "parallel" / "README.md"
BEGIN, END = "<!-- table of layouts -->\n", "<!-- end of the table -->\n"
PLACE = ("ranks", "pipeline", "data", "sequence", "tensor", "ZeRO")
COLUMNS = (*PLACE, "variants", "rows", "loss", "gradient norm", "parameters", "measured")

Place = tuple[int, ...]


def run_table(
    folder: Path, ranks: Sequence[int] = (), variants: Sequence[str] = VARIANTS
) -> dict[Trial, dict[str, float]]:
    """Every trial's differences from one process; of layouts of so many ranks, or all."""
    trials = [trial for trial in table() if trial.case in variants and (not ranks or trial.ranks in ranks)]
    seen = run_trials([*(trial.alone for trial in trials), *trials], folder, timeout=3000)
    return {trial: differences(seen[trial], seen[trial.alone]) for trial in trials}


def lines(found: Mapping[Trial, Mapping[str, float]], measured: str) -> dict[Place, list[str]]:
    """By layout and ZeRO stage: what was trained in it, and the largest differences."""
    together: dict[Place, list[Trial]] = defaultdict(list)
    for trial in found:
        together[trial.ranks, trial.pipeline, trial.data, trial.sequence, trial.tensor, trial.stage].append(trial)
    made = {}
    for place, trials in together.items():
        cases = ", ".join(dict.fromkeys(trial.case.removesuffix("-window") for trial in trials))
        modes = ", ".join(mode for mode in MODES if any(trial.mode == mode for trial in trials))
        worst = (max(found[trial][name] for trial in trials) for name in ("loss", "norm", "parameters"))
        made[place] = [*map(str, place), cases, modes, *(f"{number:.1e}" for number in worst), measured]
    return made


def merged(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """The line of a layout where another was written before: of the variants of both, unless all were run again."""
    at, numbers = len(PLACE), slice(len(PLACE) + 2, len(PLACE) + 5)
    known, run = before[at].split(", "), now[at].split(", ")
    if set(known) <= set(run):
        return list(now)
    names = [name.removesuffix("-window") for name in VARIANTS]
    modes = {*before[at + 1].split(", "), *now[at + 1].split(", ")}
    worst = [f"{max(float(a), float(b)):.1e}" for a, b in zip(before[numbers], now[numbers], strict=True)]
    measured = "; ".join(dict.fromkeys([*before[-1].split("; "), now[-1]]))
    return [
        *now[:at],
        ", ".join(name for name in names if name in {*known, *run}),
        ", ".join(mode for mode in MODES if mode in modes),
        *worst,
        measured,
    ]


def written_lines() -> dict[Place, list[str]]:
    """Those on the page."""
    rows = [line.strip("| ").split(" | ") for line in _parts()[1].splitlines()[2:]]
    return {tuple(map(int, row[: len(PLACE)])): row for row in rows}


def _parts() -> tuple[str, str, str]:
    """The page before the table, the table, and what is behind it."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    text, after = rest.split(END)
    return before, text, after


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.parallel.layout_table", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[], help="layouts of so many ranks (default: all)")
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=VARIANTS, help="(default: all)")
    asked = parser.parse_args(arguments)
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    with TemporaryDirectory() as folder:
        found = run_table(Path(folder), asked.ranks, asked.variants)
    before, _, after = _parts()
    rows = written_lines()
    for place, line in lines(found, f"{datetime.now(UTC):%Y-%m-%d}, {commit}").items():
        rows[place] = merged(rows[place], line) if place in rows else line
    text = [COLUMNS, ["---"] * len(COLUMNS), *(row for _, row in sorted(rows.items()))]
    body = "".join(f"| {' | '.join(row)} |\n" for row in text)
    PAGE.write_text(before + BEGIN + body + END + after, encoding="utf-8")
    worst = max(found, key=lambda trial: max(found[trial].values()))
    print(f"{len(found)} trainings; the largest difference: {worst}: {found[worst]}")


if __name__ == "__main__":
    main()
