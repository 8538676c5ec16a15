"""What rectifiers' masks tell of gradients is what the gradients are, whatever came before and whatever the weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openood_sandi import SandI
from openood_sandi.detectors.sandi.rectifier import Rectifier
from openood_sandi.detectors.sandi.windows import Windows
from openood_sandi.engine.recorded import Call, Produced
from tests.helpers.rectified_networks import Made, OptionA, Plain, images, made

OPTIONS = (
    {"steps": 1},
    {"steps": 2},
    {"combine": "union", "steps": 3},
    {"combine": "intersection"},
    {"steps": 4, "step_size": 0.05},
    {"ascent": "max_logit"},
)


def require_exact(net: nn.Module, batches: list[Tensor], least: float = 0.0, **options: object) -> None:
    """One detector over the batches in turn agrees with every gradient computed anew for each."""
    detector = SandI(net, variant="Z", **options)
    for batch in batches:
        exact = SandI(net, variant="Z", rectifier_shortcut=False, **options).densities(batch)
        read = detector.densities(batch)
        for name, density in exact.items():
            assert torch.equal(read[name], density), (name, options)
    assert detector.proved_share >= least


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pool", [False, True])
def test_read_where_proved(options: dict[str, object], pool: bool) -> None:
    require_exact(made(lambda: Plain(pool=pool)), [images(6), images(5, seed=2)], 0.5, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_suffix_that_dies_after_the_step(options: dict[str, object]) -> None:
    net = nn.Sequential(
        *(nn.BatchNorm2d(1, eps=0.0), nn.ReLU(), nn.Conv2d(1, 1, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2)),
    )
    with torch.no_grad():
        net[2].weight.fill_(1.0)
        net[2].bias.fill_(-1.0)
        net[6].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    net = net.double().eval()
    batches = [torch.full((4, 1, 2, 2), value, dtype=torch.float64) for value in (2.0, 1.0005, 1.5, 1.01)]
    require_exact(net, batches, **options)
    if options.get("steps") == 2:
        tau = [float(SandI(net, variant="Z")(batch)[1][0]) for batch in batches[:2]]
        assert tau == [1.0, 0.5], "the second gradient of the second batch is zero"


def predicted_sparse(net: nn.Module) -> tuple[Tensor, Tensor]:
    """Gives class 1 a row of the head that is half zero; images of the other classes, and of that one."""
    pool = images(200)
    with torch.no_grad():
        net.head.weight[1, :24] = 0
        net.head.weight.mul_(20)
        net.head.bias.sub_(net(pool).mean(0))
        sparse = net(pool).argmax(1) == 1
    return pool[~sparse], pool[sparse]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_classes_whose_row_of_the_head_has_zeros(options: dict[str, object]) -> None:
    net = made(Plain)
    dense, sparse = predicted_sparse(net)
    assert min(len(dense), len(sparse)) > 5
    require_exact(net, [dense[:8], sparse[:8]], **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("stride", ["convolution", "average pool"])
def test_an_image_size_at_which_windows_leave_a_row_out(options: dict[str, object], stride: str) -> None:
    class Strided(Plain):
        def forward(self, x: Tensor) -> Tensor:
            a = F.relu(self.n0(self.c0(x)))
            b = F.relu(self.n1(F.conv2d(a, self.c1.weight[..., :2, :2], None, 2) if stride[0] == "c" else self.c1(a)))
            b = b if stride[0] == "c" else F.avg_pool2d(b, 2)
            return self.head(b.mean((2, 3)))

    require_exact(made(Strided), [images(4, 8), images(4, 9), images(4, 8)], **options)


class OddViews(Plain):
    """Channels averaged with positions, rows taken for channels, images mixed."""

    def __init__(self, kind: str) -> None:
        super().__init__(classes=6)
        self.kind = kind
        self.rows = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.n0(self.c0(x)))
        b = F.relu(self.n1(self.c1(a)))
        if self.kind == "channels":
            return self.rows(F.relu(b.mean(1) - 0.4).mean(2))
        if self.kind == "regrouped":
            return self.rows(F.relu(b.view(len(b), 6, 64, 8) - 0.5).mean((1, 2)))
        if self.kind == "images":
            b = b + b.mean(0, keepdim=True).expand_as(b)
        if self.kind == "flipped":
            b = b[[*range(len(b))][::-1]]
        return self.head(b.mean((2, 3)))


def test_the_shortcut_of_cifar_resnets() -> None:
    for options in OPTIONS:
        require_exact(made(OptionA), [images(6)], 0.5, **options)


@pytest.mark.parametrize("kind", ["channels", "regrouped", "images", "flipped"])
@pytest.mark.parametrize("options", [{"steps": 1}, {"steps": 2}], ids=str)
def test_dimensions_that_change_their_meaning(kind: str, options: dict[str, object]) -> None:
    require_exact(made(lambda: OddViews(kind)), [images(6)], **options)


def test_weights_that_are_pruned_after_the_first_batch() -> None:
    net, x = made(Plain), images(6)
    detector = SandI(net, variant="Z")
    detector(x)
    assert detector.proved_share == 1
    with torch.no_grad():
        net.c1.weight[:, :12] = 0  # in place, as pruning does
        net.head.weight[:, 40:] = 0
    exact = SandI(net, variant="Z", rectifier_shortcut=False)(x)[1]
    assert torch.equal(detector(x)[1], exact)


def test_output_channels_with_zero_weights_need_more_open_ones() -> None:
    """Some zeros, as float16 leaves them, do not cost the shortcut; zeros that could cut an input off do."""
    net, x = made(Plain), images(6)
    with torch.no_grad():
        net.c1.weight[:3, 5] = 0
    require_exact(net, [x], 0.5)
    with torch.no_grad():
        net.c1.weight[:, 5] = 0
    require_exact(net, [x])


@pytest.mark.parametrize("options", [{"steps": 1}, {"steps": 2}, {"combine": "intersection"}], ids=str)
def test_narrow_networks_have_closed_positions(options: dict[str, object]) -> None:
    require_exact(made(lambda: Plain(width=3)), [images(16)], **options)


@pytest.mark.parametrize("ties", [False, True])
def test_winners_of_a_max_pool_are_where_its_gradient_is(ties: bool) -> None:
    torch.manual_seed(0)
    entering = torch.randint(-2, 3, (2, 3, 9, 9)).double() if ties else torch.randn(2, 3, 9, 9).double()
    entering.requires_grad_(True)
    rectified = F.relu(entering)
    pooled = F.max_pool2d(rectified, 3, 2, 1)
    (gradient,) = torch.autograd.grad(pooled.sum(), entering)
    call = Call(F.max_pool2d, (Produced(0), 3, 2, 1), {}, pooled, (0,))
    mask = Rectifier(0, (0.0, float("inf")), Windows.of_pool(call, rectified.shape)).mask(rectified.detach())
    assert torch.equal(mask != 0, gradient != 0)


def test_zero_weights_count_through_a_pool() -> None:
    def pooled(net: Made, x: Tensor) -> Tensor:
        a = F.relu(net.n0(net.c0(x)))
        return net.head(F.relu(F.avg_pool2d(net.c2(a), 2)).mean((2, 3)))

    net = made(lambda: Made(pooled, width=6))
    with torch.no_grad():
        net.n0.bias.add_(4)
        net.c2.weight[:5, 2] = 0
        net.c2.bias.add_(0.5)
    x = images(400)
    most = SandI(net, variant="Z", rectifier_shortcut=False, splits=["n0"]).densities(x)["n0"].mean(1).argsort()
    require_exact(net, [x[torch.cat([most.flip(0)[:8], most[:3]])]], splits=["n0"])


def test_the_head_is_the_layer_that_gives_the_logits() -> None:
    def with_another_behind(net: Made, x: Tensor) -> Tensor:
        a = F.relu(net.n0(net.c0(x))).mean((2, 3))
        logits = net.head(a)
        net.aux(a)
        return logits

    net = made(lambda: Made(with_another_behind))
    dense, sparse = predicted_sparse(net)
    require_exact(net, [dense[:8], sparse[:8]], splits=["n0"], steps=1)


def test_a_first_look_at_images_that_prove_nothing_is_none() -> None:
    """A batch norm alone between two rectifiers: what the first lets through the second may cut off."""

    def twice(net: Made, x: Tensor) -> Tensor:
        return net.head(F.relu(net.n1(F.relu(net.n0(net.c0(x))))).mean((2, 3)))

    net = made(lambda: Made(twice))
    with torch.no_grad():
        net.n1.bias.sub_(0.2)
        net.c0.bias.fill_(-1e-3)
    require_exact(net, [torch.cat([torch.zeros(2, 3, 8, 8, dtype=torch.float64), 3 * images(4)])])


@pytest.mark.parametrize("kept", ["parameter", "attribute", "inference"])
def test_weights_whose_changes_are_not_counted(kept: str) -> None:
    def functional(net: Made, x: Tensor) -> Tensor:
        a = F.relu(net.n0(net.c0(x)))
        return net.head(F.relu(net.n1(F.conv2d(a, net.weight, None, 1, 1))).mean((2, 3)))

    with torch.inference_mode(kept == "inference"):
        net = made(lambda: Made(functional))
        net.weight = net.c1.weight if kept != "attribute" else net.c1.weight.detach().clone()
    x = images(6)
    detector = SandI(net, variant="Z")
    detector(x)
    assert detector.proved_share == 1
    with torch.inference_mode(kept == "inference"):
        net.weight.data[:, :12] = 0
    exact = SandI(net, variant="Z", rectifier_shortcut=False)(x)[1]
    assert torch.equal(detector(x)[1], exact)


@pytest.mark.parametrize("other", [lambda x: x.abs().max() < 1, lambda x: len(x) == 1], ids=["data", "batch"])
def test_other_images_may_take_other_layers(other: Callable[[Tensor], bool]) -> None:
    def gated(net: Made, x: Tensor) -> Tensor:
        a = F.relu(net.n0(net.c0(x)))
        return net.head(F.relu(net.n1(net.c1(a) if other(x) else net.c2(a))).mean((2, 3)))

    net = made(lambda: Made(gated))
    with torch.no_grad():
        net.c1.weight[:, :20] = 0
    require_exact(net, [images(6), images(1, seed=2), 0.1 * images(4)])


def test_channels_of_a_padding_open_nothing_before_it() -> None:
    """They are open at every position. Where the others are not, as in the second batch, the layer before is dead."""

    def padded(net: Made, x: Tensor) -> Tensor:
        few = F.conv2d(F.relu(net.n0(net.c0(x))), net.c1.weight[:4], padding=1)
        return net.head(
            F.relu(F.pad(few, (0, 0, 0, 0, 0, 44)) + F.conv2d(x, net.aux.weight[:, :, None, None])).mean((2, 3))
        )

    net = made(lambda: Made(padded))
    net.aux = nn.Linear(3, 48).double()
    with torch.no_grad():
        net.aux.weight.fill_(0.001)
        net.aux.weight[:4, 0], net.aux.weight[4:, 1] = 100.0, 1.0
        net.head.bias[1] = 1e6
    x = images(6).abs() + torch.tensor([1.0, 10.0, 0.0], dtype=torch.float64).view(3, 1, 1)
    net.n0.running_mean.copy_(net.c0(x).mean((0, 2, 3)))
    require_exact(net, [x, x * torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64).view(3, 1, 1)], splits=["n0"])


def test_two_names_of_one_tensor() -> None:
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 48, 3), nn.BatchNorm2d(48)), nn.ReLU(), nn.Conv2d(48, 32, 3))
    net.extend([nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3)])
    require_exact(net.double().eval(), [images(6)], least=1.0, splits=["0", "0.1", "3"])


def test_gradients_that_cancel_for_some_classes() -> None:
    """Channels come in pairs of equal maps, which one row of the head weighs alike and another against each other."""

    def paired(net: Made, x: Tensor) -> Tensor:
        a = F.relu(net.n0(net.c0(x)))
        return net.head(F.relu(net.c1(a)).mean((2, 3)))

    net = made(lambda: Made(paired))
    net.head = nn.Linear(48, 2).double()
    with torch.no_grad():
        net.c1.weight[::2] = net.c1.weight[1::2]
        net.c1.bias[::2] = net.c1.bias[1::2]
        net.head.weight.fill_(1)
        net.head.weight[1, ::2] = -1
        net.head.bias.copy_(torch.tensor([0.0, 2.0]))
    x = torch.cat([images(8) * scale for scale in (3.0, 0.1)])
    label = net(x).argmax(1)
    assert set(label.tolist()) == {0, 1}
    require_exact(net, [x[label == 0], x[label == 1]], splits=["n0"])


def test_reading_is_taken_up_again_after_batches_that_prove_nothing() -> None:
    net, x = made(Plain), images(4)
    with torch.no_grad():
        net.n0.bias.fill_(-0.5)
        net.c0.bias.zero_()
    batches = [torch.zeros_like(x)] * 2 + [3 * x] * 9
    require_exact(net, batches, least=0.5)


def test_in_low_precision_every_gradient_is_computed() -> None:
    """Its sums are zero by accident in some images and not in others, whatever full precision has shown before."""
    net, x = made(Plain, torch.float32), images(16).float()
    detector, exact = SandI(net, variant="Z"), SandI(net, variant="Z", rectifier_shortcut=False)
    detector(x)
    with torch.autocast("cpu", torch.bfloat16):
        for batch in x.split(4):
            assert torch.equal(detector(batch)[1], exact(batch)[1])
