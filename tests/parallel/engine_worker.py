"""Runs on every rank of test_engine.py: trains a small model under several layouts in one process each and writes
what it saw.

Arguments: OUTPUT.json LAYOUT..., a layout being `zero<stage>-<precision>`, with `-offload` where all that can be is
kept on the host.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.config import ParallelConfig
from parallel.engine import Engine, StepResult
from parallel.mesh import Mesh
from parallel.process import World, initialize
from parallel.scoring import Rows
from tests.worker_results import hand_over

VOCABULARY, WIDTH, LENGTH, GLOBAL_ROWS, STEPS, CLIP = 32, 16, 12, 8, 20, 0.5


@dataclass(frozen=True)
class Output:
    loss_sum: Tensor
    stats: list[dict[str, Tensor]] | None
    correct: Tensor | None
    losses: Tensor | None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(F.gelu(self.up(self.norm(hidden))))


class Head(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, self.weight).float()
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
        return losses.view_as(targets), logits.detach().argmax(2) == targets


class Small(nn.Module):
    """A stand-in with the language model's signature and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = Head(self.embedding.weight)

    def forward(
        self, tokens: Tensor, *, targets: Tensor, with_stats: bool = False, with_correct: bool = False
    ) -> Output:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        stats = [{"size": hidden.detach().float().abs().mean()}, {}] if with_stats else None
        losses, correct = self.head(hidden, targets)
        scores = (correct, losses) if with_correct else (None, None)
        return Output(losses.sum(), stats, *scores)


def optimizer_of(model: nn.Module) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)


def global_batch(step: int) -> Rows:
    """All ranks' rows of a step; their numbers of counted targets differ, so that a mean of means would be wrong."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (GLOBAL_ROWS, LENGTH + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    for row in range(GLOBAL_ROWS):
        targets[row, : row + step % 3] = -100
    return Rows(tokens[:, :-1], targets)


def rate(step: int) -> float:
    return 1e-2 * (1 - step / (2 * STEPS))


def own_rows(world: World, step: int, accumulation: int) -> list[Rows]:
    whole = global_batch(step)
    size = GLOBAL_ROWS // accumulation // world.size
    starts = [(m * world.size + world.rank) * size for m in range(accumulation)]
    return [Rows(whole.tokens[s : s + size], whole.targets[s : s + size]) for s in starts]


def build(world: World, layout: str, accumulation: int) -> Engine:
    model, stage, precision, *rest = Small(), int(layout[4]), *layout.split("-")[1:]
    options = {"keep_gathered_below": 20} if stage == 3 else {}
    if rest:
        options |= {"offload_optimizer": True, "offload_parameters": stage == 3}
    config = ParallelConfig(zero_stage=stage, precision=precision, device="cpu", **options)
    size = GLOBAL_ROWS // accumulation // world.size
    return Engine(
        model,
        optimizer_of(model),
        config,
        Mesh.data_parallel(world),
        micro_batch_size=size,
        accumulation=accumulation,
        gradient_clip=CLIP,
    )


def take(engine: Engine, world: World, steps: range) -> list[StepResult]:
    return [
        engine.train_step(own_rows(world, step, engine.accumulation), rate(step), with_stats=step == STEPS - 1)
        for step in steps
    ]


def trial(world: World, layout: str, shared: Path) -> dict[str, object]:
    engine = build(world, layout, 2)
    shared.mkdir(exist_ok=True)
    results = take(engine, world, range(STEPS // 2))
    engine.save(shared)
    results += take(engine, world, range(STEPS // 2, STEPS))
    whole = engine.full_parameters()
    held_out = engine.evaluate([global_batch(99)] * (1 + 2 * world.rank), with_correct=True)
    engine.destroy()
    resumed = build(world, layout, 2)
    resumed.load(shared)
    again = take(resumed, world, range(STEPS // 2, STEPS))
    same = all(torch.equal(whole[n], p) for n, p in resumed.full_parameters().items())
    resumed.destroy()
    longer = build(world, layout, 4)
    accumulated = take(longer, world, range(4))
    longer.destroy()
    return {
        "losses": [float(r.loss) for r in results],
        "norms": [float(r.grad_norm) for r in results],
        "tokens": [int(r.tokens) for r in results],
        "stats": [{k: float(v) for k, v in layer.items()} for layer in results[-1].stats or []],
        "resumed": [float(r.loss) for r in again],
        "resumed_norms": [float(r.grad_norm) for r in again],
        "resumed_weights_equal": same,
        "accumulated": [float(r.loss) for r in accumulated],
        "evaluated": held_out,
        "weights": {name: value.flatten().tolist() for name, value in whole.items()},
        "folder": str(shared),
    }


def main(output: str, layouts: list[str]) -> None:
    world = initialize("cpu")
    torch.set_num_threads(1)
    seen = {layout: trial(world, layout, Path(output).with_name(layout)) for layout in layouts}
    hand_over(world, output, seen)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
