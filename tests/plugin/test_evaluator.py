"""OpenOOD's Evaluator and scripts/eval_ood.py with S&I, GAIA and OpenOOD's own methods, on the CPU too."""

from __future__ import annotations

import csv
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openood_sandi import SandI
from tests.helpers import installation, tiny
from tests.plugin.conftest import git_status


def evaluator(checkout: Path, **options: Any) -> Any:
    from openood.evaluation_api import Evaluator

    folders = {"data_root": str(checkout / "data"), "config_root": str(checkout / "configs")}
    return Evaluator(device(tiny.network()), id_name="cifar100", **folders, num_workers=0, **options)


def device(net: Any) -> Any:
    return net.cuda() if torch.cuda.is_available() else net


def config(checkout: Path, name: str = "sandi", **options: Any) -> Any:
    """OpenOOD's configuration of ``configs/postprocessors/<name>.yml`` with some options changed."""
    from openood.utils.config import Config

    settings = Config(str(checkout / f"configs/postprocessors/{name}.yml"))
    for option, value in options.items():
        settings.postprocessor.postprocessor_args[option] = value
    return settings


def search(checkout: Path) -> Any:
    """A configuration with APS_mode and two settings to choose from."""
    settings = config(checkout, splits="last_stage")
    settings.postprocessor.APS_mode = True
    settings.postprocessor.postprocessor_sweep = {"steps": [1, 2]}
    return settings


def check_scores(scores: Any, checkout: Path, detector: SandI) -> None:
    """The Evaluator's ``scores`` are those of ``detector`` on the same images."""
    sets = {"cifar100": scores["id"]["test"]}
    sets |= {name: scores["ood"]["near"][name] for name in tiny.NEAR}
    sets |= {name: scores["ood"]["far"][name] for name in tiny.FAR}
    for name, (pred, conf, _) in sets.items():
        expected, tau = detector(tiny.read_images(checkout, name))
        np.testing.assert_array_equal(pred, expected.numpy())
        np.testing.assert_allclose(conf, -tau.numpy(), rtol=1e-5)


@pytest.mark.slow
def test_evaluator_by_name(checkout: Path) -> None:
    evaluation = evaluator(checkout, postprocessor_name="sandi")
    table = evaluation.eval_ood(progress=False)
    check_scores(evaluation.scores, checkout, SandI(tiny.network()))
    assert list(table.index) == [*tiny.NEAR, "nearood", *tiny.FAR, "farood"]
    hits = evaluation.scores["id"]["test"][0] == np.arange(tiny.IMAGES)
    assert (table["ACC"] == 100 * hits.mean()).all()
    assert git_status(checkout) == ""


@pytest.mark.slow
def test_evaluator_with_an_instance(checkout: Path) -> None:
    from openood_sandi.postprocessor import GAIAPostprocessor

    evaluation = evaluator(checkout, postprocessor=GAIAPostprocessor(config(checkout, "gaia", splits="last_stage")))
    evaluation.eval_ood(progress=False)
    check_scores(evaluation.scores, checkout, SandI(tiny.network(), steps=1, splits="last_stage"))


def test_evaluator_with_openoods_own(checkout: Path) -> None:
    evaluation = evaluator(checkout, postprocessor_name="ebo")
    evaluation.eval_ood(progress=False)
    with torch.no_grad():
        energy = tiny.network()(tiny.read_images(checkout, "svhn")).logsumexp(1)
    np.testing.assert_allclose(evaluation.scores["ood"]["far"]["svhn"][1], energy.numpy(), rtol=1e-5)


def test_a_yml_in_the_users_config_root_goes_first(checkout: Path, tmp_path: Path) -> None:
    from openood.evaluation_api.evaluator import get_postprocessor

    (tmp_path / "postprocessors").mkdir()
    (tmp_path / "postprocessors/sandi.yml").write_text(
        "postprocessor:\n  name: sandi\n  APS_mode: True\n"
        "  postprocessor_args: {step_size: 1e-3, epsilon: 1}\n"
        "  postprocessor_sweep: {steps: [1, 3]}\n"
    )
    postprocessor = get_postprocessor(str(tmp_path), "sandi", "cifar100")
    assert postprocessor.options == {"step_size": 1e-3, "epsilon": 1.0}
    assert postprocessor.APS_mode is True and postprocessor.hyperparam_search_done is False


@pytest.mark.slow
def test_parameter_search(checkout: Path) -> None:
    from openood_sandi.postprocessor import SandIPostprocessor

    postprocessor = SandIPostprocessor(search(checkout))
    evaluator(checkout, postprocessor=postprocessor)
    assert postprocessor.hyperparam_search_done is True
    assert postprocessor.get_hyperparam() in ([1], [2])
    assert postprocessor.options["steps"] == postprocessor.get_hyperparam()[0]


