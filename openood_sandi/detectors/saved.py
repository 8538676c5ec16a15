"""A fitted detector in a safetensors file: written, and read back for the same network only.

The file has what was learnt as tensors and, as JSON, the options, the threshold, and what identifies the network:
names, shapes and a digest of its weights, the split points, and the scores of a few seeded images. Reading executes
nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from openood_sandi.detectors.options import options_of
from openood_sandi.engine import checks
from openood_sandi.runs.files import replace

if TYPE_CHECKING:
    from openood_sandi.detectors.detector import Detector

__all__ = ["Saved", "load", "read", "save"]

_log = logging.getLogger(__name__)

_HEAD, _FORMAT = "openood-sandi", "openood-sandi detector 1"
_PROBES = 4
#: Relative differences of the probe's scores up to here are rounding, such as another machine's.
_ROUNDING = 1e-5


class Saved(NamedTuple):
    """What a file holds."""

    about: dict[str, Any]
    """The detector's class, options, threshold and the network's identity."""
    tensors: dict[str, Tensor]
    """What was learnt, and the scores of the probe."""


def save(detector: Detector, file: str | Path, notes: Mapping[str, str]) -> None:
    """Write ``detector``, which is fitted, as :meth:`.detector.Detector.save` says."""
    from safetensors.torch import save as in_safetensors

    if detector.image_shape is None:
        raise RuntimeError("the detector has not seen an image, so that its file could not be told apart: score some")
    tensors = {"probe": _probed(detector, detector.image_shape)}
    names: dict[str, list[str] | None] = {}
    for name in detector.fitted:
        value = getattr(detector, name)
        names[name] = list(value) if isinstance(value, Mapping) else None
        tensors |= {_key(name, part): each for part, each in _parts(value).items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = json.dumps(
        {
            "detector": type(detector).__name__,
            "options": {name: detector.options[name] for name in options_of(type(detector))},
            "threshold": detector.threshold,
            "fitted": names,
            "image": detector.image_shape,
            "splits": detector.split_names,
            "network": _identity(detector.net),
            "torch": torch.__version__,
            "notes": dict(notes),
        }
    )
    head = json.dumps({"format": _FORMAT, "about": about, "digest": _digest(about, tensors)})
    replace(Path(file).expanduser(), in_safetensors(tensors, {_HEAD: head}))  # one entry: several come in any order


def read(file: str | Path) -> Saved:
    """What a file of :func:`save` holds.

    Raises:
        ValueError: it is no such file, or damaged.
        OSError: it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(file).expanduser()
    with path.open("rb"):  # for the error of Python's own where it is missing
        pass
    try:
        with safe_open(path, framework="pt") as opened:
            head = json.loads((opened.metadata() or {}).get(_HEAD, "{}"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    except SafetensorError as error:
        raise ValueError(
            f"{str(file)!r} is no safetensors file, or damaged ({error}); expected one of save()"
        ) from error
    if head.get("format") != _FORMAT:
        what = f"says {head['format']!r}" if "format" in head else "is a safetensors file of something else"
        raise ValueError(f"{str(file)!r} {what}; expected {_FORMAT!r}, as a detector's save() writes it")
    if head["digest"] != _digest(head["about"], tensors):
        raise ValueError(f"{str(file)!r} is damaged: its content is not what was saved; save the detector again")
    return Saved(json.loads(head["about"]), tensors)


def load(cls: Callable[..., Detector], file: str | Path, net: nn.Module, others: Mapping[str, Any]) -> Detector:
    """The detector of class ``cls`` that ``file`` holds, on ``net``, as :meth:`.detector.Detector.load` says."""
    about, tensors = read(file)
    if about["detector"] != cls.__name__:
        raise ValueError(
            f"{str(file)!r} holds a {about['detector']}: use {about['detector']}.load, not {cls.__name__}.load"
        )
    _require_same_network(about["network"], _identity(checks.eager_network(net)), file)
    detector = cls(net, **others, **about["options"])
    for name, parts in about["fitted"].items():
        value: Any = tensors[_key(name, None)] if parts is None else {part: tensors[_key(name, part)] for part in parts}
        setattr(detector, name, value)
    detector.threshold = about["threshold"]
    detector.image_shape = tuple(about["image"])
    _compare_probe(detector, about, tensors["probe"], file)
    return detector


def _compare_probe(detector: Detector, about: Mapping[str, Any], before: Tensor, file: str | Path) -> None:
    """Raises where the split points are others; warns where the scores of the probe are."""
    now = _probed(detector, tuple(about["image"]))
    if list(detector.split_names) != about["splits"]:
        raise ValueError(
            f"{str(file)!r} is of a detector that split the network at {_few(about['splits'])}; here it is split at "
            f"{_few(detector.split_names)}, so that scores are others: fit again"
        )
    difference = _largest_difference(before.double(), now.double().cpu())
    if difference > _ROUNDING:
        _log.warning(
            "%s: the scores of %d seeded images differ from those at saving by up to %.2g of their size (torch %s "
            "then, %s now): check the threshold, or fit again",
            *(file, len(now), difference, about["torch"], torch.__version__),
        )


def _largest_difference(before: Tensor, now: Tensor) -> float:
    """Relative to the score before; infinite where only one of both is NaN."""
    relative = (now - before).abs() / before.abs().clamp_min(1e-12)
    relative[now.isnan() & before.isnan()] = 0
    return float(relative.nan_to_num(torch.inf).max())


def _probed(detector: Detector, shape: tuple[int, ...]) -> Tensor:
    """Scores of seeded noise, (4,)."""
    like = next((each for each in detector.net.parameters() if each.is_floating_point()), torch.zeros(0))
    noise = torch.randn((_PROBES, *shape), generator=torch.Generator().manual_seed(0))
    return detector(noise.to(like))[1]


# ---------------------------------------------------------------------- the network's identity


def _identity(net: nn.Module) -> dict[str, Any]:
    tensors = dict([*net.named_parameters(), *net.named_buffers()])
    return {"shapes": {name: list(tensor.shape) for name, tensor in tensors.items()}, "weights": _digest("", tensors)}


def _require_same_network(theirs: Mapping[str, Any], ours: Mapping[str, Any], file: str | Path) -> None:
    then, now = theirs["shapes"], ours["shapes"]
    differing = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{str(file)!r} was fitted to another network: {name!r} has shape {then.get(name, 'none')} there and "
            f"{now.get(name, 'none')} here; load the network that it was fitted to, or fit again"
        )
    if theirs["weights"] != ours["weights"]:
        raise ValueError(
            f"{str(file)!r} was fitted to a network of the same shape with other weights; load the weights that it was "
            "fitted to, or fit again"
        )


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---------------------------------------------------------------------- names


def _parts(value: Any) -> dict[str | None, Tensor]:
    return dict(value) if isinstance(value, Mapping) else {None: value}


def _key(name: str, part: str | None) -> str:
    return f"fitted/{name}" if part is None else f"fitted/{name}/{part}"


def _few(names: Any) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:2])}, ... ({len(names)} in all)"
