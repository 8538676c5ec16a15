"""Tau of the exact engine lies between its bounds from one forward pass, on networks built to break them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openood_sandi import SandI
from openood_sandi.detectors.sandi.bounds import Bounds
from tests.helpers import cases, networks
from tests.helpers.cases import Case
from tests.helpers.rectified_networks import WAYS, Made, OptionA, Plain, exact, images, made, with_way

OPTIONS = (
    {"steps": 1},
    {"steps": 2},
    {"steps": 5},
    {"steps": 3, "step_size": 0.05},
    {"steps": 3, "combine": "union"},
    {"steps": 2, "combine": "intersection"},
    {"steps": 4, "step_size": 0.02, "combine": "intersection"},
)
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
TAIL = ["n0", "n1", "tail"]


def require_inside(net: nn.Module, x: Tensor, proved: float = 0.0, **options: object) -> Bounds:
    """The upper end is one always, the lower one where it is proved, and at least that share is."""
    bounds = SandI(net, variant="Z", **options).bounds(x)
    pred, tau = exact(net, **options)(x)
    assert torch.equal(bounds.pred, pred)
    assert bool((bounds.low <= bounds.high).all())
    assert bool((tau <= bounds.high).all()), (tau - bounds.high).max()
    assert bool((bounds.low <= tau)[bounds.proved].all()), (bounds.low - tau).max()
    assert bounds.proved.double().mean() >= proved
    assert bounds.low.dtype == bounds.high.dtype == tau.dtype
    return bounds


# ---------------------------------------------------------------------- networks


@every_option
@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tau_is_inside(options: dict[str, object], pool: bool, dtype: torch.dtype) -> None:
    net = made(lambda: Plain(width=64, pool=pool), dtype)
    bounds = require_inside(net, images(6).to(dtype), **options)
    if options["steps"] == 1 or (options.get("combine") == "union" and not pool):
        assert torch.equal(bounds.low, bounds.high)
    else:
        assert bool((bounds.low < bounds.high).all())


@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{"steps": 2}, {"steps": 4, "step_size": 0.01}], ids=str)
def test_steps_go_the_network_s_own_way(kind: str, dtype: torch.dtype, options: dict[str, object]) -> None:
    net = made(lambda: Made(partial(with_way, kind)), dtype)
    with torch.no_grad():
        if kind == "slope":
            net.n0.weight.copy_(torch.linspace(-5, 5, 48))
            net.n1.weight.copy_(torch.linspace(5, -5, 48))
        if kind == "residual":
            net.c2.weight.mul_(150)
            net.n1.bias.fill_(-30.0)
            assert float(net.c2(F.relu(net.n0(net.c0(images(4).to(dtype))))).max()) > 50
        if kind in ("both clips", "max-pool"):
            net.n1.weight.fill_(4.0)
            net.n1.bias.fill_(3.0)
    x = images(4).to(dtype)
    bounds = require_inside(net, x, splits=["c0", "c1"] if kind == "slope" else "all", **options)
    assert bool((bounds.low < bounds.high).all()), "the steps change something"


@every_option
def test_a_split_behind_all_rectifiers_is_always_alive(options: dict[str, object]) -> None:
    """As the average pool of wide residual networks in the paper's list; it is not replayed either."""
    net = made(lambda: Made(partial(with_way, "with a tail")))
    net.tail = nn.AdaptiveAvgPool2d(1)
    x = images(4)
    require_inside(net, x, float("step_size" not in options), splits=TAIL, **options)
    expected = exact(net, splits=TAIL, **options).densities(x)
    detector = SandI(net, variant="Z", splits=TAIL, **options)
    found = detector.densities(x)
    assert all(torch.equal(found[name], density) for name, density in expected.items())
    assert detector.proved_share == 1
    with torch.no_grad():
        net.head.weight[2, 5] = 0  # a class that may be the one after a step
    require_inside(net, x, splits=TAIL, **options)
    assert torch.equal(SandI(net, variant="Z", splits=TAIL, **options)(x)[1], exact(net, splits=TAIL, **options)(x)[1])


@every_option
def test_narrow_networks_and_channels_of_zeros(options: dict[str, object]) -> None:
    require_inside(made(lambda: Plain(width=4)), images(12), **options)
    require_inside(made(OptionA), images(6), **options)


@pytest.mark.parametrize("value", [1.0, 1.0005, 1.5], ids=str)
def test_a_suffix_that_dies_after_the_step_is_not_proved(value: float) -> None:
    net = nn.Sequential(
        *(nn.BatchNorm2d(1, eps=0.0), nn.ReLU(), nn.Conv2d(1, 1, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2)),
    )
    with torch.no_grad():
        net[2].weight.fill_(1.0)
        net[2].bias.fill_(-1.0)
        net[6].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        net[6].bias.zero_()
    net = net.double().eval()
    x = torch.full((2, 1, 2, 2), value, dtype=torch.float64)
    bounds = require_inside(net, x)
    assert bool(bounds.proved.all()) == (value != 1.0005)  # 1 is dead from the start, which is seen, and computed
    detector = SandI(net, variant="Z")
    detector.threshold = 0.75
    assert detector.is_ood(x).tolist() == [value == 1.5] * 2


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in networks.HANDMADE])
def test_on_every_trap(case: Case) -> None:
    net, x = cases.build(case), cases.images(case)
    splits = cases.split_points(case, net, x)
    require_inside(net, x, splits=splits, step_size=0.01)


@pytest.mark.long
@networks.each
def test_on_every_network(case: Case) -> None:
    net, x = cases.build(case), cases.images(case)
    splits = cases.split_points(case, net, x)
    for combine in ("count", "intersection", "union"):
        require_inside(net, x, splits=splits, steps=3, step_size=0.01, combine=combine)


