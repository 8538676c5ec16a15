"""Gradient Short-Circuit and Prototype Fusion in OpenOOD: Evaluator, main.py, pickles, options."""

from __future__ import annotations

import copyreg
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from openood_sandi import SandI, SandIC
from openood_sandi.detectors.gsc import GradientShortCircuit
from openood_sandi.detectors.prototype_fusion import PrototypeFusion
from tests.helpers import tiny, tiny_suite
from tests.plugin.test_evaluator import check_scores, config, evaluator
from tests.plugin.test_main import check_against, main, results


def fusion(checkout: Path, **options: Any) -> PrototypeFusion:
    """Fitted on the protocol's training images as a test preprocesses them, which the Evaluator does."""
    images = tiny.read_images(checkout, "cifar100", "train")
    val = tiny.read_images(checkout, "cifar100", "val")
    return PrototypeFusion(tiny.network(), **options).fit([(images, torch.arange(len(images)))], val)


def test_evaluator_by_name(checkout: Path) -> None:
    for name, detector in (("gsc", GradientShortCircuit(tiny.network())), ("prototype_fusion", fusion(checkout))):
        evaluation = evaluator(checkout, postprocessor_name=name)
        evaluation.eval_ood(progress=False)
        check_scores(evaluation.scores, checkout, detector)


@pytest.mark.slow
def test_main_with_a_set_up(checkout: Path) -> None:
    # main.py crops and mirrors training images at random, but the fit is to images as a test has them
    main("--postprocessor", "prototype_fusion", cwd=checkout)
    check_against(fusion(checkout), checkout, results(checkout, "prototype_fusion"))


class Images(Dataset[dict[str, torch.Tensor]]):
    """As OpenOOD's data sets: what ``transform_image`` makes of every image."""

    def __init__(self, images: torch.Tensor, preprocessor: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.images, self.preprocessor, self.transform_image = images, preprocessor, preprocessor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"data": self.transform_image(self.images[index]), "label": index % tiny_suite.CLASSES}


def test_a_fit_from_python_is_to_images_as_a_test_has_them(checkout: Path, caplog: pytest.LogCaptureFixture) -> None:
    from openood_sandi.postprocessor import PrototypeFusionPostprocessor

    images, net = tiny_suite.images(40, 1, 5), tiny_suite.network()
    train = Images(images, lambda image: image.flip(2) + torch.randn(()))
    loaders = {
        "train": DataLoader(train, batch_size=16, shuffle=True, drop_last=True),
        "val": DataLoader(Images(images, lambda image: image)),
    }
    made = PrototypeFusionPostprocessor(layers="last_2")
    made.setup(net.train(), loaders, {})  # as main.py does
    assert all(module.training for module in net.modules())
    net.eval()
    labels = torch.arange(40) % tiny_suite.CLASSES
    expected = PrototypeFusion(net, layers="last_2").fit([(images, labels)], images).prototypes
    for name, prototypes in expected.items():
        torch.testing.assert_close(made.prototypes[name], prototypes)
    assert made.setup_flag and train.transform_image is train.preprocessor

    again = PrototypeFusionPostprocessor()
    again.setup(net, {"train": loaders["train"]}, {})
    assert "augmented" in caplog.text


def test_options_from_python_without_a_configuration(checkout: Path) -> None:
    from openood_sandi.postprocessor import SandIPostprocessor

    net, x = tiny_suite.network(), tiny_suite.images(4, 0, 5)
    made = pickle.loads(pickle.dumps(SandIPostprocessor(variant="A", steps=np.int64(1), unreadable="skip")))
    assert made.run["unreadable"] == "skip" and not made.APS_mode
    expected = SandI(net, variant="A", steps=1)(x)
    torch.testing.assert_close(made.postprocess(net, x), (expected[0], -expected[1]))
    with pytest.raises(ValueError, match="sandi has no option 'varaint'"):
        SandIPostprocessor(varaint="A")
    with pytest.raises(ValueError, match="variant='B'"):
        SandIPostprocessor(variant="B")
    for arguments in (("A",), (made.config,)):
        with pytest.raises(TypeError, match="expected a configuration of OpenOOD's, or options by name"):
            SandIPostprocessor(*arguments, variant="A")


