"""Every mistake in what is given says what it was, what was expected and what to do, and leaves no trace."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from openood_sandi import SandI
from tests.helpers.cases import prepared
from tests.helpers.surroundings import surroundings
from tests.helpers.trap_networks import Block


def refused(net: nn.Module, x: Any, *words: str, **options: Any) -> None:
    """The first batch is refused in these words, a good one is scored before and after, and all is left as found."""
    good = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    before = surroundings(net, good)
    for warm in (False, True):
        detector = SandI(net, **options)
        if warm:
            detector(good)
        with pytest.raises((ValueError, TypeError)) as refusal:
            detector(x)
        for word in words:
            assert word in str(refusal.value)
        detector(good)
        assert surroundings(net, good) == before


# --- images ---------------------------------------------------------------------------------------------------------

IMAGES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "one image": (torch.zeros(3, 16, 16), ("float32 of shape (3, 16, 16)", "(B, C, H, W)")),
    "pixels": (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), ("uint8", "floating-point", "normalised")),
    "complex": (torch.zeros(2, 3, 16, 16, dtype=torch.cfloat), ("complex64", "floating-point")),
    "sparse": (torch.zeros(2, 3, 16, 16).to_sparse(), ("dense",)),
    "an empty batch": (torch.zeros(0, 3, 16, 16), ("(0, 3, 16, 16)", "empty")),
    "an array": (np.zeros((2, 3, 16, 16)), ("ndarray", "tensor of images (B, C, H, W)")),
    "nothing": (None, ("NoneType",)),
    "another dtype": (torch.zeros(2, 3, 16, 16), ("float32 of shape (2, 3, 16, 16)", "'stem' (Conv2d)", "float64")),
    "grey images": (torch.zeros(2, 1, 16, 16).double(), ("(2, 1, 16, 16)", "'stem' (Conv2d)", "(8, 3, 3, 3)")),
    "channels last": (torch.zeros(2, 16, 16, 3).double(), ("to have 3 channels, but got 16", "(B, C, H, W)")),
    "no pixels": (torch.zeros(2, 3, 0, 16).double(), ("(2, 3, 0, 16)",)),
}


@pytest.mark.parametrize("x, words", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("variant", ["Z", "A"])
def test_what_is_no_batch_of_images_for_this_network(x: Any, words: tuple[str, ...], variant: str) -> None:
    net, _ = prepared(Block)
    refused(net, x, *words, variant=variant)


def test_a_size_that_the_network_does_not_take() -> None:
    class Flat(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(super().middle(self.norm0(self.stem(x))).flatten(1)[:, :512])

    net, _ = prepared(Block)
    net.__class__ = Flat
    net.head = nn.Linear(512, 5).double()
    refused(net, torch.zeros(2, 3, 9, 9).double(), "(2, 3, 9, 9)", "'head' (Linear)", "(5, 512)")


@pytest.mark.parametrize("factor, warns", [(1, False), (100, True)])
def test_images_in_0_to_255_are_noted(factor: int, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    net, x = prepared(Block)
    detector = SandI(net)
    for _ in range(2):
        detector(factor * x)
    told = [record.getMessage() for record in caplog.records if "normalise" in record.getMessage()]
    assert len(told) == warns


@pytest.mark.parametrize("options", [{"variant": "Z"}, {"variant": "A"}, {"variant": "Z", "steps": 1}])
def test_an_image_that_is_not_finite_is_named(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    net, x = prepared(Block)
    detector = SandI(net, **options)
    expected = detector(x)
    x = x.clone()
    x[1, 0, 3, 3], x[1, 2, 0, 0] = math.nan, -math.inf
    assert not caplog.records
    pred, tau = detector(x)
    assert tau[1].isnan()
    torch.testing.assert_close(tau[[0, 2]], expected[1][[0, 2]], rtol=1e-12, atol=0)
    assert torch.equal(pred[[0, 2]], expected[0][[0, 2]])
    (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "image 1 of the batch holds 2 value(s)" in told


def test_a_layer_that_overflows_is_named() -> None:
    net, x = prepared(Block)
    net, x = net.float(), x.float()
    with torch.no_grad():
        net.norm1.weight *= 1e15
    x[1] *= 1e30
    detector = SandI(net)
    assert detector(x)[1].isnan().tolist() == [False, True, False]
    assert detector.not_finite(x) == [
        "image 1 of the batch is finite, but the output of layer 'norm1' (BatchNorm2d) is NaN or infinite"
    ]


def test_one_bad_image_does_not_slow_down_the_others() -> None:
    """Its gradients say nothing about the rectifiers, which are relied on for all other images."""
    net, x = prepared(Block)
    spoilt = x.clone()
    spoilt[0, 0, 0, 0] = math.nan
    detector = SandI(net, variant="Z")
    detector(spoilt)
    detector(spoilt)
    detector(x)
    assert detector.proved_share > 0


# --- networks -------------------------------------------------------------------------------------------------------


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x), 1, 1, 1).to(x) > 0.5) if self.training else x


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), DropPath(), nn.BatchNorm2d(8).double()])
def test_one_layer_in_train_mode(layer: nn.Module) -> None:
    net, x = prepared(Block)
    net.feature = nn.Sequential(net.feature, layer.train())
    with pytest.raises(ValueError, match=r"train mode.*'feature\.1'.*eval\(\)"):
        SandI(net)(x)
    net.eval()
    SandI(net)(x)


def test_a_wrapper_made_in_train_mode_is_no_obstacle() -> None:
    net, x = prepared(Block)
    wrapper = nn.Sequential(net)
    assert wrapper.training and not net.training
    torch.testing.assert_close(SandI(wrapper)(x)[1], SandI(net)(x)[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("net", [None, "resnet18", nn.ReLU, lambda x: x], ids=["None", "name", "class", "function"])
def test_what_is_no_network(net: Any) -> None:
    with pytest.raises(TypeError, match=r"net is .*expected an eager torch\.nn\.Module"):
        SandI(net)


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_network() -> None:
    quantisation = pytest.importorskip("torch.ao.quantization")
    net, _ = prepared(Block)
    quantised = quantisation.quantize_dynamic(net.float(), {nn.Linear})
    with pytest.raises(TypeError, match=r"quantised \(layer 'head'.*floating-point"):
        SandI(quantised)


def test_a_network_that_fails_by_itself_says_where() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("no such thing")

    net, x = prepared(Block)
    net.feature = Fails()
    with pytest.raises(ValueError, match=r"no such thing.*'feature' \(Fails\)"):
        SandI(net)(x)


# --- options --------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, list[Any]] = {
    "variant": ["z", "", None, 1, ["Z"], np.array(["Z", "A"])],
    "splits": [None, 3, ["norm0", 1], b"all", {"norm0"}],
    "feature": [None, 1, ["feature"]],
    "steps": [0, -1, 2.0, True, "2", None, math.nan],
    "step_size": [0, -1e-3, math.nan, math.inf, "1e-3", None, True, 1e300, 10**400],
    "epsilon": [0, -1.0, math.nan, "inf", None, False, -math.inf],
    "combine": ["add", None, 0],
    "attribution": ["logit", None],
    "ascent": ["crossentropy", None],
    "top_fraction": [0, 1.1, -0.5, math.nan, "0.9", None, True],
    "top_over": ["channel", None],
    "denominator": ["sum", None],
    "splitting": ["yes", 1, None],
    "stop_at_flip": ["no", 0, None],
    "rectifier_shortcut": ["no", 0, None],
    "memory_fraction": [0, 1.5, math.nan, "half", None],
}


@pytest.mark.parametrize(
    "name, value",
    [(name, value) for name, values in OPTIONS.items() for value in values],
    ids=lambda value: value if isinstance(value, str) else repr(value)[:20],
)
def test_an_option_out_of_range_or_of_the_wrong_type(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"{name}=.*: expected "):
        SandI(nn.Identity(), **{name: value})


@pytest.mark.parametrize("splits", ["", ",", []])
def test_no_split_points(splits: Any) -> None:
    net, x = prepared(Block)
    with pytest.raises(ValueError, match="splits is empty"):
        SandI(net, splits=splits)(x)


@pytest.mark.parametrize("mistake", [{"step": 2}, {"Variant": "Z"}])
def test_an_unknown_option_is_python_s_own_error(mistake: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(mistake))):
        SandI(nn.Identity(), **mistake)
