"""Ends, edges, windows and reach, each against all paths that a split can take, or a loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openood_sandi import SandI
from openood_sandi.detectors.sandi.losses import LogitsPlan
from openood_sandi.detectors.sandi.pooling import clearance, may_win, surely_wins, winners
from openood_sandi.detectors.sandi.rectifier import between
from openood_sandi.detectors.sandi.rectifiers import RectifiedNetwork
from openood_sandi.detectors.sandi.ways import ends_of, narrowed
from openood_sandi.detectors.sandi.windows import Windows
from openood_sandi.engine.attack import Attack
from openood_sandi.engine.recorded import Call, Produced, Site
from openood_sandi.engine.walk import Observer, Walk
from tests.helpers.rectified_networks import WAYS, Made, Plain, images, made, with_way

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def look(net: nn.Module, x: Tensor, **options: object) -> tuple[SandI, RectifiedNetwork]:
    """A detector on ``net`` and what it knows about the network."""
    detector = SandI(net, variant="Z", **options)
    detector.bounds(x)
    found: list[Any] = detector._network.over(x, detector._z._readable.at, list)
    return detector, found[0].known.rectified


# ---------------------------------------------------------------------- edges


@DTYPES
@pytest.mark.parametrize("step_size", [1e-3, 0.3, 1e-9, 3.0, 1e-60, 2e38], ids=str)
@pytest.mark.parametrize("bounds", [(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0)], ids=str)
@pytest.mark.parametrize("i", [2, 3, 5])
def test_an_edge_is_where_iterated_steps_leave_the_range(
    dtype: torch.dtype, step_size: float, bounds: tuple[float, float], i: int
) -> None:
    """The bounds that are narrowed sort floats as the steps do one by one, to the last bit on either side."""
    sure = narrowed(bounds, i, step_size, dtype)
    attack = Attack(step_size=step_size)
    near = torch.tensor([edge for edge in (*bounds, *sure) if math.isfinite(edge)], dtype=dtype)
    z = torch.cat([near, torch.linspace(bounds[0], min(bounds[1], 9.0), 100, dtype=dtype)])
    for _ in range(3):
        z = torch.cat([z, torch.nextafter(z, z + 1), torch.nextafter(z, z - 1)])
    z = z.clamp(*bounds)  # as the rectifier's result is
    lower = upper = z
    for _ in range(i - 1):
        lower = attack.advance(lower, z, -torch.ones_like(z))
        upper = attack.advance(upper, z, torch.ones_like(z))
    expected = (lower > bounds[0]) & (upper < bounds[1]) & (z > bounds[0]) & (z < bounds[1])
    assert torch.equal(between(z, sure).bool(), expected)


# ---------------------------------------------------------------------- ends


@DTYPES
@pytest.mark.parametrize("scale", [1.0, 1e3], ids=str)
def test_no_path_leaves_the_ends(dtype: torch.dtype, scale: float) -> None:
    """Random steps of -eta, 0 and eta, carried as the network does it; a thousand rounds the steps themselves."""
    net = made(lambda: Made(partial(with_way, "twice")), dtype)
    with torch.no_grad():
        net.n1.bias.add_(scale)
        net.c2.bias.sub_(scale)
    x = images(2).to(dtype)
    _, readable = look(net, x)
    way = next(way for way in readable.ways.values() if way.split.name == "n1")
    generator = torch.Generator().manual_seed(0)
    z = (scale + torch.randn(2, 48, 8, 8, generator=generator)).to(dtype)
    beside = {place: (torch.randn(2, 48, 8, 8, generator=generator) - scale / 2).to(dtype) for place in way.beside}
    attack = Attack(step_size=0.01)
    found = {i: [] for i in (2, 3, 4)}
    for ends in ends_of(way, z, beside, 0.01, [2, 3, 4]):
        assert ends.upper is None, "a ReLU is left downwards only"
        found[ends.i].append(ends.lower)
    lowest = {i: torch.cat(parts) for i, parts in found.items()}
    reached = {i: torch.zeros_like(z, dtype=torch.bool) for i in lowest}
    for _ in range(20):
        moved = z
        for i in lowest:
            step = torch.randint(-1, 2, z.shape, generator=generator).to(dtype)
            moved = attack.advance(moved, z, step)
            entering = way.carry(moved, beside)
            assert bool((entering >= lowest[i]).all())
            reached[i] |= entering == lowest[i]
    assert bool(reached[2].all()), "the ends are no wider than that"


@pytest.mark.parametrize("kind", WAYS)
def test_ways_start_and_end_where_the_network_s_do(kind: str) -> None:
    """Carried clean, a split's tensor is what enters its rectifier."""
    net, x = made(lambda: Made(partial(with_way, kind))), images(2)
    detector, readable = look(net, x, splits=["c0", "c1"] if kind == "slope" else "all")
    results: list[Any] = []

    class Listener(Observer):
        def call(self, position: int, name: str, result: Any) -> None:
            results.append(result)

    walk = Walk(LogitsPlan(detector._network.splits, None, "cross_entropy"), Attack(2))
    detector._network.over(x, lambda part: detector._network.walk(part, walk, Listener()), list)
    assert len(readable.ways) == len(detector.split_names)
    for way in readable.ways.values():
        entering = way.carry(results[way.position].detach(), {p: results[p].detach() for p in way.beside})
        assert torch.equal(entering.clamp(*way.rectifier.bounds), results[way.rectifier.position])


