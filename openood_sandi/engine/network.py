"""A classifier split at points of its forward pass: the life of a network that gradients are asked of.

:class:`SplitNetwork` finds the split points, freezes the parameters, cuts batches to what fits in memory, walks the
paths of Eq. 9 and leaves the network as it was found. It knows nothing of what is made of the gradients.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from openood_sandi.engine import checks, lanes
from openood_sandi.engine.agreement import compared
from openood_sandi.engine.devices import is_autocast
from openood_sandi.engine.errors import BackwardError, ReplayError
from openood_sandi.engine.memory import MemoryBudget, free_memory, is_out_of_memory
from openood_sandi.engine.plain import walk_plain
from openood_sandi.engine.split_point import Split
from openood_sandi.engine.splits import RecordedNetwork, record_network
from openood_sandi.engine.tape import Tape
from openood_sandi.engine.twin import Twin
from openood_sandi.engine.walk import Observer, Walk, walk_input, walk_splits

__all__ = ["Choice", "SplitNetwork", "Weights"]

_log = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U")

Choice = Callable[["SplitNetwork", RecordedNetwork, Tensor], Sequence[Split]]
"""From the network, a recorded pass and its images (b, C, H, W), which are noise, to the split points in call order."""


class Weights(NamedTuple):
    """Tells states of a network's weights from one another."""

    counted: tuple[object, ...]
    """Counts of writes. They tell most changes; not those through ``.data`` or ``.numpy()``, as pruning makes them, and
    into inference tensors."""
    sums: list[Tensor]
    """In which the others show (:mod:`.fingerprint`), where the weights are: to read them is to wait for the device."""

    @staticmethod
    def values(sums: Sequence[Tensor]) -> tuple[bytes, ...]:
        """``sums`` on the CPU as values to compare."""
        return tuple(hashlib.blake2b(of_device.numpy().data, digest_size=16).digest() for of_device in sums)


