"""S&I-C against loops over images, positions, channels and classes; what it needs, refuses and leaves alone."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openood_sandi.detectors.sandi.activation_shares import activation_pass
from openood_sandi.detectors.sandi.activation_stages import Stages, find_activations
from openood_sandi.detectors.sandi.calibrated import SandIC
from openood_sandi.detectors.sandi.calibrated_summary import Summaries
from openood_sandi.detectors.sandi.decision_boundaries import DecisionBoundaries
from tests.helpers.calibrated_reference import CLASSES, Hooked, Reference, Staged, Tokens, images, made, read
from tests.helpers.surroundings import surroundings

TRAINING, VAL, SEEN = images(24, 1), images(12, 2), images(6, 3)
LABELS = torch.arange(24) % CLASSES


def fitted(net: nn.Module, labels: Tensor = LABELS, **options: Any) -> SandIC:
    batches = list(zip(TRAINING.split(7), labels.split(7), strict=True))
    return SandIC(net, **options).fit(batches, val=[(VAL, torch.full((len(VAL),), -1))])


def assert_agrees(detector: SandIC, reference: Reference, **how: Any) -> None:
    pred, score = detector(SEEN)
    assert pred.tolist() == [r.logits.index(max(r.logits)) for r in map(reference.read, SEEN)]
    torch.testing.assert_close(score.tolist(), [reference.score(image, **how) for image in SEEN], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------- the definition

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "relu": (F.relu, math.inf),
    "relu module": (nn.ReLU(), math.inf),
    "relu in place": (nn.ReLU(inplace=True), math.inf),
    "relu_ of the tensor": (lambda x: x.relu_(), math.inf),
    "relu6": (nn.ReLU6(), 6),
    "relu6 in place": (lambda x: F.relu6(x, inplace=True), 6),
    "hardtanh": (nn.Hardtanh(0, 0.5), 0.5),
    "clamp": (lambda x: x.clamp(0, 0.5), 0.5),
    "clamp from below": (lambda x: torch.clamp(x, min=0), math.inf),
    "hard-swish": (nn.Hardswish(), math.inf),
    "silu": (F.silu, math.inf),
    "silu in place": (nn.SiLU(inplace=True), math.inf),
    "gelu": (nn.GELU(), math.inf),
    "leaky": (nn.LeakyReLU(0.1), math.inf),
    "prelu": (nn.PReLU().double(), math.inf),
    "mish": (F.mish, math.inf),
    "elu": (F.elu, math.inf),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_scores_are_those_of_the_definition(name: str) -> None:
    act, clip = ACTIVATIONS[name]
    net = made(lambda: Staged(act))
    reference = Reference(net, (0, 1, 2), clip=clip).fit(TRAINING, LABELS.tolist(), VAL)
    assert_agrees(fitted(net), reference)
    assert_agrees(fitted(net, use_z="always", gate=0.5), reference, use_z=True, gate=0.5)


@pytest.mark.parametrize("low", [-1.0, torch.zeros(1, dtype=torch.double), torch.zeros(16, dtype=torch.double)])
def test_clipping_from_elsewhere_than_zero_is_no_activation(low: Any) -> None:
    class Clipping(Staged):
        def forward(self, x: Tensor, tell: Any = None) -> Tensor:
            return super().forward(x.clamp(low), tell) if tell else super().forward(torch.clamp(x, min=low))

    net = made(lambda: Clipping(F.relu))
    assert_agrees(
        fitted(net, use_z="always"), Reference(net, (0, 1, 2)).fit(TRAINING, LABELS.tolist(), VAL), use_z=True
    )


def test_a_clip_that_no_value_reaches_could_not_fail() -> None:
    net = made(lambda: Staged(nn.Hardtanh(0, 0.5)))
    assert any(read(net, x, 0.5, 1).shares != read(net, x, math.inf, 1).shares for x in SEEN)


@pytest.mark.parametrize(("key", "name"), [("m", "max_logit"), ("d", "d"), ("z", "z"), ("f", "fdbd")])
def test_each_quantity_is_that_of_the_definition(key: str, name: str) -> None:
    net = made(lambda: Staged(F.relu))
    reference = Reference(net, (0, 1, 2)).fit(TRAINING, LABELS.tolist(), VAL)
    detector = fitted(net, use_z="always")
    expected = [reference.values(reference.read(image))[key] for image in SEEN]
    torch.testing.assert_close(detector._values(detector._summary(SEEN))[name].tolist(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        detector.statistics[name].tolist(), list(reference.statistics[key]), rtol=1e-5, atol=1e-6
    )


def test_gates_of_one_position_do_not_count() -> None:
    net = made(lambda: Staged(F.relu, gate=True))
    assert_agrees(
        fitted(net, use_z="always"), Reference(net, (0, 1, 2)).fit(TRAINING, LABELS.tolist(), VAL), use_z=True
    )


def test_an_activation_that_is_called_twice_counts_twice() -> None:
    net = made(lambda: Staged(nn.ReLU(), twice=True))
    assert_agrees(
        fitted(net, use_z="always"), Reference(net, (1, 3, 5)).fit(TRAINING, LABELS.tolist(), VAL), use_z=True
    )


@pytest.mark.parametrize(("depth", "ends"), [(1, (0,)), (2, (0, 1)), (4, (1, 2, 3)), (6, (1, 3, 5))])
def test_a_network_of_one_resolution_has_three_parts(depth: int, ends: tuple[int, ...]) -> None:
    net = made(lambda: Tokens(depth))
    assert_agrees(fitted(net), Reference(net, ends, channels=2).fit(TRAINING, LABELS.tolist(), VAL))


def test_channels_may_be_last() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up, self.head = nn.Conv2d(3, 5, 3), nn.Linear(5, 7), nn.Linear(7, CLASSES)

        def forward(self, x: Tensor, tell: Any = None) -> Tensor:
            up = self.up(self.conv(x).permute(0, 2, 3, 1))
            return self.head((tell(F.gelu, up) if tell else F.gelu(up)).mean((1, 2)))

    net = made(Last)
    net.linear = True
    assert_agrees(fitted(net), Reference(net, (0,), channels=3).fit(TRAINING, LABELS.tolist(), VAL))


def test_stages_can_be_named_or_counted() -> None:
    net = made(lambda: Staged(F.relu))
    reference = Reference(net, (1, 2)).fit(TRAINING, LABELS.tolist(), VAL)
    assert_agrees(fitted(net, stages="last_2"), reference)
    assert_agrees(fitted(net, stages=["stage2", "stage3"]), reference)
    detector = fitted(net, stages="stage1")
    assert detector.split_names == ("stage1",)
    assert_agrees(detector, Reference(net, (0,)).fit(TRAINING, LABELS.tolist(), VAL))


@pytest.mark.parametrize("base", ["max_logit", "energy"])
def test_other_bases(base: str) -> None:
    net = made(lambda: Staged(F.relu))
    net.linear = False  # so that the reference leaves fDBD out
    reference = Reference(net, (0, 1, 2))
    if base == "energy":
        values = reference.values
        reference.values = lambda r: {**values(r), "m": -math.log(sum(map(math.exp, r.logits)))}  # type: ignore[method-assign]
    assert_agrees(fitted(net, base=base), reference.fit(TRAINING, LABELS.tolist(), VAL))
    net.linear = True


def test_options_other_than_stages_need_no_other_fit() -> None:
    net = made(lambda: Staged(F.relu))
    first = fitted(net)
    for options in ({"base": "energy"}, {"base": "max_logit", "gate": 0.5}, {"use_z": "always"}):
        other = SandIC(net, **options)
        for name in SandIC.fitted:
            setattr(other, name, getattr(first, name))
        assert torch.equal(other(SEEN)[1], fitted(net, **options)(SEEN)[1])
    other = SandIC(net, stages="last_2")
    other.prototypes, other.feature_mean, other.statistics = first.prototypes, first.feature_mean, first.statistics
    with pytest.raises(
        RuntimeError, match="prototypes are of stage1, stage2, stage3, expected those of stage2, stage3"
    ):
        other(SEEN)


def test_the_floor_keeps_overconfident_logits_from_outweighing_the_densities() -> None:
    net = made(lambda: Staged(F.relu))
    reference = Reference(net, (0, 1, 2)).fit(TRAINING, LABELS.tolist(), VAL)
    detector, loud = fitted(net), 8 * SEEN
    expected = [reference.score(image) for image in loud]
    bases = [reference.standard("b", reference.base(reference.values(reference.read(image)))) for image in loud]
    assert min(bases) < -2
    torch.testing.assert_close(detector(loud)[1].tolist(), expected, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------- a last layer


def test_a_head_that_is_not_linear_leaves_fdbd_out_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    net = made(lambda: Staged(F.relu, linear=False))
    detector = fitted(net)
    assert "fDBD is left out" in caplog.text and not len(detector.feature_mean)
    assert_agrees(detector, Reference(net, (0, 1, 2)).fit(TRAINING, LABELS.tolist(), VAL))


def test_equal_rows_of_the_last_layer_are_left_out() -> None:
    net = made(lambda: Staged(F.relu))
    with torch.no_grad():
        net.head.weight[1] = net.head.weight[0]
    assert_agrees(fitted(net), Reference(net, (0, 1, 2)).fit(TRAINING, LABELS.tolist(), VAL))
    alike = DecisionBoundaries(torch.ones(3, 2))
    assert alike.distance(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [0.0]


# ------------------------------------------------------------------------------------------- options and refusals


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"base": "logit"}, r"base='logit': expected one of 'max_logit\+fdbd', 'max_logit', 'energy'"),
        ({"use_z": True}, "use_z=True: expected one of 'auto', 'always', 'never'"),
        ({"gate": -1}, "gate=-1: expected a positive number"),
        ({"gate": math.nan}, "gate=nan: expected a positive number"),
        ({"stages": ""}, "stages='': expected \"last_3\""),
        ({"stages": []}, r"stages=\[\]"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        SandIC(nn.Identity(), **options)


def test_an_unknown_stage_is_refused_with_near_names() -> None:
    with pytest.raises(ValueError, match="calls no module 'stage4'; did you mean stage"):
        fitted(made(lambda: Staged(F.relu)), stages="stage4")


def test_a_network_without_activations_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.ReLU(), nn.Linear(4, CLASSES))
    with pytest.raises(ValueError, match=r"calls no activation .* on maps of more than one position"):
        fitted(net.double().eval())


def test_a_path_that_depends_on_the_images_is_refused() -> None:
    class Branching(Staged):
        def forward(self, x: Tensor, tell: Any = None) -> Tensor:
            return super().forward(F.relu(x) if x.mean() > 50 else x)

    detector = fitted(made(lambda: Branching(F.relu)))
    with pytest.raises(ValueError, match="called 4 activations for these images and 3 for the first ones"):
        detector(SEEN + 100)


# ------------------------------------------------------------------------------------------- what is left alone


def test_the_network_is_left_as_found() -> None:
    net = made(lambda: Staged(nn.ReLU(inplace=True)))
    given = SEEN.clone()
    before = surroundings(net, given)
    fitted(net)(given)
    with pytest.raises(ValueError, match="calls no module"):
        fitted(net, stages="stage4")
    assert surroundings(net, given) == before


def test_logits_are_the_networks_own() -> None:
    net = made(lambda: Staged(nn.ReLU(inplace=True), gate=True))
    found = find_activations(net, SEEN, Stages("last_3"))
    with torch.no_grad():
        assert torch.equal(activation_pass(net, SEEN, found.axes).logits, net(SEEN))


def test_threads_do_not_see_each_others_passes() -> None:
    net = made(lambda: Staged(F.relu))
    detector = fitted(net, use_z="always")
    expected = [detector(x)[1] for x in SEEN.split(1)]
    wrong: list[int] = []

    def work(which: int) -> None:
        for _ in range(30):
            if not torch.equal(detector(SEEN[which : which + 1])[1], expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_one_forward_pass_an_image_and_no_map_counted_for_nothing() -> None:
    net = made(lambda: Staged(F.relu, twice=True))
    detector, calls = fitted(net), []
    net.register_forward_hook(lambda *_: calls.append(1))
    summary = detector._summary(SEEN)
    assert len(calls) == 1 and not summary.z.any()
    assert Summaries(net, SEEN, Stages("last_3"))(SEEN).z.all()


def test_a_saved_detector_scores_alike(tmp_path: Any) -> None:
    net = made(lambda: Staged(F.relu))
    detector = fitted(net, gate=2.0)
    detector.save(tmp_path / "detector.safetensors")
    loaded = SandIC.load(tmp_path / "detector.safetensors", net)
    assert torch.equal(loaded(SEEN)[1], detector(SEEN)[1]) and loaded.threshold == detector.threshold
    assert loaded.options == detector.options


def test_half_precision_counts_exactly() -> None:
    net = made(lambda: Staged(F.relu)).bfloat16()
    found = find_activations(net, SEEN.bfloat16(), Stages("last_3"))
    told = Hooked()
    with torch.no_grad():
        counts = activation_pass(net, SEEN.bfloat16(), found.axes).counts
        net(SEEN.bfloat16(), told)
    for count, x in zip(counts.values(), told.seen, strict=True):
        assert torch.equal(count.long(), (x > 0).flatten(2).sum(2))


def test_loggers_are_quiet_where_all_is_well(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        SandIC(made(lambda: Staged(F.relu))).fit([(TRAINING, LABELS)], val=images(60, 5))
    assert not caplog.records
