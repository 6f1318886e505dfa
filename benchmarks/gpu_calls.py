"""Calls every GPU kernel of ours a few times on small random images: what a sanitizer watches.

compute-sanitizer --tool memcheck python -m benchmarks.gpu_calls
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from resnet_fused.ops import _cuda, _triton

_ops = torch.ops.resnet_fused
_TEXTS = (
    "",
    "64x64x64 warps 4 stages 4",
    "64x64x64 warps 4 stages 4 split 3",
    "256x64x64 warps 8 stages 4 swap",
    "128x128x64 warps 8 stages 3",
)


def main() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    able = {"triton": _triton.triton_error(device), "cuda": _cuda.cuda_error(device)}
    for plan, error in able.items():
        if error:
            print(f"{plan}: {error}")
            continue
        for name, call in calls(plan, device):
            call()
            torch.cuda.synchronize()
            print(f"{plan}: {name}")


def calls(plan: str, device: torch.device) -> Iterator[tuple[str, object]]:
    """What to call, by name."""
    conv, add = (getattr(_ops, f"{name}_{plan}") for name in ("conv_bn_act", "add_relu"))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a = torch.randn(2, 20, 7, 9, device=device).to(dtype)
        yield f"add_relu {dtype}", lambda a=a: add(a, a)
        for text in _TEXTS if plan == "triton" else ("",):
            for shape in _SHAPES:
                yield f"{shape} {dtype} {text}", _call(conv, shape, dtype, text, device)


class Shape:
    """A convolution small enough for a sanitizer."""

    def __init__(self, c: int, k: int, kernel: int, stride: int, joined: int, groups: int = 1):
        self.c, self.k, self.kernel, self.stride = c, k, kernel, stride
        self.joined, self.groups = joined, groups

    def __str__(self) -> str:
        text = f"{self.kernel}x{self.kernel}/{self.stride} {self.c}->{self.k}"
        return f"{text}, {self.joined} joined" if self.joined else text


_SHAPES = (
    Shape(64, 64, 3, 1, 0),
    Shape(64, 128, 3, 1, 64),
    Shape(3, 64, 7, 2, 0),
    Shape(40, 72, 3, 2, 0),
    Shape(64, 32, 1, 1, 0),
    Shape(32, 48, 3, 1, 0, groups=2),
)


def _call(conv, shape: Shape, dtype: torch.dtype, text: str, device: torch.device):
    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device).to(dtype)

    pad = shape.kernel // 2
    size = (11 + 2 * pad - shape.kernel) // shape.stride + 1
    operands = [
        draw(2, shape.c, 11, 11),
        draw(shape.k, shape.c // shape.groups, *[shape.kernel] * 2),
    ]
    operands += [torch.randn(shape.k, device=device), torch.randn(shape.k, device=device)]
    if shape.joined:
        operands += [None, draw(2, shape.joined, 2 * size, 2 * size)]
        operands += [draw(shape.k, shape.joined, 1, 1)]
        operands += [torch.randn(shape.k, device=device), torch.randn(shape.k, device=device)]
    else:
        operands.append(draw(2, shape.k, size, size))
    keywords = {"stride": (shape.stride,) * 2, "padding": (pad, pad), "groups": shape.groups}
    return lambda: conv(
        *operands,
        kernel_size=(shape.kernel,) * 2,
        shortcut_stride=(2, 2),
        config=text,
        **keywords,
    )


if __name__ == "__main__":
    main()
