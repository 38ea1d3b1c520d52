"""Models as lm-eval asks them: ours, and an export as transformers loads it.

A text begins after EOS in both, since documents in training do. Requests are scored in batches; ours reads each row in
pieces with the state handed on, so that a text of any length takes the memory of a short one. lm-eval gives an export
whole texts, and holds the logits of all their tokens. Ranks each answer a share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from model import ModelState
from model.generation import PREFILL_TOKENS
from parallel.scoring import IGNORED, Rows, read_in_pieces
from pretrain.errors import UserError
from tools.evaluation.completion import complete
from tools.evaluation.ranks import Ranks
from tools.huggingface.tokenizer import UNBOUNDED
from tools.model_directory import NOT_FINITE, LoadedModel

TokenRequest = tuple[Any, list[int], list[int]]
"""What was asked, for messages; the context's tokens, at least one; the tokens whose likelihood is asked for."""


class _Divided:
    """lm-eval's collectives over the ranks of `Ranks`."""

    _ranks: Ranks

    def _take_place(self, ranks: Ranks) -> None:
        self._ranks, self._rank, self._world_size = ranks, ranks.world.rank, ranks.world.size

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, one beside the other, on the CPU: lm-eval's are small."""
        return torch.stack(self._ranks.gather(tensor.cpu()))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any]:
        """Every rank's object, by rank."""
        return self._ranks.gather(obj)

    def barrier(self) -> None:
        """Waits for all ranks."""
        self._ranks.gather(None)


class NativeLM(_Divided, TemplateLM):
    """A model of ours, for lm-eval."""

    def __init__(self, loaded: LoadedModel, ranks: Ranks, *, batch_size: int) -> None:
        """`batch_size`: rows that are read together."""
        super().__init__()
        self._take_place(ranks)
        self._loaded, self._batch_size = loaded, batch_size
        self._device = loaded.model.norm.weight.device

    @property
    def eot_token_id(self) -> int:
        """The token before and behind a text."""
        return self._loaded.tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, EOS before them unless `add_special_tokens` is False."""
        tokens = self._loaded.tokenizer.encode(string)
        return tokens if add_special_tokens is False else [self.eot_token_id, *tokens]

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests: Sequence[TokenRequest], **_: Any) -> list[tuple[float, bool]]:
        require_context(requests, self._loaded.config.context_limit)
        # Rows of like lengths together: the least padding.
        order = sorted(range(len(requests)), key=lambda index: -len(requests[index][1]) - len(requests[index][2]))
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            for index, answer in zip(batch, self._score([requests[index] for index in batch]), strict=True):
                answers[index] = answer
        return answers

    def _score(self, requests: Sequence[TokenRequest]) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether each token has the largest logit) of each continuation."""
        length = max(len(context) + len(continuation) for _, context, continuation in requests) - 1
        tokens = torch.full((len(requests), length), self.eot_token_id)
        targets = torch.full((len(requests), length), IGNORED)
        for row, (_, context, continuation) in enumerate(requests):
            both = torch.tensor(context + continuation)
            tokens[row, : len(both) - 1] = both[:-1]
            targets[row, len(context) - 1 : len(both) - 1] = both[len(context) :]

        def read(rows: Rows, state: ModelState | None, _: bool) -> tuple[tuple[Tensor, Tensor], ModelState]:
            output = self._loaded.model(
                rows.tokens.to(self._device), state, targets=rows.targets.to(self._device), with_correct=True
            )
            return (output.losses.double().sum(1).cpu(), (~output.correct).sum(1).cpu()), output.state

        nats, wrong = torch.zeros(len(requests), dtype=torch.float64), torch.zeros(len(requests), dtype=torch.int64)
        for piece in read_in_pieces(Rows(tokens, targets), read, length=PREFILL_TOKENS):
            rows = len(piece.targets)
            nats[:rows] += piece.carried[0]
            wrong[:rows] += piece.carried[1] - (piece.targets == IGNORED).sum(1)
        return require_finite([(-float(loss), int(errors) == 0) for loss, errors in zip(nats, wrong, strict=True)])

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each by itself; in windows for a transformer, whose context is bounded."""
        limit = self._loaded.config.context_limit
        windows: list[TokenRequest] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in get_rolling_token_windows(tokens, self.eot_token_id, limit or max(len(tokens), 1), 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += likelihood
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, cut before the first of the texts in `until`. Raises ValueError for sampling."""
        texts = []
        for request in requests:
            context, options = request.args
            if options.get("do_sample"):
                raise ValueError("generate_until was asked to sample (do_sample): it is greedy alone; leave it out")
            tokens, count = self.tok_encode(context), int(options.get("max_gen_toks", 256))
            require_context([(context, tokens, [0] * count)], self._loaded.config.context_limit)
            until = options.get("until") or []
            until = [until] if isinstance(until, str) else until
            texts += complete(self._loaded, torch.tensor([tokens]), max_new_tokens=count, until=until)
        return texts


class TransformersLM(_Divided, HFLM):
    """An export as transformers loads it with the code in its folder, through lm-eval's own class."""

    def __init__(self, folder: Path, ranks: Ranks, *, batch_size: int, dtype: torch.dtype, limit: int | None) -> None:
        """`limit`: most tokens that the model reads at once, None for any number."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._limit = limit
        if not (folder / "tokenizer.json").is_file():
            raise UserError(
                f"{folder}: has no tokenizer.json, as its tokenizer can't be converted exactly, and transformers reads "
                "no other; use --through native"
            )
        # Loading copies the folder's code into a cache, which ranks may share: the first one alone, then the first of
        # each node, then the others.
        world = ranks.world
        turn = 0 if world.is_main else 1 if world.local_index == 0 else 2
        for now in range(3):
            if now == turn:
                model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
                tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
            ranks.gather(None)
        HFLM.__init__(
            self,
            model.to(world.device),
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=limit or UNBOUNDED,
            softmax_dtype="float32",  # as ours; else that of the logits, in bf16 too coarse for a likelihood
        )
        self._take_place(ranks)

    def _loglikelihood_tokens(self, requests: Sequence[TokenRequest], *arguments: Any, **options: Any) -> Any:
        require_context(requests, self._limit)  # lm-eval would cut it
        return require_finite(super()._loglikelihood_tokens(requests, *arguments, **options))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """As in lm-eval; but the EOS that our tokenizer begins a text with is its prefix, and not scored itself."""
        together, self.batch_size_per_gpu = self.batch_size_per_gpu, 1  # of whole texts the logits are held
        self.add_bos_token = False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token, self.batch_size_per_gpu = None, together


def require_finite(answers: Sequence[tuple[float, bool]]) -> list[tuple[float, bool]]:
    """The (log-likelihood, is greedy) of requests; raises UserError where one is no finite number."""
    if not all(math.isfinite(likelihood) for likelihood, _ in answers):
        raise UserError(f"the model's likelihoods are not finite: {NOT_FINITE}")
    return list(answers)


def require_context(requests: Sequence[TokenRequest], limit: int | None) -> None:
    """Raises UserError for a request that is longer than what a transformer was trained to read."""
    for asked, context, continuation in requests:
        length = len(context) + len(continuation) - 1
        if limit is not None and length > limit:
            raise UserError(
                f"a prompt of {length:,} tokens is longer than the transformer's context of {limit:,}: "
                f"{str(asked)[:80]!r}; leave out that task, ask for fewer examples (--num-fewshot), or take one with "
                "a memory"
            )
