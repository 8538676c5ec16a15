"""Networks that return more than their logits, and the function that takes these out."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openood_sandi import SandI
from openood_sandi.engine.errors import ReplayError
from tests.helpers.oracle import Options, Reference

FORMS = {
    "object": (lambda logits: SimpleNamespace(logits=logits, hidden=logits + 1), lambda output: output.logits),
    "dict": (lambda logits: {"aux": logits * 2, "out": logits}, lambda output: output["out"]),
    "tuple": (lambda logits: (logits, None), lambda output: output[0]),
}


class Returning(nn.Sequential):
    """The layers, and what ``form`` makes of their logits."""

    def __init__(self, form: Any) -> None:
        super().__init__(
            *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
        )
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(super().forward(x))


def prepared(form: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network, the same one returning plain logits, and images."""
    torch.manual_seed(0)
    net = Returning(form).double().eval()
    plain = Returning(lambda logits: logits).double().eval()
    plain.load_state_dict(net.state_dict())
    return net, plain, torch.randn(6, 3, 9, 9, dtype=torch.float64)


@pytest.mark.parametrize("variant", ["Z", "A"])
@pytest.mark.parametrize("kind", FORMS)
def test_scores_are_those_of_the_logits(kind: str, variant: str) -> None:
    form, take = FORMS[kind]
    net, plain, x = prepared(form)
    options = Options(variant, feature="5" if variant == "A" else "")
    naive = Reference(plain, x, ("1", "4"), options)
    detector = SandI(net, take, variant=variant, splits=["1", "4"], feature=options.feature or "auto")
    pred, tau = detector(x)
    assert torch.equal(pred, naive.pred)
    torch.testing.assert_close(tau, naive.tau(), rtol=1e-12, atol=0)
    assert not net._forward_hooks, "the network is left as it was found"


def test_a_network_that_cannot_be_copied_has_its_logits_taken_in_this_thread_alone() -> None:
    net, plain, x = prepared(FORMS["tuple"][0])
    net.uncopyable = threading.Event()  # its lock cannot be copied
    seen: list[type] = []

    def take(output: Any) -> Tensor:
        worker = threading.Thread(target=lambda: seen.append(type(net(x))))
        worker.start()
        worker.join()
        return output[0]

    _, tau = SandI(net, take, variant="Z")(x)
    torch.testing.assert_close(tau, SandI(plain, variant="Z")(x)[1], rtol=1e-12, atol=0)
    assert set(seen) == {tuple}


def test_without_the_function_the_error_names_it() -> None:
    net, _, x = prepared(FORMS["object"][0])
    with pytest.raises(ReplayError, match=r"returns SimpleNamespace, expected logits .*logits=FUNCTION"):
        SandI(net, variant="Z")(x)


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="logits='out': expected a function"):
        SandI(nn.Identity(), "out")  # type: ignore[arg-type]


def test_an_image_that_is_not_finite_is_named() -> None:
    net, _, x = prepared(FORMS["dict"][0])
    x[2] = torch.nan
    detector = SandI(net, FORMS["dict"][1], variant="Z")
    _, tau = detector(x)
    assert tau.isnan().tolist() == [False, False, True, False, False, False]
    assert detector.not_finite(x) == ["image 2 of the batch holds 243 value(s) that are NaN or infinite"]
