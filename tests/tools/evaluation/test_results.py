"""Results are in their files before they are printed: an output that nobody reads any more loses none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pretrain.errors import UserError
from tools import evaluate
from tools.inspect import __main__ as inspect


def closed(*_: Any, **__: Any) -> None:
    raise UserError("the output is closed")


@pytest.mark.parametrize("kind", ["text", "tasks", "long", "surprise", "memory"])
def test_results_are_written_before_they_are_printed(
    kind: str, mac: Path, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("ki mo ta re")
    board = ["--tensorboard", str(tmp_path / "board")]
    plot, page = tmp_path / "plot.svg", tmp_path / "page.html"
    long = ["--lengths", "500", "--depths", "50", "--samples", "1", "--answer-tokens", "12", "--plot", str(plot)]
    main, arguments, written = {
        "text": (evaluate.main, [str(mac), "--input", str(text)], []),
        "tasks": (evaluate.main, [str(mac), "--tasks", "lambada", "--data", str(sets), *board], [tmp_path / "board"]),
        "long": (evaluate.main, [str(mac), "--ruler", "niah_single_1", *long, *board], [plot, tmp_path / "board"]),
        "surprise": (inspect.main, ["surprise", str(mac), str(text), "--output", str(page)], [page]),
        "memory": (inspect.main, ["memory", str(mac), "--output", str(page)], [page]),
    }[kind]
    monkeypatch.setattr(Console, "print", closed)
    assert main([*arguments, "--json", str(tmp_path / "out.json")]) == 2
    assert "the output is closed" in capsys.readouterr().err
    assert all(path.exists() for path in [tmp_path / "out.json", *written])
