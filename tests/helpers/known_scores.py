"""Outcomes of known scores: what reports, tables and pictures are made of, without scoring anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from comparison.cost import Cost, Expense
from comparison.evaluation import Outcome, Scored
from comparison.methods import Method, Scorer
from comparison.methods.method import Library
from comparison.suite import ImageSet, Suite
from comparison.table import Run
from torch import nn
from torch.utils.data import TensorDataset

COUNTS = {"known": 40, "tin": 30, "texture": 20, "mnist": 25, "inaturalist": 15, "textures": 18}
GROUPS: dict[str, Literal["near", "far"]] = {"tin": "near", "texture": "far", "mnist": "far"}
ABOUT: dict[str, Any] = {
    "command": "python benchmarks/side_by_side.py",
    "seeds": [0],
    "protocol": "openood",
    "limit": None,
    "hardware": {"device": "cpu", "processor": "a processor", "torch_threads": 1},
    "versions": {"torch": "2"},
}


def suite(missing: tuple[str, ...] = (), **changes: Any) -> Suite:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 100),
    ).eval()
    values: dict[str, Any] = {
        "name": "cifar100",
        "network": net,
        "network_name": "resnet18_32x32",
        "network_description": "a network",
        "weights": "0" * 64,
        "classes": 100,
        "normalisation": ((0.5,) * 3, (0.25,) * 3),
        "in_distribution": image_set("known", "ID"),
        "out_of_distribution": tuple(image_set(name, group) for name, group in GROUPS.items()),
        "missing": missing,
        "protocol": "OpenOOD's near and far sets",
    }
    return Suite(**values | changes)


def image_set(name: str, group: Literal["ID", "near", "far"]) -> ImageSet:
    count = COUNTS[name]
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))
    return ImageSet(name, group, TensorDataset(images, torch.arange(count) % 100), "images", name)


def outcome(
    name: str,
    seed: int,
    source: Library = "openood-sandi",
    options: Mapping[str, object] | None = None,
    title: str | None = None,
    forwards: float = 2.0,
) -> Outcome:
    def build(suite: Suite, device: torch.device, batch_size: int) -> Scorer:
        raise AssertionError("a report scores nothing")

    rng = np.random.default_rng(seed)
    scored = {}
    for at, (place, count) in enumerate(COUNTS.items()):
        labels = np.arange(count) % 100 if place == "known" else np.full(count, -1)
        pred = np.where(rng.random(count) < 0.8, labels, 0)
        scored[place] = Scored(pred, labels, rng.normal(at, 1, count))
    cost = Cost(images_per_second=100 / forwards, forwards=(0.9 * forwards, forwards, 1.1 * forwards))
    expense = Expense(cost, batch_size=16, peak_bytes=3 << 20, hardware=ABOUT["hardware"])
    return Outcome(Method(name, title or name, source, options or {}, build), scored, expense)


def run(*outcomes: Outcome, seed: int = 0, **changes: Any) -> Run:
    return Run(seed, suite(**changes), {outcome.method.name: outcome for outcome in outcomes})
