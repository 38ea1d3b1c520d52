"""The command `python -m tools.plan RECIPE`: memory and time of a run on a cluster, and layouts that suit it."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from pretrain.command_line import overrides_of
from pretrain.errors import UserError
from pretrain.phases import Phase, load_phases
from pretrain.quantities import size_text
from tools.bench.record import read_record
from tools.command import positive_int, positive_number, run_command
from tools.plan.cluster import DEVICES, GB, NODE_LINK_BYTES, Cluster, find_device
from tools.plan.rates import Rates, assumed, calibrated
from tools.plan.search import USABLE, Candidate, Overrides, Search, plan_layout, search

DESCRIPTION = """\
Estimate the memory of each rank and the time of a step of a recipe on a cluster, and suggest layouts.

Parameters, gradients, optimizer and buckets are counted; activations, states and times are estimates, from the shapes,
the operations, the links' full speed, and the speed that a record measured (--record) or, without one, an assumed share
of the device's peak. --section.field VALUE changes the recipe, as in training."""

SHOWN = 5


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments, rest = _parser().parse_known_args(argv)
    return run_command(lambda: run(arguments, rest))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="example: python -m tools.plan launch/recipes/titans-340m.yaml --gpu h100 --nodes 4 --suggest",
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="the recipe")
    parser.add_argument("--gpu", default="h100", metavar="NAME", help=f"{', '.join(DEVICES)} (default %(default)s)")
    parser.add_argument("--nodes", type=positive_int, default=1, metavar="N", help="(default 1)")
    parser.add_argument("--gpus-per-node", type=positive_int, default=8, metavar="N", help="(default 8)")
    parser.add_argument(
        "--node-link", type=positive_number, default=NODE_LINK_BYTES / GB, metavar="GB",
        help="bytes a second of each GPU to other nodes, in GB, one direction (default %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--gpu-link", type=positive_number, metavar="GB", help="the same inside a node (default: the GPU's data sheet)"
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE",
        help="of `tools.bench train` or `long`, measured on such a GPU in the recipe's precision: it gives the "
        "speed of computing",
    )  # fmt: skip
    parser.add_argument("--suggest", action="store_true", help="also search the layouts that the model can have there")
    parser.add_argument("--json", action="store_true", help="as JSON")
    return parser


def run(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Plans every phase of the recipe, and prints it. Raises UserError."""
    given = tuple(overrides_of(rest))
    device = find_device(arguments.gpu)
    if arguments.gpu_link is not None:
        device = dataclasses.replace(device, link_bytes=arguments.gpu_link * GB)
    cluster = Cluster(device, arguments.nodes, arguments.gpus_per_node, arguments.node_link * GB)
    record = None if arguments.record is None else read_record(arguments.record)
    found = []
    for phase in load_phases(arguments.recipe, given):
        precision = phase.recipe.parallel.precision
        rates = assumed(cluster.peak_flops(precision)) if record is None else calibrated(record, device.name, precision)
        others = _search(arguments.recipe, given, phase, cluster, rates) if arguments.suggest else None
        try:
            plan: Candidate | UserError = plan_layout(phase.recipe, cluster, rates)
        except UserError as error:
            if others is None:
                raise
            plan = error  # there may be others that it can have
        found.append((phase, rates, plan, others))
    if arguments.json:
        print(json.dumps([_fields(*each) for each in found], indent=1))
        return
    print(f"{cluster.nodes} x {cluster.gpus_per_node} {device.name}; all of this is an estimate")
    for phase, rates, plan, others in found:
        print("\n".join(_lines(phase, rates, plan, cluster) + _suggestion_lines(others, cluster)))


def _search(path: Path, given: Overrides, phase: Phase, cluster: Cluster, rates: Rates) -> Search:
    def load(overrides: Overrides) -> Any:
        prefix = f"phases.{phase.name}." if phase.of > 1 else ""
        named = tuple((prefix + name, value) for name, value in overrides)
        kept = tuple((name, value) for name, value in given if name not in dict(named))
        return load_phases(path, kept + named)[phase.number - 1].recipe

    return search(load, cluster, rates)


def _lines(phase: Phase, rates: Rates, plan: Candidate | UserError, cluster: Cluster) -> list[str]:
    if isinstance(plan, UserError):
        return ["", *([phase.title] if phase.of > 1 else []), f"layout              not as the recipe has it: {plan}"]
    recipe, memory, time = phase.recipe, plan.memory, plan.time
    layout = recipe.parallel.layout(cluster.gpus)
    speed = recipe.training.batch_tokens / time.total
    lines = [
        "",
        *([phase.title] if phase.of > 1 else []),
        f"layout              {layout}, ZeRO {recipe.parallel.zero_stage}",
    ]
    lines.append(f"speed               {rates.source}")
    share = memory.total / cluster.device.memory_bytes
    room = "" if plan.fits(cluster) else f": more than the {USABLE:.0%} that can be used"
    lines.append(f"memory of a rank    {size_text(memory.total)}, {share:.0%} of the GPU's, at the most{room}")
    of_device = {name: value for name, value in vars(memory).items() if name != "host"}
    lines += [f"  {name.replace('_', ' '):17} {size_text(value)}" for name, value in of_device.items()]
    lines += [f"  on the host       {size_text(memory.host)}, offloaded"] if memory.host else []
    lines.append(f"a step              {time.total:.3g} s, {speed:,.0f} tokens/s")
    lines += [
        f"  {name.replace('_', ' '):17} {value:.3g} s, {value / time.total:.0%}" for name, value in vars(time).items()
    ]
    hours = recipe.batches(cluster.gpus).steps * time.total / 3600
    return [*lines, f"all steps           {hours:,.1f} h"]


def _suggestion_lines(found: Search | None, cluster: Cluster) -> list[str]:
    if found is None:
        return []
    lines = [f"layouts             {len(found.fitting)} fit, {len(found.too_large)} take too much memory"]
    for candidate in found.fitting[:SHOWN] or found.too_large[:1]:
        options = " ".join(f"--{name} {value}" for name, value in candidate.overrides)
        verdict = "" if candidate.fits(cluster) else " (too large; the smallest)"
        lines.append(f"  {candidate.time.total:.3g} s, {size_text(candidate.memory.total)}{verdict}: {options}")
        lines += [f"    without the recipe's {lost}" for lost in candidate.dropped]
    if not found.fitting:
        lines.append("  none fits: more GPUs, a smaller micro_batch_size, or training.segment_length")
    lines += [f"  refused, {count} times: {reason}" for reason, count in found.refused.most_common(3)]
    return lines


def _fields(phase: Phase, rates: Rates, plan: Candidate | UserError, others: Search | None) -> dict[str, Any]:
    def of(candidate: Candidate) -> dict[str, Any]:
        memory, time = vars(candidate.memory), vars(candidate.time)
        return {
            "overrides": dict(candidate.overrides),
            "dropped": list(candidate.dropped),
            "memory_bytes": memory | {"total": candidate.memory.total},
            "step_seconds": time | {"total": candidate.time.total},
        }

    own = {"refused": str(plan)} if isinstance(plan, UserError) else of(plan)
    found = {"phase": phase.name, "speed": rates.source, **own}
    if others is not None:
        found["fitting"] = [of(candidate) for candidate in others.fitting[:SHOWN]]
    return found


if __name__ == "__main__":
    sys.exit(main())
