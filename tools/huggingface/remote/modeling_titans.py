"""A Titans language model for transformers: Mnemosyne's own code of the model, with the state as `past_key_values`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from model.language_model import LMHead, TitansLM
from tools.huggingface.remote.configuration_titans import TitansConfig
from tools.huggingface.remote.titans_cache import TitansCache

_ALIGNMENT = 64
"""Bytes: of what PyTorch allocates on a CPU."""


class TitansForCausalLM(PreTrainedModel, GenerationMixin):
    """`generate` in all its modes, fine-tuning with exact gradients, and a state that does not grow with the context.

    Positions follow from the attention mask alone: `position_ids` are not needed, and not used.
    """

    config_class = TitansConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _absent_with_head: frozenset[str] = frozenset()
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.model = TitansLM(config.model_config())
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, with every weight where PyTorch would have put it.

        Raises:
            ValueError: there is no tensor for a weight, or one of another shape: nothing else would fill it.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        absent = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
        if model.config.model_config().tie_embeddings:
            absent -= cls._tied_weights_keys.keys()
            absent |= model._absent_with_head
        if absent:
            raise ValueError(
                f"the weights lack {', '.join(sorted(absent)[:5])} ({len(absent)} of the model's in all), or have them "
                "in another shape: restore the files, or export the model again"
            )
        _align(model)
        return (model, info) if wants_info else model

    def mark_tied_weights_as_initialized(self, *loading_info: Any) -> None:
        """As in `PreTrainedModel`. Transformers 5 takes an embedding that is tied for read here, though it and the head
        are both missing, and reports neither.
        """
        missing = set(loading_info[0].missing_keys) if loading_info else set()
        pairs = self._tied_weights_keys.items()
        self._absent_with_head = frozenset(shared for head, shared in pairs if {head, shared} <= missing)
        super().mark_tied_weights_as_initialized(*loading_info)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: TitansCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Reads tokens after what the cache has seen.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T], or with columns before them for what was read earlier; 0 for padding, which leaves
                the row's state as it was. The logits at padding are those of the token before it.
            past_key_values: what was read before; it is changed in place, and returned.
            labels: [B, T] int64, -100 for tokens that don't count; shifted here, as transformers has it.
            use_cache: whether to return a cache; by default where there are no labels.
            logits_to_keep: only those of the last so many tokens, or at these places; 0 for all.

        Raises:
            ValueError: an argument that doesn't fit, or one that this model has no use for.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("give input_ids, and no inputs_embeds: a Titans model reads tokens")
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name):
                raise ValueError(f"{name} is set, but a Titans model does not return them: leave it out")
        if use_cache is None:
            use_cache = labels is None and getattr(self.config, "use_cache", True)
        cache = self._cache_from(past_key_values)
        wants_places = isinstance(logits_to_keep, Tensor)
        keep = 0 if wants_places else logits_to_keep
        num_logits = min(keep, input_ids.shape[1]) if keep else input_ids.shape[1]
        logits = cache.read(self.model, input_ids, _own_mask(attention_mask, input_ids), num_logits)
        if wants_places:
            logits = logits[:, logits_to_keep]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache if use_cache else None)
        return output.to_tuple() if return_dict is False else output

    def _cache_from(self, given: Any) -> TitansCache:
        """The cache to go on from; a new one in the place of the empty one that `generate` makes."""
        if isinstance(given, TitansCache):
            return given
        if given is None or (isinstance(given, DynamicCache) and given.get_seq_length() == 0):
            return TitansCache(self.config.num_hidden_layers)
        raise ValueError(
            f"past_key_values is a {type(given).__name__}: a Titans model goes on from a TitansCache that it returned, "
            "and nothing else; leave cache_implementation out"
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # `generate` reads a prompt in chunks only where it made a cache, though an empty one that is replaced.
        return True

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the embedding."""
        self.model.embedding = value

    def get_output_embeddings(self) -> LMHead:
        """The head, whose weight may be the embedding's."""
        return self.model.head

    def set_output_embeddings(self, value: LMHead) -> None:
        """Replaces the head."""
        self.model.head = value

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        # What transformers 5 offers beside: each n-th layer alone, and a function of its own that offloads.
        function = getattr(gradient_checkpointing_func, "func", checkpoint)
        if enable and (every_n_layers != 1 or function is not checkpoint):
            raise ValueError("a Titans model checkpoints every layer, without offloading: leave the options out")
        self.model.set_activation_checkpointing(enable)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the model's own constructors have drawn its weights, or `from_pretrained` fills all of them."""


def _align(model: nn.Module) -> None:
    """Moves weights that lie in a mapped file off the boundaries at which PyTorch allocates.

    From there its CPU kernels add in another order, and the logits would not be those of training bit for bit.
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()


def _own_mask(mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """The mask's columns of these tokens, bool; None where there is no padding among them."""
    if mask is None:
        return None
    if mask.dim() != 2 or len(mask) != len(tokens) or mask.shape[1] < tokens.shape[1]:
        raise ValueError(
            f"attention_mask is {list(mask.shape)}: it must be {list(tokens.shape)}, or have columns before these for "
            "what was read earlier"
        )
    own = mask[:, -tokens.shape[1] :]
    if not bool(((own == 0) | (own == 1)).all()):
        raise ValueError("attention_mask holds values other than 0 and 1")
    own = own == 1
    return None if bool(own.all()) else own
