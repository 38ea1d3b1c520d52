"""What memories did with a text as one HTML page that loads nothing: the text in colours, curves, and influences."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from tools.inspect.influence import Influence
from tools.inspect.memories import QUANTITIES, Trace
from tools.inspect.text import Reading
from tools.trials.page import facts_table, html_document
from tools.trials.plots import STYLE, WIDTH, svg_image

SHADES = 16
DATA_BYTES = 400_000
"""Of the layers' values in the page, for up to 4,096 tokens; more layers than fit are left out evenly."""
DATA_TOKENS = 4096
CURVE_POINTS = 4800
"""Of all curves together."""
SMALLEST = 1e-6
"""Of the largest value of a quantity: what is below it is shown as 0."""
_NO_VALUE = np.uint8(0)
_SCRIPT = Path(__file__).with_name("surprise.js")


@dataclass(frozen=True)
class Page:
    """What the page shows."""

    title: str
    facts: Sequence[tuple[str, str]]
    """Names and values: the model, the text."""
    reading: Reading
    trace: Trace
    influences: Sequence[Influence] | None = None
    """Of spans of the text on the answer; None where there is no answer."""
    answer_nats: float = 0.0
    """log p of the answer."""

    def html(self) -> str:
        """The page."""
        kept = kept_layers(len(self.trace.layers), len(self.reading.tokens))
        script = _SCRIPT.read_text(encoding="utf-8")
        body = [
            f"<h1>{html.escape(self.title)}</h1>",
            facts_table(self.facts),
            self._text(kept),
            *([] if self.influences is None else [self._influences(self.influences)]),
            f"<h2>By position</h2>\n{svg_image(curves(self.trace), 'What each layer did, by position in the text')}",
            _definitions(),
            f'<script type="application/json" id="data">{self._data(kept)}</script>',
            f"<script>{script}</script>",
        ]
        return html_document(self.title, "\n".join(body), _head(script))

    def _text(self, kept: Sequence[int]) -> str:
        """The text, a span of HTML for each token, in the colours of the layers' mean surprise."""
        values = self.trace.of_layers(QUANTITIES[0]).mean(0)
        tokens = "".join(
            f'<i class="c{shade}">{html.escape(shown) or "·"}</i>'
            for shade, shown in zip(shades(values), self.reading.shown, strict=True)
        )
        titles = [quantity.title for quantity in QUANTITIES] + ["loss"]
        titles += [] if self.influences is None else ["influence on the answer"]
        layers = _layer_names(kept)
        left_out = len(self.trace.layers) - len(kept)
        note = f" {left_out} layers between them are left out of this page, not of the JSON." if left_out else ""
        return (
            '<h2>The text</h2>\n<p id="controls" hidden>'
            f'<label>colour by <select id="quantity">{_options(titles)}</select></label> '
            f'<label>of <select id="layer">{_options(layers)}</select></label></p>\n'
            f'<div id="text">{tokens}</div>\n<p id="tip" hidden></p>\n'
            f'<p class="note">Darker is more: from the 2nd to the 98th percentile. A dot is a token that is part of a '
            f"character, which stands at its last one.{note}</p>"
        )

    def _data(self, kept: Sequence[int]) -> str:
        """What the script reads."""
        quantities = []
        for quantity in QUANTITIES:
            every = self.trace.of_layers(quantity)
            quantities.append(packed(quantity.title, np.concatenate([every.mean(0, keepdims=True), every[kept]])))
        quantities.append(packed("loss", self.trace.losses[None]))
        data: dict[str, Any] = {"shades": SHADES, "layers": _layer_names(kept), "quantities": quantities}
        if self.influences is not None:
            data["influence"] = self._influence_of_tokens(self.influences)
        # "<" could end the script that the data stand in.
        return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")

    def _influence_of_tokens(self, influences: Sequence[Influence]) -> dict[str, list[Any]]:
        """Each token's span's influence as text, and its colour."""
        nats: list[str | None] = [None] * len(self.reading.tokens)
        classes = [""] * len(nats)
        finite = [influence for influence in influences if math.isfinite(influence.nats)]
        largest = max((abs(influence.nats) for influence in finite), default=0.0) or 1.0
        for influence in finite:
            for token in influence.span:
                nats[token] = f"{influence.nats:+.4g} nats"
                sign = "n" if influence.nats < 0 else "c"
                classes[token] = f"{sign}{round(abs(influence.nats) / largest * (SHADES - 1))}"
        for token in self.reading.answer:
            classes[token] = "answer"
        return {"nats": nats, "classes": classes}

    def _influences(self, influences: Sequence[Influence]) -> str:
        """A bar for each span."""
        largest = max((abs(influence.nats) for influence in influences), default=0.0) or 1.0
        rows = []
        for influence in influences:
            width, sign = 100 * abs(influence.nats) / largest, "negative" if influence.nats < 0 else "positive"
            x = 100 - width if influence.nats < 0 else 100
            bar = (
                f'<svg width="200" height="12" role="img" aria-label="{influence.nats:+.4g} nats">'
                f'<rect class="{sign}" x="{x:.1f}" y="1" width="{width:.1f}" height="10"/>'
                '<rect class="middle" x="99.5" y="0" width="1" height="12"/></svg>'
            )
            words = "".join(self.reading.shown[influence.span.start : influence.span.stop])
            rows.append(
                f'<tr><th scope="row">{influence.span.start}:{influence.span.stop}</th>'
                f"<td>{influence.nats:+.4g}</td><td>{bar}</td><td>{html.escape(words.strip())}</td></tr>"
            )
        answer = "".join(self.reading.shown[self.reading.answer.start : self.reading.answer.stop])
        return (
            "<h2>What the answer owes to what was written</h2>\n"
            f"<p>The answer <q>{html.escape(answer)}</q> has a log-likelihood of {self.answer_nats:.4f} nats. A span's "
            "influence is what it loses when the span's tokens are read, but not written to any memory (θ = 0).</p>\n"
            '<div class="wide"><table class="influences">\n<thead><tr><th scope="col">tokens</th>'
            '<th scope="col">nats</th><th scope="col">influence</th><th scope="col">span</th></tr></thead>\n<tbody>\n'
            + "\n".join(rows)
            + "\n</tbody></table></div>"
        )


