"""Seams of modules that were reloaded, and warnings where the filters make errors of them; no OpenOOD is needed."""

from __future__ import annotations

import types
import warnings

import pytest

from openood_sandi.plugin import seams


def module(monkeypatch: pytest.MonkeyPatch, seam: object) -> types.ModuleType:
    made = types.ModuleType("openood.utils.config")
    made.__file__ = "config.py"
    made.setup_config = lambda: "their own"  # type: ignore[attr-defined]
    monkeypatch.setitem(seams.SEAMS, made.__name__, seam)
    return made


def test_a_reloaded_module_is_opened_again_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def seam(module: types.ModuleType) -> None:
        opened.append(module)
        module.setup_config = lambda: "ours"  # type: ignore[attr-defined]

    made = module(monkeypatch, seam)
    for _ in range(2):
        seams.open_seam(made)
    assert len(opened) == 1 and made.setup_config() == "ours"
    made.setup_config = lambda: "their own"  # type: ignore[attr-defined]  # as a reload leaves it, mark and all
    seams.open_seam(made)
    assert len(opened) == 2 and made.setup_config() == "ours"


def test_a_misfit_stays_a_warning_where_warnings_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def seam(module: types.ModuleType) -> None:
        raise AttributeError("it has no such function")

    made = module(monkeypatch, seam)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.warns(UserWarning, match="does not fit this OpenOOD.*no such function"):
            warnings.simplefilter("error")
            seams.open_seam(made)
