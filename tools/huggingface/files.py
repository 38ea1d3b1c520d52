"""The small files of an exported model: what transformers reads beside weights, code and tokenizer."""

from __future__ import annotations

import json
from typing import Any

import torch

from pretrain.exported import CONFIG, MODEL_TYPE, ModelDirectoryConfig
from tools.encoding import Tokenizer
from tools.huggingface.package import CONFIGURATION, MODELING

GENERATION_CONFIG = "generation_config.json"


def config_files(config: ModelDirectoryConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, str]:
    """config.json and generation_config.json by name.

    Args:
        dtype: of the weights.
    """
    # A text begins after the token that ends documents.
    tokens = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    tokens["pad_token_id"] = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
    contents: dict[str, dict[str, Any]] = {
        CONFIG: {
            "model_type": MODEL_TYPE,
            "architectures": ["TitansForCausalLM"],
            "auto_map": {
                "AutoConfig": f"{CONFIGURATION}.TitansConfig",
                "AutoModelForCausalLM": f"{MODELING}.TitansForCausalLM",
            },
            "titans": config.model.model_dump(mode="json"),
            "mnemosyne": config.provenance.model_dump(mode="json"),
            **tokens,
            "tie_word_embeddings": config.model.tie_embeddings,
            "use_cache": True,
            "dtype": str(dtype).removeprefix("torch."),
        },
        GENERATION_CONFIG: tokens,
    }
    return {name: json.dumps(content, indent=1) + "\n" for name, content in contents.items()}
