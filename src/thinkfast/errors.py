"""The one exception a user's mistake ends in."""


class BadInput(Exception):
    """Something the user gave cannot be used.

    The message is one line that names the file and field, or the value and what was expected. The command line
    prints it and exits with status 2; no traceback is shown.
    """
