"""Small hand-made networks, each of them a trap for an engine that replays a network from the middle.

All take (B, 3, 16, 16) and give (B, 7) logits. The feature map of variant A is the module "feature".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 7
WIDTH = 8


def conv(inputs: int = WIDTH, outputs: int = WIDTH, kernel: int = 3, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)  # type: ignore[arg-type]


class Trap(nn.Module):
    """Stem, the trap (``middle``), a last convolution whose rectified output is the feature map, a linear head."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.stem, self.norm0 = conv(3, WIDTH, stride=2), nn.BatchNorm2d(WIDTH)
        self.last, self.norm9 = conv(width, WIDTH), nn.BatchNorm2d(WIDTH)
        self.feature, self.head = nn.ReLU(), nn.Linear(WIDTH, CLASSES)

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(F.relu(self.norm0(self.stem(x))))
        return self.head(self.feature(self.norm9(self.last(x))).mean((2, 3)))


class Block(Trap):
    """One normalised, rectified convolution; tests change what happens to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(), nn.BatchNorm2d(WIDTH)

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(self.change(x, self.norm1(self.conv1(x))))


class InPlaceResidual(Trap):
    """The residual is added into the norm's output, and the sum rectified in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.conv2, self.norm2 = conv(), nn.BatchNorm2d(WIDTH), conv(), nn.BatchNorm2d(WIDTH)
        self.relu = nn.ReLU(inplace=True)

    def middle(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        out += x
        return self.relu(out)


class RectifiedBehindItsBack(Trap):
    """``y`` is rectified in place by a module called on it, and used again afterwards under its old name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.relu = conv(), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True)

    def middle(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x))
        z = self.relu(y)
        return self.conv1(z) + 3 * y


class Dense(Trap):
    def __init__(self) -> None:
        super().__init__(width=3 * WIDTH)
        self.norm1, self.conv1 = nn.BatchNorm2d(WIDTH), conv()
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * WIDTH), conv(2 * WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        return torch.cat([x, self.conv2(F.relu(self.norm2(x)))], 1)


class Reused(Trap):
    """One block called three times: "norm1", "norm1#2", "norm1#3"; one ReLU object everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.relu = conv(), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True)

    def middle(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.relu(self.norm1(self.conv1(x)))
        return x


class Grouped(Trap):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm1 = conv(groups=WIDTH), nn.BatchNorm2d(WIDTH)
        self.pointwise, self.norm2 = conv(kernel=1), nn.GroupNorm(2, WIDTH)
        self.grouped, self.norm3 = (
            conv(groups=2, dilation=1),
            nn.InstanceNorm2d(WIDTH, affine=True, track_running_stats=True),
        )
        self.act = nn.ReLU6(inplace=True)

    def middle(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.depthwise(x)))
        x = self.act(self.norm2(self.pointwise(x)))
        x = x.view(x.size(0), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)  # channel shuffle
        return self.act(self.norm3(self.grouped(x)))


