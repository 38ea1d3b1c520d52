"""A study's results as a table: the same cells as markdown and as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from tools.trials.record import Metric, Record, Spread, StudyResults, spread

NOTHING = "–"
BITS = "bits_per_byte"


@dataclass(frozen=True)
class Table:
    """Text cells, left-aligned in the first column and right-aligned in the others, and a line below them."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str

    def markdown(self) -> str:
        """The table and its note as markdown, without a newline at the end."""
        lines = [
            _markdown_row(self.header),
            _markdown_row(["---", *["---:"] * (len(self.header) - 1)], escape=False),
            *map(_markdown_row, self.rows),
        ]
        return "\n".join([*lines, "", _escaped(self.note)])

    def html(self) -> str:
        """The table and its note as HTML."""
        head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in self.header)
        rows = "\n".join(
            f'<tr><th scope="row">{html.escape(row[0])}</th>'
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in self.rows
        )
        return (
            f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>\n'
            f'<p class="note">{html.escape(self.note)}</p>'
        )


def _escaped(text: str) -> str:
    """Text that markdown shows as it is, also in a table."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _markdown_row(cells: Sequence[str], *, escape: bool = True) -> str:
    """A line of a markdown table."""
    return f"| {' | '.join(_escaped(cell) if escape else cell for cell in cells)} |"


def value_text(value: float, metric: Metric) -> str:
    """A value with the digits that a table shows: percent with one decimal, a loss with three."""
    return f"{100 * value:.1f} %" if metric == "accuracy" else f"{value:.3f}"


def spread_text(found: Spread, metric: Metric) -> str:
    """Mean over seeds, and the smallest and the largest where there are two or more."""
    mean = value_text(found.mean, metric)
    if found.n == 1:
        return mean
    low, high = (value_text(value, metric).removesuffix(" %") for value in (found.low, found.high))
    return f"{mean} [{low}..{high}]"


def study_table(results: StudyResults) -> Table:
    """The table of a study: a row for each of its trials, also for those that diverged or have no result yet.

    The losses of probes on text are followed by bits per byte, which can be compared between tokenizers.
    """
    study = results.study
    bits = [
        probe
        for probe in study.probes
        if study.metric == "loss" and any(results.probe_values(trial, probe, BITS) for trial in study.trials)
    ]
    header = ("trial", "parameters", "tokens", "tokens/s", "seeds", *study.probes)
    rows = tuple(_row(results, trial, bits) for trial in study.trials)
    return Table((*header, *(f"{probe}, bits a byte" for probe in bits)), rows, _note(results))


def _row(results: StudyResults, trial: str, bits: Sequence[str]) -> tuple[str, ...]:
    """The cells of a trial; `bits`: the probes whose bits per byte are shown."""
    finished, diverged = results.finished(trial), results.diverged(trial)
    known = [*finished, *diverged]
    seeds = len(results.study.seeds)
    lacking = results.lacking(trial)
    return (
        trial,
        f"{known[0].parameters:,}" if known else NOTHING,
        f"{max(result.tokens for result in known):,}" if known else NOTHING,
        f"{sum(result.tokens_per_second for result in finished) / len(finished):,.0f}" if finished else NOTHING,
        f"{len(finished)} of {seeds} ({lacking})" if lacking else str(seeds),
        *(_probe_cell(results, trial, probe) for probe in results.study.probes),
        *(_bits_cell(results, trial, probe) for probe in bits),
    )


def _bits_cell(results: StudyResults, trial: str, probe: str) -> str:
    """Bits per byte of a trial in a probe, the mean alone: the loss beside it shows the range."""
    values = results.probe_values(trial, probe, BITS)
    return f"{spread(list(values.values())).mean:.3f}" if values else NOTHING


def _probe_cell(results: StudyResults, trial: str, probe: str) -> str:
    """What the trial's seeds reached in a probe."""
    values = results.probe_values(trial, probe)
    if not values:
        if results.finished(trial):
            return "not finite"
        return "diverged" if results.diverged(trial) else "missing"
    text = spread_text(spread(list(values.values())), results.study.metric)
    return text if len(values) == len(results.study.seeds) else f"{text}, n = {len(values)}"


def _note(results: StudyResults) -> str:
    """What the cells mean."""
    accuracy = results.study.metric == "accuracy"
    seeds = len(results.study.seeds)
    note = "Right answers" if accuracy else "Loss in nats a token"
    note += f": mean over {seeds} seeds [smallest..largest]." if seeds > 1 else ", one seed."
    if accuracy and results.chance is not None:
        note += f" Guessing gets {value_text(results.chance, 'accuracy')}."
    scored = {
        probe: found.tokens
        for result in results.results
        for probe, found in result.probes.items()
        if probe in results.study.probes
    }
    if scored:
        counts = ", ".join(f"{number:,} {probe}" for probe, number in scored.items())
        note += f" {'Answers' if accuracy else 'Tokens'} scored with each seed: {counts}."
    return note


def memory_table(results: StudyResults) -> Table | None:
    """The memories' last statistics while training, a row for each trial's layer; None where no run has any."""
    layers: dict[tuple[str, str], dict[str, list[float]]] = {}
    for trial in results.study.trials:
        for result in results.finished(trial):
            for layer, statistics in result.memory.items():
                for name, value in statistics.items():
                    layers.setdefault((trial, layer), {}).setdefault(name, []).append(value)
    names = tuple(dict.fromkeys(name for statistics in layers.values() for name in statistics))
    rows = tuple(
        (
            f"{trial}, {layer}",
            *(f"{spread(statistics[name]).mean:.4g}" if name in statistics else NOTHING for name in names),
        )
        for (trial, layer), statistics in layers.items()
    )
    return Table(("memory", *names), rows, "Mean over the seeds that finished.") if rows else None


def markdown_report(record: Record) -> str:
    """Every study's title and table as markdown."""
    return "\n\n".join(
        f"## {_escaped(study.title)}\n\n{study_table(record.of_study(name)).markdown()}"
        for name, study in record.studies.items()
    )