def test_another_number_of_stages_and_a_pickle_need_no_other_set_up(checkout: Path) -> None:
    from openood_sandi.postprocessor import PrototypeFusionPostprocessor

    postprocessor = PrototypeFusionPostprocessor(config(checkout, "prototype_fusion"))
    net = evaluator(checkout, postprocessor=postprocessor).net
    images = tiny.read_images(checkout, "svhn")
    for layers in ("last_1", "last_3"):
        postprocessor.set_hyperparam([layers])  # as OpenOOD's search does
        copy = pickle.loads(pickle.dumps(postprocessor))
        copy.setup(net, {}, {})  # as eval_ood.py does with one that it has loaded
        assert copy.setup_flag and copy.get_hyperparam() == [layers]
        expected = -fusion(checkout, layers=layers)(images)[1]
        np.testing.assert_allclose(copy.postprocess(net, images)[1].cpu(), expected, rtol=1e-5)
    assert not any(isinstance(value, torch.nn.Module) for value in vars(postprocessor).values())


def test_the_calibrated_score_is_searched_on_one_set_up(checkout: Path) -> None:
    from openood_sandi.postprocessor import SandICPostprocessor

    postprocessor = SandICPostprocessor(config(checkout, "sandi_c"))
    net = evaluator(checkout, postprocessor=postprocessor).net
    images, training = tiny.read_images(checkout, "svhn"), tiny.read_images(checkout, "cifar100", "train")
    val = tiny.read_images(checkout, "cifar100", "val")
    for base, gate in (("max_logit+fdbd", 1.5), ("energy", 1.0)):
        postprocessor.set_hyperparam([base, gate])  # as OpenOOD's search does
        copy = pickle.loads(pickle.dumps(postprocessor))
        copy.setup(net, {}, {})
        detector = SandIC(tiny.network(), base=base, gate=gate).fit([(training, torch.arange(len(training)))], val)
        expected = -detector(images)[1]
        np.testing.assert_allclose(copy.postprocess(net, images)[1].cpu(), expected, rtol=1e-4, atol=1e-4)


class AsBefore:
    """Pickled as postprocessors were before 0.2: by the name of their class, with its attributes."""

    def __init__(self, kind: type, **state: Any) -> None:
        self.kind, self.state = kind, state

    def __reduce__(self) -> Any:
        return copyreg._reconstructor, (self.kind, object, None), self.state  # type: ignore[attr-defined]


def test_pickles_from_before(checkout: Path) -> None:
    from openood_sandi.postprocessor import GAIAPostprocessor, PrototypeFusionPostprocessor

    net, images = tiny.network(), tiny.read_images(checkout, "svhn")
    options = {"steps": 1, "top_fraction": 1.0, "variant": "A"}
    gaia = config(checkout, "gaia")
    before = AsBefore(GAIAPostprocessor, config=gaia, options=options)
    expected = -SandI(net, **options)(images)[1]
    torch.testing.assert_close(pickle.loads(pickle.dumps(before)).postprocess(net, images)[1], expected, rtol=0, atol=0)
    prototypes, settings = fusion(checkout).prototypes, config(checkout, "prototype_fusion")
    before = AsBefore(PrototypeFusionPostprocessor, config=settings, options={}, setup_flag=True, prototypes=prototypes)
    found = pickle.loads(pickle.dumps(before))
    found.setup(net, {}, {})
    torch.testing.assert_close(found.postprocess(net, images)[1], -fusion(checkout)(images)[1])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gsc", {"mask_ratio": 2}, "gsc: mask_ratio=2.0: expected a share"),
        ("gsc", {"ratio": 0.1}, "gsc has no option 'ratio'. Did you mean: mask_ratio"),
        ("prototype_fusion", {"layers": 3}, "prototype_fusion: layers=3: expected a string"),
    ],
)
def test_wrong_options_are_refused(checkout: Path, name: str, options: dict[str, Any], message: str) -> None:
    from openood_sandi.plugin.registry import postprocessor_class

    with pytest.raises(ValueError) as caught:
        postprocessor_class(name)(config(checkout, name, **options))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["sandi", "sandi_c", "gaia", "gsc", "prototype_fusion"])
def test_ymls_carry_every_option_and_a_sweep(checkout: Path, name: str) -> None:
    from openood_sandi.plugin.registry import postprocessor_class

    settings, kind = config(checkout, name).postprocessor, postprocessor_class(name)
    given = dict(settings.postprocessor_args)
    of_the_run = {"cache_dir": "", "unreadable": "stop"}
    assert given == kind.settable() | of_the_run
    assert {option: type(value) for option, value in given.items()} == {
        option: type(value) for option, value in (kind.settable() | of_the_run).items()
    }
    postprocessor = kind(config(checkout, name))
    assert postprocessor.args_dict == dict(settings.postprocessor_sweep)
    for values in zip(*(values[-1:] for values in postprocessor.args_dict.values()), strict=True):
        postprocessor.set_hyperparam(values)
        assert postprocessor.get_hyperparam() == list(values)