class Pooled(Trap):
    """Where the pattern of non-zero gradients is not that of the rectifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.pool = conv(), nn.BatchNorm2d(WIDTH), nn.MaxPool2d(3, 2, 1)
        self.conv2, self.norm2, self.act = conv(), nn.BatchNorm2d(WIDTH), nn.LeakyReLU(0.0)

    def middle(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.norm1(self.conv1(x))))
        x = F.relu(F.max_pool2d(self.norm2(self.conv2(x)), 2))
        return F.interpolate(self.act(x), scale_factor=2, mode="bilinear", align_corners=False)


class Attention(Trap):
    """Tokens, a class token expanded to the batch, self-attention by hand and by a module (which gives a tuple)."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.ln1, self.ln2, self.ln3 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.attention = nn.Linear(WIDTH, 3 * WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def middle(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        t = torch.cat([self.token.expand(batch, -1, -1), x.flatten(2).transpose(1, 2)], 1)
        q, k, v = self.qkv(self.ln1(t)).reshape(batch, -1, 3, 2, channels // 2).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) * channels**-0.5).softmax(-1)
        t = t + (weights @ v).transpose(1, 2).reshape(batch, -1, channels)
        y = self.ln2(t)
        t = t + self.attention(y, y, y, need_weights=False)[0]
        t = F.gelu(self.ln3(t))[:, 1:] * t[:, :1]
        return t.transpose(1, 2).reshape(batch, channels, height, width)


class SliceWrites(Trap):
    """Writes into parts of a tensor, by index."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(), nn.BatchNorm2d(WIDTH)
        self.conv2, self.norm2 = conv(), nn.BatchNorm2d(WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x))
        y[:, :4] += x[:, 4:]
        y[:, 1] = x[:, 2] * 2
        z = self.norm2(self.conv2(F.relu(y)))
        z[z < -1] = 0.5
        z[:, :, ::2] *= 0.5
        buffer = torch.zeros_like(z)
        buffer[:, :4] = z[:, 4:]
        buffer[:, 4:] = z[:, :4]
        return F.leaky_relu(buffer, 0.1) + y.mul_(0.5)


class SqueezeExcite(Trap):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.norm2 = conv(), nn.BatchNorm2d(WIDTH), nn.BatchNorm1d(4)
        self.down, self.up = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.norm1(self.conv1(x)))
        scale = self.up(F.relu(self.norm2(self.down(F.adaptive_avg_pool2d(y, 1).flatten(1))))).sigmoid()
        return x + y * scale[:, :, None, None]


class Pair(nn.Module):
    """Gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(self.conv(x))
        return F.relu(y), y


class Tuples(Trap):
    def __init__(self) -> None:
        super().__init__()
        self.pair1, self.pair2 = Pair(), Pair()

    def middle(self, x: Tensor) -> Tensor:
        first, before = self.pair1(x)
        second, _ = self.pair2(first)
        return second + before


class Branches(Trap):
    """chunk, split, stack, unbind, einsum, where, and two branches that meet again."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(WIDTH)
        self.conv1, self.conv2 = conv(4, 4), conv(4, 4)
        self.mix = nn.Parameter(torch.zeros(WIDTH, WIDTH))

    def middle(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=1)
        left, right = F.relu(self.norm1(self.conv1(left))), F.relu(self.norm2(self.conv2(right)))
        met = torch.stack([left, right], dim=1)
        total = sum(met.unbind(1)) + (left - right).abs()
        x = torch.einsum("bchw,dc->bdhw", torch.cat([total, *(-total).split([2, 2], 1)], 1), self.mix)
        x = self.norm3(x)
        return torch.where(x > 0, x, 0.1 * x)


class Dead(Trap):
    """One split reaches the logits not at all, one only through zero weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.norm2, self.norm3 = conv(), *(nn.BatchNorm2d(WIDTH) for _ in range(3))
        self.register_buffer("off", torch.zeros(1, WIDTH, 1, 1))

    def middle(self, x: Tensor) -> Tensor:
        self.norm1(self.conv1(x))
        return F.relu(self.norm3(x + self.off * self.norm2(self.conv1(x))))


class DynamicFilter(Trap):
    """Convolution by weights computed from the image: the batch is folded into groups by the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH)
        self.filters = nn.Linear(WIDTH, 9 * WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        batch, channels, height, width = y.shape
        weights = self.filters(y.mean((2, 3))).view(batch * channels, 1, 3, 3)
        y = F.conv2d(y.reshape(1, batch * channels, height, width), weights, padding=1, groups=batch * channels)
        return F.relu(self.norm2(y.view(batch, channels, height, width)))


class Dropouts(Trap):
    """Inactive in eval mode, where the in-place one gives back its very argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(), nn.BatchNorm2d(WIDTH)
        self.drop1, self.drop2, self.same = nn.Dropout(0.5), nn.Dropout2d(0.5, inplace=True), nn.Identity()

    def middle(self, x: Tensor) -> Tensor:
        y = self.drop2(self.norm1(self.conv1(self.drop1(x))))
        return F.relu_(F.dropout(self.same(y), 0.5, self.training, inplace=True)) + x


class Upsampling(Trap):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.norm1 = conv(WIDTH, 4 * WIDTH, stride=2), nn.BatchNorm2d(4 * WIDTH)
        self.up, self.norm2 = nn.ConvTranspose2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        y = F.pixel_shuffle(F.elu(self.norm1(self.down(x))), 2)
        y = F.pad(self.norm2(self.up(y)), (1, 0, 0, 1), mode="reflect")[..., :-1, 1:]
        y = F.softplus(y) * x.cumsum(2).tanh()
        return y.roll(1, 3).flip(2) / y.amax((2, 3), keepdim=True).clamp(min=1e-3)


class Functional(Trap):
    """Normalisation without modules; split at convolutions and activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.act = conv(), nn.PReLU(WIDTH)

    def middle(self, x: Tensor) -> Tensor:
        mean, variance = torch.zeros(WIDTH).to(x), torch.ones(WIDTH).to(x)
        y = F.batch_norm(self.conv1(x), mean, variance, eps=1e-3)
        return F.group_norm(self.act(F.layer_norm(y, y.shape[1:])), 2)


class Plain(nn.Module):
    """No normalisation at all, flattened by ``x.size(0)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1, self.pool = nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2)
        self.conv2, self.relu2 = nn.Conv2d(6, 8, 3), nn.ReLU(inplace=True)
        self.hidden, self.relu3, self.head = nn.Linear(8 * 4 * 4, 20), nn.ReLU(), nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.conv2(self.pool(self.relu1(self.conv1(x)))))
        return self.head(self.relu3(self.hidden(x.view(x.size(0), -1))))


class FrozenStem(Trap):
    """Computes its first block under no_grad, as networks with frozen parts do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(), nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = F.relu(self.norm0(self.stem(x)))
        x = F.relu(self.norm1(self.conv1(x)))
        return self.head(self.feature(self.norm9(self.last(x))).mean((2, 3)))


TRAPS: dict[str, type[nn.Module]] = {
    trap.__name__: trap
    for trap in (
        InPlaceResidual,
        RectifiedBehindItsBack,
        Dense,
        Reused,
        Grouped,
        Pooled,
        Attention,
        SliceWrites,
        SqueezeExcite,
        Tuples,
        Branches,
        Dead,
        DynamicFilter,
        Dropouts,
        Upsampling,
        Functional,
        FrozenStem,
    )
}
"""Those with a module "feature" for variant A; ``Plain`` besides."""
