"""`python -m launch`: start training processes. A subcommand for each kind of machine."""

import argparse
import sys
from collections.abc import Sequence

from launch import local, logs, requeue, slurm, status, stop, task
from pretrain.errors import MachineError, UserError, outlive_full_disks
from pretrain.exit_codes import EXIT_MACHINE_ERROR, EXIT_USER_ERROR


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand and return its exit status. A user's mistake is one line on stderr and status 2; a disk that
    is full or fails is one, too, and status 74.
    """
    outlive_full_disks()
    parser = argparse.ArgumentParser(prog="python -m launch", description="Start the training processes of a recipe.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (local, slurm, status, logs, stop, task, requeue):
        command.add_parser(subparsers)
    options, unknown = parser.parse_known_args(argv)
    try:
        if unknown:
            raise UserError(f"{unknown[0]}: training's options stand after the recipe, the launcher's before it")
        return int(options.run(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_MACHINE_ERROR if isinstance(error, MachineError) else EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
