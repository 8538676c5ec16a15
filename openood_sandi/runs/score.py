"""Scores of a whole data set: shared among ranks, resumed after an interruption, the same whichever way.

The unit of work is the batch as the loader makes it, so that an image meets the same batch mates, and its score has the
same bits, in one process and in many, at once and after an interruption.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from openood_sandi.runs import keys, ranks
from openood_sandi.runs.batches import is_fixed, order_of, share_of, some_of
from openood_sandi.runs.cache import Entry, ScoreCache
from openood_sandi.runs.canary import sing
from openood_sandi.runs.contents import files_of
from openood_sandi.runs.progress import shown
from openood_sandi.runs.results import BatchScores, Results
from openood_sandi.runs.unreadable import Batch, name_without_score, record

__all__ = ["Scorer", "score_dataset"]

_log = logging.getLogger(__name__)

#: Images (B, C, H, W) on the device to predicted classes (B,) and scores (B,).
Scorer = Callable[[Tensor], tuple[Tensor, Tensor]]
#: For so many batches results stay on the device, so that nothing waits for it.
_KEPT_ON_DEVICE = 64


def score_dataset(
    score: Scorer,
    loader: Iterable[Any],
    device: torch.device | str,
    *,
    key: Mapping[str, object] | None = None,
    cache: ScoreCache | None = None,
    unreadable: str = "stop",
    canary: bool = True,
    progress: bool | str = True,
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
        key: what decides the scores, as :func:`openood_sandi.runs.keys.score_key` gives it: names and values, such as
            JSON takes. This package's code, the order of the images, what the loader makes batches with, the kind of
            device and its arithmetic are added.
            Needed with a cache; ranks whose keys differ are refused.
        cache: where finished batches are kept. It needs a loader whose order is fixed; with another one (shuffled,
            or a plain iterable) it is left unused, and the log says so. Of what it holds, one batch drawn at random is
            scored again; if that differs by more than :data:`openood_sandi.runs.canary.TOLERANCE`, nothing of it is
            used, and a warning names the files.
        unreadable: "stop" at an image that cannot be read, or "skip" it: it is then missing in the results, and named
            in the log and, with ``cache``, in a file beside the scores. For a plain ``DataLoader`` only.
        canary: whether to do so; it needs ``score`` even where nothing is left to be scored.
        progress: tell how far it is, on rank 0: a bar of tqdm's on a terminal, else a line every half minute; a string
            is its title, and the data set's name in messages.

    Returns:
        Predicted classes (N,) int64, scores (N,) in their own dtype, labels (N,) int64, in the loader's order.

    Raises:
        ValueError: the loader gives no images, or ``cache`` comes without a ``key``.
        openood_sandi.runs.unreadable.UnreadableImage: an image cannot be read, or with "skip" none can.
        RuntimeError: another rank has failed, or scores something else.
    """
    ranks.join()
    device, order = torch.device(device), order_of(loader)
    title = progress if isinstance(progress, str) else ""
    entry = None
    if cache is not None and (whole := _whole(key, loader, order, device, unreadable, title)) is not None:
        entry = cache.entry(ranks.broadcast("key", whole), _paths(loader, order or []))
    known = _known(_task(key, order, device), entry)
    sung = bool(canary and known and order is not None)
    if sung and not sing(known, lambda numbers: _again(score, loader, order or [], numbers, device, unreadable), entry):
        known = Results.of({})

    started = time.monotonic()
    mine = _Mine(entry)
    count = len(order or ())
    try:
        bar = functools.partial(_shown, progress=progress, title=title)
        for number, batch, is_mine in share_of(
            loader, order, known, device, unreadable, bar, sung and ranks.rank() == 0
        ):
            count = max(count, number + 1)
            results = _scored(score, batch, device) if is_mine or number == 0 else None
            if is_mine and results is not None:
                mine.add(number, results, batch)
    finally:  # after an error too: what is finished stays
        mine.settle()
        mine.write()

    patience = timedelta(seconds=time.monotonic() - started)
    for their_count, elsewhere in ranks.gather("scores", (count, mine.batches), patience):
        _require_same({"number of batches": their_count}, {"number of batches": count})
        known = known.joined(Results.of(elsewhere))
    return _told(known, entry, loader, order, title)


class _Mine:
    """What this rank has scored. Results stay on the device for a while, so that nothing waits for it."""

    def __init__(self, entry: Entry | None) -> None:
        self.batches: dict[int, BatchScores] = {}
        self._entry = entry
        self._on_device: list[tuple[int, tuple[Tensor, ...], Batch]] = []

    def add(self, number: int, results: tuple[Tensor, ...], batch: Batch) -> None:
        """Take in predicted classes, scores and labels of a batch, (n,) each."""
        self._on_device.append((number, results, batch._replace(data=None)))
        due = self._entry is not None and self._entry.due
        if due or len(self._on_device) == _KEPT_ON_DEVICE:
            self.settle()
        if due:
            self.write()

    def settle(self) -> None:
        """Fetch from the device what is there."""
        fetched = iter(_fetched([each for _, results, _ in self._on_device for each in results]))
        for number, _, batch in self._on_device:
            pred, values, label = (_as_array(next(fetched)) for _ in range(3))
            self.batches[number] = BatchScores(pred, values, label, batch.unreadable, batch.contents)
        self._on_device.clear()

    def write(self) -> None:
        """Put what has been fetched in the cache, where there is one."""
        if self._entry is not None:
            self._entry.write(self.batches)


# ---------------------------------------------------------------------- ranks


