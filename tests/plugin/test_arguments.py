"""``--key value`` of OpenOOD's command line: read, never evaluated, and refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

OPTION = "postprocessor.postprocessor_args."


@pytest.fixture
def config(checkout: Path) -> Any:
    from openood.utils.config import Config

    files = ("postprocessors/sandi.yml", "datasets/cifar100/cifar100_ood.yml", "pipelines/test/test_ood.yml")
    return Config(*(str(checkout / "configs" / file) for file in files))


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        (f"{OPTION}splits", "all:__import__('os').system('exit 1')", "all:__import__('os').system('exit 1')"),
        (f"{OPTION}splits", "a:b", "a:b"),
        (f"{OPTION}splits", "5:str", "5"),
        (f"{OPTION}cache_dir", "/data/run:1", "/data/run:1"),
        (f"{OPTION}cache_dir", "C:\\scores", "C:\\scores"),
        (f"{OPTION}cache_dir", "a=b", "a=b"),
        (f"{OPTION}steps", "3", 3),
        (f"{OPTION}step_size", "1e-2", 0.01),
        (f"{OPTION}steps", "2.5:float", 2.5),
        (f"{OPTION}splitting", "False", False),
        (f"{OPTION}splits", "[layer3.*, layer4.*]:list", ["layer3.*", "layer4.*"]),
        ("ood_dataset.farood.datasets", "[mnist,texture]", ["mnist", "texture"]),
        ("ood_dataset.farood.datasets", "mnist", ["mnist"]),
        ("postprocessor.postprocessor_sweep.step_size", "[1, 0.5]", [1, 0.5]),
        ("ood_dataset.num_workers", "4", 4),  # '@{num_workers}', which is a number
    ],
)
@pytest.mark.parametrize("form", ["--{}={}", "--{} {}"])
def test_values(config: Any, key: str, text: str, value: object, form: str) -> None:
    arguments = [f"--{key}={text}"] if "=" in form else [f"--{key}", text]
    assert config.parse_args(arguments) == []
    assert config[key] == value and type(config[key]) is type(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"--{OPTION}stepz", "5"], f"--{OPTION}stepz: there is no such setting. Did you mean: {OPTION}steps, "),
        (["--steps", "5"], f"--steps: there is no such setting. Did you mean: {OPTION}steps?"),
        (["--zzz", "5"], "--zzz: there is no such setting. Did you mean: evaluator, exp_name, "),
        ([f"--{OPTION}steps", "five"], f"--{OPTION}steps five: expected a whole number, as the present 2 is"),
        ([f"--{OPTION}steps", "2.5"], "expected a whole number"),
        ([f"--{OPTION}step_size", "small"], "expected a number"),
        ([f"--{OPTION}splits", "all:int"], f"--{OPTION}splits all:int: expected a whole number"),
        ([f"--{OPTION}splitting", "no"], "expected True or False"),
        (["--ood_dataset.farood.datasets", "[mnist"], "expected a list, such as [mnist,texture]"),
        (["--ood_dataset.farood", "mnist"], "expected one of its settings, such as --ood_dataset.farood.datasets"),
        ([f"--{OPTION}steps"], f"--{OPTION}steps: expected a value after it"),
        ([f"--{OPTION}splits", "--mark", "x"], f"--{OPTION}splits: expected a value after it"),
        (["steps", "5"], "'steps': expected --key value or --key=value"),
    ],
)
def test_refusals(config: Any, arguments: list[str], message: str) -> None:
    before = config.__getstate__()
    with pytest.raises(ValueError) as caught:
        config.parse_args(arguments)
    assert message in str(caught.value)
    assert config.__getstate__() == before


def test_unknown_names_can_be_handed_back(config: Any) -> None:
    assert config.parse_args(["--a.b=c", "--mark", "mine"], strict=False) == ["--a.b", "c"]
    assert config.mark == "mine"
