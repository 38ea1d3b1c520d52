"""The command: what it writes and prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tools.huggingface.exported_cases import random_ids, write_exported
from tests.tools.inspect.page_structure import Structure
from tools.inspect.__main__ import main
from tools.inspect.memories import QUANTITIES, trace
from tools.model_directory import load_model_directory
from tools.sessions import Session, save_session

TEXT = 'The key is 4711. <script>alert("x")</script> was here! "Is it?"\nNothing else; 記憶 🚀 was [bold]empty…\n'


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mac") / "model"
    write_exported(folder, "mac")
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_page_and_json_have_every_token(
    exported: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = ["--output", str(tmp_path / "new/page.html"), "--json", str(tmp_path / "found.json")]
    asked = ["--query", "Which key?", "--answer", " 4711"]
    assert main(["surprise", str(exported), str(text), *outputs, *asked]) == 0
    found = Structure((tmp_path / "new/page.html").read_text(encoding="utf-8"))
    assert "".join(found.texts["text"].split("</s>", 1)[1].split("·")) == TEXT + "Which key? 4711"
    content = json.loads((tmp_path / "found.json").read_text())
    loaded = load_model_directory(exported)
    expected = trace(loaded.model, content["tokens"], "model")
    assert content["tokens"] == [
        loaded.tokenizer.eos_id, *loaded.tokenizer.encode(TEXT + "Which key? 4711")
    ]  # fmt: skip
    for layer, values in zip(content["layers"], expected.layers, strict=True):
        for quantity in QUANTITIES:
            np.testing.assert_allclose(layer[quantity.name], values[quantity.name], rtol=1e-6, atol=1e-30)
    assert content["loss"][0] is None
    influence = content["influence"]
    likelihood = -sum(content["loss"][slice(*influence["answer"])])
    assert influence["answer_nats"] == pytest.approx(likelihood, rel=1e-4)
    assert [x["start"] for x in influence["spans"]][0] == 1 and influence["spans"][-1]["stop"] == content["text"][1]
    assert any(abs(x["nats"]) > 1e-4 for x in influence["spans"])
    shown = capsys.readouterr().out
    assert "most surprising" in shown and "rests on" in shown and "[bold]" in shown


def test_spans_and_cuts(exported: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-tokens", "20", "--answer", " x", "--span", "2:5", "7:9", "--json", str(tmp_path / "found.json")]
    assert main(["surprise", str(exported), str(text), *options]) == 0
    content = json.loads((tmp_path / "found.json").read_text())
    assert [(x["start"], x["stop"]) for x in content["influence"]["spans"]] == [(2, 5), (7, 9)]
    assert content["text"] == [1, 21]
    assert "read to its token 20; --max-tokens reads more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--query", "x"], "give --answer, or drop them"),
        (["--span", "1:2"], "give --answer, or drop them"),
        (["--answer", "x", "--span", "0:2"], "behind an EOS; give a span inside it"),
        (["--answer", "x", "--span", "2:2000"], "give a span inside it"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    exported: Path, text: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["surprise", str(exported), str(text), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("span", ["3", "5:5", "-1:3", "a:b", "7:2"])
def test_spans_that_are_none_are_refused(exported: Path, span: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["surprise", str(exported), "text", "--answer", "x", f"--span={span}"])
    assert "START:END" in capsys.readouterr().err


def test_texts_that_cannot_be_read_are_refused(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").write_bytes(b"")
    for name, message in (
        ("absent", "absent: cannot be read: No such file"), ("latin", "latin: is not UTF-8 at byte 3"),
        ("empty", "empty: the text is empty"), (".", "cannot be read: Is a directory"),
    ):  # fmt: skip
        assert main(["surprise", str(exported), str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert main(["surprise", str(tmp_path), str(tmp_path / "latin")]) == 2


def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    exported: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["surprise", str(exported / "nothing"), str(text), "--output", str(text / "page.html")]) == 2
    assert "page.html: cannot be written" in capsys.readouterr().err


def test_a_transformer_has_nothing_to_look_at(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_exported(tmp_path / "model", "transformer")
    for arguments in (["surprise", str(tmp_path / "model"), str(text)], ["memory", str(tmp_path / "model")]):
        assert main(arguments) == 2
        assert "its variant is transformer, which has no memory" in capsys.readouterr().err


def test_states_that_do_not_fit_are_refused(
    exported: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_exported(tmp_path / "other", "mag")
    model = load_model_directory(exported).model
    with torch.no_grad():
        save_session(tmp_path / "session", Session(model(random_ids(1, 9)).state, random_ids(1, 1), 9), model)
    for arguments, message in (
        ([str(tmp_path / "session")], "is a file: give --model"),
        ([str(tmp_path / "absent")], "no such file or folder"),
        ([str(tmp_path / "session"), "--model", str(tmp_path / "other")], "is a session of another model"),
        ([str(text), "--model", str(exported)], "cannot be read as a session"),
        ([str(exported), "--model", str(exported)], "holds its own: drop it"),
        ([str(tmp_path)], "holds no checkpoints"),
        ([str(tmp_path), "--dtype", "bfloat16"], "a checkpoint's weights are looked at as they are"),
    ):
        assert main(["memory", *arguments]) == 2, arguments
        assert message in capsys.readouterr().err


def test_a_model_that_diverged_is_shown_as_it_is(tmp_path: Path, text: Path) -> None:
    """No traceback, and JSON that any reader takes."""
    write_exported(tmp_path / "model", "mac", diverged=True)
    files = {name: ["--output", str(tmp_path / f"{name}.html"), "--json", str(tmp_path / name)] for name in "ab"}
    model = str(tmp_path / "model")
    assert main(["surprise", model, str(text), "--answer", " x", "--span", "1:4", *files["a"]]) == 0
    found = json.loads((tmp_path / "a").read_text(), parse_constant=pytest.fail)
    assert found["influence"]["answer_nats"] is None and found["influence"]["spans"][0]["nats"] is None
    assert main(["memory", model, *files["b"]]) == 0
    json.loads((tmp_path / "b").read_text(), parse_constant=pytest.fail)
    assert not list(tmp_path.glob(".*"))
