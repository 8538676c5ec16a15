"""The error of a network that cannot be split."""

__all__ = ["ReplayError"]


class ReplayError(RuntimeError):
    """The network does something that a replay cannot repeat; the message names it and says what to do."""
