"""The networks that the benchmarks run: architectures, their inputs, the paper's split points, and checkpoints.

Module names are those of the weights that people have, so that published state dicts load as they are.
"""

from openood_sandi.weights import SourceError

__all__ = ["SourceError"]
