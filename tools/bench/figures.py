"""Plots of benchmarks' rows: lines over a length, and bars beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from tools.bench.cases import Row
from tools.bench.record import RIVAL
from tools.bench.tables import digits
from tools.trials.plots import COLOURS, LINES, STYLE, WIDTH

Series = Mapping[str, Sequence[tuple[float, float]]]
"""Points (x, y) by the line's name."""


def figures_of(name: str, rows: Sequence[Row]) -> dict[str, Figure]:
    """The plots of a record by their headings; none where nothing was measured."""
    measured = [row for row in rows if "outcome" not in row and "status" not in row]
    makers: dict[str, Callable[[Sequence[Row]], dict[str, Figure | None]]] = {
        "memory": _memory,
        "against": _against,
        "attention": _attention,
        "train": _train,
        "decode": _decode,
    }
    if name not in makers or not measured:
        return {}
    return {heading: figure for heading, figure in makers[name](measured).items() if figure is not None}


def _memory(rows: Sequence[Row]) -> dict[str, Figure | None]:
    def name(row: Row) -> str:
        return f"{row['backend']}, expansion {row['expansion']}, chunk {row['chunk_size']}, batch {row['batch']}"

    rates = {"TFLOP/s": _series(rows, name, "length", "tflops")}
    costs = {"KB a token": _series(rows, name, "length", "kb_per_token")}
    return {
        "Speed of forward and backward by length": _lines({**_microseconds(rows, name), **rates}, "tokens in a row"),
        "Growth of memory by length": _lines(costs, "tokens in a row"),
    }


def _attention(rows: Sequence[Row]) -> dict[str, Figure | None]:
    def name(row: Row) -> str:
        return f"{row['backend']}, window {row['window'] or 'all'}, batch {row['batch']}"

    rates = {"TFLOP/s": _series(rows, name, "length", "tflops")}
    return {
        "Speed of forward and backward by length": _lines({**_microseconds(rows, name), **rates}, "tokens in a row")
    }


def _microseconds(rows: Sequence[Row], name: Callable[[Row], str]) -> dict[str, Series]:
    return {"microseconds a token": _series(rows, name, "length", "us_per_token")}


def _against(rows: Sequence[Row]) -> dict[str, Figure | None]:
    def name(row: Row) -> str:
        reads = "a read a token" if row["rival_chunk_size"] == 1 else f"chunk {row['rival_chunk_size']}"
        return f"{row['implementation']}\n{row['length']:,} tokens ({RIVAL}: {reads})"

    panels = {
        "microseconds a token": {name(row): row["us_per_token"] for row in rows},
        "peak MB over inputs": {name(row): row["peak_bytes"] / 1e6 for row in rows},
    }
    return {"Time and memory, forward and backward": _bars(panels)}


def _train(rows: Sequence[Row]) -> dict[str, Figure | None]:
    def name(row: Row) -> str:
        return f"{row['preset']}, {row['length']:,} tokens, batch {row['batch']}"

    panels = {"tokens a second": {name(row): row["tokens_per_second"] for row in rows}}
    shares = {name(row): 100 * row["mfu"] for row in rows if row["mfu"] is not None}
    panels |= {"MFU, percent": shares} if shares else {}
    panels["peak GB"] = {name(row): row["peak_bytes"] / 1e9 for row in rows}
    return {"Training steps": _bars(panels)}


def _decode(rows: Sequence[Row]) -> dict[str, Figure | None]:
    def name(row: Row) -> str:
        return f"{row['preset']}, {row['context']:,} tokens, batch {row['batch']}"

    panels = {
        "tokens a second": {name(row): row["tokens_per_second"] for row in rows},
        "state, MB a row": {name(row): row["state_bytes_per_row"] / 1e6 for row in rows},
    }
    return {"Generation behind a context": _bars(panels)}


def _series(rows: Sequence[Row], name: Callable[[Row], str], x: str, y: str) -> Series:
    """Points by name, from left to right."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        series.setdefault(name(row), []).append((row[x], row[y]))
    return {key: sorted(points) for key, points in series.items()}


def _lines(panels: Mapping[str, Series], label: str) -> Figure | None:
    """A panel for each quantity, a line for each name; both axes in powers. None where every line is one point."""
    if all(len(points) < 2 for series in panels.values() for points in series.values()):
        return None
    names = list(next(iter(panels.values())))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, max(3.2, 0.9 + 0.19 * len(names))), layout="constrained")
        drawn = []
        for axes, (quantity, series) in zip(_panels(figure, len(panels)), panels.items(), strict=True):
            drawn = [
                axes.plot(
                    *zip(*points, strict=True),
                    color=COLOURS[index % len(COLOURS)],
                    linestyle=LINES[index // len(COLOURS) % len(LINES)],
                    marker=".",
                    label=name,
                )[0]
                for index, (name, points) in enumerate(series.items())
            ]
            axes.set_xscale("log", base=2)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(label)
            axes.set_title(quantity)
        if len(names) > 1:
            figure.legend(handles=drawn, loc="outside right upper", fontsize=8)
        return figure


def _bars(panels: Mapping[str, Mapping[str, float]]) -> Figure:
    """A panel for each quantity, a bar for each name, its value beside it; the first name from above."""
    names = list(next(iter(panels.values())))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.0 + 0.36 * len(names)), layout="constrained")
        all_axes = _panels(figure, len(panels), sharey=True)
        for axes, (quantity, values) in zip(all_axes, panels.items(), strict=True):
            for row, name in enumerate(names):
                if name in values:
                    axes.barh(row, values[name], height=0.6, color=COLOURS[row % len(COLOURS)])
                    axes.annotate(
                        digits(values[name]),
                        (values[name], row),
                        (3, 0),
                        textcoords="offset points",
                        va="center",
                        fontsize=8,
                    )
            axes.set_title(quantity)
            axes.set_xlim(0, 1.25 * max([*values.values(), 1e-9]))
            axes.tick_params(axis="y", length=0)
        all_axes[0].set_yticks(range(len(names)), names)
        all_axes[0].set_ylim(len(names) - 0.5, -0.5)
        return figure


def _panels(figure: Figure, number: int, *, sharey: bool = False) -> list[Axes]:
    return list(figure.subplots(1, number, squeeze=False, sharey=sharey).flat)
