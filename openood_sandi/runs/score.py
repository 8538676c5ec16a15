"""Scores of a whole data set: shared among ranks, resumed after an interruption, the same whichever way.

The unit of work is the batch as the loader makes it, so that an image meets the same batch mates, and its score has the
same bits, in one process and in many, at once and after an interruption.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from openood_sandi.runs import keys, ranks
from openood_sandi.runs.batches import is_fixed, order_of, share_of
from openood_sandi.runs.cache import BatchScores, Entry, ScoreCache
from openood_sandi.runs.unreadable import Batch, Unreadable, name_without_score, record

__all__ = ["Scorer", "infer"]

_log = logging.getLogger(__name__)

#: Images (B, C, H, W) on the device to predicted classes (B,) and scores (B,).
Scorer = Callable[[Tensor], tuple[Tensor, Tensor]]
#: For so many batches results stay on the device, so that nothing waits for it.
_KEPT_ON_DEVICE = 64


def infer(
    score: Scorer,
    loader: Iterable[Any],
    device: torch.device | str,
    *,
    cache: ScoreCache | None = None,
    key: Mapping[str, object] | None = None,
    progress: bool = True,
    description: str = "",
    unreadable: str = "stop",
) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Score every image of a loader.

    Under ``torchrun``, rank r of N takes every N-th batch that is still to be scored, and all ranks return all results.
    With a cache, batches that an earlier run has finished are neither loaded nor scored. Some scorers study the
    first images they see: ``score`` therefore sees the loader's first batch first in every process, also where its
    results are another rank's or known already.

    Args:
        score: images (B, C, H, W) on ``device`` to (predicted class (B,), score (B,)).
        loader: a ``DataLoader``, or any iterable, of batches {"data": images, "label": classes} or (images, classes).
            What is not a plain ``DataLoader`` of a map-style data set is iterated in full by every rank.
        device: where ``score`` expects its images.
        cache: where finished batches are kept. It needs a loader whose order is fixed; with another one (shuffled,
            or a plain iterable) it is left unused, and the log says so.
        key: names and values, such as JSON takes, of what decides the scores: the method and its options, the weights,
            the images. This package's code, the order of the images and the kind of device are added. Needed with a
            cache; ranks whose keys differ in anything but "images" are refused.
        progress: show a progress bar (on rank 0, and with tqdm installed).
        description: the bar's, and the data set's name in messages.
        unreadable: "stop" at an image that cannot be read, or "skip" it: it is then missing in the results, and named
            in the log and, with ``cache``, in a file beside the scores. For a plain ``DataLoader`` only.

    Returns:
        Predicted classes (N,) int64, scores (N,) in their own dtype, labels (N,) int64, in the loader's order.

    Raises:
        ValueError: the loader gives no images, or ``cache`` comes without a ``key``.
        openood_sandi.runs.unreadable.UnreadableImage: an image cannot be read, or with "skip" none can.
        RuntimeError: another rank has failed, or scores something else.
    """
    ranks.join()
    device = torch.device(device)
    order = order_of(loader)
    entry = _entry(cache, key, loader, order, device, unreadable, description)
    found: dict[int, BatchScores] = {}
    task = _task(key, order)
    for theirs, elsewhere in ranks.gather("task", (task, entry.found if entry else {})):
        _require_same(theirs, task)
        found |= elsewhere  # ranks may be on machines with folders of their own

    started = time.monotonic()
    count = len(order or ())
    scored: dict[int, BatchScores] = {}
    pending: list[tuple[int, tuple[Tensor, ...], tuple[Unreadable, ...]]] = []

    def settle() -> None:
        for number, (pred, values, label), unread in pending:
            scored[number] = BatchScores(_on_host(pred), _on_host(values), _on_host(label), unread)
        pending.clear()
        if entry and entry.due:
            entry.write(scored)

    try:
        shown = functools.partial(_shown, progress=progress, description=description)
        for number, batch, mine in share_of(loader, order, found, device, unreadable, shown):
            count = max(count, number + 1)
            if mine or number == 0:
                results = _scored(score, batch, device)
                if mine:
                    pending.append((number, results, batch.unreadable))  # not the images
            if len(pending) == _KEPT_ON_DEVICE or (entry and entry.due):
                settle()
    finally:  # after an error too: what is finished stays
        settle()
        if entry:
            entry.write(scored)

    patience = timedelta(seconds=time.monotonic() - started)
    for their_count, elsewhere in ranks.gather("scores", (count, scored), patience):
        _require_same({"number of batches": their_count}, {"number of batches": count})
        found |= elsewhere
    pred, values, label = _joined(found, entry, description)
    if ranks.rank() == 0:
        unread = [image for number in found for image in found[number].unreadable]
        name_without_score(values, getattr(loader, "dataset", None), order, unread)
    return pred, values, label


