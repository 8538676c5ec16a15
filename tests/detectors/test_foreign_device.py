"""On a device that is not the CPU: the same scores, no operands of the CPU, one wait a batch, also without float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from openood_sandi import PrototypeFusion, SandI, SandIC
from openood_sandi.engine.devices import Moved, add_rows, fetch, rows_where, take
from tests.helpers.every_detector import KINDS, TRAINING, images, like, made, network
from tests.helpers.foreign_device import ForeignDevice, OnDevice, foreign_device, moved

every_kind = pytest.mark.parametrize("name", KINDS)
WIDTHS = {"every image proved": 16, "some proved": 10, "few proved": 6}
BATCHES = [images(8, seed) for seed in (11, 12)]


@pytest.fixture
def device() -> Iterator[ForeignDevice]:
    with foreign_device() as device:
        yield device


def on_the_device(name: str, net: nn.Module) -> Any:
    return like(made(name, net), moved(net))


def require_equal(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], float64: bool) -> None:
    pred, score = found
    assert isinstance(pred, OnDevice) and isinstance(score, OnDevice)
    assert torch.equal(pred.inner, expected[0])
    exact = float64 or score.dtype == expected[1].dtype
    assert exact or score.dtype == torch.float32
    tolerance = 0 if float64 else 1e-6
    torch.testing.assert_close(score.inner.to(expected[1].dtype), expected[1], rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------- detectors


@every_kind
@pytest.mark.parametrize("float64", [True, False], ids=["float64", "no float64"])
def test_scores_are_those_of_the_cpu_and_a_batch_waits_once(name: str, float64: bool) -> None:
    """All operands lie on the device, also on the first batch, when layers are looked for."""
    net = network(16)
    here, there = made(name, net), on_the_device(name, net)
    with foreign_device(float64) as device:
        for x in BATCHES:  # each class is looked at more closely when it first comes
            require_equal(there(OnDevice(x)), here(x), float64)
        for x in BATCHES:
            device.waits.clear()
            require_equal(there(OnDevice(x)), here(x), float64)
            assert len(device.waits) <= 1, device.waits


@pytest.mark.parametrize(
    "proved, options",
    [
        *((proved, {"steps": 3}) for proved in WIDTHS),
        ("every image proved", {"steps": 1}),
        ("some proved", {"rectifier_shortcut": False}),
        ("few proved", {"combine": "union"}),
    ],
    ids=str,
)
def test_z_waits_once_whatever_is_proved(proved: str, options: dict[str, Any], device: ForeignDevice) -> None:
    net = network(WIDTHS[proved])
    here, there = SandI(net, variant="Z", **options), SandI(moved(net), variant="Z", **options)
    for x in BATCHES * 2:  # each class is looked at more closely when it first comes
        expected = here(x)
        device.waits.clear()
        require_equal(there(OnDevice(x)), expected, True)
    assert len(device.waits) <= 1, device.waits
    assert there.proved_share == here.proved_share


@pytest.mark.parametrize("options", [{}, {"steps": 5}, {"combine": "intersection"}], ids=str)
def test_bounds_wait_once(options: dict[str, Any], device: ForeignDevice) -> None:
    net = network(16)
    here, there = SandI(net, variant="Z", **options), SandI(moved(net), variant="Z", **options)
    for x in BATCHES * 2:
        expected = here.bounds(x)
        device.waits.clear()
        found = there.bounds(OnDevice(x))
        waits = list(device.waits)
        assert all(torch.equal(end.inner, other) for end, other in zip(found, expected, strict=True))
        assert torch.equal(found.proved.inner, expected.proved)
    assert len(waits) <= 1, waits


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_bounds_and_decisions(width: int, device: ForeignDevice) -> None:
    """Bounds wait once a batch; decisions at most three times, as some images are computed as well."""
    net = network(width)
    here = SandI(net, variant="Z").fit([TRAINING])
    there = like(here, moved(net))
    there.threshold = here.threshold
    batches = [(x, torch.zeros(len(x)).long()) for x in BATCHES]
    for _ in range(2):  # each class is looked at more closely when it first comes
        device.waits.clear()
        found = there.decide(batches)
    assert len(device.waits) <= 3 * len(batches), device.waits
    np.testing.assert_array_equal(found.ood, here.decide(batches).ood)
    for x in BATCHES:
        device.waits.clear()
        found, expected = there.bounds(OnDevice(x)), here.bounds(x)
        assert len(device.waits) <= 1, device.waits
        torch.testing.assert_close(found[1].inner, expected[1], rtol=0, atol=0)
        torch.testing.assert_close(found[2].inner, expected[2], rtol=0, atol=0)
        device.waits.clear()
        assert torch.equal(there.is_ood(OnDevice(x)).inner, here.is_ood(x))
        assert len(device.waits) <= 3, device.waits


def test_a_single_image_waits_once(device: ForeignDevice) -> None:
    there = SandI(moved(network(16)), variant="Z")
    for x in BATCHES[0].split(1):
        there(OnDevice(x))
    for x in BATCHES[0].split(1):
        device.waits.clear()
        there(OnDevice(x))
        assert len(device.waits) <= 1, device.waits


def test_attribution_maps_wait_for_nothing(device: ForeignDevice) -> None:
    net = network(8)
    there = SandI(moved(net), variant="Z")
    there.explain(OnDevice(BATCHES[0]))
    device.waits.clear()
    maps = there.explain(OnDevice(BATCHES[0]))
    assert not device.waits
    for name, expected in SandI(net, variant="Z").explain(BATCHES[0]).items():
        torch.testing.assert_close(maps[name].inner, expected, rtol=0, atol=0)


def test_weights_written_through_data_are_noticed_though_their_norms_come_last(device: ForeignDevice) -> None:
    net = network(16)
    there = moved(net)
    detector = SandI(there, variant="Z")
    for x in BATCHES:
        detector(OnDevice(x))
    share = detector.proved_share
    assert share > 0.5
    for each in (net, there):
        weight = each.head.weight.data
        weight.mul_(torch.tensor([1.0, 0.0] * 24).to(weight.device))
    require_equal(detector(OnDevice(BATCHES[0])), SandI(net, variant="Z")(BATCHES[0]), True)
    assert detector.proved_share < share


@pytest.mark.parametrize("kind, waits", [(PrototypeFusion, 1), (SandIC, 2)])
@pytest.mark.parametrize("float64", [True, False], ids=["float64", "no float64"])
def test_a_fit_on_the_device(kind: Any, waits: int, float64: bool) -> None:
    """The host asks which images are finite, together with what it keeps.

    S&I-C asks for the labels again, and without float64 the sums of Prototype Fusion are taken on the host.
    """
    net, (x, labels) = network(), TRAINING
    expected = kind(net).fit([TRAINING])
    counts: list[int] = []
    with foreign_device(float64) as device:
        for size in (20, 10):
            device.waits.clear()
            there = kind(moved(net)).fit(list(zip(x.split(size), labels.split(size), strict=True)))
            counts.append(len(device.waits))
            pred, score = there(OnDevice(x))
            assert torch.equal(pred.inner, expected(x)[0])
            tolerance = 1e-9 if score.dtype == torch.float64 else 1e-6
            torch.testing.assert_close(score.inner.double(), expected(x)[1].double(), rtol=tolerance, atol=tolerance)
    assert counts[1] - counts[0] <= (waits if float64 else 2) * 3, counts
    assert there.threshold == pytest.approx(expected.threshold, rel=1e-6)


@every_kind
def test_a_data_set_is_fetched_as_a_whole(name: str, device: ForeignDevice) -> None:
    net = network(16)
    here, there = made(name, net), on_the_device(name, net)
    x = torch.cat(BATCHES)
    loader = DataLoader(TensorDataset(x, torch.zeros(len(x)).long()), batch_size=8)
    expected = here.score(loader, progress=False)
    there.score(loader, progress=False)
    device.waits.clear()
    found = there.score(loader, progress=False)
    np.testing.assert_array_equal(found.pred, expected.pred)
    np.testing.assert_array_equal(found.score, expected.score)
    assert len(device.waits) <= len(BATCHES) + 2, device.waits


# --------------------------------------------------------------------------------------------- what they are made of


def test_what_is_fetched_at_once_is_what_was_there(device: ForeignDevice) -> None:
    values = [torch.tensor([True, False, True]), torch.tensor(3.5), torch.arange(5), torch.zeros(0)]
    values += [torch.tensor([float("nan"), -0.0], dtype=torch.float64), torch.randn(3, 4).T, torch.ones(3).bfloat16()]
    fetched = fetch(*map(OnDevice, values), values[0])
    assert len(device.waits) == 1
    for found, value in zip(fetched, [*values, values[0]], strict=True):
        assert found.dtype == value.dtype and found.shape == value.shape and found.device.type == "cpu"
        assert found.contiguous().view(-1).view(torch.uint8).equal(value.contiguous().view(-1).view(torch.uint8))


def test_rows_are_added_without_an_order_of_threads(device: ForeignDevice) -> None:
    """``index_add_`` has one on GPUs: it is not called there."""
    rows, values = torch.tensor([2, 0, 2, 2]), torch.randn(4, 3).double()
    expected = torch.ones(4, 3).double().index_add_(0, rows, values)
    totals = OnDevice(torch.ones(4, 3).double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "index_add_", None)
        add_rows(totals, OnDevice(rows), OnDevice(values))
    assert not device.waits
    torch.testing.assert_close(totals.inner, expected)
    here = torch.ones(4, 3).double()
    add_rows(here, rows, values)
    assert torch.equal(here, expected)


def test_what_is_moved_once_is_moved_again_where_it_has_changed(device: ForeignDevice) -> None:
    kept, like_this, where = Moved(), OnDevice(torch.zeros(1)), torch.arange(3.0)
    for _ in range(2):
        assert kept.to("a", where, like_this).inner.tolist() == [0, 1, 2]
    assert len(device.waits) == 1
    where[0] = 5
    assert kept.to("a", where, like_this).inner.tolist() == [5, 1, 2]
    assert kept.to("a", torch.ones(2), like_this).inner.tolist() == [1, 1]
    assert kept.to("a", torch.ones(2), like_this.double()).dtype == torch.float64
    assert kept.to("b", where, torch.zeros(1)) is where
    with torch.inference_mode():
        uncounted = torch.zeros(2)
        kept.to("c", uncounted, like_this)
        uncounted.add_(1)
        assert kept.to("c", uncounted, like_this).inner.tolist() == [1, 1]


def test_rows_are_found_without_a_wait(device: ForeignDevice) -> None:
    mask = torch.tensor([False, True, True, False, True])
    assert rows_where(OnDevice(mask), 3).inner.tolist() == [1, 2, 4]
    assert take(OnDevice(torch.arange(5) * 10), [4, 0]).inner.tolist() == [40, 0]
    assert not device.waits


# --------------------------------------------------------------------------------------------- the device itself


MIXED: dict[str, Callable[[Tensor], object]] = {
    "a sum": lambda x: x + torch.ones(4),
    "a list of places": lambda x: x[[0, 1]],
    "a value to write": lambda x: x.index_put_((OnDevice(torch.tensor([0])),), torch.ones(1)),
    "numpy": lambda x: x.numpy(),
    "cat": lambda x: torch.cat([x, torch.ones(4)]),
}
WAITS: dict[str, Callable[[Tensor], object]] = {
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool((x > 0).any()),
    "if": lambda x: 1 if x[0] > 0 else 2,
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x[0].item(),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "a mask to write at": lambda x: x.index_put_((x > 0,), OnDevice(torch.tensor(1.0))),
    "places of the host": lambda x: x[torch.tensor([0, 1])],
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: torch.ones(3).to(x.device),
    "into the host": lambda x: torch.ones(4).copy_(x),
    "unique": lambda x: x.unique(),
}
FREE: dict[str, Callable[[Tensor], object]] = {
    "a number": lambda x: x + torch.tensor(1.0),
    "its form": lambda x: (x.shape, x.stride(), x.numel(), len(x), x.is_contiguous()),
    "its places": lambda x: x[OnDevice(torch.tensor([0, 1]))],
    "made there": lambda x: torch.zeros(4, device=x.device) + x,
    "sent ahead": lambda x: torch.ones(4).to(x.device, non_blocking=True) + x,
    "where": lambda x: torch.where(x > 0, x, 0.0),
}


@pytest.mark.parametrize("work", MIXED.values(), ids=MIXED)
def test_mixed_operands_are_refused(work: Callable[[Tensor], object], device: ForeignDevice) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        work(OnDevice(torch.arange(4.0)))


@pytest.mark.parametrize("work", WAITS.values(), ids=WAITS)
def test_waits_are_noted(work: Callable[[Tensor], object], device: ForeignDevice) -> None:
    work(OnDevice(torch.arange(4.0)))
    assert len(device.waits) == 1


@pytest.mark.parametrize("work", FREE.values(), ids=FREE)
def test_what_needs_no_wait_has_none(work: Callable[[Tensor], object], device: ForeignDevice) -> None:
    work(OnDevice(torch.arange(4.0)))
    assert not device.waits


def test_float64_is_refused_where_there_is_none() -> None:
    with foreign_device(float64=False), pytest.raises(TypeError, match="float64"):
        OnDevice(torch.ones(2)).double()


# --------------------------------------------------------------------------------------------- backward passes


class Pooled(nn.Module):
    """A max-pool behind a rectifier that a split point feeds."""

    def __init__(self) -> None:
        super().__init__()
        self.c0, self.n0 = nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.c1, self.n1 = nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.n0(self.c0(x)).relu(), 2)
        return self.head(self.n1(self.c1(x)).relu().mean((2, 3)))


PASSES: dict[str, dict[str, Any]] = {
    "count": {"variant": "Z"},
    "five steps": {"variant": "Z", "steps": 5},
    "union": {"variant": "Z", "combine": "union"},
    "every gradient": {"variant": "Z", "rectifier_shortcut": False},
    "A": {"variant": "A", "splits": "all"},
}


@pytest.mark.parametrize("options", PASSES.values(), ids=PASSES)
def test_no_backward_pass_is_run_inside_another(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a hook it would be re-entrant: on a GPU, where hooks run on a thread of autograd's, each needs one more."""
    torch.manual_seed(0)
    net, inside, run = Pooled().eval(), list[int](), torch.autograd._engine_run_backward

    def watched(*args: Any, **kwargs: Any) -> Any:
        inside.append(torch._C._current_graph_task_id())
        return run(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "_engine_run_backward", watched)
    SandI(net, **options)(BATCHES[0])
    assert inside and set(inside) == {-1}
    leaf, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    total = other.sum()
    leaf.register_hook(lambda _: torch.autograd.grad(total, other)[0])
    torch.autograd.grad((2 * leaf).sum(), leaf)
    assert inside[-1] != -1, "the test does not see one that is"
