"""The command `python -m tools.checkpoint inspect | verify | reshape | upload`."""

import argparse
import sys
from pathlib import Path

from parallel.mesh import Layout
from pretrain.errors import UserError
from pretrain.phases import load_phases
from pretrain.resume import RECIPE_FILE, read_trainer_state
from tools.checkpoint.contents import as_json, contents, damage, find_checkpoints, lines
from tools.checkpoint.reshape import reshape
from tools.checkpoint.upload import upload
from tools.command import positive_int, run_command
from tools.export import find_checkpoint


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: arguments.command(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.checkpoint", description="Checkpoints of training runs.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "inspect",
        help="show what checkpoints hold",
        description="Show what a checkpoint holds, or each of a run's folder: step, tokens, phase, place in the data, "
        "model, layout, files. The bytes are not checked: see verify.",
    )
    command.add_argument("folder", type=Path, help="a checkpoint, or the folder of a run")
    command.add_argument("--parameters", action="store_true", help="also every parameter: shape, and how it is held")
    command.add_argument("--json", action="store_true", help="as JSON, a list with an object for each checkpoint")
    command.set_defaults(command=_inspect)
    command = commands.add_parser(
        "verify",
        help="check checkpoints for damage",
        description="Read every byte of a checkpoint, or of each of a run's folder: its files must be those that were "
        "written, and hold every element of every parameter. Exit code 2 where something is wrong, with its name.",
    )
    command.add_argument("folder", type=Path, help="a checkpoint, or the folder of a run")
    command.set_defaults(command=_verify)
    command = commands.add_parser(
        "reshape",
        help="rewrite a checkpoint for another layout",
        description="Write a checkpoint again with the state files that the ranks of another layout hold, so that each "
        "reads a file of its own. Any layout reads any checkpoint without this, but reads more. Stages of a "
        "pipeline are balanced as the checkpoint's recipe says. Files of states that rows carry (streams) and of "
        "random generators are copied as they are. To go on from it: a run whose folder holds no checkpoints, with "
        "--resume OUTPUT.",
    )
    command.add_argument("checkpoint", type=Path, help="a checkpoint, or a run's folder for its newest whole one")
    command.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="the checkpoint to make")
    command.add_argument("--ranks", type=positive_int, required=True, metavar="N", help="ranks in all")
    for axis in ("pipeline", "sequence", "tensor"):
        command.add_argument(f"--{axis}", type=positive_int, default=1, metavar="N", help=f"{axis} ranks (default 1)")
    command.add_argument(
        "--zero-stage", type=int, choices=range(4), help="of the ranks that will read it (default: the checkpoint's)"
    )
    command.set_defaults(command=_reshape)
    command = commands.add_parser(
        "upload",
        help="upload the checkpoints that a run could not",
        description="Upload what the store that a run's recipe names (checkpoint.upload) does not have of its "
        "checkpoints, without the run: after one that ended while the store was away. It takes as long as it takes.",
    )
    command.add_argument("folder", type=Path, help="the folder of a run")
    command.set_defaults(command=_upload)
    return parser


def _inspect(arguments: argparse.Namespace) -> None:
    found = [contents(checkpoint) for checkpoint in find_checkpoints(arguments.folder)]
    if arguments.json:
        print(as_json(found))
        return
    print("\n\n".join("\n".join(lines(each, with_parameters=arguments.parameters)) for each in found))


def _verify(arguments: argparse.Namespace) -> None:
    wrong = []
    for checkpoint in find_checkpoints(arguments.folder):
        found = damage(checkpoint)
        wrong += found
        print(f"{checkpoint}: {f'{len(found)} problem(s)' if found else 'whole'}", flush=True)
    if wrong:
        raise UserError("\n".join(wrong))


def _upload(arguments: argparse.Namespace) -> None:
    store, names = upload(arguments.folder)
    print(f"{store.location} holds {', '.join(names)}")


def _reshape(arguments: argparse.Namespace) -> None:
    checkpoint = find_checkpoint(arguments.checkpoint)
    try:
        layout = Layout.of(
            arguments.ranks, pipeline=arguments.pipeline, sequence=arguments.sequence, tensor=arguments.tensor
        )
    except ValueError as error:
        raise UserError(f"--ranks: {error}") from error
    stage = arguments.zero_stage
    if stage is None:
        state = read_trainer_state(checkpoint)
        stage = load_phases(checkpoint / RECIPE_FILE)[len(state.done)].recipe.parallel.zero_stage
    reshape(checkpoint, arguments.output, layout, stage)
    print(f"{checkpoint} -> {arguments.output}: {layout.ranks} state file(s), {layout}, ZeRO {stage}")


if __name__ == "__main__":
    sys.exit(main())
