"""Scores and decisions by bounds: how far off they can be is told, and only what is open is computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from openood_sandi import SandI
from tests.helpers.rectified_networks import Plain, exact, images, made


def test_the_log_says_how_far_off_scores_can_be(caplog: pytest.LogCaptureFixture) -> None:
    net, x = made(lambda: Plain(width=64)), images(6)
    with caplog.at_level("INFO"):
        SandI(net, variant="Z").score(x, progress=False)
        assert "middle" not in caplog.text
        detector = SandI(net, variant="Z", precision="bounded")
        detector.score(x, progress=False)
    assert f"off by {detector.max_error:.3g} at most: that is proved of 100 % of 6 images" in caplog.text


def test_the_middle_serves_as_score() -> None:
    net, x = made(Plain), images(6)
    detector = SandI(net, variant="Z", precision="bounded", steps=4)
    bounds = detector.bounds(x)
    assert torch.equal(detector(x)[1], bounds.middle)
    assert detector.max_error == float(bounds.half_width.max())
    assert detector.proved_share == float(bounds.proved.double().mean())
    tau = SandI(net, variant="Z", steps=4)(x)[1]
    assert bool(((detector(x)[1] - tau).abs() <= detector.max_error * (1 + 1e-6)).all())
    assert SandI(net, variant="Z").max_error == 0


def network_and_threshold(call: Callable[[], nn.Module] = Plain) -> tuple[nn.Module, Tensor, float]:
    net, x = made(call), images(40)
    return net, x, float(exact(net)(x)[1].sort().values[30])


def test_decisions_are_those_of_tau() -> None:
    net, x, threshold = network_and_threshold(lambda: Plain(width=3))
    expected = exact(net)(x)[1] > threshold
    detector = SandI(net, variant="Z")
    detector.threshold = threshold
    assert torch.equal(detector.is_ood(x), expected)
    found = detector.decide([x[:16], x[16:32], x[32:]])
    assert found.ood is not None and found.ood.tolist() == expected.tolist()
    assert found.pred.tolist() == net(x).argmax(1).tolist()
    tau = exact(net)(x)[1].numpy()
    assert abs(found.score - tau).max() <= float(detector.bounds(x).half_width.max()) * 1.001


def test_only_what_is_open_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those above the threshold that are not proved, all of which fit into one batch."""
    net, x, threshold = network_and_threshold(lambda: Plain(width=3))
    expected = exact(net)(x)[1] > threshold
    detector = SandI(net, variant="Z")
    detector.threshold = threshold
    bounds = detector.bounds(x)
    left = int((~bounds.decided(threshold)).sum())
    assert 0 < left < 16
    computed: list[int] = []
    plain = SandI._tau
    monkeypatch.setattr(SandI, "_tau", lambda self, x: computed.append(len(x)) or plain(self, x))
    detector.decide(x.split(16))
    assert computed == [left]
    computed.clear()
    assert torch.equal(detector.is_ood(x, hard=False), expected)
    straddling = int(((bounds.low <= threshold) & (bounds.high > threshold)).sum())
    assert computed == [straddling] * bool(straddling) and straddling < left
    computed.clear()
    detector.threshold = float(bounds.high.max())
    assert not detector.is_ood(x).any() and not computed


def test_decisions_need_a_threshold_and_images() -> None:
    detector = SandI(made(Plain), variant="Z")
    with pytest.raises(RuntimeError, match="no threshold"):
        detector.is_ood(images(2))
    detector.threshold = 1.0
    with pytest.raises(ValueError, match="no images"):
        detector.decide([])
