"""Results of long contexts that are written before all lengths are answered, and gone on from by the same command."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.durable import file_sha256
from pretrain.errors import UserError
from pretrain.exported import CONFIG, TOKENIZER, weight_files
from tools.result_files import is_special


def model_digest(model: Path) -> str:
    """sha256 of the bytes that an exported model's answers depend on: its weights, configuration and tokenizer."""
    digest = hashlib.sha256()
    for path in (model / CONFIG, *weight_files(model), model / TOKENIZER):
        digest.update(file_sha256(path).encode())
    return digest.hexdigest()


def answered_before(path: Path, settings: Mapping[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """The prompts, as they were written, of each length that an unfinished file of these settings has whole.

    None are of a finished file, whose lengths are asked again, nor of any other file, which is replaced.

    Args:
        path: of the results.
        settings: what answers depend on, JSON-ready.

    Raises:
        UserError: the file is unfinished, and of other settings.
    """
    if is_special(path) or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no JSON
        return {}
    if not isinstance(found, dict) or found.get("finished") is not False:
        return {}
    before = found.get("settings") or {}
    changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if changed:
        raise UserError(
            f"--json {path}: holds answers of an unfinished evaluation with other settings ({', '.join(changed)}); "
            "give those that it was begun with to go on from it, or name another file, or remove it"
        )
    lengths: dict[int, list[dict[str, Any]]] = {}
    for prompt in found["prompts"]:
        lengths.setdefault(prompt["length"], []).append(prompt)
    return lengths
