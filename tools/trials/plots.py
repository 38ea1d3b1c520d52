"""A study's results as plots: learning curves, what each probe found, and loss by position.

Figures are drawn without a display and without matplotlib's global state; the same results give the same bytes.
"""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator, PercentFormatter, ScalarFormatter

from tools.trials.record import StudyResults, by_position, common_curve, finite_curve

WIDTH = 9.6
"""Inches of every figure."""

COLUMNS = 3
"""Panels beside each other."""

# Told apart also by the colour-blind; a study of more than eight trials goes through them again in another line style.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#444444", "#8c564b")
LINES = ("-", "--", ":", "-.")
REFERENCE = {"color": "#888888", "linewidth": 1.0}

STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that every machine draws the same
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "svg.hashsalt": "mnemosyne",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}


def svg_image(figure: Figure, text: str) -> str:
    """The figure as an HTML image with its SVG inside; `text`, escaped, stands for it where it cannot be seen."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{text}" src="data:image/svg+xml;base64,{data}">'


def curves_figure(results: StudyResults) -> Figure | None:
    """The metric on held-out data over the steps, a line per trial; None while no run has any.

    Line: mean over the seeds that finished, band: from the smallest to the largest. A seed that diverged is a thin line
    of its own with a cross at its end.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, max(3.6, 0.9 + 0.19 * len(results.study.trials))), layout="constrained")
        axes = figure.add_subplot()
        seen: list[float] = []
        for index, trial in enumerate(results.study.trials):
            colour, line = _look(index)
            curve = common_curve(results.finished(trial))
            if curve:
                steps = [step for step, _ in curve]
                low, high = [found.low for _, found in curve], [found.high for _, found in curve]
                axes.plot(steps, [found.mean for _, found in curve], color=colour, linestyle=line)
                axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
                seen += [*low, *high]
            for result in results.diverged(trial):
                points = finite_curve(result)
                if points:
                    axes.plot(*zip(*points, strict=True), color=colour, linestyle=line, linewidth=0.8)
                    axes.plot(*points[-1], color=colour, marker="x")
        if not axes.lines:
            return None
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
        _value_axis(axes, results, seen, vertical=True)
        _legend(figure, results)
        return figure


def probes_figure(results: StudyResults) -> Figure | None:
    """What each probe found: a panel per probe, a row per trial, a point per seed, a stroke at their mean. None while
    there is nothing to show.
    """
    study = results.study
    if not any(results.probe_values(trial, probe) for trial in study.trials for probe in study.probes):
        return None
    rows, columns = _grid(len(study.probes), COLUMNS)
    with matplotlib.rc_context(STYLE):
        height = rows * (1.0 + 0.24 * len(study.trials))
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
        panels = list(grid.flat)
        for axes, probe in zip(panels, study.probes, strict=False):
            _probe_panel(axes, results, probe)
        for axes in panels[len(study.probes) :]:
            axes.set_axis_off()
        # The rows share their trials: the first from above.
        panels[0].set_yticks(range(len(study.trials)), [_row_name(results, trial) for trial in study.trials])
        panels[0].set_ylim(len(study.trials) - 0.5, -0.5)
        return figure


def positions_figure(results: StudyResults) -> Figure | None:
    """Loss by position in the row, a panel per probe that measured it; None where none did.

    A dotted line marks the length that was trained on.
    """
    probes = [
        probe
        for probe in results.study.probes
        if any(by_position(results.finished(trial), probe) for trial in results.study.trials)
    ]
    if not probes:
        return None
    rows, columns = _grid(len(probes), COLUMNS - 1)
    with matplotlib.rc_context(STYLE):
        height = max(3.4 * rows, 0.9 + 0.19 * len(results.study.trials))
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
        for axes, probe in zip(panels, probes, strict=False):
            _positions_panel(axes, results, probe)
        for axes in panels[len(probes) :]:
            axes.set_axis_off()
        for axes in panels[: len(probes) : columns]:
            axes.set_ylabel("loss, nats a token")
        _legend(figure, results, f"trained on {results.study.sequence_length:,} tokens")
        return figure


