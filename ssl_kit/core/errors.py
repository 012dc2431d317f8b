"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """A user's mistake: one line that says what was got, what was wanted and what to do.

    The command line prints the message and exits with 2; any other exception is our own mistake and exits with 1.
    """
