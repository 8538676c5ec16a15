"""The errors of a network that cannot be split."""

__all__ = ["BackwardError", "ReplayError"]


class ReplayError(RuntimeError):
    """The network does something that a replay cannot repeat; the message names it and says what to do."""


class BackwardError(ReplayError):
    """Autograd cannot go back through a recorded pass; through plain ones it may."""
