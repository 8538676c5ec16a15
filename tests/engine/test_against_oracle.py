"""SandI equals the naive reference (``tests/helpers/oracle.py``) in float64, on every network of the helpers."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from openood_sandi import SandI
from tests.helpers import cases, networks
from tests.helpers.cases import Case
from tests.helpers.oracle import Options, Reference

RELATIVE = 1e-12
COMBINES = ("count", "union", "intersection")

every_trap = pytest.mark.parametrize("case", networks.HANDMADE, ids=lambda case: case.name, scope="module")
SOME = [c for c in networks.HANDMADE if c.name in ("InPlaceResidual", "Reused", "Attention", "Branches")]
some_networks = pytest.mark.parametrize("case", SOME, ids=lambda case: case.name, scope="module")


@lru_cache(maxsize=1)  # all tests of one network follow each other, as its parameter has the scope of the module
def network(case: Case) -> tuple[nn.Module, Tensor]:
    return cases.build(case), cases.images(case)


@lru_cache(maxsize=4)
def reference(case: Case, options: Options) -> Reference:
    net, x = network(case)
    return Reference(net, x, cases.split_points(case, net, x, before=options.feature), options)


@lru_cache(maxsize=1)
def rescaled(case: Case, factor: float) -> Reference:
    naive = reference(case, LONGEST)
    return Reference(naive.net, naive.x * factor, naive.splits, replace(naive.options, steps=2))


def detector_like(naive: Reference, **options: object) -> SandI:
    """SandI with the options of a reference, but for those given."""
    own = dict(vars(naive.options))
    own["feature"] = own["feature"] or "auto"
    return SandI(naive.net, splits=naive.splits, **(own | options))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for split, values in expected.items():
        assert found[split].shape == values.shape, f"{split}: {found[split].shape}, expected {values.shape}"
        scale = values.abs().max().item()
        torch.testing.assert_close(
            found[split],
            values,
            rtol=0,
            atol=RELATIVE * scale,
            msg=lambda text, split=split: f"{split}: {text}",
        )


def assert_agrees(detector: SandI, naive: Reference, combine: str | None = None, steps: int | None = None) -> None:
    """The densities of the first image alone, then predictions and tau of the whole batch."""
    first = {split: density[:1] for split, density in naive.densities(combine, steps).items()}
    assert_same(detector.densities(naive.x[:1]), first)
    pred, tau = detector(naive.x)
    assert torch.equal(pred, naive.pred)
    torch.testing.assert_close(tau, naive.tau(combine, steps), rtol=RELATIVE, atol=0)
    assert detector.split_names == naive.splits


#: One reference serves all of these: its first steps are those of a shorter path.
LONGEST = Options("Z", steps=3, step_size=0.01)
Z_SETTINGS = [(1, "count"), *itertools.product((2, 3), COMBINES)]
Z_WITHOUT_SHORTCUT = [(1, "union"), (2, "intersection"), (3, "count")]
# Long paths of big networks cost time and add nothing: they are left to the traps.
Z_SHORT = [(1, "union"), (2, "count")]


@networks.each
def test_z(case: Case) -> None:
    trap = case in networks.HANDMADE
    naive = reference(case, LONGEST if trap else replace(LONGEST, steps=2))
    for steps, combine in Z_SETTINGS if trap else Z_SHORT:
        assert_agrees(detector_like(naive, steps=steps, combine=combine), naive, combine, steps)
    for steps, combine in Z_WITHOUT_SHORTCUT if trap else ():
        plain = detector_like(naive, steps=steps, combine=combine, rectifier_shortcut=False)
        assert_agrees(plain, naive, combine, steps)


@every_trap
@pytest.mark.parametrize(
    "first, combine", [(0, "count"), (1, "count"), (2, "count"), (1, "union"), (2, "intersection")]
)
def test_z_after_a_first_batch_of_another_kind(case: Case, first: int, combine: str) -> None:
    """What one image shows, say that a rectifier's mask is the pattern of the gradient, need not hold for the next."""
    naive = reference(case, LONGEST)
    detector = detector_like(naive, steps=2, combine=combine)
    detector(naive.x[first : first + 1])
    assert_same(detector.densities(naive.x), naive.densities(combine, 2))
    assert_same(detector.densities(naive.x * 30), rescaled(case, 30).densities(combine))


@networks.each
def test_a(case: Case) -> None:
    trap = case in networks.HANDMADE
    naive = reference(case, Options("A", steps=3 if trap else 2, step_size=0.01, feature=case.feature))
    for steps in (1, 2, 3) if trap else (2,):
        assert_agrees(detector_like(naive, steps=steps), naive, steps=steps)


@every_trap
@pytest.mark.parametrize(
    "options", [LONGEST, replace(LONGEST, steps=2, attribution="cross_entropy", ascent="max_logit")], ids=["", "losses"]
)
def test_explain(case: Case, options: Options) -> None:
    naive = reference(case, options)
    for variant in ("Z", "A"):
        assert_same(detector_like(naive, variant=variant).explain(naive.x), naive.explain())


