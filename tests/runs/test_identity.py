"""No stale hit: whatever may change a score changes a digest; and no miss: what does not, leaves it, in any process."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from openood_sandi.runs import keys
from tests.helpers import identity_cases as cases
from tests.helpers.places import ROOT


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the network's modules, first on the path; what a change leaves behind is undone."""
    folder = cases.write_modules(tmp_path / "modules")
    monkeypatch.syspath_prepend(str(folder))
    hooks = torch.nn.modules.module
    for kind in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks"):
        monkeypatch.setattr(hooks, kind, type(getattr(hooks, kind))(getattr(hooks, kind)))
    monkeypatch.setattr(hooks, "_global_is_full_backward_hook", hooks._global_is_full_backward_hook)
    monkeypatch.setattr(nn.BatchNorm1d, "forward", nn.BatchNorm1d.forward)
    yield folder
    forget()


def forget() -> None:
    for name in [name for name in sys.modules if name.startswith("identity_") and name != "identity_cases"]:
        del sys.modules[name]


def fresh(folder: Path, *arguments: str, seed: str = "0") -> str:
    """The digests in another process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
    command = [sys.executable, str(ROOT / "tests/helpers/identity_cases.py"), str(folder), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("change", cases.CHANGES)
def test_every_change_in_memory_changes_the_digest(change: str, modules: Path) -> None:
    before = cases.digests()
    assert before == cases.digests()
    assert cases.digests(change) != before


@pytest.mark.parametrize(
    ("what", "old", "new"),
    [
        ("network", "x * SCALE", "x + SCALE"),
        ("network", "power = 2", "power = 3"),
        ("helper", "clamp(-LIMIT, LIMIT)", "clamp(-LIMIT, LIMIT) + 1"),
        ("late", "image + 1", "image + 2"),  # imported when the function first runs
    ],
)
def test_every_edit_of_a_source_changes_the_digest(what: str, old: str, new: str, modules: Path) -> None:
    before = cases.digests()
    forget()
    text = {"network": cases.NETWORK, "helper": cases.HELPER, "late": cases.LATE}[what]
    assert old in text
    cases.write_modules(modules, **{what: text.replace(old, new)})
    assert cases.digests() != before


def test_another_process_finds_the_same(modules: Path, tmp_path: Path) -> None:
    """With another seed of hashes, other modules imported first, from another folder."""
    elsewhere = cases.write_modules(tmp_path / "another/checkout")
    assert fresh(elsewhere, "--other-order", seed="77") == cases.digests()


def test_what_is_typed_in_a_notebook_is_told_by_its_code(modules: Path) -> None:
    """As in a script: neither the cell nor the line it is in."""

    def typed(text: str, file: str) -> str:
        cell: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(text, file, "exec"), cell)
        return keys.state({"class": cell["Net"], "transform": cell["transform"]})

    script = typed(cases.NETWORK, "/home/me/script.py")
    assert typed("\n\n# a cell" + cases.NETWORK, "<ipython-input-3>") == script
    assert typed(cases.NETWORK.replace("x * SCALE", "x + SCALE"), "<ipython-input-3>") != script
    assert typed(cases.NETWORK.replace("{'alpha', ", "{"), "script.py") == script  # it is not there: no change


def test_a_copy_is_the_same(modules: Path) -> None:
    import copy

    _, net = cases.made()
    before = keys.network(net)
    again = copy.deepcopy(net)  # Python leaves notes on the class
    assert keys.network(again) == before == keys.network(net)


@pytest.mark.parametrize(
    "change",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.backends.mkldnn.flags(enabled=False),
    ],
)
def test_settings_of_the_process_are_told_by_name(change: Callable[[], Any]) -> None:
    before = keys.arithmetic(torch.device("cpu"))
    with change():
        assert keys.arithmetic(torch.device("cpu")) != before
    assert keys.arithmetic(torch.device("cpu")) == before


def test_more_settings() -> None:
    before = keys.arithmetic(torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        low = keys.arithmetic(torch.device("cpu"))
    with torch.autocast("cpu", torch.float16):
        assert low["autocast dtype"] != keys.arithmetic(torch.device("cpu"))["autocast dtype"]
    torch.set_default_dtype(torch.float64)
    try:
        assert keys.arithmetic(torch.device("cpu"))["default dtype"] != before["default dtype"]
    finally:
        torch.set_default_dtype(torch.float32)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert keys.arithmetic(torch.device("cpu")) != before
    finally:
        torch.set_float32_matmul_precision(precision)


def test_a_setting_that_is_named_and_changes_nothing() -> None:
    """What a careful script does first, and another does not."""
    before = keys.arithmetic(torch.device("cpu"))
    torch.set_float32_matmul_precision(torch.get_float32_matmul_precision())
    assert keys.arithmetic(torch.device("cpu")) == before


@pytest.mark.parametrize("value", [random.Random(0), torch.jit.script(nn.ReLU()), torch.zeros(2, device="meta")])
def test_what_hides_its_state_is_refused(value: Any) -> None:
    with pytest.raises(keys.Indescribable):
        keys.state({"value": value})


@pytest.mark.slow
def test_a_hundred_changes_and_a_hundred_reruns(modules: Path, tmp_path: Path) -> None:
    """Random changes to code and weights: no two digests are alike. Unchanged, each is found again."""
    rng, seen = random.Random(0), {cases.digests()}
    numbers = rng.sample(range(10, 10_000), 100)
    for count, number in enumerate(numbers):
        forget()
        texts = {"network": cases.NETWORK, "helper": cases.HELPER, "late": cases.LATE}
        what, old, new = rng.choice(
            [
                ("network", "SCALE = 2.0", f"SCALE = {number}.0"),
                ("network", "power = 2", f"power = {number}"),
                ("network", "x.relu()", f"x.relu() + {number}"),
                ("network", "nn.Linear(12, 3)", f"nn.Linear(12, {number})"),
                ("helper", "LIMIT = 3.0", f"LIMIT = {number}.5"),
                ("late", "image + 1", f"image + {number}"),
            ]
        )
        cases.write_modules(modules, **{what: texts[what].replace(old, new)})
        now = cases.digests()
        assert now not in seen, (what, new)
        seen.add(now)
        forget()
        cases.write_modules(tmp_path / str(count), **{what: texts[what].replace(old, new)})
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(tmp_path / str(count)))
            assert cases.digests() == now, (what, new)
    assert len(seen) == 101
