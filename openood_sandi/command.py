"""The command ``openood-sandi``: fit a detector to a folder of images, and decide on the images of another.

openood-sandi fit PHOTOS --network torchvision:resnet50 --checkpoint FILE --out detector.safetensors
openood-sandi score OTHERS --network torchvision:resnet50 --checkpoint FILE --detector detector.safetensors

Under ``torchrun`` its processes share the images to score, each on its own GPU, and the first one alone writes.
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, TextIO

import numpy as np
from torch import nn
from torch.utils.data import DataLoader, Dataset

from openood_sandi.detectors import saved
from openood_sandi.detectors.detector import Detector
from openood_sandi.detectors.options import as_option, options_of
from openood_sandi.engine.errors import ReplayError
from openood_sandi.heat_maps import write_heat_maps
from openood_sandi.image_input import Input
from openood_sandi.named_networks import FORMS, named
from openood_sandi.plugin import registry
from openood_sandi.runs import ranks
from openood_sandi.runs.loaders import Folder, readable
from openood_sandi.runs.score import score_dataset
from openood_sandi.runs.unreadable import UnreadableImage

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with ``arguments``, by default those of the process; returns its exit status: 0, or 2."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING if ranks.is_main_process() else logging.ERROR)
    try:
        given = _parser().parse_args(arguments)
        {"fit": _fit, "score": _score}[given.call](given)
    except (ValueError, TypeError, OSError, ReplayError, UnreadableImage, _WrongUsage) as error:
        print(f"openood-sandi: error: {error}", file=sys.stderr)
        print("usage: openood-sandi {fit,score} FOLDER --network NAME ...   (--help tells all)", file=sys.stderr)
        return 2
    return 0


# ---------------------------------------------------------------------- what can be called


def _fit(given: argparse.Namespace) -> None:
    net, transform, notes = _network(given)
    kind = _kind(given.method)
    options = dict(_option(kind, text) for text in given.option)
    loaders = [None if path is None else _loader(path, transform, given) for path in (given.folder, given.val)]
    train, val = (None if each is None else readable(each, given.unreadable) for each in loaders)
    detector = kind(net, **options).fit(train, val=val, tpr=given.tpr)
    if ranks.is_main_process():
        detector.save(given.out, {**notes, "tpr": repr(given.tpr)})
        print(f"{given.out}: {detector!r}", file=sys.stderr)
    if given.test is not None:
        test = _loader(given.test, transform, given)
        found = detector.score(test, unreadable=given.unreadable, progress=given.progress)
        if ranks.is_main_process():
            print(_id_lost(found.ood, given.tpr), file=sys.stderr)


def _score(given: argparse.Namespace) -> None:
    net, transform, notes = _network(given)
    about = saved.read(given.detector).about
    if about["notes"].get("transform") != notes["transform"]:
        raise ValueError(
            f"{given.detector} was fitted to images transformed by {about['notes'].get('transform', 'a program')}, and "
            f"these would be by {notes['transform']}: give the same --resize, --crop, --mean and --std"
        )
    kinds = {info.detector.rpartition(":")[2]: name for name, info in registry.infos().items()}
    detector = _kind(kinds.get(about["detector"], about["detector"])).load(given.detector, net)
    if given.heat_maps is not None and not hasattr(detector, "explain"):
        raise ValueError(f"--heat-maps: a {type(detector).__name__} has none; expected SandI or GAIA")
    images, device = Folder(given.folder, transform), next(net.parameters()).device
    numbered = DataLoader(_Numbered(images), batch_size=given.batch_size, num_workers=given.workers)
    found = score_dataset(detector, numbered, device, unreadable=given.unreadable, progress=given.progress)
    if not ranks.is_main_process():
        return
    pred, score, number = found
    ood = ~(score <= detector.threshold)
    _write_table(given.csv, [images.files[each] for each in number], pred, score, ood)
    told = about["notes"].get("tpr")
    lost = _id_lost(ood, None if told is None else float(told))
    print(lost if given.id else f"{int(np.sum(ood))} of {len(ood)} images are OOD", file=sys.stderr)
    if given.heat_maps is not None:
        write_heat_maps(detector, images, number.tolist(), given.folder, given.heat_maps, device)


def _id_lost(ood: Any, tpr: float | None) -> str:
    """How many ID images are taken for OOD, beside the share that the threshold promises; None if that is not known."""
    lost = f"{int(np.sum(ood))} of {len(ood)} ID images are taken for OOD: {np.mean(ood):.1%} lost"
    return lost if tpr is None else f"{lost}, where the threshold promises {1 - tpr:.1%}"


def _write_table(path: Path | None, files: list[Path], pred: Any, score: Any, ood: Any) -> None:
    """CSV into ``path``, or to standard output."""
    with _output(path) as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["file", "class", "score", "ood"])
        said = ["OOD" if each else "ID" for each in ood]
        table.writerows(zip(files, pred.tolist(), score.tolist(), said, strict=True))


class _Numbered(Dataset[tuple[Any, int]]):
    """The images of a folder, each with its number in place of a label, so that scores find their files."""

    def __init__(self, images: Folder) -> None:
        self.images, self.files = images, images.files

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.images[index][0], index


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        yield file


# ---------------------------------------------------------------------- what is given


def _network(given: argparse.Namespace) -> tuple[nn.Module, Input, dict[str, str]]:
    """The network on its device, how images are transformed, and what the file is to say of both."""
    net, usual = named(given.network, given.checkpoint)
    usual = usual or Input(0, 0)
    mean, std = usual.normalisation or ((), ())
    mean, std = tuple(given.mean or mean), tuple(given.std or std)
    crop = given.crop or usual.crop
    resize = given.resize or usual.resize or crop
    values = {"resize": resize, "crop": crop, "mean": mean, "std": std}
    missing = [f"--{name}" for name, value in values.items() if not value]
    if missing:
        raise ValueError(
            f"how images are transformed for --network {given.network} is not known: give {', '.join(missing)}, as its "
            "test images are (mean and standard deviation of pixels in 0..1, by channel)"
        )
    transform = Input(resize, crop, (mean, std), usual.interpolation)
    device = given.device or ranks.own_device()
    return net.to(device), transform, {"network": given.network, "transform": repr(transform)}


def _loader(path: Path, transform: Input, given: argparse.Namespace) -> DataLoader[Any]:
    return DataLoader(Folder(path, transform), batch_size=given.batch_size, num_workers=given.workers)


def _kind(name: str) -> Any:
    """A detector's class by the name of its method."""
    known = registry.infos()
    if name not in known:
        raise ValueError(f"no detector is called {name!r}; there are {', '.join(known)}")
    module, _, attribute = known[name].detector.partition(":")
    kind = getattr(import_module(module), attribute)
    if not issubclass(kind, Detector):
        raise ValueError(f"{name} cannot be fitted and saved here: {known[name].detector} is no openood_sandi.Detector")
    return kind