# ---------------------------------------------------------------------- windows

POOLS = (
    (2,),
    (3, 2, 1),
    (3, 1, 1),
    ((3, 2), (2, 1), (1, 0)),
    (2, 2, 0, 2),
    (3, 2, 0, 1, True),
    (3, 2, 1, 1, True),
)


def windows(arguments: tuple[Any, ...], values: Tensor) -> Windows:
    call = Call(F.max_pool2d, (Produced(0), *arguments), {}, F.max_pool2d(values, *arguments), (0,))
    return Windows.of_pool(call, values.shape)


@pytest.mark.parametrize("arguments", POOLS, ids=str)
@pytest.mark.parametrize("size", [7, 8])
def test_who_wins_surely_and_possibly(arguments: tuple[Any, ...], size: int) -> None:
    """Among values between the ends the sure ones always win, the others never, and each possible one once."""
    generator = torch.Generator().manual_seed(size)
    lower = torch.rand(2, 2, size, size, generator=generator, dtype=torch.float64)
    pool = windows(arguments, lower)
    upper = lower + 0.2 * torch.rand(2, 2, size, size, generator=generator, dtype=torch.float64)
    surely, possibly = surely_wins(lower, upper, pool), may_win(lower, upper, pool)
    assert not bool((surely & ~possibly).any()) and bool(surely.any()) and bool((~possibly).any())
    for _ in range(30):
        values = lower + (upper - lower) * torch.rand(lower.shape, generator=generator, dtype=lower.dtype).round()
        won = winners(values, pool)
        assert bool(won[surely].all()) and not bool(won[~possibly].any())
    for place in (possibly & ~surely).nonzero()[:40]:
        values = lower.clone()
        values[tuple(place)] = upper[tuple(place)]
        assert bool(winners(values, pool)[tuple(place)])
        values = upper.clone()
        values[tuple(place)] = lower[tuple(place)]
        assert not bool(winners(values, pool)[tuple(place)])


