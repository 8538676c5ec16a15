"""OpenOOD's main.py on the command line, in every form, from a wheel and from an editable install."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sklearn import metrics

from openood_sandi import SandI
from tests.helpers import installation, tiny
from tests.plugin.conftest import CONFIGS, git_status

OVERRIDES = ["--network.checkpoint", str(tiny.CHECKPOINT), "--num_gpus", "0"]
pytestmark = pytest.mark.slow  # every test runs main.py
LAST_STAGE = ["--postprocessor.postprocessor_args.splits", "last_stage"]  # less to compute than the default


@pytest.mark.parametrize("postprocessor", ["sandi", "msp"])
def test_a_checkpoint_that_does_not_fit(checkout: Path, tmp_path: Path, postprocessor: str) -> None:
    state = torch.load(checkout / tiny.CHECKPOINT, map_location="cpu", weights_only=True)
    other = {key.replace("layer4", "stage4"): tensor for key, tensor in state.items()}
    torch.save(other, tmp_path / "other.ckpt")
    arguments = ["--postprocessor", postprocessor, "--network.checkpoint", str(tmp_path / "other.ckpt")]
    result = main(*arguments, "--mark", "misfit", cwd=checkout, check=False)
    text = " ".join(result.stderr.split())
    assert "does not fit the network 'resnet18_32x32': it has no 'layer4.0.conv1.weight'" in text
    assert "but 'stage4.0.conv1.weight'" in text
    # other people's methods run, as without this package
    assert result.returncode == (1 if postprocessor == "sandi" else 0)


def main(*arguments: str, cwd: Path, check: bool = True, script: str = "main.py", **variables: str) -> Any:
    """Run ``python main.py`` with the installed wheel."""
    python = installation.wheel_python()
    return installation.run(python, script, *arguments, cwd=cwd, check=check, **variables)


def results(checkout: Path, postprocessor: str = "sandi", mark: str = "default") -> Path:
    return checkout / f"results/cifar100_resnet18_32x32_test_ood_ood_{postprocessor}_{mark}/s0/ood"


def scores(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """{set: {"pred", "conf", "label"}} as OpenOOD has saved them."""
    return {file.stem: dict(np.load(file)) for file in sorted((folder / "scores").glob("*.npz"))}


def check_against(detector: Any, checkout: Path, folder: Path) -> None:
    """The saved scores are those of ``detector`` (images -> pred, tau), and ood.csv follows from them."""
    saved = scores(folder)
    assert set(saved) == {"cifar100", *tiny.NEAR, *tiny.FAR}
    for name, arrays in saved.items():
        pred, tau = detector(tiny.read_images(checkout, name))
        np.testing.assert_array_equal(arrays["pred"], pred.numpy())
        np.testing.assert_allclose(arrays["conf"], -tau.numpy(), rtol=1e-5)
        expected = np.arange(tiny.IMAGES) if name == "cifar100" else np.full(tiny.IMAGES, -1)
        np.testing.assert_array_equal(arrays["label"], expected)
    with (folder / "ood.csv").open() as file:
        rows = {row["dataset"]: row for row in csv.DictReader(file)}
    assert list(rows) == [*tiny.NEAR, "nearood", *tiny.FAR, "farood"]
    for name in (*tiny.NEAR, *tiny.FAR):
        outlier = np.repeat([0, 1], tiny.IMAGES)
        tau = -np.concatenate([saved["cifar100"]["conf"], saved[name]["conf"]])
        assert float(rows[name]["AUROC"]) == pytest.approx(100 * metrics.roc_auc_score(outlier, tau), abs=0.006)


def test_without_config_beside_the_checkout(checkout: Path) -> None:
    main("--postprocessor", "sandi", cwd=checkout.parent, script="openood/main.py")
    check_against(SandI(tiny.network()), checkout, results(checkout))
    assert not (checkout.parent / "results").exists()
    assert git_status(checkout) == ""


def test_overrides_and_paths_from_here(checkout: Path, tmp_path: Path) -> None:
    shutil.copy(checkout / tiny.CHECKPOINT, tmp_path / "mine.ckpt")
    options = {"variant": "A", "splits": "layer3.*,layer4.*", "steps": 3, "step_size": 0.1, "epsilon": 2.0}
    overrides = [f"--postprocessor.postprocessor_args.{name}={value}" for name, value in options.items()]
    main(
        *("--postprocessor", "sandi", *overrides, "--network.checkpoint", "mine.ckpt", "--output_dir", "out"),
        cwd=tmp_path,
        script=str(checkout / "main.py"),
    )
    folder = tmp_path / "out" / results(checkout).relative_to(checkout / "results")
    check_against(SandI(tiny.network(), **options), checkout, folder)


def test_config_and_postprocessor(checkout: Path) -> None:
    # the yml of the method that --postprocessor replaces must leave no option behind
    files = [*CONFIGS, "configs/postprocessors/react.yml"]
    main(
        "--config",
        *files,
        "--postprocessor",
        "sandi",
        *OVERRIDES,
        *LAST_STAGE,
        "--mark",
        "config",
        cwd=checkout,
    )
    check_against(SandI(tiny.network(), splits="last_stage"), checkout, results(checkout, mark="config"))


@pytest.fixture(scope="module")
def last_stage(checkout: Path) -> Path:
    """Results of the wheel with a yml that the checkout lacks."""
    file = "configs/postprocessors/sandi.yml"
    assert not (checkout / file).exists()
    main("--config", *CONFIGS, file, *OVERRIDES, *LAST_STAGE, "--mark", "yml", cwd=checkout)
    return results(checkout, mark="yml")


def test_config_with_a_yml_that_the_checkout_lacks(checkout: Path, last_stage: Path) -> None:
    check_against(SandI(tiny.network(), splits="last_stage"), checkout, last_stage)
    assert git_status(checkout) == ""


def test_editable_install_and_results_that_are_there_already(checkout: Path, last_stage: Path) -> None:
    first = scores(last_stage)
    shutil.rmtree(last_stage / "scores")
    # OpenOOD's default would ask on stdin what to do about the folder
    arguments = ["--postprocessor", "sandi", *LAST_STAGE, "--mark", "yml"]
    installation.run(installation.editable_python(), "openood/main.py", *arguments, cwd=checkout.parent)
    again = scores(last_stage)
    assert list(again) == list(first)
    for name, arrays in again.items():
        np.testing.assert_array_equal(arrays["conf"], first[name]["conf"])


def test_gaia_is_one_step(checkout: Path) -> None:
    main("--postprocessor", "gaia", "--postprocessor.postprocessor_args.variant", "A", cwd=checkout)
    detector = SandI(tiny.network(), variant="A", steps=1, top_fraction=1.0)
    check_against(detector, checkout, results(checkout, "gaia"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_openoods_own_on_a_machine_without_gpu(checkout: Path) -> None:
    net = tiny.network()

    def msp(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            confidence, pred = net(images).softmax(1).max(1)
        return pred, -confidence

    main("--postprocessor", "msp", cwd=checkout)
    check_against(msp, checkout, results(checkout, "msp"))


def test_parameter_search(checkout: Path, tmp_path: Path) -> None:
    args = {"splits": "last_stage"}
    sweep = {"variant": ["Z", "A"], "steps": [1, 2]}
    settings = {"name": "sandi", "APS_mode": True, "postprocessor_args": args, "postprocessor_sweep": sweep}
    file = tmp_path / "search.yml"
    file.write_text(yaml.safe_dump({"postprocessor": settings}, sort_keys=False))
    log = main("--config", *CONFIGS, str(file), *OVERRIDES, "--mark", "search", cwd=checkout).stdout
    assert log.count("Hyperparam:[") == 4
    final = log.split("Final hyperparam: ")[1].splitlines()[0]
    variant, steps = yaml.safe_load(final)
    detector = SandI(tiny.network(), splits="last_stage", variant=variant, steps=steps)
    tried = [line.split("auroc:") for line in log.splitlines() if line.startswith("Hyperparam:")]
    best = max(float(auroc) for _, auroc in tried)
    assert f"Hyperparam:{final}, " in [setting for setting, auroc in tried if float(auroc) == best]
    saved = scores(results(checkout, mark="search"))
    np.testing.assert_allclose(
        saved["svhn"]["conf"], -detector(tiny.read_images(checkout, "svhn"))[1].numpy(), rtol=1e-5
    )


def test_missing_files_are_named_at_once(bare_checkout: Path) -> None:
    result = main("--postprocessor", "sandi", cwd=bare_checkout, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    for split, name in [("train", "cifar100"), ("test", "cifar10"), ("val", "tin"), ("test", "places365")]:
        assert str(bare_checkout / f"data/benchmark_imglist/cifar100/{split}_{name}.txt") in result.stderr
    assert str(bare_checkout / tiny.CHECKPOINT) in result.stderr
    assert (
        "python scripts/download/download.py --contents datasets checkpoints --dataset_mode dataset "
        "--datasets cifar100 tin cifar10 mnist svhn texture places365 "
        "--checkpoints cifar100_res18_v1.5 --save_dir ./data ./results"
    ) in result.stderr
    assert not (bare_checkout / "results").exists()
    assert git_status(bare_checkout) == ""


def test_missing_images_of_one_set(checkout: Path) -> None:
    lost = checkout / "data/images_classic/svhn/test/1.png"
    kept = lost.rename(lost.with_suffix(".kept"))
    try:
        result = main("--postprocessor", "sandi", cwd=checkout, check=False)
    finally:
        kept.rename(lost)
    assert result.returncode == 1
    assert str(lost) in result.stderr
    assert "--contents datasets --dataset_mode dataset --datasets svhn --save_dir" in result.stderr
    # download.py would skip the folder, as it is not empty
    assert "skips a folder that is not empty, which these are" in result.stderr
    assert f"  {checkout / 'data/images_classic/svhn'}" in result.stderr.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--postprocessor", "sandy"], "Did you mean: sandi"),
        (
            ["--postprocessor", "sandi", "--postprocessor.postprocessor_args.variant", "B"],
            "variant='B': expected one of",
        ),
    ],
)
def test_mistakes_are_explained(checkout: Path, arguments: list[str], message: str) -> None:
    result = main(*arguments, "--mark", "mistake", cwd=checkout, check=False)
    assert result.returncode == 1 and message in result.stderr
