"""What a user's mistake, or a full disk, ends in."""

import errno

ALLOWED = "one that this user may use"
USABLE = {
    errno.EACCES: ALLOWED,
    errno.EPERM: ALLOWED,
    errno.EROFS: "a place that can be written",
    errno.EEXIST: "a directory",
    errno.ENOTDIR: "a directory",
    errno.EISDIR: "a file",
}
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class BadInput(Exception):
    """Something the user gave cannot be used.

    The message is one line that names the file and field, or the value and what was expected. The command line
    prints it and exits with status 2; no traceback is shown.
    """


def line_of(error: OSError) -> tuple[int, str] | None:
    """Exit status and line for a path that cannot be used (2) or a disk that takes no more (1); None for the rest."""
    if error.errno in USABLE and error.filename:
        return 2, f"{error.filename}: {error.strerror}, expected {USABLE[error.errno]}"
    if error.errno in USABLE or error.errno in DISK:
        return 1, f"cannot write {error.filename}: {error.strerror}" if error.filename else str(error)
    return None