def _known(task: Mapping[str, object], entry: Entry | None) -> Results:
    """The batches that an earlier run has finished, of every rank: they may be on machines with folders of their own.

    Raises:
        RuntimeError: another rank is about to do something else.
    """
    known = Results.of({})
    for theirs, elsewhere in ranks.gather("task", (task, entry.found if entry else known)):
        _require_same(theirs, task)
        known = known.joined(elsewhere)
    return known


def _task(key: Mapping[str, object] | None, order: list[Any] | None, device: torch.device) -> dict[str, object]:
    """What a rank is about to do."""
    shared = {"code": keys.code(), "arithmetic": keys.arithmetic(device)} if ranks.world_size() > 1 else {}
    return {**(key or {}), **shared, "order": _digest(order)}


def _require_same(theirs: Mapping[str, object], ours: Mapping[str, object]) -> None:
    differing = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    if differing:
        raise RuntimeError(
            f"the ranks of torchrun share one task, but differ in {', '.join(differing)}; give all of them the same "
            "network, options and loader (or start independent runs without torchrun)"
        )


def _digest(order: list[Any] | None) -> str:
    return hashlib.sha256(repr(order).encode()).hexdigest()


# ---------------------------------------------------------------------- the results


def _told(
    results: Results, entry: Entry | None, loader: Any, order: list[Any] | None, title: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[np.int64]]:
    """All results in the loader's order; rank 0 puts them in the cache and tells what has no score."""
    if not results:
        raise ValueError(f"the loader{title and f' of {title}'} gives no batches; expected images to score")
    main = ranks.rank() == 0
    if main and entry:
        entry.complete(results)
    result = results.all
    if result.unreadable and (main or not len(result.pred)):  # with no image left this is an error, on every rank
        file = entry.beside("unreadable.tsv") if main and entry else None
        record(result.unreadable, len(result.pred) + len(result.unreadable), file)
    if main:
        name_without_score(result.score, getattr(loader, "dataset", None), order, result.unreadable)
    return result.pred, result.score, result.label


def _shown(batches: Any, progress: bool | str, title: str) -> Iterable[Any]:
    """``batches``, and how many images are done, or batches where it is not known how many images there are."""
    if progress is False:
        return batches  # type: ignore[no-any-return]
    sampler = getattr(batches, "batch_sampler", None)
    if not isinstance(sampler, list):
        return shown(batches, title)
    return shown(batches, title, "images", sum(map(len, sampler)), _images_of)


def _images_of(batch: Batch) -> int:
    return len(batch.unreadable) + (0 if batch.data is None else len(batch.data[1]))


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


def _fetched(results: Sequence[Tensor]) -> list[Tensor]:
    """Tensors (n,) on the CPU: those of one device and dtype in one transfer, as each makes the host wait."""
    fetched = [each.detach() for each in results]
    for kind in {(each.device, each.dtype) for each in fetched if each.device.type != "cpu"}:
        there = [number for number, each in enumerate(fetched) if (each.device, each.dtype) == kind]
        parts = torch.cat([fetched[number] for number in there]).cpu()
        for number, part in zip(there, torch.split(parts, [len(fetched[n]) for n in there]), strict=True):
            fetched[number] = part
    return fetched


def _again(
    score: Scorer, loader: Any, order: list[Any], numbers: Sequence[int], device: torch.device, unreadable: str
) -> list[BatchScores]:
    """Batches that were scored before, loaded and scored anew."""
    batches = some_of(loader, order, numbers, device, unreadable)
    mine = _Mine(None)
    for number, batch in enumerate(batches):
        mine.add(number, _scored(score, batch, device), batch)
    mine.settle()
    return [mine.batches[number] for number in sorted(mine.batches)]


def _as_array(values: Tensor) -> npt.NDArray[Any]:
    if not values.is_floating_point():
        return values.numpy().astype(np.int64)
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()  # NumPy has no bfloat16


# ---------------------------------------------------------------------- the cache


def _paths(loader: Any, order: list[Any]) -> dict[int, list[str]] | None:
    """{number of the batch: its images' files}, None if the images are no files."""
    files = files_of(loader.dataset)
    if files is None:
        return None
    return {number: [files[int(index)] for index in indices] for number, indices in enumerate(order)}


def _whole(
    key: Mapping[str, object] | None,
    loader: Any,
    order: list[Any] | None,
    device: torch.device,
    unreadable: str,
    title: str,
) -> dict[str, object] | None:
    """The key with what this module knows to decide scores; None where that cannot be told, and rank 0 says so."""
    if key is None:
        raise ValueError("a cache needs a key: what decides the scores, as the method, its options and the weights")
    if order is None:
        why = "the loader is not a DataLoader over a map-style data set"
    elif not is_fixed(loader):
        why = "the loader gives its images in a random order"
    else:
        try:
            return {**key, **_of_the_run(loader, order, device, unreadable)}
        except keys.Indescribable as error:
            why = f"the loader's collate_fn or worker_init_fn cannot be told from others: {error}"
    if ranks.rank() == 0:
        _log.warning("the score cache is left unused%s: %s", title and f" for {title}", why)
    return None


def _of_the_run(loader: Any, order: list[Any], device: torch.device, unreadable: str) -> dict[str, object]:
    batches = keys.state({"collate_fn": loader.collate_fn, "worker_init_fn": loader.worker_init_fn})
    run = {"order": _digest(order), "batches": batches, "device": device.type, "unreadable": unreadable}
    return {**run, "code": keys.code(), "arithmetic": keys.arithmetic(device)}
