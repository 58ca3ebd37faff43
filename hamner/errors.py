"""The one exception for bad input."""


class UserError(Exception):
    """Bad input: one clear sentence naming the flag or file and the mend.

    Commands print it without a traceback and exit with code 2 (`hamner.cli.run_command`).
    """
