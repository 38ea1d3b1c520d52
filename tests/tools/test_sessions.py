"""Sessions: saved and loaded a conversation goes on bit for bit, files that are not its own are refused, merging."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from model import ModelState, TitansLM
from pretrain.errors import UserError
from tests.data_cases import make_tokenizer
from tests.model_cases import CASES, build_model, random_tokens
from tests.tools.huggingface.exported_cases import write_exported
from tools import generate, sessions
from tools.model_directory import load_model_directory
from tools.sessions import Session, fingerprint, load_session, merge_sessions, save_session

ROOT = Path(__file__).parents[2]
NONE_UNREAD = torch.empty(1, 0, dtype=torch.int64)


def session_of(model: TitansLM, tokens: torch.Tensor) -> Session:
    """That of a model which has read tokens [1, T]."""
    with torch.no_grad():
        return Session(model(tokens).state, NONE_UNREAD, tokens.shape[1])


@torch.no_grad()
@pytest.mark.parametrize("case", list(CASES))
def test_a_session_saved_three_times_gives_the_logits_of_an_unbroken_one_bit_for_bit(case: str, tmp_path: Path) -> None:
    model, path = build_model(case, torch.float32), tmp_path / "session"
    tokens = random_tokens(2, 41)
    pieces = tokens.split([9, 8, 11, 13], 1)
    unbroken, loaded, read = None, None, 0
    for piece in pieces:
        kept, gone_on = model(piece, unbroken), model(piece, loaded)
        assert torch.equal(gone_on.logits, kept.logits)
        read += piece.shape[1]
        save_session(path, Session(gone_on.state, piece[:, -1:], read), model)
        found = load_session(path, build_model(case, torch.float32))
        unbroken, loaded = kept.state, found.state
        assert found.tokens == read
        assert torch.equal(found.unread, piece[:, -1:])
    expected = unbroken.tensors()
    assert read == 41 and loaded.tensors().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.tensors().items())


@torch.no_grad()
@pytest.mark.parametrize("case", ["mac", "mag", "mal", "lmm", "transformer-window"])
def test_a_file_does_not_grow_with_the_tokens_read(case: str, tmp_path: Path) -> None:
    model, sizes = build_model(case, torch.float32), []
    for length in (64, 2048):
        save_session(tmp_path / "session", session_of(model, random_tokens(1, length)), model)
        sizes.append((tmp_path / "session").stat().st_size)
    assert abs(sizes[0] - sizes[1]) < 64  # digits of the token count


def test_every_byte_of_a_file_counts(tmp_path: Path) -> None:
    model, path = build_model("lmm", torch.float32), tmp_path / "session"
    save_session(path, session_of(model, random_tokens(1, 9)), model)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    places = [*range(header, len(content), 97), content.index(b'"tokens":"9"') + 10]
    for place in places:
        altered = bytearray(content)
        altered[place] ^= 1
        path.write_bytes(altered)
        with pytest.raises(UserError, match="was altered"):
            load_session(path, model)
    for cut in (0, 5, header - 3, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(UserError, match=f"{path}: cannot be read as a session"):
            load_session(path, model)
    path.write_bytes(content)
    assert load_session(path, model).tokens == 9


def test_a_file_of_another_model_kind_or_version_is_refused(tmp_path: Path) -> None:
    model, path = build_model("lmm", torch.float32), tmp_path / "session"
    save_session(path, session_of(model, random_tokens(1, 9)), model)
    other = build_model("lmm", torch.float32)
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-7
    for wrong in (other, build_model("mag", torch.float32), build_model("lmm", torch.bfloat16)):
        with pytest.raises(UserError, match="is a session of another model, or of this one in another --dtype"):
            load_session(path, wrong)
    with pytest.raises(UserError, match="no such file"):
        load_session(tmp_path / "absent", model)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), tmp_path / "newer", metadata | {"version": "2"})
    with pytest.raises(UserError, match="format version 2; this program reads 1"):
        load_session(tmp_path / "newer", model)
    save_file(load_file(path), tmp_path / "weights")
    with pytest.raises(UserError, match="is no session"):
        load_session(tmp_path / "weights", model)


@pytest.mark.parametrize("step", ["writing", "replacing"])
def test_a_session_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    model, path = build_model("lmm", torch.float32), tmp_path / "session"
    save_session(path, session_of(model, random_tokens(1, 9)), model)
    content = path.read_bytes()

    def half_written(tensors: object, target: Path, metadata: object) -> None:
        target.write_bytes(content[:100])
        raise SafetensorError("no space left")

    def refused(source: Path, target: Path) -> None:
        raise OSError(5, "input/output error")

    with monkeypatch.context() as patch:
        if step == "writing":
            patch.setattr(sessions, "save_file", half_written)
        else:
            patch.setattr(Path, "replace", refused)
        with pytest.raises(UserError, match=f"{path}: cannot be written"):
            save_session(path, session_of(model, random_tokens(1, 20)), model)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == content
    assert load_session(path, model).tokens == 9


def test_a_session_in_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    model = build_model("lmm", torch.float32)
    with pytest.raises(UserError, match="cannot be written"):
        save_session(tmp_path / "absent" / "session", session_of(model, random_tokens(1, 9)), model)
    assert list(tmp_path.iterdir()) == []


def test_a_fingerprint_is_of_all_weights_and_the_configuration() -> None:
    model = build_model("mac", torch.float32)
    prints = {fingerprint(model), fingerprint(build_model("mac", torch.float32, norm_eps=2e-6))}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[-1] += 1
            prints.add(fingerprint(model))
    assert len(prints) == 2 + len(list(model.parameters()))
    assert fingerprint(build_model("mac", torch.float32)) in prints


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    write_exported(folder / "model", "mac", tokenizer=make_tokenizer(folder))
    return folder / "model"


def spoken(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command prints."""
    assert generate.main(arguments) == 0
    return capsys.readouterr().out.removesuffix("\n")


