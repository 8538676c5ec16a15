"""A long run with its memory watched: tens of thousands of images through S&I, and nothing piles up.

    python benchmarks/soak.py

scores the sets of ``--data`` over and over until ``--images`` are done, as any run would (score cache included), and
prints how much memory the process held on the way. ``--out DIR`` keeps the figures. It exits with 1 if memory grew, or
if an image that came again was scored otherwise.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparison import arguments, files, sources
from comparison.environment import environment
from networks.errors import SourceError
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from openood_sandi import SandI
from openood_sandi.runs.cache import ScoreCache
from openood_sandi.runs.score import infer

SAMPLES = 200  # of memory, over the run
SETTLING = 0.1  # of the run: caches of torch and Python fill up
MOST_GROWTH = 0.02  # of the memory held, over the rest of the run


@dataclass(frozen=True)
class Memory:
    """The process's resident memory and the tensors alive in it, once so many images are scored."""

    images: int
    bytes: int
    tensors: int


class Repeated(Dataset[Any]):
    """The items of ``data``, from the start again until there are ``length``."""

    def __init__(self, data: ConcatDataset[Any], length: int) -> None:
        self.data, self.length = data, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.data[index % len(self.data)]


class Watched:
    """A scorer that takes samples of memory as it goes."""

    def __init__(self, scorer: SandI, every: int) -> None:
        self.scorer, self.every = scorer, every
        self.samples: list[Memory] = []
        self.images = 0

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.images >= len(self.samples) * self.every:
            tensors = sum(issubclass(type(found), Tensor) for found in gc.get_objects())
            self.samples.append(Memory(self.images, resident_bytes(), tensors))
        self.images += len(x)
        return self.scorer(x)


def resident_bytes() -> int:
    """Memory that the process holds now; where the system does not tell, the most that it has held."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def growth(samples: Sequence[Memory]) -> tuple[float, float]:
    """Bytes by which memory grew once settled, by a straight line through the samples, and that over its mean."""
    settled = samples[int(SETTLING * len(samples)) :]
    images, held = (np.array([getattr(sample, name) for sample in settled], float) for name in ("images", "bytes"))
    slope = float(np.polyfit(images, held, 1)[0])
    grown = slope * float(images[-1] - images[0])
    return grown, grown / float(held.mean())


def repetition_difference(scores: np.ndarray[Any, np.dtype[Any]], period: int) -> float:
    """The largest relative difference between an image's scores in different rounds; 0 for a single round."""
    rounds = [scores[start : start + period] for start in range(0, len(scores), period)]
    return max((float((abs(later / rounds[0][: len(later)] - 1)).max()) for later in rounds[1:]), default=0.0)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--images", type=arguments.positive, default=40_000, help="default: %(default)s")
    options.add_argument("--variant", choices=("auto", "Z", "A"), default="auto", help="default: %(default)s")
    options.add_argument("--steps", type=arguments.positive, default=2, help="T; default: %(default)s")
    options.add_argument("--batch-size", type=arguments.positive, default=100, help="default: %(default)s")
    options.add_argument("--workers", type=int, default=0, help="loading processes; default: %(default)s")
    options.add_argument(
        "--device", type=arguments.device, default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU"
    )
    options.add_argument("--out", type=Path, metavar="DIR", help="where to write soak.json and soak.md")
    sources.add_arguments(options)
    return options


def main(command: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parser().parse_args(command)
    try:
        suite = sources.load(options)
    except SourceError as error:
        print(error, file=sys.stderr)
        return 2
    sets = (suite.in_distribution, *suite.out_of_distribution)
    data: ConcatDataset[Any] = ConcatDataset([images.dataset for images in sets])
    loader = DataLoader(Repeated(data, options.images), options.batch_size, num_workers=options.workers)
    detector = SandI(suite.network.to(options.device), variant=options.variant, steps=options.steps)
    watched = Watched(detector, max(options.images // SAMPLES, 1))
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        key = {"run": "soak", "images": options.images}
        _, scores, _ = infer(watched, loader, options.device, cache=ScoreCache(folder), key=key, description="soak")
    seconds = time.monotonic() - started
    grown, share = growth(watched.samples)
    differing = repetition_difference(scores, len(data))
    held = [sample.bytes for sample in watched.samples]
    result = {
        "command": shlex.join(["python", "benchmarks/soak.py", *(sys.argv[1:] if command is None else command)]),
        "images": len(scores),
        "different_images": len(data),
        "network": suite.network_description,
        "splits": len(detector.split_names),
        "seconds": round(seconds, 1),
        "memory_first_bytes": held[0],
        "memory_settled_bytes": held[int(SETTLING * len(held))],
        "memory_last_bytes": held[-1],
        "memory_most_bytes": max(held),
        "growth_bytes": round(grown),
        "growth_share": share,
        "tensors_alive_least": min(sample.tensors for sample in watched.samples[1:]),
        "tensors_alive_most": max(sample.tensors for sample in watched.samples[1:]),
        "scores_not_finite": int((~np.isfinite(scores)).sum()),
        "largest_difference_between_rounds": differing,
        "environment": environment(options.device),
        "samples": [asdict(sample) for sample in watched.samples],
    }
    text = summary(result)
    print(text)
    if options.out is not None:
        files.replace(options.out / "soak.json", json.dumps(result, indent=1) + "\n")
        files.replace(options.out / "soak.md", text + "\n")
    return int(share > MOST_GROWTH or differing > 1e-3 or result["scores_not_finite"] != 0)


def summary(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    mib = {name: result[name] / 2**20 for name in result if name.endswith("_bytes")}
    rounds = result["images"] / result["different_images"]
    return "\n".join(
        [
            "# A long run",
            "",
            f"`{result['command']}`",
            "",
            f"{result['network']}; {result['splits']} split points.",
            "",
            "| | |",
            "|---|---|",
            f"| images scored | {result['images']} ({rounds:.1f} rounds of {result['different_images']}) |",
            f"| time | {result['seconds']} s |",
            f"| memory at the start | {mib['memory_first_bytes']:.0f} MiB |",
            f"| memory after {SETTLING:.0%} of the images | {mib['memory_settled_bytes']:.0f} MiB |",
            f"| memory at the end | {mib['memory_last_bytes']:.0f} MiB |",
            f"| most memory | {mib['memory_most_bytes']:.0f} MiB |",
            f"| growth over the last {1 - SETTLING:.0%}, by a straight line | {mib['growth_bytes']:+.1f} MiB "
            f"({result['growth_share']:+.2%}) |",
            f"| tensors alive between batches, results among them | {result['tensors_alive_least']} to "
            f"{result['tensors_alive_most']} |",
            f"| scores that are not finite | {result['scores_not_finite']} |",
            f"| largest relative difference of an image's score between rounds | "
            f"{result['largest_difference_between_rounds']:.1e} |",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
