"""A detector in one file and one yml, from outside this package: what it declares is all that OpenOOD needs."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from openood_sandi import DetectorInfo, register
from openood_sandi.plugin import registry
from tests.helpers import installation, tiny
from tests.plugin.test_evaluator import check_scores, config, evaluator
from tests.plugin.test_main import check_against, results

FOLDER = Path(__file__).parent / "outside"
#: main.py after the detector's module, as a script of the user's would have it.
RUN = "import mean_gradient, runpy; runpy.run_path('main.py', run_name='__main__')"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The outside module, imported and registered in this process; forgotten afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(registry, "_added", {})
    clear()
    import mean_gradient

    yield mean_gradient
    del sys.modules["mean_gradient"]
    monkeypatch.undo()
    clear()


def clear() -> None:
    registry.entry_points.cache_clear()
    registry._loaded.cache_clear()


def mean_gradient(images: Tensor, stage: str = "layer4") -> tuple[Tensor, Tensor]:
    """The detector's score by plain autograd, image by image."""
    net = tiny.network()
    kept: list[Tensor] = []
    norms = [m for name, m in net.named_modules() if name.startswith(stage) and isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.register_forward_hook(lambda _, __, output: kept.append(output))
    pred, score = [], []
    for image in images:
        kept.clear()
        logits = net(image[None])
        gradients = torch.autograd.grad(logits.max(), kept)
        pred.append(int(logits.argmax()))
        score.append(sum(float(gradient.abs().mean()) for gradient in gradients))
    return torch.tensor(pred), torch.tensor(score)


def test_it_is_short_and_uses_public_names_only() -> None:
    text = (FOLDER / "mean_gradient.py").read_text()
    assert len(text.splitlines()) <= 40
    assert text.count("openood_sandi") == 1 and "from openood_sandi import " in text


@pytest.mark.slow
def test_main(checkout: Path) -> None:
    arguments = ["--postprocessor", "mean_gradient", "--postprocessor.postprocessor_args.splits", "layer3.*,layer4.*"]
    python = installation.wheel_python()
    installation.run(python, "-c", RUN, *arguments, cwd=checkout, PYTHONPATH=str(FOLDER))

    def both_stages(images: Tensor) -> tuple[Tensor, Tensor]:
        pred, third = mean_gradient(images, "layer3")
        return pred, third + mean_gradient(images, "layer4")[1]

    check_against(both_stages, checkout, results(checkout, "mean_gradient"))


@pytest.mark.slow
def test_main_does_not_know_it_unregistered(checkout: Path) -> None:
    command = ["main.py", "--postprocessor", "mean_gradient"]
    result = installation.run(installation.wheel_python(), *command, cwd=checkout, check=False)
    assert result.returncode == 1 and "there is no such postprocessor" in result.stderr


@pytest.mark.slow
def test_evaluator_and_pickle(checkout: Path, module: Any) -> None:
    evaluation = evaluator(checkout, postprocessor_name="mean_gradient")
    evaluation.eval_ood(progress=False)
    check_scores(evaluation.scores, checkout, mean_gradient)
    copy = pickle.loads(pickle.dumps(evaluation.postprocessor))
    assert type(copy) is type(evaluation.postprocessor) and vars(copy).keys() == vars(evaluation.postprocessor).keys()
    images = tiny.read_images(checkout, "svhn")
    np.testing.assert_allclose(copy.postprocess(evaluation.net, images)[1].cpu(), -mean_gradient(images)[1], rtol=1e-5)


def test_it_is_in_the_table_of_detectors(module: Any) -> None:
    assert list(registry.infos()) == [*registry.DETECTORS, "mean_gradient"]
    assert registry.infos()["mean_gradient"] is module.INFO


def test_a_name_is_given_once(module: Any) -> None:
    register(module.INFO)  # again: nothing
    with pytest.raises(ValueError, match=r"its name 'gsc' is already that of openood_sandi\.postprocessor:GSCPost"):
        register(DetectorInfo("gsc", "GSC", "mine:GSC", "", "", ""))
    other = DetectorInfo("mean_gradient", "Another", "another:Mean", "", "", "")
    with pytest.raises(ValueError, match="its name 'mean_gradient' is already that of mean_gradient:MeanGradient"):
        register(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "mean gradient"}, "name='mean gradient': expected letters"),
        ({"detector": "MeanGradient"}, "detector='MeanGradient': expected 'package.module:Class'"),
        ({"needs": "luck"}, "needs='luck': expected one of 'nothing', 'training images'"),
        ({"needs": "training images"}, r"fitted=\(\) with needs='training images': expected the names"),
        ({"fitted": ("means",)}, r"fitted=\('means',\) with needs='nothing': expected the names"),
    ],
)
def test_mistakes_are_explained(changes: dict[str, Any], message: str) -> None:
    given = {"name": "mine", "label": "", "detector": "mine:Mine", "title": "", "venue": "", "url": ""}
    with pytest.raises(ValueError, match=message):
        DetectorInfo(**(given | changes))


def test_rows_and_infos_agree(checkout: Path) -> None:
    import openood_sandi.postprocessor as postprocessors

    for name, (_, cls) in registry.DETECTORS.items():
        info = registry.infos()[name]
        made = getattr(postprocessors, cls)
        assert (info.name, made.__name__, made.info) == (name, cls, info)
        assert pickle.loads(pickle.dumps(made)) is made
        fitted = hasattr(made(config(checkout, name)), "setup_flag")  # what eval_ood.py pickles
        assert fitted == (info.needs == "training images")
