"""Files of results: whole or as they were before, strict JSON, and no trace of having been tried."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from pretrain.errors import UserError
from tools.result_files import replacing, require_writable, write_json, write_text


def test_trying_a_file_leaves_things_as_they_were(tmp_path: Path) -> None:
    new, old = tmp_path / "a" / "new.json", tmp_path / "old.json"
    old.write_text("old")
    require_writable(new, None, old, Path(os.devnull))
    assert old.read_text() == "old"
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a", old]


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file" / "below.json"):
        with pytest.raises(UserError, match="cannot be written"):
            require_writable(path)
        with pytest.raises(UserError, match="cannot be written"):
            write_text(path, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "map.svg"
    write_text(path, "older")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        assert partial.suffix == ".svg"
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "older" and list(tmp_path.iterdir()) == [path]
    write_text(path, "newer")
    assert path.read_text() == "newer" and list(tmp_path.iterdir()) == [path]


def test_links_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    link, target = tmp_path / "link.json", tmp_path / "folder" / "target.json"
    target.parent.mkdir()
    link.symlink_to(target)
    write_text(link, "x")
    assert link.is_symlink() and target.read_text() == "x"
    write_text(Path(os.devnull), "x")
    assert not Path(os.devnull).is_file()


def test_json_has_null_for_what_is_no_finite_number(tmp_path: Path) -> None:
    content = {"a": [1.5, math.inf, (math.nan, 2)], "b": {"c": -math.inf}, "d": None, "e": "nan", "f": True}
    write_json(tmp_path / "x.json", content, indent=1)
    read = json.loads((tmp_path / "x.json").read_text(), parse_constant=pytest.fail)
    assert read == {"a": [1.5, None, [None, 2]], "b": {"c": None}, "d": None, "e": "nan", "f": True}
