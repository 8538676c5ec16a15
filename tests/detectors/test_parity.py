"""SandI, and the naive reference it is tested against elsewhere, reproduce the numbers of the authors' released code.

The files (see their README) hold weights, images and every number of the released S&I and GAIA code. All ``*.npz``
files of ``$SANDI_PARITY``, or of ``../shared/parity`` beside the checkout, are read. The released ``add`` is our
``union``, ``multiply`` our ``intersection``; ``MAX`` steps ascend what is attributed. Released scores in our terms:

    Z: mean over all channels of density^2 = tau^2 / channels
    A: mean over the inner channels of (inner / output)^2 with sums over t where we take means = T tau^2 / channels
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from openood_sandi import SandI
from tests.helpers.oracle import Options, Reference
from tests.helpers.parity_networks import BiT, ResNet, network_of
from tests.helpers.places import PARITY

FOLDER = PARITY
FILES = sorted(FOLDER.glob("*.npz"))
ABSENT = f"no parity files in {FOLDER}: OPENOOD_SANDI_DATA=FOLDER names another place, with parity beside it"

COMBINE = {"add": "union", "multiply": "intersection"}
ASCENT = {"CE": "cross_entropy", "MAX": "max_logit"}
DTYPE = {"f32": torch.float32, "f64": torch.float64}
NORMS = (nn.BatchNorm2d, nn.GroupNorm)

# Relative tolerances of scores. In float64 the pattern of non-zeros is reproduced position by position.
SCORE = {("Z", "f64"): 1e-12, ("A", "f64"): 1e-10, ("Z", "f32"): 5e-6, ("A", "f32"): 1e-5}
# In float32 a unit within rounding of zero may fall on either side of it.
FLIPS = {"f64": 0, "f32": 2}
# Images of the four on which Z and the reference are checked: every number is one image's own.
TWO = slice(2)


class Entry(NamedTuple):
    """One setting of the released code, e.g. f64/Z/T2/CE/add/0.001000."""

    precision: str
    kind: str
    steps: int
    ascent: str
    combine: str
    step_size: float
    key: str


class Parity:
    def __init__(self, path: Path) -> None:
        self.data = np.load(path)
        self.weights = {k[2:]: torch.from_numpy(self.data[k]) for k in self.data.files if k.startswith("w/")}
        self.splits = [str(name) for name in self.data["split_names"]]
        self.name = path.stem

    @cache  # noqa: B019 - a handful of small objects that live as long as the tests
    def at(self, precision: str) -> tuple[nn.Module, Tensor]:
        dtype = DTYPE[precision]
        weights = {k: w.to(dtype) if w.is_floating_point() else w for k, w in self.weights.items()}
        return network_of(weights), torch.from_numpy(self.data["x"]).to(dtype)

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.data[key])

    def entries(self) -> list[Entry]:
        found = []
        for key in self.data.files:
            parts = key.split("/")
            if parts[-1] != "score" or len(parts) != 7:
                continue
            precision, kind, steps, ascent, combine, size, _ = parts
            step_size = 1 / 255 if size == "0.003922" else float(size)
            found.append(Entry(precision, kind, int(steps[1:]), ascent, combine, step_size, key.rpartition("/")[0]))
        return found

    def norms(self, *stages: str) -> list[str]:
        net, _ = self.at("f64")
        return [n for n, m in net.named_modules() if isinstance(m, NORMS) and n.startswith(stages or "")]

    def gaia_splits(self) -> list[str]:
        """Where released GAIA-Z looks: BiT at the split points, the others at every normalisation layer."""
        return self.splits if isinstance(self.at("f64")[0], BiT) else self.norms()

    def gaia_a(self) -> tuple[list[str], str]:
        """Split points and F of released GAIA-A. Only the ResNet's F has positions: they are averaged over."""
        net, _ = self.at("f64")
        if isinstance(net, BiT):
            return self.splits[:-1], self.splits[-1]
        return (self.norms("layer3", "layer4"), "layer4") if isinstance(net, ResNet) else (self.norms(), "AdaptAvgPool")

    def z_splits(self, entry: Entry) -> list[str]:
        """Zspec reads BiT's last normalisation itself in place of the whole before_head."""
        return self.splits if entry.kind == "Z" else [*self.splits[:-1], f"{self.splits[-1]}.gn"]


PARITY = [Parity(path) for path in FILES]


def each(
    kinds: tuple[str, ...], precisions: tuple[str, ...] = ("f64", "f32"), combines: tuple[str, ...] = tuple(COMBINE)
) -> pytest.MarkDecorator:
    cases = [
        pytest.param(parity, entry, id=f"{parity.name}-{entry.key}", marks=marks(parity, entry))
        for parity in PARITY
        for entry in parity.entries()
        if entry.kind in kinds and entry.precision in precisions and entry.combine in combines and not chaotic(entry)
    ]
    return pytest.mark.parametrize(
        "parity, entry", cases or [pytest.param(None, None, marks=pytest.mark.skip(reason=ABSENT))]
    )


