"""What a wheel and an editable install put into place: package, configurations, start-up files."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

import openood_sandi
from openood_sandi import startup
from openood_sandi.plugin import registry
from tests.helpers import installation

INSTALLS = pytest.mark.parametrize(
    "python",
    [
        pytest.param(installation.wheel_python, id="wheel"),
        pytest.param(installation.editable_python, id="editable"),
    ],
)


def evaluate(python: str, code: str, **variables: str) -> str:
    """What ``python -c code`` prints; anything on stderr is a failure."""
    result = installation.run(python, "-c", code, cwd=installation.workspace(), **variables)
    assert result.stderr == ""
    return result.stdout.strip()


@pytest.mark.slow
def test_wheel_holds_package_configurations_and_start_up_files() -> None:
    names = set(zipfile.ZipFile(installation.wheel()).namelist())
    configurations = {path.name for path in (installation.ROOT / "configs/postprocessors").glob("*.yml")}
    assert {"openood_sandi.pth", "openood_sandi.start", "openood_sandi/py.typed"} <= names
    assert {f"openood_sandi/configs/postprocessors/{name}" for name in configurations} <= names
    assert {"sandi.yml", "gaia.yml"} <= configurations
    package = installation.ROOT / "openood_sandi"
    modules = {str(path.relative_to(package)) for path in package.rglob("*.py")}
    assert {f"openood_sandi/{name}" for name in modules} <= names
    top_level = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top_level == {"openood_sandi", "openood_sandi.pth", "openood_sandi.start"}


@INSTALLS
@pytest.mark.slow
def test_start_up_puts_the_finder_in_place(python: Callable[[], str]) -> None:
    code = "import sys; print(getattr(sys.meta_path[0], '__name__', ''))"
    assert evaluate(python(), code) == startup.OpenOODFinder.__name__


@INSTALLS
@pytest.mark.slow
def test_environment_variable_switches_it_off(python: Callable[[], str]) -> None:
    code = "import sys; print(sys.meta_path)"
    assert startup.OpenOODFinder.__name__ not in evaluate(python(), code, **{startup.SWITCH: "1"})
    assert startup.OpenOODFinder.__name__ in evaluate(python(), code, **{startup.SWITCH: "0"})


@pytest.mark.parametrize(
    ("value", "active"),
    [
        *((value, False) for value in ("1", "true", "True", "yes", "on", " ON ", "anything")),
        *((value, True) for value in ("0", "false", "False", "no", "off", "OFF", "", " ")),
    ],
)
def test_values_of_the_switch(monkeypatch: pytest.MonkeyPatch, value: str, active: bool) -> None:
    monkeypatch.setenv(startup.SWITCH, value)
    monkeypatch.setattr(sys, "meta_path", [])
    startup.activate()
    assert (startup.OpenOODFinder in sys.meta_path) == active


def test_start_up_imports_nothing_but_itself() -> None:
    code = (
        "import os, sys\n"
        f"sys.path.insert(0, {str(installation.source())!r})\n"
        "before = set(sys.modules)\n"
        "from openood_sandi import startup\n"
        "startup.activate()\n"
        "print(*sorted(set(sys.modules) - before), len(sys.meta_path))\n"
        "startup.activate()\n"
        "print(len(sys.meta_path))"
    )
    result = installation.run(sys.executable, "-S", "-c", code, cwd=installation.workspace())
    first, second = result.stdout.splitlines()
    assert first.split() == ["openood_sandi", "openood_sandi.startup", second]


@INSTALLS
@pytest.mark.slow
def test_entry_points_and_configurations_are_found(python: Callable[[], str]) -> None:
    code = (
        "from importlib import metadata\n"
        "from openood_sandi.plugin import registry\n"
        "for entry in metadata.entry_points(group=registry.GROUP):\n"
        "    print(entry.name, entry.value, registry.config_file(entry.name).is_file())"
    )
    lines = set(evaluate(python(), code).splitlines())
    own = {name: f"openood_sandi.postprocessor:{own}" for name, (_, own) in registry.DETECTORS.items()}
    assert {f"{name} {value} True" for name, value in own.items()} <= lines


@pytest.mark.slow
def test_description_and_classes_come_from_the_detectors() -> None:
    code = (
        "import sys\n"
        "from importlib import metadata\n"
        "print(metadata.metadata('openood-sandi')['Summary'])\n"
        "print('torch' in sys.modules)"
    )
    summary, torch_imported = evaluate(installation.wheel_python(), code).splitlines()
    assert summary == "Out-of-distribution detection for OpenOOD: S&I, S&I-C, GAIA, GSC and Prototype Fusion"
    assert torch_imported == "False"


def test_public_names_load_when_first_used() -> None:
    for name in openood_sandi.__all__:
        assert getattr(openood_sandi, name) is not None, name
    assert {*openood_sandi.__all__} == {*openood_sandi._HOMES, "__version__"} == {*dir(openood_sandi)}
    with pytest.raises(AttributeError, match="has no attribute 'sandi'"):
        _ = openood_sandi.sandi


@pytest.mark.slow
def test_a_removed_package_leaves_python_silent() -> None:
    python = installation.environment("removed")
    (site_packages,) = Path(python).parents[1].glob("lib/python*/site-packages")
    (site_packages / "openood_sandi.pth").write_bytes(zipfile.ZipFile(installation.wheel()).read("openood_sandi.pth"))
    (site_packages / "openood_sandi").mkdir()
    (site_packages / "openood_sandi" / "__init__.py").write_text("raise RuntimeError('half removed')")
    assert evaluate(python, "print('started')") == "started"


@pytest.mark.slow
def test_core_imports_without_openood_and_torchvision() -> None:
    code = (
        "import sys\n"
        "absent = 'openood', 'torchvision', 'pandas', 'sklearn', 'yaml', 'tqdm', 'scipy', 'matplotlib'\n"
        "sys.modules.update({name: None for name in absent})\n"
        "from openood_sandi import SandI, __version__\n"
        "print(SandI.__name__, __version__)"
    )
    assert evaluate(installation.wheel_python(), code) == f"SandI {openood_sandi.__version__}"
