"""Convolutions that joins, tiles and scales show up in, and a net: for Triton's interpreter and for
GPUs alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

import torch
from conftest import NAN, Case, Operands, exact, integers, randomize
from test_ops_conv import square
from torch import Tensor, nn

import resnet_fused as rf

ONE, TWO, THREE = (1, 1), (2, 2), (3, 3)

SMALL = [
    square(1, 40, 5, 72, padding=ONE),  # ragged
    square(2, 64, 4, 64, padding=ONE),
    square(1, 3, 11, 40, 7, stride=TWO, padding=(3, 3)),  # flat
    square(1, 32, 5, 48, groups=2, padding=ONE),
]


def with_shortcut(case, dtype, channels=24, stride=2):
    """Operands of a convolution and the shortcut that joins it, whole numbers."""
    o = integers(case.but(residual=False)).to(dtype)
    rows, columns = case.y_shape[-2:]
    size = (channels, stride * (rows - 1) + 1, stride * columns)
    branch = Case(case.n, *size, case.k, (1, 1), stride=(stride, stride), residual=False)
    s = integers(branch.but(act="none")).to(dtype)
    powers = torch.exp2(torch.arange(case.k) % 5 - 2.0)  # ratios of scales stay exact
    signs = 1 - 2.0 * (torch.arange(case.k) % 2)
    return replace(o, scale=powers * signs), replace(s, scale=powers.flip(0)), branch


def shortcut_of(s, branch):
    return {
        "shortcut_x": s.x,
        "shortcut_packed": s.weight,
        "shortcut_scale": s.scale,
        "shortcut_shift": s.shift,
        "shortcut_stride": branch.stride,
    }


def exact_with_shortcut(o, case, s, branch):
    y = exact(o, case.but(residual=False, act="none"))
    y = y + exact(s, branch.but(act="none"))
    return y.clamp_min(0) if case.act == "relu" else y


SCALES = [0.0, 1e-6, -1e-6, 1.0, -1.5, 1e-38, -3e-45, 1e4]


def small_net() -> nn.Sequential:
    """A stem with its pool, and every kind of residual block; for 3 channels, any size."""
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(rf.reference.Residual(8, 8), rf.reference.Residual(8, 16, True, 2)),
        *(rf.reference.Bottleneck(16, 4), rf.reference.Bottleneck(16, 8, True, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 7)),
    )
    return randomize(net).eval()


# ---- on a device -------------------------------------------------------------------------------

# How float32 is multiplied, and the 16-bit dtypes.
MODES = {
    "ieee": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@contextmanager
def multiplied(mode: str) -> Iterator[torch.dtype]:
    """torch's flag for float32 convolutions as a mode says; gives the mode's dtype."""
    flags = torch.backends.cudnn.conv
    before = flags.fp32_precision
    flags.fp32_precision = "tf32" if mode == "tf32" else "ieee"
    try:
        yield MODES[mode]
    finally:
        flags.fp32_precision = before


def moved(o: Operands, device: torch.device) -> Operands:
    """Operands on a device; dense there, so that layouts come after."""
    tensors = {field.name: getattr(o, field.name) for field in fields(o)}
    return Operands(**{n: None if t is None else t.to(device) for n, t in tensors.items()})


def spoil(size: int, device: torch.device) -> None:
    """Leaves NaN in freed memory of a device, which the next tensor of so many bytes gets."""
    blocks = [torch.full((max(size // 2, 1),), NAN, dtype=torch.bfloat16, device=device)]
    blocks += [block.clone() for block in blocks * 3]
    del blocks


def gpu_conv(
    plan: str, o: Operands, case: Case, config: str = "", **shortcut: Tensor | tuple[int, int]
) -> Tensor:
    """The op of a plan on operands where they are, into spoiled memory."""
    y_bytes = torch.Size(case.y_shape).numel() * o.x.element_size()
    spoil(y_bytes, o.x.device)
    names = ("stride", "padding", "dilation", "groups", "act")
    keywords = {name: getattr(case, name) for name in names} | shortcut
    op = getattr(torch.ops.resnet_fused, f"conv_bn_act_{plan}")
    return op(*o.args(), kernel_size=case.kernel, config=config, **keywords)