LOSSES = ("max_logit", "cross_entropy")
#: Half of the combinations: whatever four of the five options are given, they are given together in one of these. Each
#: is tried on two of the networks.
EVERY_FOUR = [
    tuple(values[choice] for values, choice in zip(both, choices, strict=True))
    for both in [(("Z", "A"), (True, False), LOSSES, LOSSES, (float("inf"), 0.05))]
    for choices in itertools.product((0, 1), repeat=5)
    if sum(choices) % 2 == 0
]


@pytest.mark.parametrize(
    "case, variant, splitting, attribution, ascent, epsilon",
    [(case, *row) for i, case in enumerate(SOME) for j, row in enumerate(EVERY_FOUR) if (i + j) % 2],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_losses_ball_and_input_attack(
    case: Case, variant: str, splitting: bool, attribution: str, ascent: str, epsilon: float
) -> None:
    options = Options(
        variant,
        steps=3,
        step_size=0.01,
        epsilon=epsilon,
        attribution=attribution,
        ascent=ascent,
        splitting=splitting,
        feature=case.feature if variant == "A" else "",
    )
    naive = reference(case, options)
    assert_agrees(detector_like(naive), naive)
    if variant == "Z":
        assert_same(detector_like(naive).explain(naive.x), naive.explain())


@some_networks
@pytest.mark.parametrize("top_over", ["channels", "labels"])
@pytest.mark.parametrize("top_fraction", [0.01, 0.5, 1.0])
def test_top_fraction(case: Case, top_over: str, top_fraction: float) -> None:
    options = Options("A", step_size=0.01, feature=case.feature, top_over=top_over, top_fraction=top_fraction)
    naive = reference(case, options)
    assert_agrees(detector_like(naive), naive)


@some_networks
def test_options_matter(case: Case) -> None:
    """The settings above lead to different scores: their agreement with the reference says something."""
    base = reference(case, Options("Z", steps=3, step_size=0.01)).tau()
    for options in (
        Options("Z", steps=3, step_size=0.01, splitting=False),
        Options("Z", steps=3, step_size=0.01, epsilon=0.05),
        Options("Z", steps=3, step_size=0.01, combine="union"),
        Options("Z", steps=3, step_size=0.01, ascent="max_logit"),
    ):
        assert not torch.allclose(reference(case, options).tau(), base, rtol=1e-9), options


@pytest.mark.parametrize("splitting", [True, False], ids=["splitting", "input_only"])
def test_a_path_stops_where_its_class_has_changed(splitting: bool) -> None:
    net, x = flipping()
    options = Options("Z", steps=4, step_size=0.01, splitting=splitting, stop_at_flip=True)
    naive = Reference(net, x, ("1", "4"), options)
    detector = detector_like(naive)
    assert_agrees(detector, naive)
    assert_same(detector.explain(x), naive.explain())
    goes_on = Reference(net, x, ("1", "4"), replace(options, stop_at_flip=False))
    stopped = (naive.tau() - goes_on.tau()).abs() > 1e-9
    assert 0 < int(stopped.sum()) < len(x), "some of the images, not all, should be of that kind"


def test_plain_paths_stop_too() -> None:
    net, x = flipping()
    naive = Reference(net, x, ("1", "4"), Options("Z", steps=4, step_size=0.01, stop_at_flip=True))
    detector = detector_like(naive)
    detector(x)
    detector._network._plain_because = "the test wants it so"
    assert_agrees(detector, naive)


def flipping() -> tuple[nn.Module, Tensor]:
    """A network and images of which some change their class within three steps of 0.01."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    with torch.no_grad():
        net[8].weight[:2] *= torch.eye(2).repeat(1, 4)  # two classes see every other channel each
        net[8].bias.zero_()
    return net.double().eval(), torch.randn(24, 3, 8, 8, dtype=torch.float64)


def test_a_denominator_for_each_channel() -> None:
    net, x = flipping()
    options = Options("A", step_size=0.01, feature="5", denominator="channel")
    naive = Reference(net, x, ("1", "4"), options)
    assert_agrees(detector_like(naive), naive)
    assert not torch.allclose(naive.tau(), Reference(net, x, ("1", "4"), replace(options, denominator="mean")).tau())
    net[3] = nn.Conv2d(8, 16, 3).double()
    net[4], net[8] = nn.BatchNorm2d(16).double().eval(), nn.Linear(16, 4).double()
    with pytest.raises(ValueError, match="split point '1' has 8 channels and F \\('5'\\) 16; name splits"):
        detector_like(naive)(x)


def test_a_union_that_the_first_gradient_does_not_tell() -> None:
    """Behind the last rectifier a gradient can be zero at first and not later, when the path changes the class."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    net = net.double().eval()
    with torch.no_grad():
        net[7].weight[:2] *= torch.eye(2).repeat(1, 4)  # two classes see every other feature
    x = 3 * torch.randn(24, 3, 8, 8, dtype=torch.float64)
    naive = Reference(net, x, ("1", "5"), Options("Z", steps=3, step_size=0.2))
    detector = detector_like(naive, combine="union")
    assert_agrees(detector, naive, "union")
    first, union = naive.densities("union", 1)["5"], naive.densities("union")["5"]
    assert 0 < int((first < union).any(1).sum()) < len(x), "some of the images, not all, should be of that kind"