def _option(kind: Any, text: str) -> tuple[str, Any]:
    """NAME=VALUE as the detector takes it."""
    name, equals, value = text.partition("=")
    defaults = options_of(kind)
    if not equals or name not in defaults:
        raise ValueError(f"--option {text}: expected NAME=VALUE with NAME one of {', '.join(defaults)}")
    switch, default = {"True": True, "False": False}, defaults[name]
    if isinstance(default, bool):
        return name, as_option(kind, name, switch.get(value, value))
    if isinstance(default, int) and value.lstrip("-").isdigit():
        return name, int(value)
    return name, as_option(kind, name, value)


class _WrongUsage(Exception):
    """The arguments are not what the command takes."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _WrongUsage(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="openood-sandi", description="Tell which images of a folder are out-of-distribution.")
    calls = parser.add_subparsers(dest="call", required=True)
    fit = calls.add_parser("fit", help="learn from in-distribution images, and write a detector")
    fit.add_argument("--method", default="sandi", help="sandi (default), gaia, gsc, prototype_fusion, ...")
    fit.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the method's")
    fit.add_argument("--val", type=Path, metavar="FOLDER", help="images that the network was not trained on")
    fit.add_argument(
        "--tpr", type=float, default=0.95, help="the share of these to be taken for in-distribution (0.95)"
    )
    new = "ID images in neither: say how many of them are taken for OOD"
    fit.add_argument("--test", type=Path, metavar="FOLDER", help=new)
    fit.add_argument("--out", type=Path, required=True, metavar="FILE", help="the detector, in safetensors")
    score = calls.add_parser("score", help="score and decide, as CSV: file, class, score, ood")
    score.add_argument("--detector", type=Path, required=True, metavar="FILE", help="what fit has written")
    score.add_argument("--id", action="store_true", help="the images are ID: say which share of them is lost")
    score.add_argument("--csv", type=Path, metavar="FILE", help="where the table goes; standard output by default")
    score.add_argument("--heat-maps", type=Path, metavar="FOLDER", help="write a map of each image (S&I and GAIA)")
    for call in (fit, score):
        _add_what_is_shared(call)
    return parser


def _add_what_is_shared(call: argparse.ArgumentParser) -> None:
    call.add_argument("folder", type=Path, metavar="FOLDER", help="images, in subfolders by class where that matters")
    call.add_argument("--network", required=True, metavar="NAME", help=", ".join(FORMS))
    call.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights: torch's (weights only), safetensors")
    call.add_argument("--resize", type=int, metavar="PIXELS", help="the shorter side; the default is the network's own")
    call.add_argument("--crop", type=int, metavar="PIXELS", help="of either side, at the centre")
    call.add_argument("--mean", type=float, nargs=3, help="of pixels in 0..1, by channel")
    call.add_argument("--std", type=float, nargs=3, help="likewise")
    call.add_argument("--unreadable", choices=("stop", "skip"), default="stop", help="at files that cannot be read")
    call.add_argument("--batch-size", type=int, default=64)
    call.add_argument("--workers", type=int, default=0, help="processes that read images")
    call.add_argument("--device", help="by default the GPU, if there is one, that LOCAL_RANK names")
    call.add_argument(
        "--progress", action="store_true", help="tell how far it is: a bar, or lines where there is no terminal"
    )
