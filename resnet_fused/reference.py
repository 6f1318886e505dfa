"""Eager definitions: what every fused op and module must compute.

These are the oracle of the tests, what the public ops compute under function transforms, parts of
what runs where no kernel of ours serves, and the plain blocks that a fused network is compared with
and can always be turned back into.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def scale_shift_act(
    y: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str
) -> Tensor:
    """act(y * scale + shift + residual), computed in scale's dtype and returned in y's.

    y and residual: (..., C, H, W); scale and shift: (C,).
    """
    wide = y.to(scale.dtype) * scale[:, None, None] + shift[:, None, None]
    if residual is not None:
        wide = wide + residual.to(scale.dtype)
    if act == "relu":
        wide = F.relu(wide)
    return wide.to(y.dtype)


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    act: str = "relu",
) -> Tensor:
    """act(conv2d(x, weight) * scale + shift + residual), shapes as in `ops.conv_bn_act`."""
    y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    return scale_shift_act(y, scale, shift, residual, act)


def max_pool(y: Tensor) -> Tensor:
    """The max-pool of a stem: 3x3, stride 2, padding 1; NaN passes. y: (..., C, H, W)."""
    return F.max_pool2d(y, 3, 2, 1)


def add_relu(a: Tensor, b: Tensor) -> Tensor:
    """relu(a + b)."""
    return F.relu(a + b)


class Residual(nn.Module):
    """The lesson's residual block: two 3x3 convolutions, an optional 1x1 one on the shortcut.

    The lesson is the chapter on ResNet of *Dive into Deep Learning*.
    x: (N, input_channels, H, W) -> (N, num_channels, ceil(H / strides), ceil(W / strides)).
    All convolutions have biases and no batch norm follows `conv3`.
    """

    def __init__(
        self, input_channels: int, num_channels: int, use_1x1conv: bool = False, strides: int = 1
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(
            input_channels, num_channels, kernel_size=3, padding=1, stride=strides
        )
        self.conv2 = nn.Conv2d(num_channels, num_channels, kernel_size=3, padding=1)
        self.conv3 = (
            nn.Conv2d(input_channels, num_channels, kernel_size=1, stride=strides)
            if use_1x1conv
            else None
        )
        self.bn1 = nn.BatchNorm2d(num_channels)
        self.bn2 = nn.BatchNorm2d(num_channels)

    def forward(self, X: Tensor) -> Tensor:
        Y = F.relu(self.bn1(self.conv1(X)))
        Y = self.bn2(self.conv2(Y))
        if self.conv3:
            X = self.conv3(X)
        Y += X
        return F.relu(Y)


class Bottleneck(nn.Module):
    """The lesson's block drawn out to 1x1, 3x3, 1x1, for nets of 50 layers and more.

    x: (N, input_channels, H, W) -> (N, 4 * num_channels, ceil(H / strides), ceil(W / strides)).
    The stride sits on the 3x3 convolution; `conv4` is the optional 1x1 convolution on the shortcut.
    Without it, input_channels must be 4 * num_channels and strides 1.
    """

    expansion = 4

    def __init__(
        self, input_channels: int, num_channels: int, use_1x1conv: bool = False, strides: int = 1
    ) -> None:
        super().__init__()
        out_channels = self.expansion * num_channels
        self.conv1 = nn.Conv2d(input_channels, num_channels, kernel_size=1)
        self.conv2 = nn.Conv2d(num_channels, num_channels, kernel_size=3, padding=1, stride=strides)
        self.conv3 = nn.Conv2d(num_channels, out_channels, kernel_size=1)
        self.conv4 = (
            nn.Conv2d(input_channels, out_channels, kernel_size=1, stride=strides)
            if use_1x1conv
            else None
        )
        self.bn1 = nn.BatchNorm2d(num_channels)
        self.bn2 = nn.BatchNorm2d(num_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def forward(self, X: Tensor) -> Tensor:
        Y = F.relu(self.bn1(self.conv1(X)))
        Y = F.relu(self.bn2(self.conv2(Y)))
        Y = self.bn3(self.conv3(Y))
        if self.conv4:
            X = self.conv4(X)
        Y += X
        return F.relu(Y)