@pytest.mark.parametrize("seed", range(6))
def test_random_networks(seed: int) -> None:
    """Depth, width, kinds of layers, slopes and step sizes by chance; most have what no proof covers."""
    generator = torch.Generator().manual_seed(seed)

    def chance(*values: float) -> float:
        return values[int(torch.randint(len(values), (), generator=generator))]

    width = int(chance(3, 8, 32))
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)]
    for _ in range(int(chance(1, 2, 3))):
        layers += [nn.ReLU6() if chance(0, 1) else nn.ReLU()]
        layers += [nn.MaxPool2d(int(chance(2, 3)), int(chance(1, 2)), 1)] if chance(0, 1, 1) else []
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)]
    torch.manual_seed(seed)
    net = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    cases.randomise(net)
    for layer in net:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, -chance(1, 5), chance(1, 5))
    dtype = torch.float64 if chance(0, 1) else torch.float32
    options = {"steps": int(chance(2, 3, 5)), "step_size": chance(1e-3, 1e-2, 0.1)}
    for combine in ("count", "union", "intersection"):
        require_inside(net.to(dtype).eval(), 2 * images(5, seed=seed).to(dtype), combine=combine, **options)


@pytest.mark.parametrize(
    "options",
    [{"stop_at_flip": True, "step_size": 0.5}, {"ascent": "max_logit"}, {"attribution": "cross_entropy"}],
    ids=str,
)
def test_other_losses_and_paths_that_stop(options: dict[str, object]) -> None:
    require_inside(made(lambda: Plain(width=64)), images(8), steps=4, **options)


@pytest.mark.parametrize("pruned", ["head", "norm"])
def test_weights_that_change_between_batches(pruned: str) -> None:
    """What was proved by the old ones is no longer, and no old edge or reach is used."""
    net, x = made(lambda: Plain(width=64)), images(6)
    detector = SandI(net, variant="Z")
    assert bool(detector.bounds(x).proved.all())
    with torch.no_grad():
        if pruned == "head":
            net.head.weight.data[:, :32] = 0
        else:
            net.n1.weight.data.mul_(1e9)
    found, fresh = detector.bounds(x), require_inside(net, x)
    if pruned == "head":  # half of all units are dead, so tau is computed
        assert torch.equal(found.low, found.high)
    else:
        assert not bool(found.proved.any())
    assert all(torch.equal(one, other) for one, other in zip(found, fresh, strict=True))


def test_where_much_of_what_is_on_is_dead_tau_is_computed() -> None:
    """Behind a depthwise convolution most open units have no gradient: no estimate that takes them for alive is one."""

    def depthwise(net: Made, x: Tensor) -> Tensor:
        a = F.relu(net.n0(net.c0(x)))
        return net.head(F.relu(net.n1(net.deep(a))).mean((2, 3)))

    net = made(lambda: Made(depthwise))
    net.deep = nn.Conv2d(48, 48, 1, groups=48).double()
    with torch.no_grad():
        net.n1.bias.sub_(1.0)
    x = images(6)
    bounds = require_inside(net, x, proved=1.0)
    assert torch.equal(bounds.low, bounds.high)
    assert torch.equal(SandI(net, variant="Z", precision="bounded")(x)[1], bounds.low)


# ---------------------------------------------------------------------- what is computed


def test_where_nothing_can_be_read_tau_is_computed() -> None:
    net, x = made(Plain), images(4)
    for options in ({"variant": "A"}, {"epsilon": 0.1}, {"splitting": False}, {"rectifier_shortcut": False}):
        detector = SandI(net, **{"variant": "Z", **options})
        bounds, tau = detector.bounds(x), detector(x)[1]
        assert torch.equal(bounds.low, tau) and torch.equal(bounds.high, tau) and bool(bounds.proved.all())


def test_an_image_that_is_not_finite_has_no_bounds() -> None:
    x = images(3)
    x[1] = torch.nan
    bounds = SandI(made(Plain), variant="Z").bounds(x)
    assert bounds.low.isnan().tolist() == bounds.high.isnan().tolist() == [False, True, False]


def test_memory_in_parts_makes_no_difference() -> None:
    net, x = made(Plain), images(6)
    whole, parts = SandI(net, variant="Z"), SandI(net, variant="Z")
    whole.bounds(x), parts.bounds(x)
    parts._network._budget.images = 2
    for one, other in zip(whole.bounds(x), parts.bounds(x), strict=True):
        torch.testing.assert_close(one, other)
    assert len(parts.bounds(x).proved) == 6


def no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a gradient is computed")

    monkeypatch.setattr(torch.autograd, "grad", refuse)


def test_bounds_take_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    detector, x = SandI(made(Plain), variant="Z", steps=5), images(4)
    detector.bounds(x)  # the first batch is looked at more closely
    no_gradients(monkeypatch)
    detector.bounds(x)


def test_no_split_that_is_proved_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second pattern follows from the step by the calls up to the rectifier, to the bit."""
    net: nn.Module = made(lambda: Plain(width=64), torch.float32)
    with torch.no_grad():
        net.n1.bias.fill_(1.0)
        net.c1.weight.mul_(0.3)
    x = images(6).float()
    detector = SandI(net, variant="Z")
    assert bool(detector.bounds(x).proved.all())
    expected = exact(net).densities(x)
    detector.densities(x)

    def refuse(*args: object) -> None:
        raise AssertionError("something is replayed")

    monkeypatch.setattr("openood_sandi.engine.tape.Tape.replay", refuse)
    found = detector.densities(x)
    assert all(torch.equal(found[name], density) for name, density in expected.items())
