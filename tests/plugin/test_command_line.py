"""What main.py and eval_ood.py make of their command line, in this process: names, files, options and reruns."""

from __future__ import annotations

import io
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from openood_sandi import GradientShortCircuit
from openood_sandi.plugin import scripts, standins
from tests.helpers import installation, tiny
from tests.plugin.conftest import CONFIGS, git_status

CHECKPOINT = ["--network.checkpoint", str(tiny.CHECKPOINT)]
Setup = Callable[..., Any]


@pytest.fixture
def setup(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """OpenOOD's ``setup_config`` for a command line typed in the checkout."""
    from openood.utils import setup_config

    def configure(*arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
        monkeypatch.chdir(checkout)
        return setup_config()

    return configure


def refused(setup: Setup, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        setup(*arguments)
    return str(caught.value)


FORMS = [["--postprocessor", "sandi"], ["--config", *CONFIGS, "configs/postprocessors/sandi.yml", *CHECKPOINT]]


@pytest.mark.parametrize("form", FORMS)
def test_wrong_names_values_and_files(setup: Setup, form: list[str]) -> None:
    option = "--postprocessor.postprocessor_args."
    assert f"{option}stepz: there is no such setting" in refused(setup, *form, f"{option}stepz", "5")
    assert f"{option}steps five: expected a whole number" in refused(setup, *form, f"{option}steps", "five")
    assert "checkpoint  " in (text := refused(setup, *form, "--network.checkpoint", "gone.ckpt"))
    assert "gone.ckpt" in text and "download" not in text
    text = refused(setup, *form, "--ood_dataset.farood.datasets", "[mnist,textures]")
    assert "--ood_dataset.farood.datasets: there is no set 'textures'. Did you mean: mnist" in text
    config = setup(*form, "--ood_dataset.farood.datasets", "[mnist,texture]")
    assert config.ood_dataset.farood.datasets == ["mnist", "texture"]


@pytest.mark.parametrize("form", FORMS)
def test_a_missing_set_is_named_and_can_be_left_out(setup: Setup, checkout: Path, form: list[str]) -> None:
    lost = checkout / "data/images_classic/svhn/test/1.png"
    kept = lost.rename(lost.with_suffix(".kept"))
    try:
        text = refused(setup, *form)
        assert str(lost) in text and "--datasets svhn --save_dir" in text
        assert "remove" not in text
        offered = text.split("To run without it:\n")[1].splitlines()[0].split()
        assert offered == ["--ood_dataset.farood.datasets", "[mnist,texture,places365]"]
        setup(*form, *offered)
    finally:
        kept.rename(lost)
    assert git_status(checkout) == ""


def test_what_openood_needs_is_not_left_out(setup: Setup, checkout: Path) -> None:
    lists = checkout / "data/benchmark_imglist/cifar100"
    kept = lists.rename(lists.with_name("kept"))
    try:
        assert "To run without it" not in refused(setup, "--postprocessor", "sandi")
    finally:
        kept.rename(lists)


def test_without_a_terminal_a_rerun_merges(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = FORMS[1]
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert setup(*arguments).merge_option == "merge"
    assert setup(*arguments, "--merge_option", "pass").merge_option == "pass"
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert setup(*arguments).merge_option == "default"


@pytest.mark.parametrize("name", ["sandy", "knnn"])
def test_unknown_postprocessors(setup: Setup, checkout: Path, name: str) -> None:
    from openood.evaluation_api.evaluator import get_postprocessor as for_evaluator
    from openood.postprocessors import get_postprocessor
    from openood.utils.config import Config

    near = f"Did you mean: {name[:3]}"
    assert near in refused(setup, "--postprocessor", name)
    with pytest.raises(ValueError, match=f"there is no postprocessor '{name}'. {near}"):
        for_evaluator(str(checkout / "configs"), name, "cifar100")  # without a download
    with pytest.raises(ValueError, match=f"there is no postprocessor '{name}'. {near}"):
        get_postprocessor(Config(postprocessor={"name": name}))
    assert git_status(checkout) == ""


@pytest.mark.parametrize("name", ["sandi", "knn"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("APS_mode: 'False'", "APS_mode='False': expected True or False"),
        ("postprocessor_args: [steps, 5]", r"postprocessor_args=\['steps', 5\]: expected options by name"),
        ("postprocessor_sweep: [1, 2]", r"postprocessor_sweep=\[1, 2\]: expected options by name"),
        ("postprocessor_sweep: {K: 50}", "K=50: expected a list of values"),
    ],
)
def test_settings_of_the_wrong_kind(checkout: Path, tmp_path: Path, name: str, settings: str, message: str) -> None:
    from openood.evaluation_api.evaluator import get_postprocessor as for_evaluator
    from openood.postprocessors import get_postprocessor
    from openood.utils.config import Config

    from openood_sandi.postprocessor import SandIPostprocessor

    file = tmp_path / f"postprocessors/{name}.yml"
    file.parent.mkdir()
    file.write_text(f"postprocessor:\n  name: {name}\n  {settings}\n")
    for build in (get_postprocessor, *([SandIPostprocessor] if name == "sandi" else [])):
        with pytest.raises(ValueError, match=f"{name}: .*{message}"):
            build(Config(str(file)))
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        for_evaluator(str(tmp_path), name, "cifar100")


def test_openoods_own_settings_are_sound(checkout: Path) -> None:
    from openood.utils.config import Config

    from openood_sandi.plugin.settings import require_sound

    files = sorted(checkout.glob("configs/postprocessors/**/*.yml"))
    assert len(files) > 30
    for file in files:
        require_sound(Config(str(file)).postprocessor)


# ---------------------------------------------------------------------------------------- eval_ood.py


@pytest.fixture
def script(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What ``eval_ood.py`` is left to read of a command line."""
    import openood

    module = ModuleType("__main__")
    module.__file__ = str(Path(openood.__file__).parents[1] / "scripts/eval_ood.py")  # beside the one that is imported
    module.ROOT_DIR = str(checkout)  # type: ignore[attr-defined]
    monkeypatch.setattr(scripts, "_taken", [])

    def take(*arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["eval_ood.py", *arguments])
        scripts.take_options(module)
        return sys.argv[1:]

    return take


@pytest.mark.parametrize(("name", "option", "attribute"), [("sandi", "steps", "options"), ("knn", "K", "K")])
def test_options_of_eval_ood(
    checkout: Path, tmp_path: Path, script: Callable[..., list[str]], name: str, option: str, attribute: str
) -> None:
    from openood.evaluation_api.evaluator import get_postprocessor

    own = ["--root", str(tmp_path), "--postprocessor", name, "--save-csv"]
    set_option = f"--postprocessor.postprocessor_args.{option}"
    assert script(*own, set_option, "7", "--postprocessor.APS_mode=False") == own
    postprocessor = get_postprocessor(str(checkout / "configs"), name, "cifar100")
    value = getattr(postprocessor, attribute)
    assert (value[option] if isinstance(value, dict) else value) == 7 and postprocessor.APS_mode is False
    script("--root", str(tmp_path), set_option + "z", "7")
    with pytest.raises(SystemExit, match=f"{option}z: there is no such setting. Did you mean: .*{option}"):
        get_postprocessor(str(checkout / "configs"), name, "cifar100")


@pytest.mark.parametrize("kind", ["postprocessors", "scores"])
def test_options_that_an_earlier_run_would_hide(tmp_path: Path, script: Callable[..., list[str]], kind: str) -> None:
    finished = tmp_path / "s0" / kind / "knn.pkl"
    finished.parent.mkdir(parents=True)
    finished.touch()
    own, option = ["--postprocessor", "knn"], "--postprocessor.postprocessor_args.K=7"
    for place in (["--root", str(tmp_path)], ["--ckpt-path", str(tmp_path / "s0/best.ckpt")]):
        with pytest.raises(SystemExit, match=f"would have no effect.*{kind}/knn.pkl"):
            script(*place, *own, option)
    scripts._taken.clear()
    script("--root", str(tmp_path), *own)  # as OpenOOD means it
    script("--root", str(tmp_path), "--postprocessor", "sandi", option)


def test_options_of_other_scripts_are_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkout: Path) -> None:
    arguments = ["mine.py", "--postprocessor.postprocessor_args.K", "7"]
    monkeypatch.setattr(sys, "argv", list(arguments))
    module = ModuleType("__main__")
    module.__file__ = str(tmp_path / "mine.py")
    scripts.take_options(module)
    assert sys.argv == arguments and scripts._taken == []


# ---------------------------------------------------------------------------------------- the extra


def test_a_package_of_the_extra_that_is_missing_names_it() -> None:
    for name, told in [("faiss", True), ("sklearn.metrics", True), ("somebodys", False), ("openood.gone", False)]:
        with pytest.raises(ModuleNotFoundError) as caught, standins.extra_named(), standins.extra_named():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        assert str(caught.value).count('pip install "openood-sandi[openood]"') == told
        assert str(caught.value).startswith(f"No module named {name!r}")


# ---------------------------------------------------------------------------------------- all of it


def run(*arguments: str, checkout: Path) -> str:
    return installation.run(installation.wheel_python(), *arguments, cwd=checkout).stdout


@pytest.mark.slow
def test_the_same_command_twice(checkout: Path) -> None:
    arguments = ["main.py", "--config", *CONFIGS, "configs/postprocessors/msp.yml", *CHECKPOINT, "--num_gpus", "0"]
    for _ in range(2):  # the second would be asked on stdin, which there is none of
        run(*arguments, "--mark", "twice", checkout=checkout)
    text = (checkout / "results/cifar100_resnet18_32x32_test_ood_ood_msp_twice/s0/ood/ood.csv").read_text()
    names = [line.partition(",")[0] for line in text.splitlines()]
    assert names == ["dataset", *tiny.NEAR, "nearood", *tiny.FAR, "farood"]


@pytest.mark.slow
def test_eval_ood_with_options(checkout: Path) -> None:
    root = checkout / tiny.CHECKPOINT.parents[1]
    own = [
        "scripts/eval_ood.py",
        "--root",
        str(root),
        "--id-data",
        "cifar100",
        "--postprocessor",
        "gsc",
        "--save-score",
    ]
    run(*own, "--postprocessor.postprocessor_args.mask_ratio", "0.5", checkout=checkout)
    finished = root / "s0/scores/gsc.pkl"
    try:
        scores = pickle.loads(finished.read_bytes())
    finally:
        finished.unlink()
    _, expected = GradientShortCircuit(tiny.network(), mask_ratio=0.5)(tiny.read_images(checkout, "svhn"))
    np.testing.assert_allclose(scores["ood"]["far"]["svhn"][1], -expected.numpy(), rtol=1e-5)
    assert git_status(checkout) == ""
