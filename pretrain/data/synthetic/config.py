"""The data section of a recipe for rows that are drawn."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pretrain.data.source import Data, Share, SourceConfig
from pretrain.data.synthetic.source import HeldOutDraws, SyntheticSource
from pretrain.data.synthetic.tasks import Copy, Passkey, Permutations, Recall


class SyntheticConfig(SourceConfig):
    """Rows drawn for a task with right answers, to see what a model can remember or keep track of."""

    kind: Literal["synthetic"] = "synthetic"
    """Rows that are drawn; training and held-out rows come from different streams, neither of which ends."""

    task: Annotated[Recall | Passkey | Copy | Permutations, Field(discriminator="kind")]
    """What is asked. Only the answers are targets; a row shorter than training.sequence_length is padded."""

    @property
    def has_held_out(self) -> bool:
        """Always: it is drawn too."""
        return True

    def check_fits(self, *, sequence_length: int, vocab_size: int, held_out_tokens: int | None) -> None:
        """Raises ValueError for rows that are too short, a vocabulary too small, and an evaluation without end."""
        task, name = self.task, f"data.task {self.task.kind}"
        if sequence_length < task.row_tokens:
            raise ValueError(
                f"training.sequence_length {sequence_length} is too short for {name}, whose longest row takes "
                f"{task.row_tokens} tokens: set training.sequence_length to {task.row_tokens} or more, or make the "
                "task smaller"
            )
        if vocab_size < task.vocab_size:
            raise ValueError(
                f"model.vocab_size {vocab_size} is smaller than the {task.vocab_size} tokens of {name}: set "
                f"model.vocab_size to {task.vocab_size}"
            )
        if held_out_tokens is None:
            raise ValueError(
                "evaluation.tokens is none, which means all, but held-out rows of synthetic data have no end: give a "
                "number"
            )

    def missing(self) -> Path | None:
        """Nothing: no file is read."""

    def open(self, seed: int, share: Share | None = None, *, grid: int, places: Collection[str] | None = None) -> Data:
        """The two streams of the task."""
        return Data(SyntheticSource(self.task, seed, self.num_workers), HeldOutDraws(self.task, seed))
