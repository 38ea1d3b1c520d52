"""The configuration of a Titans language model as transformers has it."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from model.config import MemoryConfig, ModelConfig

_STANDARD_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_dim",
    "tie_word_embeddings": "tie_embeddings",
}
"""What transformers calls some of the model's fields."""


class TitansConfig(PretrainedConfig):
    """Everything that the model is made of is in `titans`; the names that other models have are copies of it."""

    model_type = "mnemosyne_titans"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self, titans: dict[str, Any] | None = None, mnemosyne: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """
        Args:
            titans: the fields of Mnemosyne's ModelConfig. None only for transformers, which compares a configuration
                with one of nothing but defaults before it writes one.
            mnemosyne: where the weights come from; not used by the model.
            kwargs: of PretrainedConfig.

        Raises:
            ValueError: a standard name contradicts `titans`.
        """
        for name, field in _STANDARD_NAMES.items() if titans else ():
            if kwargs.setdefault(name, titans[field]) != titans[field]:
                raise ValueError(
                    f"{name} is {kwargs[name]}, but titans[{field!r}] is {titans[field]}: set titans, and leave "
                    f"{name} out"
                )
        self.titans = titans
        self.mnemosyne = mnemosyne
        super().__init__(**kwargs)

    def model_config(self) -> ModelConfig:
        """The configuration as the model takes it; raises ValueError where there is none."""
        if self.titans is None:
            raise ValueError("titans is missing: a Titans model is made of the fields in it; see an exported config")
        memory = self.titans["memory"]
        return ModelConfig(**{**self.titans, "memory": None if memory is None else MemoryConfig(**memory)})