def kept_layers(layers: int, tokens: int) -> list[int]:
    """The layers whose values go into the page: all, or as many as its size allows, the first and the last included."""
    of_layer = len(QUANTITIES) * max(tokens, 1) * 4 / 3
    room = DATA_BYTES * max(1.0, tokens / DATA_TOKENS)
    number = max(2, int(room / of_layer) - 1)  # one for their mean
    return sorted({round(index) for index in np.linspace(0, layers - 1, min(layers, number))})


def packed(title: str, values: np.ndarray) -> dict[str, Any]:
    """[layers, tokens] of numbers >= 0 as bytes for the script; 0 for what is no number, too."""
    finite = np.where(np.isfinite(values), values, 0.0)
    high = float(finite.max(initial=0.0)) or 1.0
    counted = finite >= high * SMALLEST
    low = float(finite[counted].min(initial=high))
    scale = np.log(high / low) / 254 or 1.0
    steps = np.log(np.where(counted, finite, low) / low) / scale
    codes = np.where(counted, 1 + np.rint(steps), _NO_VALUE).astype(np.uint8)
    encoded = base64.b64encode(codes.tobytes()).decode("ascii")
    return {"title": title, "low": low, "high": high, "layers": len(values), "values": encoded}


def shades(values: np.ndarray) -> list[int]:
    """A shade, 0 to SHADES - 1, for each token: linear between the 2nd and the 98th percentile of all but the first."""
    finite = np.where(np.isfinite(values), values, 0.0)
    ordered = np.sort(finite[1:]) if len(finite) > 1 else finite
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.02, 0.98))
    shares = np.clip((finite - low) / (high - low), 0, 1) if high > low else np.zeros(len(finite))
    return np.rint(shares * (SHADES - 1)).astype(int).tolist()


