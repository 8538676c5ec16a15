"""A loader's batches by number: which there are, and those that are this rank's to score."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, SequentialSampler

from openood_sandi.runs import ranks
from openood_sandi.runs.unreadable import Batch, Collate, Readable

__all__ = ["images_and_labels", "is_fixed", "order_of", "share_of", "some_of"]


def order_of(loader: Iterable[Any]) -> list[Any] | None:
    """The indices of every batch, the same on all ranks; None if the loader cannot be asked for single batches."""
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return None
    if ranks.world_size() > 1 and isinstance(getattr(loader.batch_sampler, "sampler", None), DistributedSampler):
        raise ValueError(
            "the loader has a DistributedSampler, which repeats images to give every rank as many; give all ranks the "
            "loader that one process would have, and each scores its share of the batches"
        )
    sampler, generator = loader.batch_sampler, loader.generator
    if is_fixed(loader):
        return [list(batch) for batch in sampler]
    # Through a loader, so that a shuffling sampler draws what it would draw for the images.
    order = list(DataLoader(_Indices(), batch_sampler=sampler, collate_fn=list, generator=generator))
    return ranks.broadcast("order of images", order)


def is_fixed(loader: DataLoader[Any]) -> bool:
    """Whether the loader's batches are the same ones each time, and in another process."""
    sampler = loader.batch_sampler
    return isinstance(sampler, (list, tuple)) or (
        type(sampler) is BatchSampler and isinstance(sampler.sampler, (SequentialSampler, range, list, tuple))
    )


class _Indices(Dataset[Any]):
    """Every index is its own item."""

    def __getitem__(self, index: Any) -> Any:
        return index


def share_of(
    loader: Any,
    order: list[Any] | None,
    found: Container[int],
    device: torch.device,
    unreadable: str,
    shown: Callable[[Any], Iterable[Any]],
    first_seen: bool = False,
) -> Iterator[tuple[int, Batch, bool]]:
    """(number, batch, whether its results are this rank's to give): its share of the batches and, ahead, the first,
    unless that has been seen."""
    rank, of = ranks.rank(), ranks.world_size()
    if order is None:
        for number, batch in enumerate(shown(loader)):
            yield number, Batch(images_and_labels(batch), ()), number % of == rank
        return
    share = [number for number in range(len(order)) if number not in found][rank::of]
    if share:
        numbers = share if share[0] == 0 or first_seen else [0, *share]
        batches = shown(_subset(loader, [order[number] for number in numbers], device, unreadable, loader.generator))
        for number, batch in zip(numbers, _handed_over(batches), strict=True):
            yield number, batch, number == share[0] or number != 0


def some_of(
    loader: DataLoader[Any], order: list[Any], numbers: Sequence[int], device: torch.device, unreadable: str
) -> list[Batch]:
    """The batches of these numbers; nothing is drawn from a random generator of anybody else's for it."""
    batches = [order[number] for number in numbers]
    return list(_handed_over(_subset(loader, batches, device, unreadable, torch.Generator())))


def _handed_over(batches: Iterable[Any]) -> Iterator[Any]:
    """``batches``, with the error clear where a worker dies in the midst of handing one over."""
    try:
        yield from batches
    except (ConnectionError, EOFError) as error:
        raise RuntimeError(
            "a DataLoader worker has died while it handed over a batch: killed, or by a lack of memory; fewer workers "
            "or smaller batches need less"
        ) from error


def _subset(
    loader: DataLoader[Any],
    batches: list[Any],
    device: torch.device,
    unreadable: str,
    generator: torch.Generator | None,
) -> DataLoader[Any]:
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
        generator=generator,
        prefetch_factor=loader.prefetch_factor,
    )


class _Needed:
    """A ``collate_fn`` that keeps images and labels only: what else a batch has need not leave the worker."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> tuple[Tensor, Tensor]:
        return images_and_labels(self.collate(items))


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) and classes (B,) of a loader's batch; -1 where it has images only.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(batch, Sequence) and len(batch) == 1:  # as of a TensorDataset of images
        batch = batch[0]
    if isinstance(batch, Tensor):
        return batch, torch.full((len(batch),), -1)
    if isinstance(batch, Mapping) and {"data", "label"} <= batch.keys():
        images, label = batch["data"], batch["label"]
    elif isinstance(batch, Sequence) and len(batch) == 2:
        images, label = batch
    else:
        names = f" of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise TypeError(
            f"the loader gives batches that are {type(batch).__name__}{names}; expected "
            "{'data': images (B, C, H, W), 'label': classes (B,)}, a pair of both, or images"
        )
    return torch.as_tensor(images), torch.as_tensor(label)
