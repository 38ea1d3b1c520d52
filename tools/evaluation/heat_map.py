"""Scores by length and depth as a picture: PNG or SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from tools.result_files import replacing

COLUMNS = 3
"""Panels beside each other."""
_STYLE = {"font.family": "DejaVu Sans", "font.size": 8, "svg.hashsalt": "mnemosyne", "text.parse_math": False}


def draw_heat_map(path: Path, cells: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """A panel for each task: lengths from left to right, depths from above; colour and number are the mean score in %.

    Args:
        path: its suffix says the format.
        cells: each with task, setting, length, depth (None: facts lie all over the text) and score (nan: none).
        title: above all panels.

    Raises:
        UserError: the file cannot be written.
    """
    names = list(dict.fromkeys(cell["task"] for cell in cells))
    columns = min(COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    with matplotlib.rc_context(_STYLE), replacing(path) as partial:
        figure = Figure(figsize=(1.2 + 3.2 * columns, 0.8 + 2.4 * rows), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, name in zip(panels, names, strict=False):
            _panel(axes, [cell for cell in cells if cell["task"] == name])
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        figure.suptitle(f"{title}: score, %")
        figure.savefig(partial, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(axes: Any, cells: Sequence[Mapping[str, Any]]) -> None:
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells}, key=lambda depth: -1.0 if depth is None else depth)
    scores = np.full((len(depths), len(lengths)), np.nan)  # which stays without a colour
    for cell in cells:
        scores[depths.index(cell["depth"]), lengths.index(cell["length"])] = cell["score"]
    # Cividis is told apart by the colour-blind too.
    axes.imshow(scores, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for (row, column), score in np.ndenumerate(scores):
        text = "not finite" if np.isnan(score) else f"{100 * score:.0f}"
        axes.text(column, row, text, ha="center", va="center", color="white" if score <= 0.5 else "black")
    axes.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths])
    axes.set_yticks(range(len(depths)), ["all over" if depth is None else f"{100 * depth:g} %" for depth in depths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth")
    axes.set_title(f"{cells[0]['task']} ({cells[0]['setting']})")


def _tokens(count: int) -> str:
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if count % size == 0:
            return f"{count // size}{unit}"
    return f"{count:,}"
