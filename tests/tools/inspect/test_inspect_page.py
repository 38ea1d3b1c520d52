"""The page: its text, its structure by a parser, that it loads and runs nothing foreign, its size, its numbers."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.tools.inspect.page_structure import Structure
from tools.inspect.influence import Influence
from tools.inspect.memories import QUANTITIES, Trace
from tools.inspect.surprise_page import SHADES, Page, kept_layers, packed, shades
from tools.inspect.text import Reading

HOSTILE = '<script>alert("1")</script> & </i><img src=x onerror=alert(1)> "\' &lt; <!-- 記憶 '


def made_page(shown: list[str], *, layers: int = 2, heads: int = 2, influences: bool = True) -> Page:
    """A page of drawn numbers for tokens that show `shown`, EOS before them."""
    draw, length = np.random.default_rng(0), len(shown) + 1
    found = [
        {quantity.name: draw.lognormal(size=(length, heads)).astype(np.float32) for quantity in QUANTITIES}
        for _ in range(layers)
    ]
    losses = draw.uniform(0, 8, length).astype(np.float32)
    losses[0] = np.nan
    reading = Reading(
        [0] * length, ["</s>", *shown], range(1, length - 1), range(length - 1, length), "".join(shown), False, []
    )
    spans = [Influence(range(1, 4), 0.25), Influence(range(4, length - 1), -1.5)] if influences else None
    return Page("Surprise: <a>.txt", [("text", "<b>")], reading, Trace(found, losses), spans, -3.5)


def test_hostile_text_stays_text() -> None:
    page = made_page([*HOSTILE]).html()
    found = Structure(page)
    assert found.texts["text"] == "</s>" + HOSTILE
    assert found.texts["title"] == "Surprise: <a>.txt"
    assert len(found.all("script")) == 2 and len(found.all("i")) == len(HOSTILE) + 1
    assert [image["alt"] for image in found.all("img")] == ["What each layer did, by position in the text"]
    assert not any(name.startswith("on") for _, attributes in found.elements for name in attributes)
    assert "<b>" in found.texts["table"] and "</script>" not in json.dumps(json.loads(found.texts["data"]))


def test_nothing_is_loaded_and_only_its_own_script_runs() -> None:
    page = made_page([*HOSTILE]).html()
    found = Structure(page)
    for _, attributes in found.elements:
        for name in ("src", "href", "action", "data", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert "url(" not in page and "@import" not in page
    [policy] = [meta["content"] for meta in found.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    script = page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_the_first_colours_are_those_of_the_mean_surprise() -> None:
    page = made_page([*"some words"])
    found = Structure(page.html())
    expected = shades(page.trace.of_layers(QUANTITIES[0]).mean(0))
    assert [token["class"] for token in found.all("i")] == [f"c{shade}" for shade in expected]
    assert len(set(expected)) > 5


def test_shades_go_from_the_smallest_to_the_largest() -> None:
    assert shades(np.array([9.0, *range(101)]))[1:] == [
        round(min(1, max(0, (value - 2) / 96)) * (SHADES - 1)) for value in range(101)
    ]
    assert shades(np.array([1.0, 1.0, 1.0])) == [0, 0, 0]
    assert shades(np.array([1.0])) == [0]


@pytest.mark.parametrize("span", [1e-12, 1e-3, 1.0, 1e7])
def test_values_of_the_page_are_right_to_three_per_cent(span: float) -> None:
    values = span * np.random.default_rng(1).lognormal(sigma=2.0, size=(3, 400))
    values[1, 5], values[2, 7] = 0.0, np.nan
    content = packed("x", values)
    codes = np.frombuffer(base64.b64decode(content["values"]), np.uint8).reshape(3, 400).astype(float)
    shown = np.where(codes == 0, 0.0, content["low"] * (content["high"] / content["low"]) ** ((codes - 1) / 254))
    small = np.nan_to_num(values) < np.nanmax(values) * 1e-6
    assert (shown[small] == 0).all()
    assert (np.abs(shown[~small] / values[~small] - 1) < 0.03).all()
    assert content["layers"] == 3


def test_zeros_alone_are_zeros() -> None:
    assert set(base64.b64decode(packed("x", np.zeros((2, 5)))["values"])) == {0}


@pytest.mark.parametrize(("layers", "shown"), [(1, " word"), (24, " longer"), (64, "記")])
def test_four_thousand_tokens_are_under_a_megabyte(layers: int, shown: str) -> None:
    page = made_page([shown] * 4095, layers=layers, heads=1)
    text = page.html()
    assert len(text.encode()) < 1_000_000
    kept = kept_layers(layers, 4096)
    assert kept[0] == 0 and kept[-1] == layers - 1 and len(set(kept)) == len(kept)
    assert len(kept) == layers or f"{layers - len(kept)} layers between them are left out" in text


def test_influences_are_bars_and_colours() -> None:
    page = made_page([*"abcdefgh"])
    found = Structure(page.html())
    bars = [rect for rect in found.all("rect") if rect["class"] != "middle"]
    assert [(bar["class"], bar["width"]) for bar in bars] == [("positive", "16.7"), ("negative", "100.0")]
    influence = json.loads(found.texts["data"])["influence"]
    assert influence["classes"] == ["", *["c2"] * 3, *["n15"] * 4, "answer"]
    assert influence["nats"][1] == "+0.25 nats" and influence["nats"][0] is None
    without = Structure(made_page([*"abcdefgh"], influences=False).html())
    assert not without.all("rect") and "influence" not in json.loads(without.texts["data"])


def test_a_browser_runs_the_page(tmp_path: Path) -> None:
    """Its script goes to its end under its own policy: only there the controls are shown."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium is installed")
    path = tmp_path / "page.html"
    path.write_text(made_page([*HOSTILE]).html(), encoding="utf-8")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=240, check=True
    )
    found = Structure(shown.stdout)
    [controls] = [attributes for _, attributes in found.elements if attributes.get("id") == "controls"]
    assert "hidden" not in controls
    assert found.texts["text"] == "</s>" + HOSTILE
