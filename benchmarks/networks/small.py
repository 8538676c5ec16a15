"""Small networks of other activations than ReLU, for the embedded digits: a CNN of SiLU and a transformer of GELU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SiluCnn(nn.Module):
    """Three stages of two convolutions, batch norm and SiLU behind each: (B, in, H, W) -> (B, classes)."""

    def __init__(self, in_channels: int, classes: int, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        self.stages = nn.Sequential()
        before = in_channels
        for number, width in enumerate(widths):
            layers: list[nn.Module] = []
            for stride in (2 if number else 1, 1):
                layers += [nn.Conv2d(before, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width), nn.SiLU()]
                before = width
            self.stages.append(nn.Sequential(*layers))
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.stages(x).mean((2, 3)))
        return logits


class Block(nn.Module):
    """Attention and a perceptron of one hidden layer, each behind a layer norm and added to (B, N, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.project(attended)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class SmallVit(nn.Module):
    """A vision transformer (Dosovitskiy et al., ICLR 2021) without class token: (B, in, side, side) -> (B, classes)."""

    def __init__(
        self, in_channels: int, classes: int, side: int = 16, patch: int = 4, width: int = 48, depth: int = 6
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, width, patch, patch)
        self.places = nn.Parameter(0.02 * torch.randn(1, (side // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits
