"""Calls on perturbed copies, in whatever form a network makes them, give what the network alone gives, or are refused.

The right values are those of :mod:`tests.helpers.oracle`: scores, and maps of Eq. 10, which show every gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import TestCase

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from openood_sandi import SandI
from openood_sandi.engine import calls, lanes
from openood_sandi.engine.errors import ReplayError
from tests.helpers import call_forms
from tests.helpers.cases import prepared
from tests.helpers.no_grad_networks import FROZEN, STOPPED, UNCLEAR, Inside
from tests.helpers.oracle import Options, Reference
from tests.helpers.trap_networks import TRAPS, WIDTH, Block

SPLITS = ("norm0", "norm1", "norm9")
STEP = 0.05

pytestmark = pytest.mark.filterwarnings("ignore:.*performance drop.*:UserWarning", "ignore:.*a scalar.*:UserWarning")


def block(change: Callable[[Tensor, Tensor], Tensor]) -> type[Block]:
    """A network of a stem, the branch that ``change`` joins to its shortcut, and a head."""
    return type("Changed", (Block,), {"change": lambda _self, x, y: change(x, y)})


def assert_right(
    make: type[nn.Module], splits: tuple[str, ...] = SPLITS, plain: type[nn.Module] | None = None, steps: int = 2
) -> None:
    """SandI's scores and maps for the network equal the reference's for it, or for the same weights as ``plain``."""
    net, x = prepared(make)
    found = SandI(net, variant="Z", splits=splits, step_size=STEP, steps=steps)
    tau, maps = found(x)[1], found.explain(x)
    net.__class__ = plain or make
    naive = Reference(net, x, splits, Options("Z", steps=steps, step_size=STEP))
    torch.testing.assert_close(tau, naive.tau(), rtol=1e-9, atol=0)
    for split, expected in naive.explain().items():
        torch.testing.assert_close(maps[split], expected, rtol=0, atol=1e-9 * float(expected.abs().max()), msg=split)


def assert_refused(make: type[nn.Module], name: str, splits: tuple[str, ...] = SPLITS) -> None:
    """Copies are not computed at once, and what keeps them from it is named: in an error, or where whole passes go."""
    net, x = prepared(make)
    try:
        with TestCase().assertLogs("openood_sandi", "WARNING") as log:
            SandI(net, variant="Z", splits=splits, step_size=STEP, steps=3)(x)
    except ReplayError as refusal:
        assert name in str(refusal)
    else:
        assert any("takes whole passes" in line and name in line for line in log.output)


def perturbed(clean: Tensor) -> Tensor:
    """Two lanes of a clean tensor."""
    return lanes.join(lanes.join(clean, 0, clean + 1), 1, clean + 2)


class Count(TorchDispatchMode):
    """Counts torch's own calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("func, args", [(torch.relu, ()), (torch.add, (torch.ones(4),)), (torch.add, (None,))])
def test_the_form_of_results_is_checked_without_a_call(func: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
    """Torch is called as often as for an ordinary tensor: once."""
    clean, copies = torch.randn(3, 4), perturbed(torch.randn(3, 4))
    with Count() as count:
        calls.call(func, (copies, *(copies if arg is None else arg for arg in args)), {}, clean)
    assert count.calls == [func.__name__]


@pytest.mark.parametrize("recorded", [torch.zeros(3), torch.zeros(3, 1), torch.zeros(3, 4).double()])
@pytest.mark.parametrize("func", [torch.relu, torch.sinh])
def test_a_result_of_another_form_than_recorded_is_an_error(func: Callable[[Tensor], Tensor], recorded: Any) -> None:
    with pytest.raises(ValueError, match=r"due"):
        calls.call(func, (perturbed(torch.randn(3, 4)),), {}, recorded)


def test_strides_are_those_of_the_recorded_tensor() -> None:
    """Copies may lie in memory otherwise than it."""
    clean = torch.randn(3, 4)
    copies = torch.stack([clean + 1, clean + 2]).mT.contiguous().mT
    lanes.tag(copies, (0, 1), clean)
    assert torch.equal(calls.call(torch.as_strided, (copies, (3, 4), (4, 1)), {}, clean), copies)


def every(table: dict[str, call_forms.Form]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("form", table.values(), ids=table)


@every(call_forms.OPERANDS)
def test_operands(form: call_forms.Form) -> None:
    assert_right(block(form))


@every(call_forms.LAYOUTS)
def test_memory_formats(form: call_forms.Form) -> None:
    assert_right(block(form))


@pytest.mark.parametrize("name", ["Attention", "Branches", "Grouped", "SliceWrites", "Functional", "Upsampling"])
def test_autocast_reaches_every_call(name: str) -> None:
    """Results of another dtype than the recorded ones would be refused."""
    net, x = prepared(TRAPS[name])
    with torch.autocast("cpu", torch.bfloat16):
        tau = SandI(net.float(), variant="Z", steps=3, rectifier_shortcut=False)(x.float())[1]
    assert tau.isfinite().all()


@every(call_forms.WRITES)
def test_writes_at_places_that_the_data_choose(form: call_forms.Form) -> None:
    assert_right(block(form))


ANY = {**call_forms.OPERANDS, **call_forms.LAYOUTS, **call_forms.WRITES}


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(names=st.lists(st.sampled_from(list(ANY)), min_size=2, max_size=4), steps=st.integers(2, 3))
@pytest.mark.slow
def test_calls_after_each_other(names: list[str], steps: int) -> None:
    """Each on what the one before gave, kept at a scale where rounding does not decide."""

    def chain(x: Tensor, y: Tensor) -> Tensor:
        for name in names:
            y = F.layer_norm(ANY[name](x, y), (WIDTH, 8, 8)) + y.detach().mean()
        return y

    assert_right(block(chain), steps=steps)


@pytest.mark.parametrize("name", call_forms.REFUSED)
def test_what_differs_between_copies_is_refused_by_name(name: str) -> None:
    assert_refused(block(call_forms.REFUSED[name]), name)


@every(call_forms.SAME_IN_EVERY_COPY)
def test_python_data_that_are_the_same_in_every_copy(form: call_forms.Form) -> None:
    assert_right(block(form))


@every(call_forms.OUT)
def test_results_written_into_a_given_tensor(form: call_forms.Form) -> None:
    """torch allows that without gradients alone: the right values are those of the call without ``out``."""
    assert_right(block(form), plain=block(lambda x, y: torch.mul(x, y) + y))


class Recurrent(Block):
    """Rows of the map as a sequence."""

    def __init__(self, kind: type[nn.Module], **options: bool) -> None:
        super().__init__()
        self.layer = kind(WIDTH * 8, WIDTH * 8, **options)

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        first = 0 if getattr(self.layer, "batch_first", False) else 1
        rows = y.transpose(1, 2).flatten(2)
        out, state = self.layer(rows if first == 0 else rows.transpose(0, 1))
        state = state[0] if isinstance(state, tuple) else state
        out = (out if first == 0 else out.transpose(0, 1)) + state[0][:, None]
        return out.view(len(y), 8, WIDTH, 8).transpose(1, 2) + x


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind: type[nn.Module], batch_first: bool) -> None:
    class Layer(Recurrent):
        def __init__(self) -> None:
            super().__init__(kind, batch_first=batch_first)

    assert_right(Layer)


class Cells(Block):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTMCell(WIDTH, WIDTH), nn.GRUCell(WIDTH, WIDTH)

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        state, memory = self.lstm(y.mean((2, 3)))
        return y + (self.gru(x.mean((2, 3)), state) * memory)[..., None, None]


def test_recurrent_cells() -> None:
    assert_right(Cells)


@every(call_forms.ATTENTION)
def test_attention_with_a_mask(form: call_forms.Form) -> None:
    assert_right(block(form))


@every(call_forms.BATCH_NORM)
def test_batch_norms_do_not_mix_copies(form: call_forms.Form) -> None:
    assert_right(block(form))


class BatchStatistics(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm2 = nn.BatchNorm2d(WIDTH, track_running_stats=False)

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        return self.norm2(y) + x


def test_a_batch_norm_without_running_statistics() -> None:
    assert_right(BatchStatistics, ("norm0", "norm1", "norm2", "norm9"))


class Squeezes(Block):
    def forward(self, x: Tensor) -> Tensor:
        x = self.feature(self.norm9(self.last(self.middle(F.relu(self.norm0(self.stem(x)))))))
        return self.head(F.adaptive_avg_pool2d(x, 1).squeeze())


@pytest.mark.parametrize("variant", ["Z", "A"])
def test_a_last_batch_of_one_that_is_squeezed_away(variant: str) -> None:
    net, x = prepared(Squeezes)
    detector = SandI(net, variant=variant, splits=SPLITS[:2], feature="feature", step_size=STEP)
    pred, tau = detector(x)
    for number, image in enumerate(x.split(1)):
        torch.testing.assert_close(detector(image)[1], tau[number : number + 1], rtol=1e-12, atol=0)
        assert torch.equal(detector(image)[0], pred[number : number + 1])


# --- torch.no_grad() in forward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", STOPPED, ids=lambda network: network.__name__)
def test_gradients_stopped_on_purpose(network: type[nn.Module]) -> None:
    """As in the network itself, whose gradient the reference takes."""
    for steps in (1, 3):
        assert_right(network, steps=steps)


@pytest.mark.parametrize("network", FROZEN, ids=lambda network: network.__name__)
def test_a_frozen_stem_is_the_same_function(network: type[Inside]) -> None:
    for steps in (1, 3):
        assert_right(network, ("norm0", "norm2", "norm1", "norm9"), plain=network.without_no_grad(), steps=steps)


@pytest.mark.parametrize("network", UNCLEAR, ids=lambda network: network.__name__)
def test_what_no_grad_leaves_unclear_is_refused(network: type[nn.Module]) -> None:
    assert_refused(network, "no_grad", ("norm0", "norm2", "norm1", "norm9"))


def test_a_forward_without_gradients_is_refused() -> None:
    network = type("WithoutGradients", (Block,), {"forward": torch.inference_mode()(Block.forward)})
    assert_refused(network, "inference_mode")


def test_a_network_that_disables_gradients_for_good() -> None:
    """Refused, for it has none behind that place; and those of the caller are enabled as before."""
    net, x = prepared(block(lambda x, y: (torch.set_grad_enabled(False), x + y)[1]))
    with torch.enable_grad():
        with pytest.raises(ReplayError, match=r"norm9.*no_grad"):
            SandI(net, variant="Z", splits=SPLITS)(x)
        assert torch.is_grad_enabled()
    torch.set_grad_enabled(True)  # as `prepared`, which ran the network, found it


def test_a_single_image_in_channels_last_memory_behind_others() -> None:
    """For the stride that flattening one lane of one image makes up, torch has a wrong gradient of batch norm."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    nn.init.normal_(net[3].weight)
    net = net.double().eval()
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    detector = SandI(net, variant="Z", splits=["1"], step_size=STEP)
    last = x.contiguous(memory_format=torch.channels_last)
    detector.explain(last[:2])
    right = SandI(net, variant="Z", splits=["1"], step_size=STEP).explain(x[2:])["1"]
    torch.testing.assert_close(detector.explain(last[2:].clone())["1"], right)


def test_a_single_image_whose_gradient_comes_in_channels_last_order() -> None:
    """Behind a view of one image torch's batch norm has a wrong gradient then: a split is such a view."""

    class Laid(Block):
        def change(self, x: Tensor, y: Tensor) -> Tensor:
            return F.relu(y.to(memory_format=torch.channels_last)).contiguous()

    net, x = prepared(Laid)
    detector = SandI(net, variant="Z", step_size=STEP, steps=3)
    both, alone = detector.explain(x), detector.explain(x[:1])
    for name, attribution in alone.items():
        torch.testing.assert_close(attribution, both[name][:1], rtol=1e-12, atol=1e-15)
