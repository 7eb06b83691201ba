"""Errors that end a run on purpose."""


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a number; the run stopped before it reached a weight."""


class Interrupted(RuntimeError):
    """The run was asked to stop, and its state is saved."""
