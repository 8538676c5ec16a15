"""What every detector can do: score a batch, learn a threshold, decide, score a data set, be saved and loaded.

A detector reads each image once, into a summary: its predicted class and whatever a score needs of it. Scores are made
of summaries. So one stream of training images is enough: of those that are learnt from, the detector takes what it
needs and keeps nothing; of those that are kept out, the summaries wait until it has learnt, and are then scored.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from openood_sandi.detectors import saved
from openood_sandi.detectors.held_out import kept_out
from openood_sandi.detectors.options import options_of, require_share
from openood_sandi.engine.devices import exact_dtype, fetch
from openood_sandi.runs.loaders import batches_of, loader_of
from openood_sandi.runs.score import score_dataset

__all__ = ["Detector", "Score", "Scores"]

_log = logging.getLogger(__name__)

_FEW = 50
"""A threshold from fewer images than these is warned of."""


class Score(NamedTuple):
    """The summary of detectors that need to know no more of an image than its score."""

    pred: Tensor
    """Predicted classes (B,) int64."""
    score: Tensor
    """(B,)."""


class Scores(NamedTuple):
    """What a detector says of a data set, in its order."""

    pred: npt.NDArray[np.int64]
    """Predicted classes (N,)."""
    score: npt.NDArray[Any]
    """Scores (N,), larger = more out-of-distribution."""
    ood: npt.NDArray[np.bool_] | None
    """Whether each image is out-of-distribution (N,); None if the detector has no threshold."""


class Detector(ABC):
    """A detector of out-of-distribution images for one network: ``pred, score = detector(images)``.

    A subclass gives :meth:`_summary` and :meth:`_scored`. One that learns from training images names in ``fitted`` the
    attributes that it learns, and gives :meth:`_start`, :meth:`_learn` and :meth:`_settle`.

    Attributes:
        options: as given, with defaults.
        threshold: images with a larger score are out-of-distribution; None before :meth:`fit`. It can be set by hand.
    """

    #: The attributes that are learnt from training images: tensors, or mappings from names to tensors.
    fitted: ClassVar[tuple[str, ...]] = ()
    options: dict[str, Any]
    threshold: float | None = None
    #: Of the last images seen, (C, H, W).
    image_shape: tuple[int, ...] | None = None

    # ------------------------------------------------------------------ what a detector is made of

    @property
    @abstractmethod
    def net(self) -> nn.Module:
        """The network."""

    @property
    def split_names(self) -> tuple[str, ...]:
        """The places of the network that are read, where a detector has such; known after the first batch."""
        return ()

    @abstractmethod
    def _summary(self, x: Tensor) -> Any:
        """A ``NamedTuple`` of tensors (B, ...), of images (B, C, H, W), in one pass; ``pred`` are predicted classes."""

    @abstractmethod
    def _scored(self, summary: Any) -> Tensor:
        """The scores (B,) of a summary, by what was learnt; NaN where there is none."""

    def _start(self) -> None:  # noqa: B027 - there may be nothing to learn
        """Forget what was learnt: :meth:`fit` begins."""

    def _learn(self, summary: Any, labels: Tensor) -> None:  # noqa: B027
        """Take in training images of classes ``labels`` (n,), negative if unknown, on the summary's device."""

    def _settle(self, held: Any) -> None:  # noqa: B027
        """Set what is ``fitted``: by what was taken in and the summary of other ID images, on the CPU."""

    # ------------------------------------------------------------------ a batch

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted classes (B,) int64 and scores (B,) of images ``x`` (B, C, H, W) on the network's device.

        A larger score means more out-of-distribution; it is NaN where an image or the network's outputs are not finite.
        """
        summary = self._summary(x)
        self.image_shape = tuple(x.shape[1:])
        return _back(summary.pred, x), _back(self._scored(summary), x)

    def is_ood(self, x: Tensor) -> Tensor:
        """Whether the scores of images ``x`` (B, C, H, W) exceed the threshold, (B,) bool.

        An image whose score is NaN is out-of-distribution: nothing says that the network knows it.

        Raises:
            RuntimeError: there is no threshold yet.
        """
        threshold = self._known_threshold()
        return ~(self(x)[1] <= threshold)

    def remark(self) -> str:
        """What is to be said of the scores so far, where they are no exact ones; empty otherwise."""
        return ""

    # ------------------------------------------------------------------ a data set

    def fit(self, loader: Any, val: Any = None, tpr: float = 0.95) -> Any:
        """Learn from in-distribution (ID) images what the detector needs, and the threshold. The images are read once.

        Args:
            loader: training images: a ``DataLoader``, or any iterable, of batches (images, labels), {"data": images,
                "label": labels} or images; or an array or tensor (N, C, H, W). They should be transformed as test
                images are, not augmented. Labels are needed by detectors that say so.
            val: ID images, as ``loader``, that the network was not trained on, for the threshold (and for means and
                deviations). Without it, a detector that learns from images keeps a tenth of ``loader`` out for that,
                chosen by the images themselves, and one that only needs a threshold takes it from all of ``loader``.
                If the network was trained on these, it is surer of them than of new ID images, and more of the
                latter are taken for OOD than ``tpr`` says.
            tpr: the share of those ID images that are to be taken for ID, above 0 and at most 1.

        Returns:
            The detector itself.

        Raises:
            ValueError: ``tpr`` is out of range, or there are no images to learn from or to take the threshold from.
        """
        require_share(tpr=tpr)
        self._start()
        held = [*self._read(loader, val is None), *([] if val is None else self._read(val, True, learns=False))]
        if not held:
            raise ValueError(_NO_THRESHOLD_IMAGES if self.fitted or val is not None else "no images to fit to")
        joined = type(held[0])(*map(torch.cat, zip(*held, strict=True)))
        self._settle(joined)
        self.threshold = _quantile(self._scored(joined), tpr)
        if val is None:
            _log.warning(
                "the threshold is from %d of the images given to fit. If the network was trained on them it is too "
                "strict: more than %.3g %% of new ID images will be taken for OOD; pass val, ID images that the "
                "network has not seen",
                *(len(joined.pred), 100 * (1 - tpr)),
            )
        return self

    def score(self, loader: Any, *, unreadable: str = "stop", progress: bool | str = True) -> Scores:
        """Score every image of a data set, and decide if there is a threshold.

        Args:
            loader: images as :meth:`fit` takes them, on any device; also what :func:`openood_sandi.folder` returns.
            unreadable: "stop" at an image that cannot be read, or "skip" it, with a warning that names it.
            progress: tell how far it is: a bar on a terminal, else a line every half minute; a string is its title.

        Raises:
            openood_sandi.runs.unreadable.UnreadableImage: an image cannot be read.
        """
        device = self._device()
        pred, score, _ = score_dataset(self, loader_of(loader), device, unreadable=unreadable, progress=progress)
        if self.remark():
            _log.info("%s", self.remark())
        ood = None if self.threshold is None else ~(score <= self.threshold)
        return Scores(pred, score, ood)

    # ------------------------------------------------------------------ files

    def save(self, file: str | Path, notes: Mapping[str, str] | None = None) -> None:
        """Write options, what was learnt and the threshold, but not the network, to a safetensors file.

        With it go what tells the network from others, and the scores of a few seeded images, which :meth:`load`
        compares. Nothing in the file is ever executed.

        Args:
            file: where it is to be; what is there is replaced at once, or stays.
            notes: whatever else the file should say, for its reader, such as how images were transformed.

        Raises:
            RuntimeError: the detector has not been fitted.
        """
        if self.threshold is None:
            raise RuntimeError("there is nothing to save yet: call fit first, or set threshold")
        saved.save(self, file, notes or {})

    @classmethod
    def load(cls, file: str | Path, net: nn.Module, **others: Any) -> Any:
        """The detector that :meth:`save` wrote.

        Args:
            file: the safetensors file.
            net: the same network, with the same weights, in eval mode.
            others: arguments that no file can hold, such as ``logits`` of :class:`openood_sandi.SandI`.

        Raises:
            ValueError: the file is damaged, of another detector, or of a network with other weights.
            OSError: it cannot be read.
        """
        return saved.load(cls, file, net, others)

    def __repr__(self) -> str:
        told = {name: repr(value) for name, value in {**self._told(), "threshold": self.threshold}.items()}
        told |= {name: _shape_of(getattr(self, name)) for name in self.fitted if self.threshold is not None}
        options = ", ".join(f"{name}={value}" for name, value in told.items())
        return f"{type(self).__name__}({type(self.net).__name__}, {options})"

    # ------------------------------------------------------------------ inside

    def _told(self) -> dict[str, Any]:
        """The options as ``repr`` shows them."""
        return {name: self.options[name] for name in options_of(type(self))}

    def _known_threshold(self) -> float:
        if self.threshold is None:
            raise RuntimeError("there is no threshold to decide by: call fit with ID images first, or set threshold")
        return self.threshold

    def _device(self) -> torch.device:
        return next((tensor.device for tensor in [*self.net.parameters(), *self.net.buffers()]), torch.device("cpu"))

    def _read(self, source: Any, holds: bool, learns: bool = True) -> list[Any]:
        """Learns from images, but for those that it ``holds`` out; the summaries of these, on the CPU.

        A detector with nothing to learn holds all of them, or reads none.
        """
        learns = learns and bool(self.fitted)
        if not holds and not learns:
            return []
        held, wrong, device = [], 0, self._device()
        for images, labels in batches_of(source):
            out = kept_out(images) if learns and holds else torch.full((len(images),), holds)
            summary = self._summary(images.to(device, non_blocking=True))
            self.image_shape = tuple(images.shape[1:])
            # all that the host has to know of the batch, at once
            finite, *kept = fetch(_finite(summary), *_rows(summary, out.nonzero()[:, 0]))
            wrong += int((~finite).sum())
            if learns and bool((finite & ~out).any()):
                chosen = (finite & ~out).nonzero()[:, 0]
                self._learn(_rows(summary, chosen), labels.cpu()[chosen].to(summary.pred.device, non_blocking=True))
            if bool((finite & out).any()):
                held.append(type(summary)(*(part.detach()[finite[out]] for part in kept)))
        if wrong:
            _log.warning("%d images were left out of the fit: they, or the network's outputs, are not finite", wrong)
        return held


_NO_THRESHOLD_IMAGES = (
    "no images are left for the threshold: a tenth of the loader is kept out for that, and it was empty; give more "
    "images, or val, ID images that the network was not trained on"
)


def _back(result: Tensor, x: Tensor) -> Tensor:
    """``result`` where the images ``x`` are: a device without float64 has its sums taken on the CPU."""
    if result.device == x.device:
        return result
    dtype = exact_dtype(x.device) if result.is_floating_point() else result.dtype
    return result.to(x.device, dtype, non_blocking=True)


def _rows(summary: Any, chosen: Tensor) -> Any:
    """The rows of a summary that the numbers ``chosen``, on the CPU, name."""
    chosen = chosen.to(summary.pred.device, non_blocking=True)
    return type(summary)(*(part.index_select(0, chosen) for part in summary))


def _finite(summary: Any) -> Tensor:
    """Whether all numbers of each image are finite, (B,)."""
    finite = [part.flatten(1).isfinite().all(1) if part.dim() > 1 else part.isfinite() for part in summary]
    return torch.stack([each.to(summary.pred.device) for each in finite]).all(0)


def _quantile(scores: Tensor, tpr: float) -> float:
    """The smallest score that at least ``tpr`` of the images do not exceed."""
    ordered = scores.double().sort().values
    if bool(ordered.isnan().any()):
        raise ValueError("scores of ID images are NaN, though their summaries are finite: no threshold can be told")
    if len(ordered) < _FEW:
        _log.warning("the threshold is from %d ID images only, fewer than %d: it is rough", len(ordered), _FEW)
    return float(ordered[max(math.ceil(tpr * len(ordered) - 1e-9), 1) - 1])


def _shape_of(value: Any) -> str:
    """A fitted attribute, in short."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)}"
    return "{" + ", ".join(f"{name}: {_shape_of(part)}" for name, part in value.items()) + "}"
