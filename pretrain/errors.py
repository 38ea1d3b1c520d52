"""The error that a user can mend: every command prints it without a traceback and exits with code 2."""


class UserError(ValueError):
    """Wrong input: a recipe, an option, data, or a checkpoint. The message names the field or file, and the fix."""
