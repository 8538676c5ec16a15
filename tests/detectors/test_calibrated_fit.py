"""What S&I-C is fitted to: in any order, with labels or without, few images or spoilt ones."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openood_sandi.detectors.sandi.calibrated import SandIC
from tests.detectors.test_calibrated import LABELS, SEEN, TRAINING, VAL, assert_agrees, fitted
from tests.helpers.calibrated_reference import CLASSES, Reference, Staged, images, made


def test_the_order_of_images_does_not_matter() -> None:
    net = made(lambda: Staged(F.relu))
    many, labels = images(90, 4), torch.arange(90) % CLASSES
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    one = SandIC(net).fit([(many, labels)])
    other = SandIC(net).fit(list(zip(many[order].split(7), labels[order].split(7), strict=True)))
    torch.testing.assert_close(one(SEEN)[1], other(SEEN)[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "labels", [torch.full((24,), -1), torch.arange(24) % 12 - 8, torch.zeros(24, dtype=torch.int64)]
)
def test_without_enough_labels_there_is_one_prototype_a_layer(labels: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    net = made(lambda: Staged(F.relu))
    detector = fitted(net, labels)
    assert "one prototype a layer" in caplog.text
    assert {tuple(p.shape) for p in detector.prototypes.values()} == {(1, 6), (1, 8), (1, 10)}
    reference = Reference(net, (0, 1, 2), by_class=False).fit(TRAINING, labels.tolist(), VAL)
    assert_agrees(detector, reference, use_z=True)  # use_z="auto" counts it here
    assert_agrees(fitted(net, labels, use_z="never"), reference)


def test_a_class_without_images_has_no_prototype(caplog: pytest.LogCaptureFixture) -> None:
    net, labels = made(lambda: Staged(F.relu)), LABELS.where(LABELS != 2, 0)
    assert_agrees(fitted(net, labels), Reference(net, (0, 1, 2)).fit(TRAINING, labels.tolist(), VAL))
    assert "no prototype of 1 classes without images: 2" in caplog.text


def test_images_alone_will_do() -> None:
    net = made(lambda: Staged(F.relu))
    reference = Reference(net, (0, 1, 2), by_class=False).fit(TRAINING, [0] * 24, VAL)
    assert_agrees(SandIC(net).fit(TRAINING, val=VAL), reference, use_z=True)


def test_an_image_that_is_not_finite_is_left_out_of_the_fit_and_scores_nan(caplog: pytest.LogCaptureFixture) -> None:
    net, spoilt = made(lambda: Staged(F.relu)), TRAINING.clone()
    spoilt[3, 0, 2, 2] = math.nan
    detector = SandIC(net).fit([(spoilt, LABELS)], val=VAL)
    assert "1 images were left out" in caplog.text
    kept = [i for i in range(24) if i != 3]
    assert_agrees(detector, Reference(net, (0, 1, 2)).fit(TRAINING[kept], LABELS[kept].tolist(), VAL))
    score = detector(torch.cat([spoilt[3:4], SEEN]))[1]
    assert score[0].isnan() and torch.equal(score[1:], detector(SEEN)[1])


def test_few_images_are_warned_of_and_none_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    net = made(lambda: Staged(F.relu))
    fitted(net)
    assert "means and deviations are of 12 ID images, fewer than 50" in caplog.text
    with pytest.raises(ValueError, match=r"1 ID image\(s\) for means and deviations.*expected 50"):
        SandIC(net).fit(TRAINING, val=VAL[:1])
    with pytest.raises(ValueError, match="no "):
        SandIC(net).fit([], val=VAL)
    with pytest.raises(RuntimeError, match="call fit first"):
        SandIC(net)(SEEN)


def test_a_label_of_no_class_is_refused() -> None:
    with pytest.raises(ValueError, match="a label is 9 and the network has 4 classes: expected 0 to 3, or -1"):
        fitted(made(lambda: Staged(F.relu)), LABELS + 6)


def test_a_constant_quantity_tells_nothing() -> None:
    net = made(lambda: Staged(F.relu))
    detector = SandIC(net).fit([(TRAINING, LABELS)], val=VAL[:1].repeat(60, 1, 1, 1))
    assert detector.statistics["max_logit"][1] == 1 and detector(SEEN)[1].isfinite().all()
    two = SandIC(net).fit([(TRAINING, LABELS)], val=VAL[:2])  # where m^ + f^ is 0 or +-2, but for rounding
    assert two.statistics["max_logit+fdbd"][1] >= 1


def test_a_second_fit_forgets_the_first() -> None:
    net = made(lambda: Staged(F.relu))
    detector = SandIC(net).fit(TRAINING + 3, val=VAL - 2)
    expected = fitted(net)(SEEN)[1]
    again = detector.fit(list(zip(TRAINING.split(7), LABELS.split(7), strict=True)), val=VAL)
    torch.testing.assert_close(again(SEEN)[1], expected)
