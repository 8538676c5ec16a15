"""S&I-C as an exported graph: the detector's scores, without hooks, for any batch, from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openood_sandi import SandIC, ServedSandIC
from tests.helpers.every_detector import TRAINING, images, network

FEW, MANY = images(3, 40), images(9, 41)


class Varied(nn.Module):
    """Activations as modules and functions, in place or not, smooth and clipped, and a gate; then a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, 2), nn.Conv2d(8, 12, 3, 2)
        self.act, self.gate, self.head = nn.ReLU(inplace=True), nn.Conv2d(12, 12, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv0(x))
        x = nn.functional.silu(self.conv1(x))
        x = nn.functional.relu6(self.conv2(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True).relu()))
        return self.head(x.mean((2, 3)))


def varied() -> nn.Module:
    torch.manual_seed(0)
    return Varied().eval()


def exported(served: nn.Module) -> Any:
    batch = torch.export.Dim("batch", min=2, max=65536)
    with torch.no_grad():
        return torch.export.export(served, (FEW,), strict=False, dynamic_shapes=({0: batch},))


@pytest.mark.parametrize(
    "make, options",
    [(network, {}), (varied, {}), (varied, {"use_z": "always"}), (network, {"base": "energy"})],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_graph_scores_as_the_detector_does(make: Any, options: dict[str, Any]) -> None:
    detector = SandIC(make(), **options).fit([TRAINING], val=images(60, 2))
    served = ServedSandIC(detector, FEW)
    graph = exported(served).module()
    for x in (FEW, MANY):
        expected = detector(x)
        for found in (served(x), graph(x)):
            assert torch.equal(found[0], expected[0])
            torch.testing.assert_close(found[1], expected[1], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(found[2], detector._summary(x).shares, rtol=0, atol=0)


def test_the_graph_needs_neither_hooks_nor_the_package(tmp_path: Path) -> None:
    detector = SandIC(network()).fit([TRAINING], val=images(60, 2))
    expected = detector(MANY)[1]
    program = exported(ServedSandIC(detector, FEW))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("aten.gt" in name for name in names), "no masks"
    torch.export.save(program, tmp_path / "detector.pt2")
    detector.fit([(images(60, 7), TRAINING[1])], val=images(60, 8))  # which the graph takes no part in
    assert not torch.equal(detector(MANY)[1], expected)
    loaded = torch.export.load(tmp_path / "detector.pt2").module()
    torch.testing.assert_close(loaded(MANY)[1], expected, rtol=1e-12, atol=1e-12)


def test_tracing_leaves_the_detector_as_it_was() -> None:
    """No tensor of a trace is kept for later batches, of this size or of others."""
    detector = SandIC(network(), use_z="always").fit([TRAINING], val=images(60, 2))
    expected = detector(MANY)
    served = ServedSandIC(detector, FEW)
    wide = torch.cat([FEW, FEW], 3)
    torch.export.export(served, (wide,), strict=False)  # a size that nobody has asked for yet
    for x in (MANY, wide):
        assert type(detector(x)[1]) is Tensor and torch.equal(served(x)[1], detector(x)[1])
    assert torch.equal(detector(MANY)[1], expected[1])


def test_a_threshold_separates_alike() -> None:
    detector = SandIC(network()).fit([TRAINING], val=images(60, 2))
    graph = exported(ServedSandIC(detector, FEW)).module()
    assert torch.equal(graph(MANY)[1] > detector.threshold, detector.is_ood(MANY))


@pytest.mark.slow
def test_the_graph_is_compiled() -> None:
    detector = SandIC(varied(), use_z="always").fit([TRAINING], val=images(60, 2))
    compiled = torch.compile(exported(ServedSandIC(detector, FEW)).module(), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(MANY)
    torch.testing.assert_close(found[1], detector(MANY)[1], rtol=1e-6, atol=1e-6)


def test_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(RuntimeError, match="call fit first"):
        ServedSandIC(SandIC(network()), FEW)
