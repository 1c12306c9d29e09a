"""The errors a user can cause. Each message is one line that says what is wrong, where, and what is allowed."""


class UserError(Exception):
    """A mistake or a missing thing on the user's side; the command line prints it without a traceback."""


class DataError(UserError):
    """A data file is absent, malformed or not what it claims to be."""


class CheckpointError(UserError):
    """A checkpoint is absent, broken, or does not fit what it is used for."""
