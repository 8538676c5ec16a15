"""Running out of memory, anywhere and for real, costs time and nothing else; nothing is held from batch to batch."""

from __future__ import annotations

import gc
import logging
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openood_sandi import SandI
from openood_sandi.engine.memory import is_out_of_memory
from tests.helpers.cases import prepared
from tests.helpers.faults import FailsAt, SmallDevice
from tests.helpers.places import ROOT
from tests.helpers.surroundings import surroundings


class Tiny(nn.Module):
    """Two split points and 3 classes: few enough operators for each of them to fail in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.norm0 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.feature, self.head = nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.conv0(x)))
        return self.head(self.feature(self.norm1(self.conv1(x))).mean((2, 3)))


@pytest.fixture(autouse=True, scope="module")
def quick_garbage_collection() -> Iterator[None]:
    """Each failure collects garbage, and need not look through all that the test session has imported."""
    net, x = prepared(Tiny, 8)
    with SmallDevice(math.inf):  # which imports some more
        SandI(net)(x)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


Use = Callable[[SandI, Tensor], Any]
USES: dict[str, tuple[dict[str, Any], Use]] = {
    "Z": ({"variant": "Z"}, lambda d, x: d(x)),
    "Z, three steps": ({"variant": "Z", "steps": 3}, lambda d, x: d(x)),
    "Z, union": ({"variant": "Z", "combine": "union"}, lambda d, x: d(x)),
    "A": ({"variant": "A", "splits": "all", "feature": "feature"}, lambda d, x: d(x)),
    "explain": ({"variant": "Z", "epsilon": 0.1}, lambda d, x: d.explain(x)),
    "input only": ({"variant": "Z", "splitting": False}, lambda d, x: d(x)),
}
every_use = pytest.mark.parametrize("options, use", USES.values(), ids=USES)


def tensors(result: Any) -> list[Tensor]:
    return list(result.values() if isinstance(result, dict) else result)


def assert_equal(found: Any, expected: Any) -> None:
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def warnings(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelno == logging.WARNING]


@every_use
@pytest.mark.parametrize("every", [pytest.param(29, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.long)])
def test_every_allocation_may_fail(
    options: dict[str, Any], use: Use, every: int, caplog: pytest.LogCaptureFixture
) -> None:
    net, x = prepared(Tiny, 8)
    expected = use(SandI(net, **options), x)
    before = surroundings(net, x)
    for number in range(1, 10_000, every):
        caplog.clear()
        detector = SandI(net, **options)
        with FailsAt(number, torch.cuda.OutOfMemoryError("injected")) as fault:
            found = use(detector, x)
        if not fault.reached:
            break
        assert_equal(found, expected)
        assert surroundings(net, x) == before, number
        (told,) = warnings(caplog)
        assert "injected" in told and "going on with" in told
    assert number > 50


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] can't allocate memory: 5 bytes")])
def test_whatever_the_failure_is_called(error: Exception) -> None:
    net, x = prepared(Tiny, 8)
    expected = SandI(net, variant="Z", steps=3)(x)
    for number in range(1, 150, 30):
        with FailsAt(number, error) as fault:
            assert_equal(SandI(net, variant="Z", steps=3)(x), expected)
        assert fault.reached


def test_other_errors_pass_through() -> None:
    net, x = prepared(Tiny, 8)
    expected, raised = SandI(net, variant="Z", steps=3)(x), 0
    for number in range(1, 300, 25):
        with FailsAt(number, RuntimeError("something else")):
            try:
                found = SandI(net, variant="Z", steps=3)(x)
            except RuntimeError as error:
                assert "something else" in str(error)
                raised += 1
            else:  # in the look at where images and channels are, which does without what fails
                assert_equal(found, expected)
    assert raised > 5


def test_real_failures_are_recognised() -> None:
    for allocate in (lambda: torch.empty(1 << 50), lambda: np.empty(1 << 50)):
        with pytest.raises((RuntimeError, MemoryError)) as failure:
            allocate()
        assert is_out_of_memory(failure.value)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


@every_use
def test_a_device_too_small_for_the_batch(options: dict[str, Any], use: Use, caplog: pytest.LogCaptureFixture) -> None:
    """Every size of device, from one that holds the batch to one that does not hold a single image."""
    net, x = prepared(Tiny, 12)
    x = torch.cat([x, 2 * x, x / 2])
    with SmallDevice(math.inf) as device:
        expected = use(SandI(net, **options), x)
    limit, worked = float(device.peak), 0
    before = surroundings(net, x)
    while True:
        limit *= 0.7
        caplog.clear()
        detector = SandI(net, **options)
        with SmallDevice(limit) as device:
            try:
                found = use(detector, x)
            except torch.cuda.OutOfMemoryError as error:
                message = str(error)
                break
            worked += 1
            assert device.failures and len(warnings(caplog)) == 1
            assert_equal(found, expected)
            del found
            device.failures = 0
            assert_equal(use(detector, x), expected)
            assert not device.failures, "the size that worked was not kept"
    # a batch of the union, by forward passes alone, takes less than twice of what one image does
    assert worked >= (1 if options.get("combine") == "union" else 3)
    assert surroundings(net, x) == before
    gc.collect()
    buffers = 2 * sum(
        buffer.nbytes for buffer in net.buffers()
    )  # of the network's twin, and what its passes start from
    assert device.bytes == buffers, "the failed attempts are still held"
    assert "one image of shape (3, 12, 12)" in message and "then with 1 image" in message
    assert_equal(use(detector, x), expected)  # with memory back, the detector goes on


def test_lanes_are_halved_before_images(caplog: pytest.LogCaptureFixture) -> None:
    net, x = prepared(Tiny, 12)
    options: dict[str, Any] = {"variant": "Z", "steps": 3}
    detector = SandI(net, **options)
    detector(x)  # the first batch takes more than a replay does
    with SmallDevice(math.inf) as device:
        expected = detector(x)
    with SmallDevice(0.95 * device.peak):
        assert_equal(detector(x), expected)
    (told,) = warnings(caplog)
    assert "3 images and 2 lanes" in told and told.endswith("going on with 1 lane at a time")


def test_no_tensor_outlives_a_batch() -> None:
    net, x = prepared(Tiny, 12)
    for options, use in USES.values():
        detector = SandI(net, **options)
        with SmallDevice(math.inf) as device:
            for _ in range(3):
                use(detector, x)
            # without a collection of garbage; what stays is the twin's buffers, twice, and a number here and there
            assert device.bytes <= 2 * sum(buffer.nbytes for buffer in net.buffers()) + 64, options


def test_the_graph_is_gone_with_the_batch() -> None:
    """Inputs of a batch, which its graph would hold, die with it."""
    net, x = prepared(Tiny, 12)
    detector = SandI(net, variant="Z", steps=3)
    images = x.clone()
    seen = weakref.ref(images)
    _, tau = detector(images)
    del images
    assert seen() is None and tau.grad_fn is None


LIMITED = """
import resource, sys
import torch
from torch import nn
from openood_sandi import SandI

torch.manual_seed(0)
layers = [nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()) for _ in range(4)]
net = nn.Sequential(nn.Conv2d(3, 32, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)).eval()
x = torch.randn(8, 3, 48, 48)
options = dict(variant="Z", steps=3)
expected = SandI(net, **options, memory_fraction=1e-12)(x)[1]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))
found = SandI(net, **options)(x)[1]
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))  # to compare, torch imports more
torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
print("equal")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux refuses memory beyond a limit")
@pytest.mark.slow
def test_a_process_that_may_not_have_more_memory() -> None:
    """The real thing: the operating system refuses."""
    root = str(ROOT)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", LIMITED], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.stdout == "equal\n", result.stderr
    assert "out of memory with" in result.stderr and "going on with" in result.stderr