@pytest.mark.parametrize("arguments", POOLS, ids=str)
def test_clearance_is_what_it_takes_to_lose(arguments: tuple[Any, ...]) -> None:
    values = torch.rand(2, 2, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pool = windows(arguments, values)
    ahead = clearance(values, pool)
    assert torch.equal(ahead > 0, winners(values, pool))
    for factor, wins in ((0.499, True), (0.501, False)):
        for place in (ahead > 0).nonzero()[:40]:
            changed = values + factor * ahead[tuple(place)]
            changed[tuple(place)] -= 2 * factor * ahead[tuple(place)]
            assert bool(winners(changed, pool)[tuple(place)]) == wins


# ---------------------------------------------------------------------- reach


class Deviations(Observer):
    """By how much rectifiers' results change in replays: {site: {position: the largest}}."""

    def __init__(self, positions: frozenset[int]) -> None:
        self._positions = positions
        self._clean: dict[int, Tensor] = {}
        self.largest: dict[Site, dict[int, float]] = {}

    def call(self, position: int, name: str, result: Any) -> None:
        if position in self._positions:
            self._clean[position] = result.detach()

    def replayed(self, position: int, lane_sites: Any, result: Any) -> None:
        if position in self._positions:
            for lane, site in enumerate(lane_sites):
                change = float((result[lane].detach() - self._clean[position]).abs().max())
                self.largest.setdefault(site, {})[position] = change


def deep(net: Made, x: Tensor) -> Tensor:
    """Convolutions with strides, a padded shortcut, pools and a hidden linear layer behind."""
    a = F.relu(net.n0(net.c0(x)))
    b = F.relu6(F.conv2d(a, net.c1.weight, None, 2, 1) + F.pad(a[:, :40, ::2, ::2], (0, 0, 0, 0, 4, 4)))
    b = F.max_pool2d(F.relu(net.n1(net.c2(F.avg_pool2d(b, 2, 1, 1)))), 2, 1)
    return net.aux(F.relu(F.linear(b.mean((2, 3)), net.c2.weight.flatten(1), net.c2.bias + 0.3)))


@pytest.mark.parametrize("together", [deep, *(partial(with_way, kind) for kind in WAYS)], ids=["deep", *WAYS])
def test_no_step_reaches_further_than_its_reach(together: Callable[[Made, Tensor], Tensor]) -> None:
    net, x = made(lambda: Made(together)), images(3)
    detector, readable = look(net, x, splits=["n0", "n1"], steps=3, step_size=0.05)
    reach = readable.reach
    assert reach is not None and not reach.unbounded and reach.rectifiers
    observer = Deviations(frozenset(readable.rectifiers))
    walk = Walk(LogitsPlan(detector._network.splits, None, "cross_entropy"), Attack(3, 0.05))
    detector._network.over(x, lambda part: detector._network.walk(part, walk, observer), list)
    for site, bounds in reach.bounds.items():
        own = readable.ways[site].rectifier.position
        assert {p for p, change in observer.largest[site].items() if change and p != own} <= set(bounds)
        for position, bound in bounds.items():
            assert observer.largest[site][position] <= bound
            assert bound < 1e3 * max(observer.largest[site][position], 1e-3), "of some use"


def test_what_grows_too_large_is_not_followed() -> None:
    net, x = made(lambda: Plain(width=64)), images(3)
    with torch.no_grad():
        net.n1.weight.mul_(1e9)
    _, readable = look(net, x)
    assert readable.reach is not None and {site.name for site in readable.reach.unbounded} == {"n0"}
    assert not bool(SandI(net, variant="Z").bounds(x).proved.any())


def test_activations_that_round_a_step_prove_nothing() -> None:
    """At a thousand, float32 turns a step of 0.001 into one of 0.00104; at a million there is none."""
    net, x = made(lambda: Plain(width=64), torch.float32), images(3).float()
    with torch.no_grad():
        net.n1.weight.mul_(0.01)
        net.n1.bias.fill_(2.0)
    assert bool(SandI(net, variant="Z").bounds(x).proved.all())
    with torch.no_grad():
        net.n0.bias.fill_(1e3)
        net.c1.weight.mul_(1e-4)
    assert not bool(SandI(net, variant="Z").bounds(x).proved.any())