@pytest.mark.slow
def test_pickled_after_use_it_holds_no_network(checkout: Path) -> None:
    from openood_sandi.postprocessor import SandIPostprocessor

    postprocessor = SandIPostprocessor(config(checkout, splits="last_stage", epsilon=2.0))
    images = tiny.read_images(checkout, "svhn")
    net = tiny.network()
    before = postprocessor.postprocess(net, images)
    postprocessor.inference(net, [{"data": images, "label": torch.zeros(len(images))}], progress=False)
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
    pickled = pickle.dumps(postprocessor, pickle.HIGHEST_PROTOCOL)
    assert len(pickled) < 10_000
    after = pickle.loads(pickled).postprocess(tiny.network(), images)
    for first, second in zip(before, after, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.slow
def test_changed_options_and_networks_take_effect(checkout: Path) -> None:
    from openood_sandi.postprocessor import SandIPostprocessor

    images = tiny.read_images(checkout, "tin")
    postprocessor = SandIPostprocessor(search(checkout))
    other = tiny.network()
    torch.nn.init.normal_(other.fc.weight)
    for net in (tiny.network(), other):
        for steps in (1, 2):
            postprocessor.set_hyperparam([steps])
            _, tau = SandI(net, steps=steps, splits="last_stage")(images)
            torch.testing.assert_close(postprocessor.postprocess(net, images)[1], -tau, rtol=0, atol=0)


def test_bounded_scores_are_middles_and_the_log_says_how_far_off(
    checkout: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from openood_sandi.postprocessor import SandIPostprocessor

    net, images = tiny.network(), tiny.read_images(checkout, "tin")
    loader = [{"data": images, "label": torch.zeros(len(images), dtype=torch.int64)}]
    options = {"variant": "Z", "splits": "last_stage"}
    with caplog.at_level("INFO"):
        _, conf, _ = SandIPostprocessor(**options, precision="bounded").inference(net, loader, progress=False)
    bounds = SandI(net, **options).bounds(images)
    np.testing.assert_array_equal(conf, -bounds.middle.numpy())
    assert f"sandi: tau is the middle of its bounds, and off by {float(bounds.half_width.max()):.3g}" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stepsize": 0.1}, "no option 'stepsize'. Did you mean: step_size"),
        ({"variant": "B"}, "variant='B': expected one of 'auto', 'Z', 'A'"),
        ({"steps": 2.5}, "steps=2.5: expected a whole number"),
        ({"splitting": "yes"}, "splitting='yes': expected True or False"),
        ({"step_size": "small"}, "step_size='small': expected a number"),
        ({"feature": 4}, "feature=4: expected a string"),
    ],
)
def test_wrong_options_are_refused(checkout: Path, options: dict[str, Any], message: str) -> None:
    from openood_sandi.postprocessor import SandIPostprocessor

    with pytest.raises(ValueError, match="sandi") as caught:
        SandIPostprocessor(config(checkout, **options))
    assert message in str(caught.value)


def test_gaia_takes_no_option_of_the_attack(checkout: Path) -> None:
    from openood_sandi.postprocessor import GAIAPostprocessor

    with pytest.raises(ValueError, match="gaia has no option 'steps'"):
        GAIAPostprocessor(config(checkout, "gaia", steps=2))


def test_search_without_anything_to_search(checkout: Path) -> None:
    from openood_sandi.postprocessor import SandIPostprocessor

    settings = search(checkout)
    del settings.postprocessor["postprocessor_sweep"]
    with pytest.raises(ValueError, match="postprocessor_sweep, which is empty"):
        SandIPostprocessor(settings)


def test_a_dictionary_of_networks_is_refused(checkout: Path) -> None:
    from openood_sandi.postprocessor import SandIPostprocessor

    with pytest.raises(TypeError, match="dictionary of netF, criterion"):
        SandIPostprocessor(config(checkout)).inference({"netF": None, "criterion": None}, [])


def test_yml_carries_every_option_typed(checkout: Path) -> None:
    from openood_sandi.detectors.options import options_of
    from openood_sandi.postprocessor import SandIPostprocessor

    settings = config(checkout)
    of_the_run = {"cache_dir": "", "unreadable": "stop"}
    assert dict(settings.postprocessor.postprocessor_args) == options_of(SandI) | of_the_run
    # what the command line gives goes through the type of what the yml has
    settings.parse_args(["--postprocessor.postprocessor_args.epsilon", "0.5"])
    settings.parse_args(["--postprocessor.postprocessor_args.splitting=False"])
    settings.parse_args(["--postprocessor.postprocessor_args.splits", "layer3.*,layer4.*"])
    options = SandIPostprocessor(settings).options
    assert (options["epsilon"], options["splitting"], options["splits"]) == (0.5, False, "layer3.*,layer4.*")


@pytest.mark.slow
def test_eval_ood_script(checkout: Path) -> None:
    root = checkout / tiny.CHECKPOINT.parents[1]
    arguments = [
        "--root",
        str(root),
        "--id-data",
        "cifar100",
        "--postprocessor",
        "sandi",
        "--save-csv",
        "--save-score",
    ]
    installation.run(installation.wheel_python(), "scripts/eval_ood.py", *arguments, cwd=checkout)
    with (root / "s0/scores/sandi.pkl").open("rb") as file:
        check_scores(pickle.load(file), checkout, SandI(tiny.network()))
    with (root / "ood/sandi.csv").open() as file:
        rows = [row[0] for row in csv.reader(file)]
    assert rows[1:] == [*tiny.NEAR, "nearood", *tiny.FAR, "farood"]
    assert git_status(checkout) == ""
