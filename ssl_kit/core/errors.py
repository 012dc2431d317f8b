"""Exceptions that mean "the user can fix this"."""


class UserError(ValueError):
    """A user's mistake: one line that says what was got, what was wanted and what to do.

    The command line prints the message and exits with 2; any other exception is our own mistake and exits with 1.
    """


class DamagedError(UserError):
    """A file that is missing, cut short or altered since it was written."""
