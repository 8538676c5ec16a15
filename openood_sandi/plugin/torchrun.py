"""OpenOOD under ``torchrun``: the ranks share the images, and rank 0 alone prints and writes.

OpenOOD knows ranks only where it has started them itself; here every rank runs all of its code. What costs time,
scoring and counting hits, goes through :func:`openood_sandi.score_dataset`, whose results all ranks have, so each
computes the same metrics. Ranks above 0 print nothing, and OpenOOD's own scripts write to temporary folders there
(:mod:`openood_sandi.plugin.own_folders`). Errors go to standard error on every rank. Without ``torchrun`` nothing is
changed.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from openood_sandi.plugin import own_folders
from openood_sandi.runs import keys, ranks
from openood_sandi.runs.score import score_dataset

#: How long ranks wait for the one that downloads what is missing.
_DOWNLOAD = timedelta(days=1)


def run_main(config: Any) -> None:
    """Prepare for OpenOOD's ``main.py`` with ``config``, if it is about a pipeline that tests.

    Raises:
        SystemExit: OpenOOD would start processes of its own in each of these.
    """
    if not config.pipeline.name.startswith("test"):
        return
    if config.num_gpus * config.num_machines > 1:
        raise SystemExit(
            f"num_gpus={config.num_gpus}, num_machines={config.num_machines}: torchrun has started the processes "
            "already, one for each GPU; use --num_gpus 1 --num_machines 1"
        )
    speak_once()
    if not ranks.is_main_process():
        own_folders.for_main(config)


@functools.cache
def speak_once() -> None:
    """Join the ranks; on all but rank 0, print nothing more. Once a process."""
    ranks.join()
    if not ranks.is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends


def share_inference(postprocessor: Any) -> None:
    """Have OpenOOD's ``BasePostprocessor``, and so each of its methods, score a share of the batches."""

    def inference(self: Any, net: Any, data_loader: Any, progress: bool = True) -> Any:
        score = functools.partial(self.postprocess, net)
        return score_dataset(score, data_loader, _device(net), key=_key(self, net), progress=progress)

    postprocessor.inference = functools.wraps(postprocessor.inference)(inference)


def share_evaluation(module: Any) -> None:
    """Have the ``Evaluator`` in ``module``, and the script that imports it, print and write once; share the counting of
    hits, and download once."""
    if not ranks.is_main_process():
        own_folders.for_script(sys.modules["__main__"])
    evaluator, own_init, fetch = module.Evaluator, module.Evaluator.__init__, module.data_setup

    @functools.wraps(own_init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        speak_once()
        own_init(self, *args, **kwargs)

    @functools.wraps(fetch)
    def data_setup(*args: Any, **kwargs: Any) -> None:
        if int(os.environ["LOCAL_RANK"]) == 0:
            fetch(*args, **kwargs)
        ranks.gather("data", None, _DOWNLOAD)
        if int(os.environ["LOCAL_RANK"]) > 0:
            fetch(*args, **kwargs)

    def classifier_inference(self: Any, data_loader: Any, msg: str = "Acc Eval", progress: bool = True) -> Any:
        def predict(images: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                pred = self.net(images).argmax(1)
            return pred, pred

        self.net.eval()
        pred, _, label = score_dataset(predict, data_loader, _device(self.net), progress=progress and msg)
        return torch.from_numpy(pred), torch.from_numpy(label)

    evaluator.__init__ = __init__
    evaluator._classifier_inference = functools.wraps(evaluator._classifier_inference)(classifier_inference)
    module.data_setup = data_setup


def _key(postprocessor: Any, net: Any) -> dict[str, object]:
    """What ranks that share a task have in common, as far as it can be told."""
    key: dict[str, object] = {"method": type(postprocessor).__qualname__}
    nets = net.values() if isinstance(net, dict) else [net]
    with contextlib.suppress(keys.Indescribable):
        key["network"] = [keys.network(each) for each in nets]
    return key


def _device(net: Any) -> torch.device:
    """Where a network is, or the networks of OpenOOD's dictionaries."""
    nets = net.values() if isinstance(net, dict) else [net]
    tensors = itertools.chain.from_iterable(itertools.chain(each.parameters(), each.buffers()) for each in nets)
    device: torch.device = next(tensors).device
    return device
