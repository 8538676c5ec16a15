"""The error of a benchmark's command line."""


class SourceError(ValueError):
    """The data, network or weights asked for cannot be had; the message says what to do."""
