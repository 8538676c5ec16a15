"""Fit, threshold, decision and whole data sets, of every detector, against numbers worked out here."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from openood_sandi import Detector, GradientShortCircuit, PrototypeFusion, SandI, SandIC, folder
from openood_sandi.detectors.gaia import GAIA
from openood_sandi.detectors.held_out import kept_out
from openood_sandi.detectors.options import options_of
from tests.helpers import tiny_suite

DETECTORS = [SandI, SandIC, GAIA, GradientShortCircuit, PrototypeFusion]
LABELS = torch.arange(120) % tiny_suite.CLASSES


@pytest.fixture
def net() -> nn.Module:
    return tiny_suite.network()


@pytest.fixture
def images() -> Tensor:
    return tiny_suite.images(120, 1, 5)


def batches(images: Tensor, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(size), LABELS[: len(images)].split(size), strict=True))


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("tpr", [0.5, 0.95, 1.0])
def test_the_threshold_keeps_that_share(kind: type[Detector], tpr: float, net: nn.Module, images: Tensor) -> None:
    val = tiny_suite.images(70, 2, 5)
    detector = kind(net).fit(batches(images), val=DataLoader(TensorDataset(val, LABELS[:70]), 16), tpr=tpr)
    scores = sorted(detector(val)[1].tolist())
    assert detector.threshold == pytest.approx(scores[math.ceil(tpr * 70) - 1], rel=1e-5)
    kept = int((~detector.is_ood(val)).sum())
    assert abs(kept - math.ceil(tpr * 70)) <= 1  # other batches, other bits
    assert detector.is_ood(val).dtype == torch.bool and detector.is_ood(val).shape == (70,)


def test_without_val_a_tenth_is_kept_out_of_what_is_learnt(
    net: nn.Module, images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    out = kept_out(images)
    assert 3 <= int(out.sum()) <= 25
    found = PrototypeFusion(net).fit(batches(images))
    learnt = PrototypeFusion(net).fit([(images[~out], LABELS[~out])], val=images[out])
    for name, prototypes in learnt.prototypes.items():
        torch.testing.assert_close(found.prototypes[name], prototypes)
    assert found.threshold == pytest.approx(learnt.threshold, rel=1e-5)
    assert "too strict: more than 5 % of new ID images" in caplog.text


def test_the_tenth_depends_on_the_images_alone(net: nn.Module, images: Tensor) -> None:
    order = torch.randperm(120, generator=torch.Generator().manual_seed(3))
    assert torch.equal(kept_out(images[order]), kept_out(images)[order])
    assert torch.equal(kept_out(images.to(memory_format=torch.channels_last)), kept_out(images))
    shuffled = [(images[chosen], LABELS[chosen]) for chosen in order.split(7)]
    found, expected = PrototypeFusion(net).fit(shuffled), PrototypeFusion(net).fit(batches(images))
    assert found.threshold == pytest.approx(expected.threshold, rel=1e-5)
    share = kept_out(torch.rand(5000, 1, 2, 2)).double().mean()
    assert 0.08 < share < 0.12


def test_nothing_is_kept_out_where_nothing_is_learnt(net: nn.Module, images: Tensor) -> None:
    found = GradientShortCircuit(net).fit(images)
    assert found.threshold == pytest.approx(GradientShortCircuit(net).fit([], val=images).threshold, rel=1e-6)


def test_training_images_are_not_read_for_a_threshold_alone(net: nn.Module, images: Tensor) -> None:
    def never() -> Any:
        raise AssertionError("read")
        yield

    GradientShortCircuit(net).fit(never(), val=images)
    with pytest.raises(AssertionError, match="read"):
        PrototypeFusion(net).fit(never(), val=images)


@pytest.mark.parametrize("kind", DETECTORS)
def test_an_image_without_score_is_ood_and_teaches_nothing(
    kind: type[Detector], net: nn.Module, images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    val = tiny_suite.images(60, 2, 5)
    clean = kind(net).fit(batches(images[1:]), val=val[1:])
    spoilt, images[0], val[0] = kind(net), math.nan, math.nan
    labels = LABELS[: len(images) - 1]
    spoilt.fit([(images[:1], labels[:1]), (images[1:], labels)], val=val)
    assert spoilt.threshold == pytest.approx(clean.threshold, rel=1e-5)
    assert "images were left out of the fit: they, or the network's outputs, are not finite" in caplog.text
    assert spoilt.is_ood(val[:2]).tolist()[0] is True


@pytest.mark.parametrize("kind", DETECTORS)
def test_score_is_the_call_over_any_source(kind: type[Detector], net: nn.Module, images: Tensor) -> None:
    detector = kind(net).fit(batches(images), val=tiny_suite.images(60, 2, 5))
    x = images[:10]
    pred, score = detector(x)
    dataset = TensorDataset(x, LABELS[:10])
    dicts = [{"data": x[:5], "label": LABELS[:5]}, {"data": x[5:], "label": LABELS[5:10]}]
    for source in (x, x.numpy(), DataLoader(dataset, 5), DataLoader(TensorDataset(x), 5), dicts, [x[:5], x[5:]]):
        found = detector.score(source, progress=False)
        np.testing.assert_array_equal(found.pred, pred.numpy())
        np.testing.assert_allclose(found.score, score.numpy(), rtol=1e-5)
        np.testing.assert_array_equal(found.ood, found.score > detector.threshold)
    detector.threshold = None
    assert detector.score(x, progress=False).ood is None


def test_what_cannot_be_done_is_said(net: nn.Module, images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    detector = SandI(net)
    with pytest.raises(RuntimeError, match="no threshold to decide by: call fit with ID images first"):
        detector.is_ood(images[:2])
    for tpr in (0, 1.5, True, "0.9"):
        with pytest.raises(ValueError, match=r"tpr=.*: expected a share, above 0 and at most 1"):
            detector.fit(images, tpr=tpr)
    with pytest.raises(ValueError, match="no images to fit to"):
        detector.fit([])
    with pytest.raises(ValueError, match="no images are left for the threshold"):
        PrototypeFusion(net).fit([(images[~kept_out(images)][:5], LABELS[:5])])
    with pytest.raises(TypeError, match=r"pass openood_sandi.folder\('photos', transform\)"):
        detector.fit("photos")
    with pytest.raises(TypeError, match="images are given as int"):
        detector.score(3)
    with pytest.raises(ValueError, match=r"torch.uint8 and shape .*; expected floating-point"):
        detector.score((images * 10).byte())
    caplog.clear()
    detector.fit(images[:49], val=images[:49])
    assert "49 ID images only, fewer than 50" in caplog.text and "too strict" not in caplog.text
    with caplog.at_level(logging.WARNING):
        caplog.clear()
        detector.fit([], val=images[:50])
    assert caplog.text == ""


def test_a_threshold_by_hand(net: nn.Module, images: Tensor) -> None:
    detector = GradientShortCircuit(net)
    scores = detector(images[:3])[1]
    detector.threshold = float(scores.median())
    assert detector.is_ood(images[:3]).tolist() == (scores > scores.median()).tolist()


@pytest.mark.parametrize("kind", DETECTORS)
def test_repr_tells_everything(kind: type[Detector], net: nn.Module, images: Tensor) -> None:
    detector = kind(net)
    assert repr(detector).startswith(f"{kind.__name__}(TinyResNet, ") and "threshold=None" in repr(detector)
    detector.fit(batches(images))
    told = repr(detector)
    assert f"threshold={detector.threshold!r}" in told
    assert all(f"{name}=" in told for name in options_of(kind))
    assert kind is not PrototypeFusion or "prototypes={stage1: (7, 8)" in told


def test_options_may_be_numbers_of_numpys(net: nn.Module, images: Tensor) -> None:
    x = images[:3]
    plain = SandI(net, variant="A", steps=3, step_size=0.5, splitting=True)
    found = SandI(net, variant="A", steps=np.int64(3), step_size=np.float32(0.5), splitting=np.bool_(True))
    assert torch.equal(found(x)[1], plain(x)[1]) and repr(found) == repr(plain)
    assert type(found.options["steps"]) is int and type(GAIA(net, variant=np.str_("A")).options["variant"]) is str
    assert GradientShortCircuit(net, mask_ratio=torch.tensor(0.5)).options["mask_ratio"] == 0.5
    with pytest.raises(ValueError, match=r"steps=2.0: expected a whole number"):
        SandI(net, steps=np.float64(2))


# ---------------------------------------------------------------------- folders


def transform(image: Any) -> Tensor:
    return torch.tensor(np.asarray(image) / 255, dtype=torch.float32).permute(2, 0, 1)


def write(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (16, 16), value).save(path)


@pytest.mark.parametrize(
    ("names", "labels", "classes"),
    [
        (["b/2.png", "a/10.png", "a/9.JPG"], [0, 0, 1], ["a", "b"]),
        (["b/2.png", "1.png"], [-1, -1], []),
        (["z.png", "a.bmp"], [-1, -1], []),
    ],
)
def test_a_folder(tmp_path: Path, names: list[str], labels: list[int], classes: list[str]) -> None:
    for number, name in enumerate(names):
        write(tmp_path / name, 50 * number)
    (tmp_path / "notes.txt").write_text("no image")
    loader = folder(tmp_path, transform, batch_size=2)
    assert [file.relative_to(tmp_path).as_posix() for file in loader.dataset.files] == sorted(names)
    assert loader.dataset.classes == classes
    found, given = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert given.tolist() == labels
    values = [50 * names.index(name) / 255 for name in sorted(names)]
    assert found.shape == (len(names), 3, 16, 16)
    np.testing.assert_allclose(found.mean((1, 2, 3)).numpy(), values, atol=0.01)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder; expected one with images"):
        folder(tmp_path / "absent", transform)
    with pytest.raises(FileNotFoundError, match=r"no images in .*; expected files that end in .*\.bmp"):
        folder(tmp_path, transform)


def test_a_folder_is_scored_and_what_cannot_be_read_is_named(net: nn.Module, tmp_path: Path, caplog: Any) -> None:
    from openood_sandi.runs.unreadable import UnreadableImage

    for number in range(4):
        write(tmp_path / f"{number}.png", 50 * number)
    detector = GradientShortCircuit(net)
    whole = detector.score(folder(tmp_path, transform), progress=False)
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:40])
    with pytest.raises(UnreadableImage, match=r"2\.png"):
        detector.score(folder(tmp_path, transform), progress=False)
    skipped = detector.score(folder(tmp_path, transform), unreadable="skip", progress=False)
    np.testing.assert_allclose(skipped.score, np.delete(whole.score, 2), rtol=1e-5)
    assert "2.png" in caplog.text
