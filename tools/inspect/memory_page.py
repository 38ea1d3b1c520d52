"""What memories hold as one HTML page that loads nothing: norms by layer and head, spectra, and the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tools.inspect.contents import Matrix
from tools.trials.page import facts_table, html_document
from tools.trials.plots import STYLE, WIDTH, svg_image
from tools.trials.tables import Table

NOTE = (
    "Norms are Frobenius norms; top is the largest singular value; the effective rank is exp of the entropy of the "
    "singular values' shares of their sum. Saturation is the effective rank of the change from the learned start, "
    "divided by the number of directions that there are: the share that what was read has filled."
)
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
PANELS = 6
"""Layers whose spectra are drawn."""
DECADES = 5
"""Of singular values that are drawn, below the largest."""


def html_page(title: str, facts: Sequence[tuple[str, str]], rows: Sequence[Sequence[Matrix]]) -> str:
    """The page, a section for each row."""
    body = [f"<h1>{escape(title)}</h1>", facts_table(facts)]
    for number, matrices in enumerate(rows):
        heading = f"Row {number}" if len(rows) > 1 else "The memories"
        table = Table(Matrix.titles(), tuple(matrix.cells() for matrix in matrices), NOTE)
        body += [
            f"<h2>{heading}</h2>",
            svg_image(maps(matrices), "Norm, distance from the start and saturation, by layer and head"),
            "<h3>Singular values: a line for each head, a colour for each matrix; dotted: of the change</h3>",
            svg_image(spectra(matrices), "Singular values, a line for each head and matrix"),
            table.html(),
        ]
    return html_document(title, "\n".join(body), f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n')


def maps(matrices: Sequence[Matrix]) -> Figure:
    """Norm, distance and saturation of the memory's last matrix, the one that holds the values, by layer and head."""
    last = max(matrix.matrix for matrix in matrices)
    shown: dict[str, Callable[[Matrix], float | None]] = {
        "norm": lambda matrix: matrix.norm,
        "distance from the start": lambda matrix: matrix.distance,
        "saturation": lambda matrix: matrix.saturation,
    }
    layers, heads = (1 + max(getattr(matrix, name) for matrix in matrices) for name in ("layer", "head"))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.4 + 0.14 * max(layers, 8)), layout="constrained")
        for axes, (title, value) in zip(figure.subplots(1, 3), shown.items(), strict=True):
            grid = np.full((layers, heads), np.nan)
            for matrix in matrices:
                if matrix.matrix == last:
                    found = value(matrix)
                    grid[matrix.layer, matrix.head] = np.nan if found is None else found
            image = axes.imshow(grid, aspect="auto", cmap="cividis", vmin=0)
            figure.colorbar(image, ax=axes)
            axes.set_title(f"{title}, matrix {last}")
            axes.set_xlabel("head")
            axes.set_ylabel("layer")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.grid(visible=False)
        return figure


def spectra(matrices: Sequence[Matrix]) -> Figure:
    """Singular values of the weights, and, dotted, of their change, in layers from the first to the last."""
    layers = sorted({matrix.layer for matrix in matrices})
    drawn = sorted({layers[round(at)] for at in np.linspace(0, len(layers) - 1, min(PANELS, len(layers)))})
    depth = 1 + max(matrix.matrix for matrix in matrices)
    colours = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.8, depth))
    columns = min(3, len(drawn))
    largest = (float(matrix.singular_values[0]) for matrix in matrices)
    top = max((value for value in largest if value > 0), default=1.0)  # 0 and nan have no logarithm
    with matplotlib.rc_context(STYLE):
        height = 2.6 * -(-len(drawn) // columns)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        panels = list(figure.subplots(-(-len(drawn) // columns), columns, squeeze=False, sharey=True).flat)
        for axes in panels[len(drawn) :]:
            axes.set_axis_off()
        for axes, layer in zip(panels, drawn, strict=False):
            for matrix in matrices:
                if matrix.layer == layer:
                    places = range(1, len(matrix.singular_values) + 1)
                    style = {"color": colours[matrix.matrix], "linewidth": 0.9}
                    axes.plot(places, matrix.singular_values, **style)
                    axes.plot(places, matrix.changes, linestyle=":", **style)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")  # not as formulas, which are off
            axes.set_ylim(bottom=top * 10**-DECADES, top=2 * top)
            axes.set_title(f"layer {layer}")
            axes.set_xlabel("singular values, from the largest")
        return figure
