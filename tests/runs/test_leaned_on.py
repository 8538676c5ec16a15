"""What values, functions and networks lean on beside their weights and their code, and what they do not."""

from __future__ import annotations

import builtins
import datetime
import decimal
import functools
import os
import threading
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import Dataset

from openood_sandi.runs import keys

Row = namedtuple("Row", "a b")


class Texts(list):  # type: ignore[type-arg]
    """A list that may carry more."""


class Doubled(TorchFunctionMode):
    factor = 2

    def __torch_function__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {})) * self.factor


class Changed:
    """A value and a change of it, or of what it leans on."""

    def __init__(self, value: object, change: Callable[[], object]) -> None:
        self.value, self.change = value, change


class Place:
    """What a change may use; all of it is undone."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, entered: ExitStack) -> None:
        self.patch, self.folder, self.entered = patch, folder, entered

    def file(self, name: str = "mean.npy", content: bytes = b"1") -> Path:
        (self.folder / name).write_bytes(content)
        return self.folder / name


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as entered:
        yield Place(monkeypatch, tmp_path, entered)


def carried(value: Any) -> Changed:
    return Changed(value, lambda: setattr(value, "factor", 2.0))


def _environment(place: Place) -> Changed:
    place.patch.setenv("LEANED_ON", "1")
    return Changed(lambda x: x * float(os.environ["LEANED_ON"]), lambda: place.patch.setenv("LEANED_ON", "2"))


VARIABLE, surroundings = "LEANED_ON", os.environ


def _environment_by_global_names(place: Place) -> Changed:
    place.patch.setenv(VARIABLE, "1")
    return Changed(lambda x: x * float(surroundings[VARIABLE]), lambda: place.patch.setenv(VARIABLE, "2"))


def _environment_by_a_closure(place: Place) -> Changed:
    place.patch.setenv("LEANED_ON", "1")
    name = "LEANED_ON"
    return Changed(lambda x: x * float(os.getenv(name, "0")), lambda: place.patch.setenv("LEANED_ON", "2"))


def _file_of_an_attribute(place: Place) -> Changed:
    path = place.file()
    return Changed(functools.partial(np.load, str(path)), lambda: place.file(content=b"2"))


def _file_of_the_code(place: Place) -> Changed:
    place.patch.chdir(place.folder)
    place.file()
    return Changed(lambda: np.load("mean.npy"), lambda: place.file(content=b"2"))


def _fields(place: Place) -> Changed:
    both = [np.array([(1.0, 2.0)], dtype=[(one, "f8"), (other, "f8")]) for one, other in ("ab", "ba")]
    held = {"array": both[0]}
    return Changed(held, lambda: held.update(array=both[1]))


def _mask(place: Place) -> Changed:
    array = np.ma.array([1.0, 2.0], mask=[False, False])
    return Changed(array, lambda: array.mask.__setitem__(0, True))


def _factory(place: Place) -> Changed:
    made: Any = defaultdict(lambda: 1.0)
    return Changed(made, lambda: setattr(made, "default_factory", lambda: 2.0))


def _order(place: Place) -> Changed:
    ordered = OrderedDict(a=1.0, b=2.0)
    return Changed(ordered, lambda: ordered.move_to_end("a"))


def _order_of_parameters(place: Place) -> Changed:
    net = nn.ParameterDict({"a": torch.zeros(1), "b": torch.ones(1)})
    return Changed(net, lambda: net._parameters.update(a=net._parameters.pop("a")))


CHANGES: dict[str, Callable[[Place], Changed]] = {
    "environment variable": _environment,
    "environment variable named by a global": _environment_by_global_names,
    "environment variable named by a closure": _environment_by_a_closure,
    "file that an attribute names": _file_of_an_attribute,
    "file that code names": _file_of_the_code,
    "names of an array's fields": _fields,
    "mask of an array": _mask,
    "what a defaultdict makes": _factory,
    "order of an OrderedDict": _order,
    "order of parameters": _order_of_parameters,
    "attribute of a list": lambda place: carried(Texts("a")),
    "attribute of a parameter": lambda place: carried(nn.Parameter(torch.zeros(2))),
    "attribute of a tensor": lambda place: carried(torch.zeros(2)),
    "function of torch.nn.functional": lambda place: Changed(
        nn.ReLU(), lambda: place.patch.setattr(nn.functional, "relu", lambda x, inplace=False: x)
    ),
    "function of torch by another of torch's": lambda place: Changed(
        nn.ReLU(), lambda: place.patch.setattr(torch, "relu", torch.tanh)
    ),
    "function of torch by a partial one": lambda place: Changed(
        nn.ReLU(), lambda: place.patch.setattr(torch, "relu", functools.partial(lambda x, y: x, y=1))
    ),
    "method of tensors": lambda place: Changed(
        nn.ReLU(), lambda: place.patch.setattr(torch.Tensor, "relu", lambda x: x, raising=False)
    ),
    "function of Python's": lambda place: Changed(
        lambda x: x * abs(-2), lambda: place.patch.setattr(builtins, "abs", lambda x: x)
    ),
    "mode of torch's functions": lambda place: Changed(nn.ReLU(), lambda: place.entered.enter_context(Doubled())),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_leaned_on_is_told(change: str, place: Place) -> None:
    changed = CHANGES[change](place)
    net = changed.value if isinstance(changed.value, nn.Module) else nn.Identity()

    def told() -> tuple[str, str]:
        return keys.state({"value": changed.value}), keys.network(net)

    before = told()
    assert told() == before
    changed.change()
    assert told() != before


@pytest.mark.parametrize(
    "make",
    [
        lambda: Row(1, 2.0),
        lambda: threading.Lock(),
        lambda: decimal.Decimal("1.5"),
        lambda: datetime.date(2025, 1, 1),
        lambda: bytearray(b"1"),
        lambda: {"rows": [Row(1, "a")]},
    ],
)
def test_what_people_keep_in_their_data_sets_is_told_by_what_is_in_it(make: Callable[[], object]) -> None:
    assert keys.state({"value": make()}) == keys.state({"value": make()})


def test_what_an_object_has_worked_out_is_nothing_new() -> None:
    class Shift:
        by = 1.0

        @functools.cached_property
        def twice(self) -> float:
            return 2 * self.by

    shift = Shift()
    before = keys.state({"transform": shift})
    assert shift.twice == 2.0 and keys.state({"transform": shift}) == before


def test_another_variable_of_the_environment_is_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(x: float) -> float:
        return x * float(surroundings.get(VARIABLE, "1"))

    before = keys.state({"transform": scaled})
    monkeypatch.setenv("LEANED_ON_BY_NOBODY", "1")
    assert keys.state({"transform": scaled}) == before


def test_a_file_elsewhere_is_the_same_file(place: Place) -> None:
    """As where the checkout has another path."""
    told = set()
    for name in ("one", "other"):
        (place.folder / name).mkdir()
        told.add(keys.state({"path": str(place.file(f"{name}/mean.npy")), "as one": place.folder / name / "mean.npy"}))
    assert len(told) == 1


class Files(Dataset[Any]):
    def __init__(self, folder: str | Path) -> None:
        self.root = folder
        self.files = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]


def test_the_folder_that_a_run_is_started_in_decides_nothing(place: Place) -> None:
    """Not even where that is the images': their names are those of files then."""
    place.file("a.bin")
    before = keys.images(Files(place.folder))
    place.patch.chdir(place.folder)
    assert keys.images(Files(place.folder)) == before
    assert {keys.images(Files(name)) for name in (f"{place.folder}/", str(place.folder))} == {before}
    place.file("a.bin", b"2")  # this is for the contents, which are kept with the scores
    assert keys.images(Files(place.folder)) == before