class SplitNetwork:
    """A classifier that is asked for gradients at split points.

    >>> network = SplitNetwork(net)
    >>> network.over(images, lambda part: network.walk(part, Walk(losses), observer), list)

    Args:
        net: a classifier in eval mode that maps images (B, C, H, W) to logits (B, classes). ``DataParallel``,
            ``DistributedDataParallel`` and ``torch.compile`` wrappers are looked through.
        logits: takes the logits (B, classes) out of what ``net`` returns, where that is something else.
        splits: the split points: "all" (every normalisation layer), "last_stage", module names and globs, as a list or
            separated by commas; or a function that chooses them. They are found on the first batch, with seeded
            noise of its images' shape, so that they do not depend on what the images show.
        memory_fraction: the share of the device's free memory that a batch may plan for.

    Raises:
        TypeError: ``net`` is no eager module, or ``logits`` cannot be called.
    """

    def __init__(
        self,
        net: nn.Module,
        logits: Callable[[Any], Tensor] | None = None,
        *,
        splits: str | Sequence[str] | Choice = "all",
        memory_fraction: float = 0.5,
    ) -> None:
        self.net = checks.eager_network(net)
        if logits is not None and not callable(logits):
            raise TypeError(f"logits={logits!r}: expected a function of what the network returns, to its logits")
        self.logits = logits
        self.memory_fraction = memory_fraction
        self.call_names: tuple[str, ...] = ()
        """The calls of the first batch's pass by name."""
        self.classes = 0
        """The number of logits, known after the first batch."""
        self._choose: Choice = splits if callable(splits) else partial(_named, splits)
        self._splits: tuple[Split, ...] = ()
        self._found_for: tuple[torch.Size, int] | None = None
        """Of which images, C x H x W, and in which making of the twin, the split points were found."""
        self._bytes_per_pixel = 0.0
        self._budget = MemoryBudget()
        self._twin = Twin(self.net, logits)
        self._running: nn.Module = self.net
        """What passes are made over: the twin, while a batch is worked on."""
        self._made = 0
        self._agreed: dict[object, set[tuple[str, ...]]] = {}
        """By kind of images and state of the network, the ways through its calls on which passes agree."""
        self._plain_because = ""
        self._hides = ""

    @property
    def is_split(self) -> bool:
        """Whether the split points are known."""
        return bool(self._splits)

    @property
    def is_plain(self) -> bool:
        """Whether every gradient takes whole passes over the network, whose calls are then not told to observers."""
        return bool(self._plain_because)

    @property
    def hides_code(self) -> bool:
        """Whether the recorded calls are not all that decides the gradients: there are custom autograd functions,
        backward hooks or scripted code."""
        return bool(self._hides)

    @property
    def splits(self) -> tuple[Split, ...]:
        """The split points in call order, found on the first batch; again where the images' size or a layer changes.

        Raises:
            RuntimeError: before the first batch, on which they are found.
        """
        if not self._splits:
            raise RuntimeError("the split points are found on the first batch; score one first")
        return self._splits

    def over(self, x: Tensor, work: Callable[[Tensor], T], join: Callable[[list[T]], U]) -> U:
        """``join`` of ``work(part)`` for each of the parts of a batch that fit in memory, in order.

        Meanwhile the parameters are frozen, gradients are enabled, and the split points are known. Where memory
        runs out all of it is done again in smaller parts.

        Args:
            x: images (B, C, H, W) as the network expects them, on its device.
            work: may call :meth:`walk`; each part is (b, C, H, W).
            join: makes one result of those of the parts; ``list`` keeps them apart.

        Raises:
            ValueError, TypeError: the images are not what the network takes, or the network is in train mode.
            ReplayError: the network cannot be split.
            torch.cuda.OutOfMemoryError: on any device, one image with one split at a time does not fit.
        """
        checks.require_images(x)
        checks.require_eval(self.net)
        with self._twin.turn:
            return self._budget.fit(lambda: join(self._over_twin(x, work)), x)

    def walk(self, x: Tensor, walk: Walk, observer: Observer, splits: Sequence[Split] | None = None) -> Tensor:
        """Walks the paths from ``x`` (B, C, H, W), tells the observer, and returns the clean logits (B, classes).

        To be called inside :meth:`over`.

        Args:
            x: the images.
            walk: losses and steps.
            observer: takes in gradients and whatever else it asks for.
            splits: where; by default at all split points.
        """
        splits = self.splits if splits is None else splits
        sites = [split.site for split in splits]
        if walk.attack.is_by_image:
            for split in splits:
                if split.batch_axis != 0 or split.fold != 1:
                    raise ValueError(
                        f"epsilon={walk.attack.epsilon}, stop_at_flip={walk.attack.stop_at_flip}: Eq. 3 and 4 stop and "
                        f"project image by image, but split point {split.name!r} has its images in another dimension "
                        "or several rows an image; name other splits, or leave both options at their defaults"
                    )
        if self._plain_because and walk.input_ascent is None:
            self._twin.state.restore()
            return walk_plain(self._running, x, sites, walk, observer).logits
        tape = Tape(self._running, sites, self._twin.state)
        if walk.input_ascent is None:
            logits = walk_splits(tape, x, walk, observer, self._budget)
        else:
            logits = walk_input(tape, x, walk, observer)
        self._require_agreed_way(x, tape.call_names)
        if tape.call_names != self.call_names and any(site.module is None for site in sites):
            raise ReplayError(
                "this batch takes the network through other calls than the first one did, so its split points at "
                "functional calls cannot be found again; use one detector for each image size, or name modules in "
                "splits"
            )
        return logits

    def weights(self) -> Weights:
        """What is another after a change of any tensor that the network holds. To be called inside :meth:`over`."""
        fingerprint = self._twin.fingerprint
        return Weights((self._made, *fingerprint.counts()), fingerprint.sums())

    def record(self, x: Tensor) -> RecordedNetwork:
        """One recorded pass over ``x`` (B, C, H, W), checked against a plain one. To be called inside :meth:`over`."""
        state = self._twin.state
        state.restore()
        with torch.no_grad():
            plain = self._running(x.clone())  # some networks write into their images
        if isinstance(plain, Tensor) and len(x) == 1:
            plain = lanes.as_batch(plain)
        checks.require_logits(plain)
        self.classes = plain.shape[1]
        state.restore()
        found, recorded = record_network(self._running, x)
        written = state.written(uncounted=True)
        checks.require_same(plain, recorded)
        if written and not self.is_plain:
            self._go_plain(written)
        state.restore()
        return found

    def not_finite(self, x: Tensor) -> list[str]:
        """For each of the images ``x`` (B, C, H, W) whose logits are not finite, where NaN or infinity comes from."""
        with self._twin.use() as module:
            return checks.not_finite(module, x)

    # ------------------------------------------------------------------ a batch

    def _over_twin(self, x: Tensor, work: Callable[[Tensor], T]) -> list[T]:
        with self._twin.use() as module:
            if module is not self._running:
                self._running, self._made = module, self._made + 1
            return self._in_parts(x, work)

    def _in_parts(self, x: Tensor, work: Callable[[Tensor], T]) -> list[T]:
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone() if x.is_inference() else x.detach()
            try:
                # which dimensions are the images' can depend on their size; a replaced layer may be no split point
                if self._found_for != (x.shape[1:], self._made):
                    self._find_splits(next(self._budget.parts(x[:2], 2)))
                self._require_agreement(x[:2])
                try:
                    return list(map(work, self._cut(x)))
                except ReplayError as error:
                    self._go_plain(str(error))
                    return list(map(work, self._cut(x)))
            except Exception as error:
                if not isinstance(error, ReplayError) and not is_out_of_memory(error):
                    checks.require_accepted(self._running, x)
                raise

    def _cut(self, x: Tensor) -> Iterator[Tensor]:
        """The batch in parts: half the memory budget holds a part's recorded pass; the other half is for replays."""
        self._budget.bytes = int(self.memory_fraction * free_memory(x.device)) // 2
        image = 3 * self._bytes_per_pixel * x[0].numel()  # results, what autograd saves beside them, gradients
        for part in self._budget.parts(x, max(1, int(self._budget.bytes / image))):
            self._twin.state.restore()
            yield part

    def _require_agreement(self, x: Tensor) -> None:
        """Compares replayed passes with plain ones, once for each kind of images and state of the network."""
        if self._kind(x) not in self._agreed and not self.is_plain:
            difference = self._difference(x)
            if difference:
                self._go_plain(difference)

    def _require_agreed_way(self, x: Tensor, call_names: tuple[str, ...]) -> None:
        """Compares again where ``x`` has taken the network through calls that no compared images did."""
        ways = self._agreed.get(self._kind(x))
        if ways is not None and call_names not in ways:
            ways.add(call_names)
            difference = self._difference(x[:2])
            if difference:
                raise ReplayError(difference)

    def _difference(self, x: Tensor) -> str:
        """In what replayed passes differ from plain ones on images ``x``, which are few."""
        sites = [split.site for split in self._splits]
        few = next(self._budget.parts(x, len(x)))
        found = compared(self._running, few, sites, self._budget, self._twin.state)
        self._agreed.setdefault(self._kind(x), set()).add(found.call_names)
        self._hides = self._hides or found.hides
        return found.difference

    def _kind(self, x: Tensor) -> tuple[object, ...]:
        return x.shape[1:], x.dtype, x.device, is_autocast(x.device), self._made

    def _go_plain(self, reason: str) -> None:
        """From now on makes whole passes, one split at a time.

        Raises:
            ReplayError: that is so already, or some split points are no modules' outputs.
        """
        if self.is_plain:
            raise ReplayError(reason)
        for split in self._splits:
            if split.site.module is None:
                raise ReplayError(
                    f"{reason}. Whole passes would do, if split point {split.name!r} were not the result of a function "
                    "call; name modules in splits"
                )
        self._plain_because = reason
        _log.warning(
            "every gradient takes whole passes over the network, one split point at a time, as %s. The scores are the "
            "same, the time is not",
            reason,
        )

    def _find_splits(self, x: Tensor) -> None:
        checks.warn_of_range(x)
        self.record(x)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
        found = self.record(noise)
        self.call_names = found.call_names
        self._bytes_per_pixel = found.size / x.numel()
        try:
            self._splits = tuple(self._choose(self, found, noise))
        except BackwardError as error:
            self._go_plain(str(error))
            self._splits = tuple(self._choose(self, found, noise))
        self._found_for = x.shape[1:], self._made


def _named(wanted: str | Sequence[str], network: SplitNetwork, found: RecordedNetwork, x: Tensor) -> Sequence[Split]:
    return found.splits(wanted, default="all")