def marks(parity: Parity, entry: Entry) -> list[pytest.MarkDecorator]:
    """Z in a deep network takes seconds in float64 or for several steps. BiT, with few splits, goes the same ways; of
    float32 one step and the usual last split are among the quick ones."""
    if deep(parity) and entry.kind == "Z" and entry.steps > 2:
        return [pytest.mark.long]
    if entry.precision == "f64":
        quick = not deep(parity) or entry.kind != "Z"
    else:
        quick = entry.steps == 1 and entry.kind != "Zspec"
    return [] if quick else [pytest.mark.slow]


def deep(parity: Parity) -> bool:
    return len(parity.splits) > 16


def chaotic(entry: Entry) -> bool:
    """Five large steps amplify float32 rounding, and a product of five gradients underflows: float64 only.

    There the released code's own float32 differs from its float64 by up to 5 %.
    """
    return entry.precision == "f32" and entry.steps == 5 and (entry.combine == "multiply" or entry.kind == "A")


def each_file(slow: Callable[[Parity], bool] = lambda parity: False) -> pytest.MarkDecorator:
    cases = [pytest.param(p, id=p.name, marks=[pytest.mark.slow] * slow(p)) for p in PARITY]
    return pytest.mark.parametrize(
        "parity", cases or [pytest.param(None, id="none", marks=pytest.mark.skip(reason=ABSENT))]
    )


def assert_close(found: Tensor, expected: Tensor, relative: float) -> None:
    """Relative to the largest expected value: inner gradients cross zero."""
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= relative, f"relative error {error:.1e}, allowed {relative:.0e}"


def counts_of(densities: dict[str, Tensor], parity: Parity, splits: list[str]) -> Tensor:
    """(B, sum of channels): positions with a non-zero combined gradient, from the densities."""
    assert list(densities) == splits
    counts = torch.cat([densities[s] * hw for s, hw in zip(splits, parity["hw"], strict=True)], dim=1)
    assert (counts - counts.round()).abs().max() < 1e-3
    return counts.round().long()


# --- SandI ----------------------------------------------------------------------------------------------------------


@each(("Z", "Zspec"))
def test_sandi_z(parity: Parity, entry: Entry) -> None:
    net, x = parity.at(entry.precision)
    x, splits = x[TWO], parity.z_splits(entry)
    detector = SandI(
        net,
        variant="Z",
        splits=splits,
        steps=entry.steps,
        step_size=entry.step_size,
        combine=COMBINE[entry.combine],
        ascent=ASCENT[entry.ascent],
    )
    pred, tau = detector(x)
    assert torch.equal(pred, parity[f"{entry.precision}/logits"].argmax(1)[TWO])
    densities = detector.densities(x)
    channels = sum(e.shape[1] for e in densities.values())
    assert_close(tau.double() ** 2 / channels, parity[f"{entry.key}/score"][TWO], SCORE["Z", entry.precision])
    if entry.kind == "Z":
        differing = (counts_of(densities, parity, splits) - parity[f"{entry.key}/count"][TWO]).abs()
        assert differing.sum() <= FLIPS[entry.precision]


@each(("A",), combines=("add",))
def test_sandi_a(parity: Parity, entry: Entry) -> None:
    """The released A may also multiply gradients over t; Eq. 12-13 average them, and so does SandI."""
    net, x = parity.at(entry.precision)
    detector = SandI(
        net,
        variant="A",
        splits=parity.splits[:-1],
        feature=parity.splits[-1],
        steps=entry.steps,
        step_size=entry.step_size,
        ascent=ASCENT[entry.ascent],
    )
    densities = torch.cat(list(detector.densities(x).values()), dim=1)
    released = parity[f"{entry.key}/inner"] / parity[f"{entry.key}/output"]
    tolerance = SCORE["A", entry.precision]
    assert_close(densities * entry.steps**0.5, released, 2 * tolerance)
    _, tau = detector(x)
    assert_close(entry.steps * tau.double() ** 2 / densities.shape[1], parity[f"{entry.key}/score"], tolerance)


@each_file()
@pytest.mark.parametrize("precision", DTYPE)
def test_sandi_with_one_step_is_gaia_z(parity: Parity, precision: str) -> None:
    net, x = parity.at(precision)
    detector = SandI(net, variant="Z", splits=parity.gaia_splits(), steps=1)
    densities = torch.cat(list(detector.densities(x).values()), dim=1)
    assert_close(densities, parity[f"{precision}/gaiaZ/dens"], 1e-12 if precision == "f64" else 1e-2)
    tau = detector(x)[1].double()
    assert_close(tau**2 / densities.shape[1], parity[f"{precision}/gaiaZ/score"], SCORE["Z", precision])


@each_file()
@pytest.mark.parametrize("precision", DTYPE)
def test_sandi_with_one_step_is_gaia_z_with_the_pooled_feature(parity: Parity, precision: str) -> None:
    key = f"{precision}/gaiaZ_beforehead/score"
    if key not in parity.data:
        pytest.skip("this network has no gaiaZ_beforehead entry")
    net, x = parity.at(precision)
    splits = [*parity.norms("layer3", "layer4"), "avg_pool"] if isinstance(net, ResNet) else parity.splits
    detector = SandI(net, variant="Z", splits=splits, steps=1)
    channels = sum(e.shape[1] for e in detector.densities(x).values())
    assert_close(detector(x)[1].double() ** 2 / channels, parity[key], SCORE["Z", precision])


