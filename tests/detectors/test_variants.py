"""What "auto" takes: Z where gradients have zeros to read, A where they have none; the same for all images."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openood_sandi import SandI
from openood_sandi.detectors.gaia import GAIA


class Small(nn.Module):
    def __init__(self, activation: nn.Module, classes: int = 10) -> None:
        super().__init__()
        self.activation = activation
        self.c0, self.n0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c1, self.n1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c2, self.n2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.n0(self.c0(x)))
        x = F.avg_pool2d(self.activation(self.n1(self.c1(x))), 2)
        return self.head(self.activation(self.n2(self.c2(x))).mean((2, 3)))


def made(activation: nn.Module, classes: int = 10) -> nn.Module:
    torch.manual_seed(0)
    return Small(activation, classes).eval()


@pytest.mark.parametrize(
    "activation, classes, variant",
    [
        (nn.ReLU(), 10, "Z"),
        (nn.ReLU6(), 10, "Z"),
        (nn.ReLU(), 101, "A"),
        (nn.GELU(), 10, "A"),
        (nn.SiLU(), 10, "A"),
        (nn.Hardswish(), 10, "A"),
        (nn.LeakyReLU(), 10, "A"),
    ],
    ids=str,
)
def test_auto(activation: nn.Module, classes: int, variant: str) -> None:
    detector = SandI(made(activation, classes))
    assert detector.variant == "auto"
    tau = detector(torch.randn(16, 3, 8, 8) * torch.linspace(0.2, 3, 16).view(-1, 1, 1, 1))[1]
    assert detector.variant == variant
    assert len(tau.unique()) == 16, "images are told apart"
    assert (detector.feature_name is None) == (variant == "Z")
    assert f"variant='{variant}'" in repr(detector) and detector.split_names[0] in repr(detector)


def test_the_choice_does_not_depend_on_the_images() -> None:
    """Constant images leave every unit of a network on, or off, and say nothing of it."""
    net = made(nn.ReLU())
    with torch.no_grad():
        net.n0.bias.fill_(1)
    chosen = set()
    for x in (torch.zeros(2, 3, 8, 8), torch.full((1, 3, 8, 8), 30.0), torch.randn(4, 3, 8, 8)):
        detector = SandI(net)
        detector(x)
        chosen.add((detector.variant, detector.split_names))
    assert len(chosen) == 1


def test_z_by_name_where_there_is_nothing_to_read_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    detector = SandI(made(nn.GELU()), variant="Z")
    with caplog.at_level(logging.WARNING, "openood_sandi"):
        for _ in range(3):
            detector(torch.randn(4, 3, 8, 8))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "0 %" in caplog.text and 'variant="A"' in caplog.text


def test_what_was_chosen_is_told_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "openood_sandi"):
        SandI(made(nn.ReLU()))(torch.randn(4, 3, 8, 8))
    assert [record.message for record in caplog.records] == ["S&I-Z with 3 split points, n0 to n2"]


@pytest.mark.parametrize(
    "options, unread",
    [
        ({"variant": "A", "combine": "union", "attribution": "cross_entropy"}, ["attribution", "combine"]),
        ({"variant": "Z", "top_fraction": 0.5, "feature": "n2"}, ["feature", "top_fraction"]),
        ({"variant": "Z", "combine": "union"}, []),
        ({"variant": "A", "top_over": "labels"}, []),
    ],
)
def test_options_that_the_variant_does_not_read(
    options: dict[str, object], unread: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "openood_sandi"):
        detector = SandI(made(nn.ReLU()), **options)
        for _ in range(2):
            detector(torch.randn(4, 3, 8, 8))
    said = [record.message for record in caplog.records]
    assert len(said) == bool(unread) and all(f"{name}=" in said[0] for name in unread)


def test_gaia_says_nothing_of_what_is_its_own(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "openood_sandi"):
        GAIA(made(nn.ReLU()))(torch.randn(4, 3, 8, 8))
    assert not caplog.records
