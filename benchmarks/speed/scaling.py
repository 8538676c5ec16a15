"""How the cost of S&I-Z grows with splits, steps, batch, image size and depth, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from comparison.cost import measure
from networks.catalogue import norms
from networks.cifar import CifarResNet

from openood_sandi import SandI

from .instrument import count
from .loops import SandIOptions, SplitLoop
from .measuring import Job, Setting
from .networks import narrow, randomise

BASE = "CIFAR ResNet-18, every normalisation layer a split, T = 2, 32 pixels"
"""What :class:`Point` stands for as it is."""


@dataclass(frozen=True)
class Point:
    """A CIFAR ResNet and the work on it; in each sweep all but one are as here."""

    splits: int | None = None
    """How many normalisation layers, evenly spaced; None for all."""
    steps: int = 2
    batch: int = 4
    size: int = 32
    blocks: int = 2
    """In each of the four stages: 2 makes a ResNet-18."""


def sweeps(batch: int, quick: bool) -> dict[str, list[tuple[int, Point]]]:
    """{what grows: [(its value, the point)]} around ``batch`` images; ``quick`` keeps the ends and the middle."""
    base = Point(batch=batch)
    found = {
        "number of splits": [(n, replace(base, splits=n)) for n in (1, 2, 5, 10, 20)],
        "steps T": [(n, replace(base, steps=n)) for n in (1, 2, 3, 4, 5)],
        "batch size": [(n, replace(base, batch=n)) for n in (batch // 4, batch // 2, batch, 2 * batch, 4 * batch)],
        "image size": [(n, replace(base, size=n)) for n in (16, 32, 48, 64)],
        "layers": [(8 * n + 2, replace(base, blocks=n)) for n in (1, 2, 3, 4)],
    }
    return {name: points[:: len(points) - 1] if quick else points for name, points in found.items()}


def measure_point(value: int, point: Point, setting: Setting) -> list[dict[str, Any]]:
    """A row of the sweep's table for every method at a point, on the ``setting``'s device and with its width."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        net = CifarResNet([point.blocks] * 4)
        narrow(net, setting.width)
        randomise(net, torch.randn(8, 3, point.size, point.size))
        images = torch.randn(point.batch, 3, point.size, point.size)
    net, images = net.to(setting.device), images.to(setting.device)
    splits = evenly(norms(net), point.splits)
    jobs: dict[str, Job] = {
        "sandi-z": SandI(net, variant="Z", splits=splits, steps=point.steps),
        "bounds-z": SandI(net, variant="Z", splits=splits, steps=point.steps).bounds,
        "sandi-z-exact": SandI(net, variant="Z", splits=splits, steps=point.steps, rectifier_shortcut=False),
        "naive-z": SplitLoop(net, splits, SandIOptions(steps=point.steps)),
    }
    with torch.no_grad():
        plain = count(lambda: net(images), setting.device)
    found = []
    for method, job in jobs.items():
        cost = measure(net, job, images, turns=setting.turns_of(method), clock=setting.clock)
        flops = count(partial(job, images), setting.device).flops / plain.flops
        found.append({"value": value, "method": method, **cost.columns(), "flops": flops})
    return found


def evenly(names: Sequence[str], number: int | None) -> list[str]:
    """``number`` of the names, the first of each of as many equal stretches."""
    return [names[len(names) * k // number] for k in range(number)] if number else list(names)
