"""Scores of a whole data set: shared among ranks, resumed after an interruption, the same whichever way.

The unit of work is the batch as the loader makes it, so that an image meets the same batch mates, and its score has the
same bits, in one process and in many, at once and after an interruption.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, SequentialSampler

from openood_sandi import distributed, fingerprints
from openood_sandi.bad_images import Batch, Collate, Readable, record
from openood_sandi.score_cache import BatchScores, Entry, ScoreCache

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
        key: with ``cache``, everything that decides the scores beside this package's code, the order of the images,
            and the kind of device, which are added: the method and its options, the weights, the images.
        progress: show a progress bar (on rank 0, and with tqdm installed).
        description: the bar's, and the data set's name in messages.
        unreadable: "stop" at an image that cannot be read, or "skip" it: it is then missing in the results, and named
            in the log and, with ``cache``, in a file beside the scores. For a plain ``DataLoader`` only.

    Returns:
        Predicted classes (N,) int64, scores (N,) in their own dtype, labels (N,) int64, in the loader's order.

    Raises:
        ValueError: the loader gives no images, or ``cache`` comes without a ``key``.
        openood_sandi.bad_images.UnreadableImage: an image cannot be read, or with "skip" none can.
        RuntimeError: another rank has failed.
    """
    distributed.join()
    device = torch.device(device)
    order = _order(loader)
    entry = _entry(cache, key, loader, order, device, unreadable, description)
    found: dict[int, BatchScores] = {}
    for elsewhere in distributed.gather(entry.found if entry else {}):
        found |= elsewhere  # ranks may be on machines with folders of their own

    started = time.monotonic()
    count = len(order or ())
    scored: dict[int, BatchScores] = {}
    pending: list[tuple[int, tuple[Tensor, ...], Batch]] = []

    def settle() -> None:
        for number, (pred, values, label), batch in pending:
            scored[number] = BatchScores(_on_host(pred), _on_host(values), _on_host(label), batch.unreadable)
        pending.clear()
        if entry and entry.due:
            entry.write(scored)

    try:
        shown = functools.partial(_shown, progress=progress, description=description)
        for number, batch, mine in _share(loader, order, found, device, unreadable, shown):
            count = max(count, number + 1)
            if mine or number == 0:
                results = _scored(score, batch, device)
                if mine:
                    pending.append((number, results, batch))
            if len(pending) == _KEPT_ON_DEVICE or (entry and entry.due):
                settle()
    finally:  # after an error too: what is finished stays
        settle()
        if entry:
            entry.write(scored)

    ranks = distributed.gather((count, scored), patience=timedelta(seconds=time.monotonic() - started))
    if len({count for count, _ in ranks}) > 1:
        raise RuntimeError(
            f"ranks disagree on the number of batches ({', '.join(str(count) for count, _ in ranks)}); the script must "
            "give each of them the same loader"
        )
    for _, elsewhere in ranks:
        found |= elsewhere
    return _joined(found, entry, description)


def _joined(
    batches: Mapping[int, BatchScores], entry: Entry | None, description: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[np.int64]]:
    """All results in the loader's order; rank 0 puts them in the cache and tells what could not be read."""
    if not batches:
        raise ValueError(f"the loader{description and f' of {description}'} gives no batches; expected images to score")
    main = distributed.rank() == 0
    if main and entry:
        entry.complete(batches)
    result = BatchScores.concatenated(batches[number] for number in sorted(batches))
    if result.unreadable and (main or not len(result.pred)):  # with no image left this is an error, on every rank
        file = entry.beside("unreadable.tsv") if main and entry else None
        record(result.unreadable, len(result.pred) + len(result.unreadable), file)
    return result.pred, result.score, result.label


# ---------------------------------------------------------------------- the loader


