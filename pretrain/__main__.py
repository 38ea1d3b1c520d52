"""`python -m pretrain RECIPE.yaml`: one rank of a training run."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence

from parallel import process
from pretrain.agreement import SharedUserError
from pretrain.command_line import Options, parse
from pretrain.errors import MachineError, UserError, outlive_full_disks
from pretrain.exit_codes import EXIT_DONE, EXIT_FENCED_OFF, EXIT_MACHINE_ERROR, EXIT_PREEMPTED, EXIT_USER_ERROR
from pretrain.fence import FencedOffError
from pretrain.phases import Phases, load_phases
from pretrain.preemption import Preempted, listen


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank. Returns the exit code: 0 done, 74 an error of the machine's disks, 2 a user's error, 77 where
    another copy of the run has its folder, each with its message printed once, 75 stopped on request. Anything else
    raises.
    """
    outlive_full_disks()
    try:
        options = parse(argv)
        phases = load_phases(options.recipe, options.overrides)
        if options.dry_run:
            if process.rank_from_environment() == 0:
                from pretrain.plan import describe

                print(describe(phases, options.ranks or int(os.environ.get("WORLD_SIZE", "1"))))
            return EXIT_DONE
    except UserError as error:
        return _refuse_before_start(error)
    return _run(phases, options)


def _run(phases: Phases, options: Options) -> int:
    listen()
    # Late: --help and --dry-run need no DeepSpeed.
    from pretrain.loop import startup_watchdog, train
    from pretrain.preflight import preflight

    rank, ranks = process.rank_from_environment(), int(os.environ.get("WORLD_SIZE", "1"))
    with startup_watchdog(phases, rank=rank, ranks=ranks) as startup:
        startup.feed("joining the other ranks")
        try:
            parallel = phases.run.parallel
            world = process.initialize(
                parallel.device, timeout_minutes=parallel.timeout_minutes, deterministic=parallel.deterministic
            )
        except ValueError as error:  # one rank's alone, such as a GPU that is missing
            print(f"error: rank {rank} on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
            return EXIT_USER_ERROR
    try:
        if options.preflight:
            with startup_watchdog(phases, rank=rank, ranks=ranks) as startup:
                startup.feed("what is looked at before a run")
                lines = preflight(phases, world).lines()
            if world.is_main:
                print(*lines, sep="\n")
        else:
            train(phases, world, resume=options.resume)
    except Preempted:
        process.shutdown()
        return EXIT_PREEMPTED
    except UserError as error:
        if world.is_main or not isinstance(error, SharedUserError):
            rank = "" if world.size == 1 or isinstance(error, SharedUserError) else f"rank {world.rank}: "
            print(f"error: {rank}{error}", file=sys.stderr)
        code = EXIT_MACHINE_ERROR if isinstance(error, MachineError) else EXIT_USER_ERROR
        if not isinstance(error, SharedUserError):
            process.exit_now(code)  # the other ranks are waiting in a collective, and the launcher ends them
        process.shutdown()
        return EXIT_FENCED_OFF if isinstance(error, FencedOffError) else code
    process.shutdown()
    return EXIT_DONE


def _refuse_before_start(error: UserError) -> int:
    # Every rank finds the same error. Rank 0 says it; the others give it the time to, as launchers end all ranks
    # with the first.
    if process.rank_from_environment() == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
    else:
        time.sleep(3)
    return EXIT_USER_ERROR


if __name__ == "__main__":
    process.exit_now(main())