def _task(key: Mapping[str, object] | None, order: list[Any] | None) -> dict[str, object]:
    """What a rank is about to do; files of the same images may have other dates on other machines."""
    return {**{name: value for name, value in (key or {}).items() if name != "images"}, "order": _digest(order)}


def _require_same(theirs: Mapping[str, object], ours: Mapping[str, object]) -> None:
    differing = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    if differing:
        raise RuntimeError(
            f"the ranks of torchrun share one task, but differ in {', '.join(differing)}; give all of them the same "
            "network, options and loader (or start independent runs without torchrun)"
        )


def _digest(order: list[Any] | None) -> str:
    return hashlib.sha256(repr(order).encode()).hexdigest()


def _joined(
    batches: Mapping[int, BatchScores], entry: Entry | None, description: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[np.int64]]:
    """All results in the loader's order; rank 0 puts them in the cache and tells what could not be read."""
    if not batches:
        raise ValueError(f"the loader{description and f' of {description}'} gives no batches; expected images to score")
    main = ranks.rank() == 0
    if main and entry:
        entry.complete(batches)
    result = BatchScores.concatenated(batches[number] for number in sorted(batches))
    if result.unreadable and (main or not len(result.pred)):  # with no image left this is an error, on every rank
        file = entry.beside("unreadable.tsv") if main and entry else None
        record(result.unreadable, len(result.pred) + len(result.unreadable), file)
    return result.pred, result.score, result.label


def _shown(batches: Any, progress: bool, description: str) -> Iterable[Any]:
    """``batches`` with a progress bar on rank 0, where tqdm is installed."""
    if not progress or not ranks.is_main_process():
        return batches  # type: ignore[no-any-return]
    try:
        from tqdm import tqdm
    except ImportError:
        return batches  # type: ignore[no-any-return]
    return tqdm(batches, desc=description or None)  # type: ignore[no-any-return]


# ---------------------------------------------------------------------- a batch


def _scored(score: Scorer, batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted classes, scores and labels of a batch, (n,) each, on whatever device."""
    if batch.data is None:
        nothing = torch.empty(0, dtype=torch.int64)
        return nothing, nothing, nothing
    images, label = batch.data
    if device.type == "cuda" and images.device.type == "cpu" and not images.is_pinned():
        images = images.pin_memory()  # without it non_blocking waits all the same
    pred, values = score(images.to(device, non_blocking=True))
    if not pred.shape == values.shape == label.shape == images.shape[:1]:
        raise ValueError(
            f"{len(images)} images with labels {tuple(label.shape)} have predictions {tuple(pred.shape)} and scores "
            f"{tuple(values.shape)}; expected one of each per image"
        )
    return pred, values, label


def _on_host(values: Tensor) -> npt.NDArray[Any]:
    values = values.detach().cpu()
    if not values.is_floating_point():
        return values.numpy().astype(np.int64)
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # NumPy has no bfloat16


# ---------------------------------------------------------------------- the cache


def _entry(
    cache: ScoreCache | None,
    key: Mapping[str, object] | None,
    loader: Any,
    order: list[Any] | None,
    device: torch.device,
    unreadable: str,
    description: str,
) -> Entry | None:
    if cache is None:
        return None
    if key is None:
        raise ValueError("a cache needs a key: what decides the scores, as the method, its options and the weights")
    if order is None or not is_fixed(loader):
        why = "is not a DataLoader over a map-style data set" if order is None else "gives its images in a random order"
        if ranks.rank() == 0:
            _log.warning("the score cache is left unused%s: the loader %s", description and f" for {description}", why)
        return None
    whole = {
        **key,
        "code": keys.code(),
        "order": _digest(order),
        "device": device.type,
        "arithmetic": keys.arithmetic(device),
        "unreadable": unreadable,
    }
    return cache.entry(ranks.broadcast("key", whole))