def test_the_command_goes_on_where_it_stopped(exported: Path, tmp_path: Path, capsys) -> None:
    base = [str(exported), "--temperature", "0", "--max-new-tokens"]
    whole = spoken([*base, "40", "--prompt", "memory 記憶 "], capsys)
    saved = str(tmp_path / "session")
    parts = [spoken([*base, "10", "--prompt", "memory 記憶 ", "--save-memory", saved], capsys)]
    for _ in range(3):
        parts.append(spoken([*base, "10", "--prompt", "", "--load-memory", saved, "--save-memory", saved], capsys))
    assert "".join(parts) == whole
    tokens = int(safe_open(saved, framework="pt").metadata()["tokens"])
    again = spoken([*base, "5", "--prompt", "titan", "--load-memory", saved], capsys)
    assert again.startswith("titan")
    assert int(safe_open(saved, framework="pt").metadata()["tokens"]) == tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--load-memory", "absent"], "absent: no such file"),
        (["--merge-weights", "1"], "--merge-weights is for several files"),
        (["--save-memory", "absent/session"], "absent/session: its folder does not exist"),
        (["--save-memory", "tests"], "tests: cannot be written: it is a folder"),
    ],
)
def test_the_command_names_what_is_wrong_before_it_prints(exported: Path, options: list[str], message: str, capsys):
    assert generate.main([str(exported), "--prompt", "me", *options]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""


def test_a_session_that_ended_early_is_not_saved_and_says_so(exported: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.generate", str(exported), "--prompt", "me", "--max-new-tokens", "2"]
    reading, writing = os.pipe()
    os.close(reading)
    saved = ["--save-memory", str(tmp_path / "session")]
    result = subprocess.run([*command, *saved], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert result.returncode == 2
    assert result.stderr == f"error: {' '.join(saved)}: not saved, the output ended early\n"


def test_an_interrupted_session_is_not_saved_and_says_so(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def interrupted(_: generate.Continuation) -> Iterator[str]:
        yield "me"
        raise KeyboardInterrupt

    monkeypatch.setattr(generate.Continuation, "pieces", interrupted)
    command = [str(exported), "--prompt", "me"]
    assert generate.main(command) == 130
    assert generate.main([*command, "--save-memory", str(tmp_path / "session")]) == 2
    assert "not saved, the output ended early" in capsys.readouterr().err


def test_a_session_of_several_rows_is_not_a_conversation(exported: Path, tmp_path: Path, capsys) -> None:
    model = load_model_directory(exported).model
    save_session(tmp_path / "rows", session_of(model, random_tokens(2, 9)), model)
    assert generate.main([str(exported), "--prompt", "me", "--load-memory", str(tmp_path / "rows")]) == 2
    assert "holds 2 rows of a batch" in capsys.readouterr().err


def test_the_command_merges_sessions_and_says_what_it_is(exported: Path, tmp_path: Path, capsys) -> None:
    files = [str(tmp_path / name) for name in "ab"]
    base = [str(exported), "--temperature", "0", "--max-new-tokens", "4"]
    for file, prompt in zip(files, ("memory", "stream"), strict=True):
        spoken([*base, "--prompt", prompt, "--save-memory", file], capsys)
    command = [*base, "--prompt", "me", "--load-memory", *files]
    assert generate.main(command) == 0
    assert "an experiment" in capsys.readouterr().err
    assert generate.main([*command, "--merge-weights", "1", "2", "3"]) == 2
    assert "weights are [1.0, 2.0, 3.0]: they must be 2 numbers" in capsys.readouterr().err


def memory_tensors(state: ModelState) -> dict[str, torch.Tensor]:
    return {name: x for name, x in state.tensors().items() if ".memory.memory." in name}


@torch.no_grad()
@pytest.mark.parametrize("case", ["mac", "mag", "mal", "lmm", "linear", "delta"])
def test_a_merged_memory_is_the_mean_of_the_changes(case: str) -> None:
    model = build_model(case)
    tokens = random_tokens(3, 16)  # whole chunks and segments
    sessions = [session_of(model, row[None]) for row in tokens]
    merged = merge_sessions(sessions, model, [1, 2, 1])
    parts = [memory_tensors(session.state) for session in sessions]
    for name, tensor in memory_tensors(merged.state).items():
        if tensor.numel():
            mean = 0.25 * parts[0][name] + 0.5 * parts[1][name] + 0.25 * parts[2][name]
            torch.testing.assert_close(tensor, mean, rtol=1e-12, atol=1e-12)
    assert merged.tokens == 48
    assert not merged.state.position.any()
    first = merge_sessions(sessions, model, [1, 0, 0])
    for name, tensor in memory_tensors(first.state).items():
        torch.testing.assert_close(tensor, parts[0][name], rtol=1e-12, atol=1e-12)
    assert model(tokens[:1], merged.state).logits.isfinite().all()


@torch.no_grad()
def test_an_open_chunk_is_part_of_what_is_merged() -> None:
    """With chunks of a token, every prefix ends at one: an open chunk's tokens are read at the same weights."""
    model = build_model("linear")
    tokens = random_tokens(1, 11)  # of chunks of 4: three tokens are open
    merged = merge_sessions([session_of(model, tokens)], model)
    # The dot product's gradient does not depend on the weights, so the grid of chunks does not matter to it.
    by_token = build_model("linear", memory={**CASES["linear"]["memory"], "chunk": 1})
    expected = memory_tensors(session_of(by_token, tokens).state)
    for name, tensor in memory_tensors(merged.state).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-10, atol=1e-12)


def test_what_cannot_be_merged_is_named() -> None:
    model = build_model("transformer")
    session = session_of(model, random_tokens(1, 5))
    with pytest.raises(ValueError, match="has no memory to merge"):
        merge_sessions([session, session], model)
    model = build_model("lmm")
    session = session_of(model, random_tokens(1, 5))
    for weights in ([1.0], [0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="weights are"):
            merge_sessions([session, session], model, weights)
    with pytest.raises(ValueError, match="no sessions"):
        merge_sessions([], model)
    with pytest.raises(ValueError, match="several rows"):
        merge_sessions([session_of(model, random_tokens(2, 5))], model)
