"""S&I among pytorch-ood's detectors, with that library's own metrics, benchmark and search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from openood_sandi import SandI, SandIC
from tests.helpers import tiny_suite
from tests.helpers.places import ROOT

pytest.importorskip("pytorch_ood", reason='pytorch-ood is missing; supply it by pip install -e ".[bench]"')

from pytorch_ood.api import Detector, RequiresFittingException, Task
from pytorch_ood.benchmark import Benchmark
from pytorch_ood.metrics import OODMetrics
from pytorch_ood.utils import GridSearch

from openood_sandi.pytorch_ood import SandICDetector, SandIDetector


def dataset(seed: int, coarseness: int, label: int) -> TensorDataset:
    return TensorDataset(tiny_suite.images(10, seed, coarseness), torch.full((10,), label))


@pytest.fixture
def net() -> nn.Module:
    return tiny_suite.network()


@pytest.fixture
def known_and_unknown() -> ConcatDataset[tuple[Tensor, Tensor]]:
    return ConcatDataset([dataset(0, 4, 1), dataset(1, 9, -1)])


GAIA = {"steps": 1, "top_fraction": 1.0}


@pytest.mark.parametrize("options", [{}, {"variant": "A"}, GAIA, {**GAIA, "variant": "A"}])
def test_scores_are_those_of_the_detector(net: nn.Module, options: dict[str, object]) -> None:
    images = tiny_suite.images(6, 0, 5)
    detector = SandIDetector(net, **options)
    assert torch.equal(detector(images), SandI(net, **options)(images)[1])
    assert torch.equal(detector.to("cpu").fit(None)(images), detector.predict(images))


def test_metrics_of_the_library(net: nn.Module, known_and_unknown: ConcatDataset[tuple[Tensor, Tensor]]) -> None:
    detector, metrics, scores = SandIDetector(net), OODMetrics(), []
    for images, labels in DataLoader(known_and_unknown, batch_size=5):
        scores.append(detector(images))
        metrics.update(scores[-1], labels)
    expected = roc_auc_score(np.repeat([0, 1], 10), torch.cat(scores))
    assert metrics.compute()["AUROC"] == pytest.approx(expected, abs=1e-6)


class Tiny(Benchmark):
    """A benchmark of one OOD set."""

    ood_names = ["unknown"]  # noqa: RUF012

    def train_set(self) -> TensorDataset:
        return dataset(2, 4, 1)

    def test_sets(self, known: bool = True, unknown: bool = True) -> list[ConcatDataset[tuple[Tensor, Tensor]]]:
        return [ConcatDataset([dataset(0, 4, 1), dataset(1, 9, -1)])]


def test_benchmark_of_the_library(net: nn.Module) -> None:
    (row,) = Tiny().evaluate(SandIDetector(net), loader_kwargs={"batch_size": 5}, device="cpu")
    images = [tiny_suite.images(10, 0, 4), tiny_suite.images(10, 1, 9)]
    scores = torch.cat([SandI(net)(part)[1] for whole in images for part in whole.split(5)])
    assert row["AUROC"] == pytest.approx(roc_auc_score(np.repeat([0, 1], 10), scores), abs=1e-6)


def test_search_of_the_library(net: nn.Module, known_and_unknown: ConcatDataset[tuple[Tensor, Tensor]]) -> None:
    detector = SandIDetector(net)
    search = GridSearch(detector, None, DataLoader(known_and_unknown, batch_size=10))
    best = search.run()
    assert len(search.results_) == 8 and detector.get_hyperparameters() == best
    images = tiny_suite.images(6, 0, 5)
    assert torch.equal(detector(images), SandI(net, **best)(images)[1])


def test_description_and_refusals(net: nn.Module) -> None:
    assert isinstance(SandIDetector(net), Detector) and not SandIDetector.requires_fit
    assert SandIDetector.info.tasks == {Task.CLASSIFICATION} and SandIDetector.info.paper.year == 2025
    with pytest.raises(ValueError, match="variant='B'"):
        SandIDetector(net, variant="B")
    with pytest.raises(TypeError, match="stepsize"):
        SandIDetector(net, stepsize=1.0)
    with pytest.raises(ValueError, match="needs a model"):
        SandIDetector(None)


def test_the_package_imports_without_pytorch_ood() -> None:
    sources = ROOT / "openood_sandi"
    users = [path.name for path in sources.glob("*.py") if "from pytorch_ood" in path.read_text()]
    assert users == ["pytorch_ood.py"]
    importers = [path.name for path in sources.glob("*.py") if "openood_sandi.pytorch_ood" in path.read_text()]
    assert importers == ["pytorch_ood.py"]


def test_the_calibrated_detector_is_fitted_and_scores_as_ours(net: nn.Module) -> None:
    labels = torch.arange(30) % tiny_suite.CLASSES
    training = DataLoader(TensorDataset(tiny_suite.images(30, 5, 5), labels), batch_size=8)
    val = DataLoader(TensorDataset(tiny_suite.images(20, 6, 5), torch.full((20,), -1)), batch_size=8)
    images = tiny_suite.images(6, 0, 5)
    detector = SandICDetector(net, gate=1.0)
    with pytest.raises(RequiresFittingException, match="call fit first"):
        detector(images)
    expected = SandIC(net, gate=1.0).fit(training, val)(images)[1]
    assert torch.equal(detector.fit(training, val)(images), expected)
    assert torch.equal(detector.to("cpu")(images), expected)
    changed = detector.set_hyperparameters(base="energy")
    assert changed.get_hyperparameters() == {"base": "energy", "gate": 1.0}
    with pytest.raises(RequiresFittingException):
        changed(images)


def test_the_librarys_search_fits_the_calibrated_detector(
    net: nn.Module, known_and_unknown: ConcatDataset[tuple[Tensor, Tensor]]
) -> None:
    labels = torch.arange(60) % tiny_suite.CLASSES
    training = DataLoader(TensorDataset(tiny_suite.images(60, 5, 5), labels), batch_size=20)
    search = GridSearch(SandICDetector(net), training, DataLoader(known_and_unknown, batch_size=5), device="cpu")
    search.run()
    assert search.detector.predict(tiny_suite.images(2, 0, 5)).isfinite().all()
