"""The store that copies of checkpoints go to, and what is refused as one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pretrain import checkpoint_store
from pretrain.checkpoint_config import CheckpointConfig
from pretrain.checkpoint_store import CheckpointStore


def test_large_files_go_in_pieces_and_an_upload_ends_between_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_store, "PIECE_BYTES", 1000)
    store = CheckpointStore(tmp_path / "store")
    source, pieces = tmp_path / "large", []
    source.write_bytes(os.urandom(4500))
    store.put("step-00000001", "large", source, lambda: pieces.append(1))
    assert len(pieces) == 5
    store.fetch("step-00000001", "large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == source.read_bytes()

    def stop() -> None:
        if len(pieces) == 7:
            raise ZeroDivisionError
        pieces.append(1)

    with pytest.raises(ZeroDivisionError):
        store.put("step-00000002", "large", source, stop)
    assert not store.has("step-00000002", "large")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"upload": "https://host/x"}, "nothing can be put there; give s3://, gs:// or a folder"),
        ({"upload": "ftp://host/x"}, "ftp:// is not read"),
        ({"upload_keep": 2}, "upload_keep is 2, but nothing is uploaded: set upload"),
        ({"upload_wait_seconds": 2.0}, "upload_wait_seconds is 2.0, but nothing is uploaded"),
    ],
)
def test_what_cannot_be_uploaded_to_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CheckpointConfig(**fields)
