"""Building by several processes, after a kill, and without duplicates: always the same bytes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.data import ShardSet
from tests.data_cases import documents, make_tokenizer, write_jsonl
from tools.encoding import Tokenizer
from tools.shards.__main__ import main

ROOT = Path(__file__).parents[2]
TEXTS = documents(400, words=400)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Documents of which every fourth is there twice."""
    texts = [copy for number, text in enumerate(TEXTS) for copy in [text] * (1 + (number % 4 == 0))]
    return write_jsonl(tmp_path_factory.mktemp("source") / "texts.jsonl", texts)


def arguments(source, model, output, *options):
    named = ("--input", str(source), "--tokenizer", str(model), "--output", str(output))
    return ["build", *named, "--shard-tokens", "8000", "--validation-fraction", "0.3", *options]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, source, model):
    """The files of a build by one process that nothing happened to."""
    output = tmp_path_factory.mktemp("whole") / "out"
    assert main(arguments(source, model, output, "--workers", "1")) == 0
    return contents(output)


def encoders_of(process):
    """The processes that a build's process has started."""
    return [int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def started(*words):
    return subprocess.Popen([sys.executable, "-m", "tools.shards", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_until(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_any_number_of_processes_gives_the_same_bytes(tmp_path, source, model, whole, monkeypatch):
    monkeypatch.setattr("tools.shards.build.BATCH_BYTES", 1 << 15)  # many batches, of which several are under way
    for workers in ("2", "3"):
        assert main(arguments(source, model, tmp_path / workers, "--workers", workers)) == 0
        assert contents(tmp_path / workers) == whole


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_killed_build_goes_on_and_gives_the_same_bytes(tmp_path, source, model, whole, workers, capsys, monkeypatch):
    out, building = tmp_path / "out", tmp_path / "out.building"
    words = arguments(source, model, out, "--workers", workers)
    process = started(*words)
    try:
        wait_until(process, lambda: (building / "shards/validation/shards-000002.tar").exists())
        assert main(words) == 2  # refused while the first one runs
        assert "another build" in capsys.readouterr().err
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    encoded = count_encoded(monkeypatch)
    assert main(words) == 0
    assert "finished shards" in capsys.readouterr().err
    assert contents(out) == whole
    assert not building.exists()
    if workers == "1":
        assert 0 < sum(encoded) < 500  # of 500 documents, those of finished shards are not encoded again


def count_encoded(monkeypatch):
    numbers = []
    encode = Tokenizer.encode_documents

    def counted(self, texts, **options):
        numbers.append(len(texts))
        return encode(self, texts, **options)

    monkeypatch.setattr(Tokenizer, "encode_documents", counted)
    return numbers


def failing_build(tmp_path, source, model, monkeypatch, shards=6):
    """A build that fails after some finished shards; its arguments and folder."""
    from tools.shards.journal import Journal

    add, added = Journal.add, []

    def failing(self, part, shard):
        add(self, part, shard)
        added.append(shard)
        if len(added) == shards:
            raise OSError(28, "No space left on device")

    words = arguments(source, model, tmp_path / "out", "--workers", "1")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", failing)
        assert main(words) == 2
    return words, tmp_path / "out.building"


def test_a_full_disk_leaves_what_is_finished(tmp_path, source, model, whole, monkeypatch, capsys):
    words, building = failing_build(tmp_path, source, model, monkeypatch)
    message = capsys.readouterr().err
    assert "no space left on its disk" in message
    assert f"{building}: holds finished shards, from which the same command goes on" in message
    assert building.exists()
    assert main(words) == 0
    assert "goes on after 6 finished shards" in capsys.readouterr().err
    assert contents(tmp_path / "out") == whole


def test_another_build_does_not_go_on_from_what_is_left(tmp_path, source, model, whole, monkeypatch, capsys):
    words, building = failing_build(tmp_path, source, model, monkeypatch)
    capsys.readouterr()
    assert main([*words, "--deduplicate"]) == 0
    assert f"{building}: removed: a build of other input" in capsys.readouterr().err
    assert contents(tmp_path / "out") != whole
    assert not building.exists()


def test_a_journal_that_was_cut_counts_up_to_its_last_whole_line(tmp_path, source, model, whole, monkeypatch, capsys):
    words, building = failing_build(tmp_path, source, model, monkeypatch)
    journal = building / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    assert main(words) == 0
    assert "goes on after 5 finished shards" in capsys.readouterr().err
    assert contents(tmp_path / "out") == whole


def test_a_line_of_the_journal_that_was_damaged_is_named(tmp_path, source, model, monkeypatch, capsys):
    words, building = failing_build(tmp_path, source, model, monkeypatch)
    journal = building / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"shard"', b'"shart"', 1))
    assert main(words) == 2
    assert f"the build that was killed cannot go on: remove {building} to begin anew" in capsys.readouterr().err


def test_a_finished_shard_that_was_damaged_is_named(tmp_path, source, model, monkeypatch, capsys):
    words, building = failing_build(tmp_path, source, model, monkeypatch)
    path = building / "shards/train/shards-000001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    assert main(words) == 2
    message = capsys.readouterr().err
    assert f"{path}: damaged: expected sha256" in message
    assert f"remove {building} to begin anew" in message


def test_documents_that_changed_under_a_killed_build_are_noticed(tmp_path, source, model, monkeypatch, capsys):
    """The same size and time, which the journal's first line cannot tell apart."""
    own = tmp_path / "own.jsonl"
    own.write_bytes(source.read_bytes())
    os.utime(own, ns=(10**18, 10**18))
    words, building = failing_build(tmp_path, own, model, monkeypatch)
    data = own.read_bytes()
    own.write_bytes(data[:12] + bytes([data[12] ^ 1]) + data[13:])
    os.utime(own, ns=(10**18, 10**18))
    assert main(words) == 2
    message = capsys.readouterr().err
    assert "are not those that the killed build read" in message
    assert "remove the folder to begin anew" in message


def test_an_encoding_process_that_is_killed_is_named_and_the_build_can_go_on(tmp_path, source, model, whole, capsys):
    words = arguments(source, model, tmp_path / "out", "--workers", "2")
    process = started(*words)
    wait_until(process, lambda: len(encoders_of(process)) == 2)
    os.kill(encoders_of(process)[0], signal.SIGKILL)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 2, message
    assert "error: an encoding process was killed by SIGKILL (out of memory? give fewer --workers)" in message
    assert not (tmp_path / "out").exists()
    assert main(words) == 0
    assert contents(tmp_path / "out") == whole


def test_progress_says_tokens_a_second_and_the_time_left(tmp_path, source, model, monkeypatch, capsys):
    monkeypatch.setattr("tools.command.LINE_SECONDS", 0.0)
    monkeypatch.setattr("tools.shards.build.BATCH_BYTES", 1 << 15)
    assert main(arguments(source, model, tmp_path / "out", "--workers", "1")) == 0
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert re.fullmatch(r" *\d+ %  [\d.]+ [kM]? ?tokens, [\d.]+ [kM]? ?tokens/s, \d+ s left", lines[2])
    percents = [int(line.partition("%")[0]) for line in lines]
    assert percents == sorted(percents) and percents[-1] == 100
    assert re.search(r"\d+ s, [\d.]+ [kM]? ?tokens/s", captured.out)


def test_documents_with_the_same_text_are_kept_once(tmp_path, source, model, capsys):
    assert main(arguments(source, model, tmp_path / "out", "--workers", "1", "--deduplicate")) == 0
    assert "left out: 100 documents whose text was there before" in capsys.readouterr().out
    tokenizer = Tokenizer.open(model)
    sets = [ShardSet.open(tmp_path / "out" / part) for part in ("train", "validation")]
    texts = [tokenizer.decode(shards.read(number)) for shards in sets for number in range(shards.documents)]
    assert sorted(texts) == sorted(TEXTS)