def _order(loader: Iterable[Any]) -> list[Any] | None:
    """The indices of every batch, the same on all ranks; None if the loader cannot be asked for single batches."""
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return None
    if distributed.world_size() > 1 and isinstance(getattr(loader.batch_sampler, "sampler", None), DistributedSampler):
        raise ValueError(
            "the loader has a DistributedSampler, which repeats images to give every rank as many; give all ranks the "
            "loader that one process would have, and each scores its share of the batches"
        )
    # Through a loader, so that a shuffling sampler draws what it would draw for the images.
    sampler, generator = loader.batch_sampler, loader.generator
    order = list(DataLoader(_Indices(), batch_sampler=sampler, collate_fn=list, generator=generator))
    return order if _is_fixed(loader) else distributed.broadcast(order)


def _is_fixed(loader: DataLoader[Any]) -> bool:
    """Whether the loader's batches are the same ones each time, and in another process."""
    sampler = loader.batch_sampler
    return isinstance(sampler, (list, tuple)) or (
        type(sampler) is BatchSampler and isinstance(sampler.sampler, (SequentialSampler, range, list, tuple))
    )


class _Indices(Dataset[Any]):
    """Every index is its own item."""

    def __getitem__(self, index: Any) -> Any:
        return index


def _share(
    loader: Any,
    order: list[Any] | None,
    found: Mapping[int, BatchScores],
    device: torch.device,
    unreadable: str,
    shown: Callable[[Any], Iterable[Any]],
) -> Iterator[tuple[int, Batch, bool]]:
    """(number, batch, whether its results are this rank's to give): its share of the batches and, ahead, the first."""
    rank, ranks = distributed.rank(), distributed.world_size()
    if order is None:
        for number, batch in enumerate(shown(loader)):
            yield number, Batch(_images_and_labels(batch), ()), number % ranks == rank
        return
    share = [number for number in range(len(order)) if number not in found][rank::ranks]
    if share:
        numbers = share if share[0] == 0 else [0, *share]
        batches = shown(_subset(loader, [order[number] for number in numbers], device, unreadable))
        for number, batch in zip(numbers, batches, strict=True):
            yield number, batch, number == share[0] or number != 0


def _subset(loader: DataLoader[Any], batches: list[Any], device: torch.device, unreadable: str) -> DataLoader[Any]:
    """A loader of the given batches, which names unreadable images and is as ``loader`` in everything else."""
    return DataLoader(
        Readable(loader.dataset, unreadable),
        batch_sampler=batches,
        collate_fn=Collate(_Needed(loader.collate_fn)),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory or device.type == "cuda",
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
    )


class _Needed:
    """A ``collate_fn`` that keeps images and labels only: what else a batch has need not leave the worker."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> tuple[Tensor, Tensor]:
        return _images_and_labels(self.collate(items))


def _images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Mapping) and {"data", "label"} <= batch.keys():
        images, label = batch["data"], batch["label"]
    elif isinstance(batch, Sequence) and len(batch) == 2:
        images, label = batch
    else:
        names = f" of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise TypeError(
            f"the loader gives batches that are {type(batch).__name__}{names}; expected "
            "{'data': images (B, C, H, W), 'label': classes (B,)} or a pair of both"
        )
    return images, torch.as_tensor(label)


def _shown(batches: Any, progress: bool, description: str) -> Iterable[Any]:
    """``batches`` with a progress bar on rank 0, where tqdm is installed."""
    if not progress or not distributed.is_main_process():
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
    if order is None or not _is_fixed(loader):
        why = "is not a DataLoader over a map-style data set" if order is None else "gives its images in a random order"
        if distributed.rank() == 0:
            _log.warning("the score cache is left unused%s: the loader %s", description and f" for {description}", why)
        return None
    whole = {
        **key,
        "code": fingerprints.code(),
        "order": hashlib.sha256(repr(order).encode()).hexdigest(),
        "device": device.type,
        "arithmetic": fingerprints.arithmetic(device),
        "unreadable": unreadable,
    }
    return cache.entry(distributed.broadcast(whole))