@each_file()
@pytest.mark.parametrize("precision", DTYPE)
def test_sandi_with_one_step_and_all_channels_is_gaia_a(parity: Parity, precision: str) -> None:
    net, x = parity.at(precision)
    splits, feature = parity.gaia_a()
    detector = SandI(net, variant="A", splits=splits, feature=feature, steps=1, top_fraction=1.0)
    channels = sum(e.shape[1] for e in detector.densities(x).values())
    assert_close(detector(x)[1].double() ** 2 / channels, parity[f"{precision}/gaiaA/score"], SCORE["A", precision])


@each_file(slow=deep)
def test_union_is_gaia_z_for_every_step_size_and_number_of_steps(parity: Parity) -> None:
    """An inactive unit has a zero gradient, sign(0) = 0, and never moves."""
    net, x = parity.at("f64")
    gaia = SandI(net, variant="Z", splits=parity.splits, steps=1)(x)[1]
    detector = SandI(net, variant="Z", splits=parity.splits, steps=3, step_size=1e-2, combine="union")
    assert_close(detector(x[:1])[1], gaia[:1], 1e-12)


# --- the naive reference --------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def reference(parity: Parity, kind: str, steps: int, ascent: str, step_size: float) -> Reference:
    net, x = parity.at("f64")
    x = x[TWO]
    splits = {"Z": parity.splits, "Zspec": [f"{parity.splits[-1]}.gn"], "A": parity.splits[:-1]}[kind]
    feature = parity.splits[-1] if kind == "A" else ""
    options = Options(kind[0], steps=steps, step_size=step_size, ascent=ASCENT[ascent], feature=feature)
    return Reference(net, x, splits, options)


@each(("Z",), ("f64",))
def test_reference_z(parity: Parity, entry: Entry) -> None:
    naive = reference(parity, "Z", max(entry.steps, 2), entry.ascent, entry.step_size)
    combine = COMBINE[entry.combine]
    counts = torch.cat([path.counts(combine, entry.steps) for path in naive.paths.values()], dim=1)
    assert torch.equal(counts, parity[f"{entry.key}/count"][TWO].long())
    score = naive.tau(combine, entry.steps) ** 2 / counts.shape[1]
    assert_close(score, parity[f"{entry.key}/score"][TWO], SCORE["Z", "f64"])


@each(("Zspec",), ("f64",))
def test_reference_z_with_the_last_norm_itself(parity: Parity, entry: Entry) -> None:
    combine = COMBINE[entry.combine]
    inner = reference(parity, "Z", max(entry.steps, 2), entry.ascent, entry.step_size).densities(combine, entry.steps)
    last = reference(parity, "Zspec", max(entry.steps, 2), entry.ascent, entry.step_size).densities(
        combine, entry.steps
    )
    densities = torch.cat([inner[split] for split in parity.splits[:-1]] + list(last.values()), dim=1)
    assert_close(densities.square().mean(1), parity[f"{entry.key}/score"][TWO], SCORE["Z", "f64"])


@each(("A",), ("f64",))
def test_reference_a(parity: Parity, entry: Entry) -> None:
    naive = reference(parity, "A", max(entry.steps, 2), entry.ascent, entry.step_size)
    paths = [*naive.paths.values(), naive.feature_path]

    def combined(path) -> Tensor:  # type: ignore[no-untyped-def]
        gradients = torch.stack(path.gradients[: entry.steps])
        return path.by_channel(gradients.sum(0) if entry.combine == "add" else gradients.prod(0)).mean(2)

    *inner, before_head = [combined(path) for path in paths]
    output = before_head.abs().mean(1, keepdim=True).sqrt()
    score = (torch.cat(inner, dim=1) / output).square().mean(1)
    found = {"before_head_grad": before_head, "inner": torch.cat(inner, dim=1).abs(), "output": output, "score": score}
    for field, values in found.items():
        assert_close(values, parity[f"{entry.key}/{field}"][TWO], 1e-12)
    if entry.combine == "add":
        channels = sum(g.shape[1] for g in inner)
        assert_close(entry.steps * naive.tau(steps=entry.steps) ** 2 / channels, score, 1e-12)


@each_file(slow=deep)
def test_reference_first_gradient(parity: Parity) -> None:
    naive = reference(parity, "Z", 2, "CE", 1e-3)
    for number, split in enumerate(parity.splits):
        g = naive.paths[split].gradients[0]
        assert g.shape[1] == parity["channels"][number] and g[0, 0].numel() == parity["hw"][number]
        assert_close(g[0], parity[f"grad1_img0/{number}"], 2e-6)


@each_file()
def test_networks_are_those_of_the_files(parity: Parity) -> None:
    net, x = parity.at("f64")
    assert_close(net(x), parity["f64/logits"], 1e-13)
