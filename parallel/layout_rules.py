"""Which layouts a model can be run in: what is refused, why, and what to do instead."""

from __future__ import annotations

from model import ModelConfig
from parallel.config import ParallelConfig


def require_layout(parallel: ParallelConfig, model: ModelConfig, *, lengths: dict[str, int]) -> None:
    """Raise ValueError, naming fields, where the model cannot be split as `parallel` says.

    Args:
        lengths: tokens that are run at a time, by the name of the field that says so.
    """
    _require_tensor(parallel.tensor, model)
    _require_sequence(parallel, model)
    _require_stretches(parallel, lengths)
    if parallel.pipeline > model.num_layers:
        raise ValueError(
            f"parallel.pipeline is {parallel.pipeline}, but the model has {model.num_layers} layers: each stage holds "
            f"at least one; set it to {model.num_layers} or less"
        )


def _require_tensor(tensor: int, model: ModelConfig) -> None:
    sizes = {"num_heads": model.num_heads, "ffn_dim": model.ffn_dim, "vocab_size": model.vocab_size}
    what = {
        "num_heads": "every rank takes as many heads of the attention and the memory",
        "ffn_dim": "every rank takes as many columns of the feed-forward",
        "vocab_size": "every rank takes as many rows of the embedding and the head",
    }
    for name, size in sizes.items():
        if size % tensor:
            below, above = size // tensor * tensor, -(-size // tensor) * tensor
            wider = f"model.{name} {above}"
            if name == "vocab_size":
                wider += " (rows above the tokenizer's are never used)"
            elif below:
                wider = f"model.{name} {below} or {above}"
            raise ValueError(
                f"parallel.tensor {tensor} does not divide model.{name} {size}: {what[name]}; set parallel.tensor to a "
                f"divisor of it, or {wider}"
            )


def _require_sequence(parallel: ParallelConfig, model: ModelConfig) -> None:
    sequence, tensor = parallel.sequence, parallel.tensor
    if sequence == 1:
        return
    if model.variant == "mac":
        raise ValueError(
            f"parallel.sequence is {sequence}, but model.variant is mac: its segments are read one after another, each "
            "from what the one before wrote, so that ranks could not share a row; set it to 1, and split the model by "
            "parallel.tensor, or long rows by parallel.pipeline with training.segment_length"
        )
    if model.num_heads % (tensor * sequence):
        heads = model.num_heads // tensor
        raise ValueError(
            f"parallel.sequence {sequence} does not divide the {heads} heads that parallel.tensor {tensor} leaves of "
            f"model.num_heads {model.num_heads}: every rank takes all tokens of some heads; set it to a divisor of "
            f"{heads}"
        )


def _require_stretches(parallel: ParallelConfig, lengths: dict[str, int]) -> None:
    ranks = f"parallel.sequence {parallel.sequence}"
    if parallel.tensor_shard_norms:
        ranks = f"parallel.tensor {parallel.tensor} with parallel.tensor_shard_norms"
        ranks += f" x sequence {parallel.sequence}" if parallel.sequence > 1 else ""
    for field, length in lengths.items():
        if length % parallel.stretches:
            raise ValueError(
                f"{ranks} does not divide {field} {length}: every rank takes a stretch of each row; set {field} to a "
                f"multiple of {parallel.stretches}"
            )
