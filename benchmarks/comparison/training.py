"""Training of the embedded benchmark's network, cached on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from networks.cifar import CifarResNet
from networks.small import SiluCnn, SmallVit
from torch import Tensor, nn
from tqdm import tqdm

from openood_sandi.runs.files import replace


@dataclass(frozen=True)
class Recipe:
    """A small network and its training.

    "smallresnet" has ``blocks`` residual blocks in each stage, by default 15 normalisation layers; of "silu_cnn" and
    "vit" (:mod:`networks.small`) ``widths`` and ``blocks`` say nothing.

    SGD with Nesterov momentum, or AdamW, under a one-cycle learning rate (``learning_rate`` is its peak).
    """

    name: str = "smallresnet"
    widths: tuple[int, ...] = (16, 32, 64)
    blocks: int = 2
    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 0.05
    momentum: float | None = 0.9
    """None: AdamW in place of SGD."""
    weight_decay: float = 5e-4

    @property
    def in_words(self) -> str:
        """How it is trained."""
        optimiser = "AdamW" if self.momentum is None else f"SGD with momentum {self.momentum}"
        rate = f"learning rate up to {self.learning_rate}, weight decay {self.weight_decay}"
        return f"{self.epochs} epochs of {optimiser} in batches of {self.batch_size}, {rate}"

    def network(self, images: Tensor, labels: Tensor) -> nn.Module:
        """A network for such ``images`` (N, C, H, W) and ``labels`` (N,)."""
        channels, classes = images.shape[1], int(labels.max()) + 1
        if self.name == "silu_cnn":
            return SiluCnn(channels, classes)
        if self.name == "vit":
            return SmallVit(channels, classes, images.shape[2])
        return CifarResNet([self.blocks] * len(self.widths), self.widths, classes, in_channels=channels)

    def optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        """For the parameters of ``net``."""
        if self.momentum is None:
            return torch.optim.AdamW(net.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        decay = self.weight_decay
        return torch.optim.SGD(net.parameters(), self.learning_rate, self.momentum, weight_decay=decay, nesterov=True)


RECIPES = {
    "smallresnet": Recipe(),
    "silu_cnn": Recipe("silu_cnn"),
    "vit": Recipe("vit", epochs=60, learning_rate=2e-3, momentum=None, weight_decay=0.05),
}


def default_cache() -> Path:
    """The user's cache folder, ``$XDG_CACHE_HOME`` or ``~/.cache``, with a folder of our own in it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openood-sandi"


def trained(images: Tensor, labels: Tensor, recipe: Recipe, seed: int, cache: Path) -> nn.Module:
    """A network in eval mode, trained on ``images`` (N, C, H, W) and ``labels`` (N,), or read from ``cache``.

    The file's name is a hash of the recipe, the seed, torch's version and the training data. A file that is
    corrupt, or does not fit the network, is reported and replaced.
    """
    key = hashlib.sha256(repr((recipe, seed, torch.__version__, "one thread")).encode())
    key.update(images.numpy().tobytes() + labels.numpy().tobytes())
    path = cache / f"{recipe.name}-{key.hexdigest()[:16]}.pt"
    if path.exists():
        try:
            with torch.device("meta"):  # no memory and no random numbers for weights that are read
                net = recipe.network(images, labels)
            with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums that torch.save writes
                if damaged := archive.testzip():
                    raise ValueError(f"the checksum of {damaged} is wrong")
            net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
        except Exception as error:  # a damaged file may fail in any way; training again cures all of them
            warnings.warn(f"Cached network {path} is unusable ({error}); training it again.", stacklevel=2)
        else:
            return net.eval()
    net = train(images, labels, recipe, seed)
    try:
        replace(path, lambda partial: torch.save(net.state_dict(), partial))
    except OSError as error:
        warnings.warn(f"Could not cache the network ({error}); the next run trains again.", stacklevel=2)
    return net


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(images: Tensor, labels: Tensor, recipe: Recipe, seed: int) -> nn.Module:
    """Train on the CPU from ``seed``, whatever device scores later; the global generator is left as found.

    On one thread: several would add in another order, and from the first last bit on the network would be another one.
    """
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.default_generator.manual_seed(seed)
        net = recipe.network(images, labels).train()
        rate, optimizer = recipe.learning_rate, recipe.optimizer(net)
        steps = len(images) // recipe.batch_size  # a last short batch would give poor batch statistics
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=recipe.epochs * steps)
        for _ in tqdm(range(recipe.epochs), desc="training", unit="epoch", disable=None):
            order = torch.randperm(len(images))
            for batch in order[: steps * recipe.batch_size].view(steps, recipe.batch_size):
                loss = F.cross_entropy(net(images[batch]), labels[batch])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
    return net.eval()