def curves(trace: Trace) -> Figure:
    """Every quantity by position, a line per layer: means over stretches of the text."""
    layers, tokens = len(trace.layers), len(trace.losses)
    drawn = sorted({round(index) for index in np.linspace(0, layers - 1, min(layers, 24))})
    panels = [(quantity.title, trace.of_layers(quantity)[drawn]) for quantity in QUANTITIES]
    panels.append(("loss, nats", trace.losses[None].astype(np.float64)))
    number = max(2, min(tokens, CURVE_POINTS // (len(drawn) * len(panels))))
    edges = np.unique(np.linspace(0, tokens, number + 1).astype(int))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 8.4), layout="constrained")
        grid = list(figure.subplots(4, 2, sharex=True).flat)
        colours = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.9, len(drawn)))
        middles = (edges[:-1] + edges[1:] - 1) / 2
        for axes, (title, values) in zip(grid, panels, strict=True):
            sums = np.add.reduceat(np.nan_to_num(values, nan=0.0), edges[:-1], axis=1)
            counts = np.add.reduceat(np.isfinite(values).astype(float), edges[:-1], axis=1)
            means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
            for index, line in enumerate(means):
                of_layer = {"color": colours[index], "label": f"layer {drawn[index]}"} if len(values) > 1 else {}
                axes.plot(middles, line, linewidth=0.9, **(of_layer or {"color": "#444444"}))
            axes.set_title(title)
            axes.set_ylim(bottom=0)
        for axes in grid[-2:]:
            axes.set_xlabel("token")
        if layers > 1:
            handles, labels = grid[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside right upper", fontsize=8)
        return figure


def _layer_names(kept: Sequence[int]) -> list[str]:
    return ["the mean of all layers", *(f"layer {index}" for index in kept)]


def _options(names: Sequence[str]) -> str:
    return "".join(f'<option value="{index}">{html.escape(name)}</option>' for index, name in enumerate(names))


def _definitions() -> str:
    rows = [(quantity.title, quantity.meaning) for quantity in QUANTITIES]
    rows.append(("loss", "-log p of the token in nats, given all tokens before it"))
    return (
        "<h2>What the numbers are</h2>\n"
        + facts_table(rows)
        + '<p class="note">Of a layer: norms over the weights of all heads, gates as the mean of the heads. Values '
        "beside the pointer are rounded to at most 3 % (the JSON has them by head, unrounded).</p>"
    )


def _head(script: str) -> str:
    """The policy, which lets nothing be loaded or run but this page's own script, and the colours."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    ramps = []
    for name, (red, green, blue) in {"c": (226, 88, 12), "n": (20, 98, 190)}.items():
        for shade in range(SHADES):
            share = 0.85 * shade / (SHADES - 1)
            mixed = ",".join(str(round(255 + share * (part - 255))) for part in (red, green, blue))
            ramps.append(f".{name}{shade} {{ background: rgb({mixed}); }}")
    return f"""<meta http-equiv="Content-Security-Policy" content="{policy}">
<style>
{" ".join(ramps)}
.answer {{ outline: 2px solid #222; outline-offset: -2px; }}
#text {{ white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7; border: 1px solid #ddd; padding: 0.8rem;
  max-height: 40rem; overflow-y: auto; }}
#text i {{ font-style: normal; }}
#tip {{ position: fixed; margin: 0; padding: 0.4rem 0.6rem; background: #222; color: #fff; font-size: 0.8rem;
  white-space: pre; pointer-events: none; border-radius: 4px; }}
#tip[hidden] {{ display: none; }}
.influences td:last-child {{ text-align: left; white-space: normal; }}
.positive {{ fill: #e2580c; }} .negative {{ fill: #1462be; }} .middle {{ fill: #888; }}
</style>
"""