def _grid(panels: int, widest: int) -> tuple[int, int]:
    """Rows and columns for a number of panels, filled as evenly as `widest` columns allow."""
    rows = math.ceil(panels / widest)
    return rows, math.ceil(panels / rows)


def _look(index: int) -> tuple[str, str]:
    """Colour and line style of a study's trial."""
    return COLOURS[index % len(COLOURS)], LINES[index // len(COLOURS) % len(LINES)]


def _value_axis(axes: Axes, results: StudyResults, seen: Sequence[float], *, vertical: bool) -> None:
    """The axis of the metric: 0 to 100 % with the chance line, or the losses `seen`, so that a run that blew up does
    not flatten the others.
    """
    axis = axes.yaxis if vertical else axes.xaxis
    limits = axes.set_ylim if vertical else axes.set_xlim
    if results.study.metric == "accuracy":
        axis.set_label_text("right answers")
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        limits(-0.03, 1.03)
        if results.chance is not None:
            (axes.axhline if vertical else axes.axvline)(results.chance, linestyle=":", **REFERENCE)
        return
    axis.set_label_text("loss, nats a token")
    if seen:
        margin = 0.05 * (max(seen) - min(seen)) or 0.05
        limits(min(seen) - margin, max(seen) + margin)


def _legend(figure: Figure, results: StudyResults, reference: str | None = None) -> None:
    """Names of the trials, and of the dotted line, right of the panels."""
    handles = []
    for index, trial in enumerate(results.study.trials):
        colour, line = _look(index)
        handles.append(Line2D([], [], color=colour, linestyle=line, label=_row_name(results, trial)))
    if reference is None and results.study.metric == "accuracy" and results.chance is not None:
        reference = "guessing"
    if reference is not None:
        handles.append(Line2D([], [], linestyle=":", label=reference, **REFERENCE))
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)


def _row_name(results: StudyResults, trial: str) -> str:
    """The trial, and how many of its runs are not in the plot."""
    lacking = results.lacking(trial)
    return f"{trial} ({lacking})" if lacking else trial


def _probe_panel(axes: Axes, results: StudyResults, probe: str) -> None:
    """One probe: the trials from above, every seed a point."""
    seen: list[float] = []
    for row, trial in enumerate(results.study.trials):
        colour, _ = _look(row)
        values = results.probe_values(trial, probe)
        if not values:
            continue
        points = list(values.values())
        # Seeds stand a little apart, so that equal ones can be counted.
        spots = [row + 0.11 * (index - (len(points) - 1) / 2) for index in range(len(points))]
        axes.plot(points, spots, color=colour, linestyle="", marker="o", markersize=4, alpha=0.8, markeredgewidth=0)
        mean = sum(points) / len(points)
        axes.plot([mean, mean], [row - 0.34, row + 0.34], color=colour, linewidth=2)
        seen += points
    _value_axis(axes, results, seen, vertical=False)
    axes.set_title(textwrap.fill(probe, 34))
    axes.tick_params(axis="y", length=0)


def _positions_panel(axes: Axes, results: StudyResults, probe: str) -> None:
    """One probe's loss by position: mean over seeds and the band from the smallest to the largest."""
    for index, trial in enumerate(results.study.trials):
        buckets = by_position(results.finished(trial), probe)
        if not buckets:
            continue
        colour, line = _look(index)
        middles = [middle for middle, _ in buckets]
        axes.plot(middles, [found.mean for _, found in buckets], color=colour, linestyle=line, marker=".", markersize=4)
        low, high = [found.low for _, found in buckets], [found.high for _, found in buckets]
        axes.fill_between(middles, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.axvline(results.study.sequence_length, linestyle=":", **REFERENCE)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("position in the row")
    axes.set_title(textwrap.fill(probe, 48))
