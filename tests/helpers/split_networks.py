"""Small networks whose split points have the batch, or the channels, in unusual dimensions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 8


class CastingNorm(nn.LayerNorm):
    """A forward of its own, and channels last all the same."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.double(), self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)


class PermutingNorm(nn.LayerNorm):
    """Normalises the channels of maps (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class HandNorm(nn.Module):
    """RMSNorm of the last dimension, without a call of torch's that says so."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale


class Maps(nn.Module):
    """A norm on maps, (B, C, H, W) or, with ``last``, (B, H, W, C)."""

    def __init__(self, norm: nn.Module, last: bool) -> None:
        super().__init__()
        self.stem, self.norm, self.last = nn.Conv2d(3, WIDTH, 3, padding=1), norm, last
        self.conv, self.head = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2) if self.last else F.relu(self.norm(x))
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


class Folded(nn.Module):
    """A norm in the ``layout`` given: "tokens" (B N, D), "sequence first" (N, B, D), "views" (V B, C, H, W),
    "interleaved views" (B V, C, H, W), "scrambled" rows."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.layout, self.maps = layout, "views" in layout
        self.patch, self.head = nn.Conv2d(3, WIDTH, 4, 4), nn.Linear(WIDTH, 5)
        self.norm: nn.Module = nn.LayerNorm(WIDTH) if layout == "sequence first" else nn.BatchNorm1d(WIDTH)
        if self.maps:
            self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.maps:
            views = torch.stack([x, x.flip(3)], 1 if "interleaved" in self.layout else 0)
            found = F.relu(self.norm(self.patch(views.flatten(0, 1)))).mean((2, 3)).unflatten(0, views.shape[:2])
            return self.head(found.mean(1 if "interleaved" in self.layout else 0))
        x = self.patch(x).flatten(2).transpose(1, 2)
        if self.layout == "sequence first":
            return self.head(F.relu(self.norm(x.transpose(0, 1))).mean(0))
        rows = x.flatten(0, 1)
        order = torch.arange(len(rows)).roll(1) if self.layout == "scrambled" else torch.arange(len(rows))
        y = self.norm(rows[order])[order.argsort()]
        return self.head(F.relu(y.view_as(x)).mean(1))


class LatentPooled(nn.Module):
    """Blocks of tokens, and an attention of one learnt query that pools them."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, WIDTH, 2, 2), nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(depth)
        )
        self.query, self.kv = nn.Parameter(torch.randn(1, 2, 1, WIDTH // 2)), nn.Linear(WIDTH, 2 * WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        x = self.norm(x)
        keys, values = self.kv(x).view(len(x), -1, 2, 2, WIDTH // 2).permute(2, 0, 3, 1, 4).unbind(0)
        pooled = F.scaled_dot_product_attention(self.query.expand(len(x), -1, -1, -1), keys, values)
        return self.head(pooled.transpose(1, 2).flatten(1))


class Squeezing(nn.Module):
    """Squeeze-and-excitation behind the last convolution, and a head with a convolution of the pooled 1x1 map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH)
        self.conv, self.last = nn.Conv2d(WIDTH, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH)
        self.squeeze, self.excite = nn.Conv2d(WIDTH, 4, 1), nn.Conv2d(4, WIDTH, 1)
        self.conv_head, self.head = nn.Conv2d(WIDTH, 12, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.last(self.conv(F.relu(self.norm(self.stem(x))))))
        x = x * self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        return self.head(F.relu(self.conv_head(F.adaptive_avg_pool2d(x, 1))).flatten(1))


class OneNorm(nn.Module):
    """The only norm is the feature map itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, WIDTH, 3), nn.Conv2d(WIDTH, WIDTH, 3)
        self.norm, self.head = nn.BatchNorm2d(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.mix(F.relu(self.conv(x)))).mean((2, 3)))


class OncePerImage(nn.Module):
    """Runs its trunk on one image after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([F.relu(self.norm(self.conv(image))).mean((2, 3)) for image in x.split(1)]))
