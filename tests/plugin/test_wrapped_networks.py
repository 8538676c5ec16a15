"""OpenOOD wraps networks for several GPUs: its postprocessors look through that, and the log says so once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn
from torch.utils.data import DataLoader

from openood_sandi.plugin import registry
from tests.helpers import tiny_suite
from tests.plugin.test_more_postprocessors import Images


def distributed(net: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(net.requires_grad_(True)).eval()


@pytest.mark.parametrize("wrap", [nn.DataParallel, distributed])
@pytest.mark.parametrize("name", registry.DETECTORS)
def test_a_wrapped_network_scores_alike(
    name: str, wrap: Any, checkout: Path, process_group: None, caplog: pytest.LogCaptureFixture
) -> None:
    from openood_sandi.postprocessor import postprocessor_of

    caplog.set_level(logging.INFO, "openood_sandi")
    net = tiny_suite.network()
    sets = [DataLoader(Images(tiny_suite.images(count, count, 5), lambda x: x), batch_size=4) for count in (60, 10, 6)]
    found = []
    for given in (net, wrap(net)):
        postprocessor = postprocessor_of(registry.infos()[name])()
        postprocessor.setup(given, {"train": sets[0], "val": sets[0]}, {})
        found.append([postprocessor.inference(given, each, progress=False) for each in sets[1:]])
    for plain, wrapped in zip(*found, strict=True):
        for column in range(3):
            np.testing.assert_array_equal(wrapped[column], plain[column])
    assert caplog.text.count("looked through") == 1
