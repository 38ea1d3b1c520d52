"""The ways in which a rank ends that are no crash."""

# For launch/, to which a rank is a process with an exit code.
from parallel.watchdog import EXIT_HUNG as EXIT_HUNG
from parallel.watchdog import STACKS_SIGNAL as STACKS_SIGNAL


class UserError(ValueError):
    """Wrong input: a recipe, an option, data, or a checkpoint. The message names the field or file, and the fix."""
