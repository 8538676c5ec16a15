"""On a real GPU, where there is one: scores as on the CPU, and no more waits than promised."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from openood_sandi.engine.memory import free_memory
from tests.helpers.every_detector import KINDS, TRAINING, images, like, made, network

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")

every_kind = pytest.mark.parametrize("name", KINDS)
BATCHES = [images(8, seed) for seed in (11, 12, 13)]


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """Which gradients are zero depends on it: no TF32, which is off for products of matrices anyway."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_scores_are_those_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and name in ("Prototype Fusion", "S&I-C"):
        pytest.skip("fitted to float32 images here")
    net = network(16).to(dtype)
    here = made(name, net)
    there = like(here, network(16).to(dtype).cuda())
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    for x in BATCHES:
        pred, score = there(x.to(dtype).cuda())
        assert pred.is_cuda and score.is_cuda
        expected = here(x.to(dtype))
        assert torch.equal(pred.cpu(), expected[0])
        torch.testing.assert_close(score.cpu(), expected[1], rtol=tolerance, atol=tolerance)


@every_kind
def test_a_batch_waits_once(name: str) -> None:
    there = like(made(name, network(16)), network(16).cuda())
    on_gpu = [x.cuda() for x in BATCHES]
    for x in on_gpu:
        there(x)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        for x in on_gpu:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                there(x)
            waits = [str(each.message) for each in caught if "synchroniz" in str(each.message)]
            assert len(waits) <= 1, waits
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_kind
def test_a_fit_and_a_data_set(name: str) -> None:
    kind, options = KINDS[name]
    here, there = (kind(net, **options).fit([TRAINING]) for net in (network(16), network(16).cuda()))
    loader = DataLoader(TensorDataset(torch.cat(BATCHES), torch.zeros(24).long()), batch_size=8)
    expected, found = here.score(loader, progress=False), there.score(loader, progress=False)
    np.testing.assert_array_equal(found.pred, expected.pred)
    np.testing.assert_allclose(found.score, expected.score, rtol=1e-3, atol=1e-3)


def test_memory_that_runs_out_is_made_do_with() -> None:
    """Only so much memory is left as the batch does not fit in."""
    net = network(64).cuda()
    x = images(256, 1).cuda()
    detector = made("S&I-Z", net)
    expected = detector(x)[1]
    device = x.device
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + (48 << 20)) / total, device)
    try:
        small = made("S&I-Z", net)
        torch.testing.assert_close(small(x)[1], expected, rtol=1e-3, atol=1e-3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert free_memory(device) > 0
