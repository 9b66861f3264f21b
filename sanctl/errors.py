"""The errors that a user sees as one line.

Every error that sanctl raises on purpose is one of these; the entry point prints its message
alone, without a traceback, and exits with its status. A message names the file, the key or the
value that is wrong, and the mend.
"""


class SanctlError(Exception):
    """Something failed that the user did not get wrong: a full disk, a loss that is not finite."""

    exit_status = 1


class UserError(SanctlError):
    """The user's input is wrong: a missing folder, an unknown key, an unreadable file."""

    exit_status = 2
