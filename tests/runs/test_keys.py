"""Digests for the score cache: the same in every process, another one for whatever may change a score."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from openood_sandi.runs import keys
from tests.helpers import loaders as runs
from tests.helpers.places import ROOT


class Preprocessor:
    """With attributes of the kinds that real ones and networks have."""

    def __init__(self, size: int = 32, names: tuple[str, ...] = ("a", "b", "c")) -> None:
        self.size, self.mean = size, [0.5, float("inf")]
        self.names, self.by_name = set(names), {name: len(name) for name in names}
        self.crop = functools.partial(torch.narrow, dim=0, length=size)
        self.scale = lambda x: x * size
        self.kernel = torch.eye(3)
        self.dtype = torch.float32


def changed(change: Callable[[nn.Module], Any]) -> str:
    net = runs.network()
    with torch.no_grad():
        change(net)
    return keys.network(net)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "a weight": lambda net: net[0].weight[0, 0, 0, 0].add_(1e-3),
    "a buffer": lambda net: net[1].running_mean.add_(1e-3),
    "a dtype": lambda net: net.double(),
    "a mode": lambda net: net.train(),
    "a layer's attribute": lambda net: setattr(net[1], "eps", 1e-3),
    "an activation": lambda net: net.__setitem__(2, nn.GELU()),
    "an attribute of its own": lambda net: setattr(net, "temperature", 2.0),
    "a hook": lambda net: net.register_forward_hook(lambda module, args, output: output * 2),
    "a tensor outside the state": lambda net: setattr(net, "prototypes", torch.ones(2)),
}


def test_every_change_of_a_network_changes_its_digest() -> None:
    digests = [changed(lambda net: None), *(changed(change) for change in CHANGES.values())]
    assert len(set(digests)) == len(digests)
    assert changed(lambda net: None) == digests[0]


def test_the_key_of_scores_has_every_part() -> None:
    net, data = runs.network(), runs.images()
    key = keys.score_key("sandi", {"steps": 2, "splits": ["a"]}, net, data, fitted="x")
    others = [
        keys.score_key("gaia", {"steps": 2, "splits": ["a"]}, net, data, fitted="x"),
        keys.score_key("sandi", {"steps": 3, "splits": ["a"]}, net, data, fitted="x"),
        keys.score_key("sandi", {"steps": 2, "splits": ["a"]}, net.double(), data, fitted="x"),
        keys.score_key("sandi", {"steps": 2, "splits": ["a"]}, runs.network(), runs.images(36), fitted="x"),
        keys.score_key("sandi", {"steps": 2, "splits": ["a"]}, runs.network(), data, fitted="y"),
    ]
    differing = [[name for name in key if key[name] != other[name]] for other in others]
    assert differing == [["method"], ["options"], ["network"], ["images"], ["fitted"]]
    assert json.loads(json.dumps(key)) == key
    assert keys.score_key("sandi", {"splits": ["a"], "steps": 2}, runs.network(), data, fitted="x") == key


def test_every_change_of_the_images_changes_their_digest() -> None:
    images, labels = runs.images().tensors
    sets = [
        TensorDataset(images, labels),
        TensorDataset(images, labels + 1),
        TensorDataset(images * 2, labels),
        TensorDataset(images.flip(0), labels),
        Subset(TensorDataset(images, labels), [0, 1]),
        Subset(TensorDataset(images, labels), [1, 0]),
    ]
    assert len({keys.images(dataset) for dataset in sets}) == len(sets)


def test_objects_are_told_apart_by_what_is_in_them() -> None:
    same = keys.state({"p": Preprocessor()})
    assert same == keys.state({"p": Preprocessor(names=("c", "a", "b"))})
    assert same != keys.state({"p": Preprocessor(size=33)})
    assert same != keys.state({"p": Preprocessor(names=("a", "b"))})


@pytest.mark.slow
def test_another_process_finds_the_same() -> None:
    code = (
        "from openood_sandi.runs import keys\nfrom tests.runs.test_keys import Preprocessor, runs\n"
        "print(keys.network(runs.network()), keys.state({'p': Preprocessor()}), keys.code())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    here = [keys.network(runs.network()), keys.state({"p": Preprocessor()}), keys.code()]
    assert result.stdout.split() == here, result.stderr


@pytest.mark.parametrize("value", [torch.Generator(), iter([]), object()])
def test_what_cannot_be_described_is_refused(value: Any) -> None:
    with pytest.raises(keys.Indescribable, match=type(value).__qualname__):
        keys.state({"value": value})


def test_code_without_a_file_is_told_by_its_code() -> None:
    def typed(text: str) -> str:
        inside: dict[str, Any] = {"__name__": "typed_by_hand", "scale": 2}
        exec(text, inside)
        return keys.state({"scale": inside["double"]})

    texts = ["def double(x): return 2 * x", "def double(x): return 3 * x", "def double(x): return scale * x"]
    assert len({typed(text) for text in texts}) == 3
    assert typed(texts[0]) == typed("\n\n# further down\n" + texts[0])


def test_what_contains_itself_is_refused() -> None:
    values: list[Any] = [1]
    values.append(values)
    with pytest.raises(keys.Indescribable, match="a list contains itself"):
        keys.state({"values": values})
