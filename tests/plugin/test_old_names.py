"""Names from before 0.2: modules load under them with a DeprecationWarning, and are the very modules of today."""

from __future__ import annotations

import pickle
import sys
import warnings
from importlib import import_module, util
from typing import Any

import numpy as np
import pytest
import torch

import openood_sandi
from openood_sandi import moved
from openood_sandi.runs.cache import BatchScores


@pytest.fixture(autouse=True)
def not_loaded_yet() -> Any:
    """Old names are met for the first time, before and after each test."""

    def forget() -> None:
        for name in moved.MOVED:
            sys.modules.pop(f"openood_sandi.{name}", None)
            vars(openood_sandi).pop(name, None)

    forget()
    yield
    forget()


@pytest.mark.parametrize("old", moved.MOVED)
def test_each_old_module_is_the_new_one(old: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"openood_sandi\.{old} is now openood_sandi\.") as caught:
        found = import_module(f"openood_sandi.{old}")
    new = f"openood_sandi.{moved.MOVED[old]}"
    assert found is sys.modules[new]
    assert found.__name__ == new and found.__spec__ is not None and found.__spec__.name == new
    assert len(caught) == 1


def test_the_warning_names_the_line_that_imports() -> None:
    with pytest.warns(DeprecationWarning) as caught:
        from openood_sandi.detector import SandI
    assert caught[0].filename == __file__
    assert SandI is openood_sandi.SandI


def test_from_the_package() -> None:
    with pytest.warns(DeprecationWarning, match="is now openood_sandi.runs.keys"):
        from openood_sandi import fingerprints
    from openood_sandi.runs import keys

    assert fingerprints is keys


def test_old_pickles_load() -> None:
    arrays = np.arange(2), np.ones(2), np.arange(2)
    written = pickle.dumps(BatchScores(*arrays), 0).replace(b"openood_sandi.runs.results", b"openood_sandi.score_cache")
    with pytest.warns(DeprecationWarning, match="score_cache is now openood_sandi.runs.cache"):
        read = pickle.loads(written)
    assert type(read) is BatchScores and read.score.tolist() == [1, 1]


def test_infer_is_score_dataset() -> None:
    with pytest.warns(DeprecationWarning, match=r"inference is now openood_sandi\.runs\.score"):
        from openood_sandi.inference import infer
    batches = [(torch.zeros(2, 3, 4, 4), torch.arange(2))]
    found = infer(
        lambda x: (x[:, 0, 0, 0].long(), x[:, 0, 0, 0] + 1), batches, "cpu", description="svhn", progress=False
    )
    assert [array.tolist() for array in found] == [[0, 0], [1, 1], [0, 1]]


@pytest.mark.parametrize("name", ["SEAMS", "find_openood", "open_seam", "register"])
def test_names_of_the_old_plugin_module(name: str) -> None:
    from openood_sandi import plugin
    from openood_sandi.plugin import seams

    with pytest.warns(DeprecationWarning, match=rf"plugin\.{name} is now openood_sandi\.plugin\.seams\.{name}"):
        assert getattr(plugin, name) is getattr(seams, name)


def test_other_names_are_unknown_as_ever() -> None:
    assert util.find_spec("openood_sandi.nonsense") is None
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        from openood_sandi.plugin import nonsense  # noqa: F401
    with pytest.raises(AttributeError):
        _ = openood_sandi.nonsense


def test_asking_where_an_old_module_is_imports_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert util.find_spec("openood_sandi.detector") is not None
    assert "openood_sandi.detector" not in sys.modules
