"""Training of the embedded benchmark's network, cached on disk."""

from __future__ import annotations

import hashlib
import os
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from networks.cifar import CifarResNet
from torch import Tensor
from tqdm import tqdm

from openood_sandi.runs.files import replace


@dataclass(frozen=True)
class Recipe:
    """A small ResNet with ``blocks`` residual blocks in each stage; by default it has 15 normalisation layers.

    SGD with Nesterov momentum under a one-cycle learning rate (``learning_rate`` is its peak).
    """

    widths: tuple[int, ...] = (16, 32, 64)
    blocks: int = 2
    epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def network(self, images: Tensor, labels: Tensor) -> CifarResNet:
        """A network for such ``images`` (N, C, H, W) and ``labels`` (N,)."""
        blocks = [self.blocks] * len(self.widths)
        return CifarResNet(blocks, self.widths, int(labels.max()) + 1, in_channels=images.shape[1])


def default_cache() -> Path:
    """The user's cache folder, ``$XDG_CACHE_HOME`` or ``~/.cache``, with a folder of our own in it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openood-sandi"


def trained(images: Tensor, labels: Tensor, recipe: Recipe, seed: int, cache: Path) -> CifarResNet:
    """A network in eval mode, trained on ``images`` (N, C, H, W) and ``labels`` (N,), or read from ``cache``.

    The file's name is a hash of the recipe, the seed, torch's version and the training data. A file that is
    corrupt, or does not fit the network, is reported and replaced.
    """
    key = hashlib.sha256(repr((recipe, seed, torch.__version__)).encode())
    key.update(images.numpy().tobytes() + labels.numpy().tobytes())
    path = cache / f"smallresnet-{key.hexdigest()[:16]}.pt"
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


def train(images: Tensor, labels: Tensor, recipe: Recipe, seed: int) -> CifarResNet:
    """Train on the CPU from ``seed``, whatever device scores later; the global generator is left as found."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = recipe.network(images, labels).train()
        rate, decay = recipe.learning_rate, recipe.weight_decay
        optimizer = torch.optim.SGD(net.parameters(), rate, recipe.momentum, weight_decay=decay, nesterov=True)
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
