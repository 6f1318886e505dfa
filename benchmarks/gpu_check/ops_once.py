"""Every GPU kernel once on small data, for sanitizers: python -m benchmarks.gpu_check.ops_once

Each Triton tile, each CUDA C++ tile that this GPU has, alone and sharing a reduction, with residual
or joined shortcut or neither; a stem with its max-pool; a bottleneck's tail; add_relu. Inputs are
made on the CPU, so that no kernels but ours run, and each answer is held against float64.
`--device cpu` takes Triton's interpreter.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import click
import torch
from torch import Tensor

from resnet_fused import backends, reference
from resnet_fused.triton_kernels import config as triton_configs
from resnet_fused.triton_kernels.device import INTERPRETED, device_of

from .facts import ROOT

_ops = torch.ops.resnet_fused
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Of the largest output, for one rounding of the output and sums in another order; TF32 products.
ALLOWED = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2e-6}
TF32_ALLOWED = 2**-9
TILES = re.compile(r"\bkTiles\[\] = \{(.*?)^\};", re.MULTILINE | re.DOTALL)
NAMED_TILE = re.compile(r'^\s*\{"(\w+)", \{', re.MULTILINE)


@dataclass(frozen=True)
class Call:
    """One call of an op. extra: "residual", "shortcut" or ""."""

    backend: str
    config: str
    dtype: torch.dtype
    in_channels: int = 64
    out_channels: int = 64
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    extra: str = ""

    def __str__(self) -> str:
        shape = f"{self.kernel}x{self.kernel}/{self.stride} {self.in_channels}>{self.out_channels}"
        parts = (self.backend, self.config or "by rule", shape, self.extra, str(self.dtype))
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Operands:
    """On the CPU. x (2, C, 9, 9), weight (K, C/groups, R, R), residual and shortcut's x to fit."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor | None
    shortcut: tuple[Tensor, ...]  # x, weight, scale, shift; or empty


def calls(device: torch.device) -> Iterator[Call]:
    """What can run on the device."""
    tiles = [triton_configs.TILES, _cuda_tiles("sm80"), ()]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        tiles[2] = (*_cuda_tiles("sm90"), "tap-shift")
    if not _missing("triton", device):
        gpu = INTERPRETED if device.type == "cpu" else device_of(device.index or 0)
        for i, tile in enumerate(tiles[0]):
            # 16-bit tiles: 32-bit operands would need twice the shared memory. Ragged channels
            # need many registers, with which large tiles are not compiled otherwise.
            channels = 40 if tile.sums_per_thread <= 32 else 64
            text = str(replace(tile, split=(1, 3)[i % 2]))
            if tile.shared_bytes(2) <= gpu.shared_bytes:
                yield Call("triton", text, DTYPES[i % 2], channels, 72, extra=_extra(i))
        yield Call("triton", "", torch.float32, 40, 48, stride=2, extra="residual")
        yield Call("triton", "", torch.bfloat16, 3, 64, kernel=7, stride=2)
        yield Call("triton", "", torch.float16, 32, 48, groups=2)
    if _missing("cuda", device):
        return
    for i, name in enumerate(tiles[1]):
        yield Call("cuda", f"sm80 {name} split {(1, 3)[i % 2]}", DTYPES[i % 3], extra=_extra(i))
    for i, name in enumerate(tiles[2]):
        chunk = int((re.findall(r"k(\d+)$", name) or ["64"])[0])
        split = 1 if name == "tap-shift" else (1, 3)[i % 2]
        yield Call("cuda", f"sm90 {name} split {split}", DTYPES[i % 2], chunk, extra=_extra(i))
    yield Call("cuda", "", torch.bfloat16, 3, 64, kernel=7, stride=2)
    yield Call("cuda", "", torch.float16, 32, 48, groups=2)


def _extra(index: int) -> str:
    return ("residual", "shortcut", "")[index % 3]


def _cuda_tiles(family: str) -> tuple[str, ...]:
    """The names of the compiled tiles, read from the sources: no op lists them."""
    texts = (path.read_text() for path in sorted((ROOT / "csrc/cuda" / family).glob("*.h")))
    lists = (tiles for text in texts for tiles in TILES.findall(text))
    names = tuple(name for tiles in lists for name in NAMED_TILE.findall(tiles))
    if not names:
        raise RuntimeError(f"ops_once: csrc/cuda/{family} must name its tiles, none was found")
    return names


@functools.cache
def _missing(plan: str, device: torch.device) -> str:
    return backends.missing(plan, device.type, device.index or 0)


def operands(call: Call, seed: int = 0) -> Operands:
    """Normal values, outputs of order 1; scales of both signs, one of them 0."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, of: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=g) * of
        if len(shape) != 4:
            return values
        return values.to(call.dtype).contiguous(memory_format=torch.channels_last)

    k, size, group = call.out_channels, -(-9 // call.stride), call.in_channels // call.groups
    fan_in = group * call.kernel**2
    scale, shift = normal(k), normal(k)
    scale[0] = 0
    shortcut = ()
    if call.extra == "shortcut":
        x, weight = normal(2, 64, 2 * size, 2 * size), normal(k, 64, 1, 1, of=64**-0.5)
        second = normal(k)
        second[1] = 0
        shortcut = (x, weight, second, normal(k))
    return Operands(
        normal(2, call.in_channels, 9, 9),
        normal(k, group, call.kernel, call.kernel, of=fan_in**-0.5),
        *(scale, shift, normal(2, k, size, size) if call.extra == "residual" else None, shortcut),
    )


def run(call: Call, o: Operands, device: torch.device) -> Tensor:
    """The op's answer, on the CPU."""
    tensors = [o.x, o.weight, o.scale, o.shift, o.residual, *(o.shortcut or [None] * 4)]
    op = getattr(_ops, f"conv_bn_act_{call.backend}")
    y = op(
        *(t if t is None else t.to(device) for t in tensors),
        kernel_size=(call.kernel, call.kernel),
        stride=(call.stride, call.stride),
        padding=(call.kernel // 2, call.kernel // 2),
        groups=call.groups,
        shortcut_stride=(2, 2),
        config=call.config,
    )
    return y.cpu()


def exact(call: Call, o: Operands) -> Tensor:
    """In float64."""
    joined = None if o.residual is None else o.residual.double()
    if o.shortcut:
        joined = reference.conv_bn_act(*(t.double() for t in o.shortcut), stride=2, act="none")
    main = (t.double() for t in (o.x, o.weight, o.scale, o.shift))
    pad = call.kernel // 2
    keywords = {"stride": call.stride, "padding": pad, "groups": call.groups}
    return reference.conv_bn_act(*main, joined, **keywords)


def error(y: Tensor, oracle: Tensor) -> float:
    """The largest difference, in units of the largest value; infinite where y is not finite."""
    if y.shape != oracle.shape or not bool(y.isfinite().all()):
        return float("inf")
    return float((y.double() - oracle).abs().max() / oracle.abs().max())


def allowed(dtype: torch.dtype) -> float:
    tf32 = dtype == torch.float32 and backends.uses_tf32()
    return TF32_ALLOWED if tf32 else ALLOWED[dtype]


def check_add_relu(backend: str, device: torch.device) -> bool:
    a, b = (torch.randn(5003, generator=torch.Generator().manual_seed(i)) for i in range(2))
    y = getattr(_ops, f"add_relu_{backend}")(a.to(device), b.to(device)).cpu()
    return torch.equal(y, torch.relu(a + b))


def check_stem(device: torch.device, size: int) -> bool:
    """Convolution and max-pool in one kernel: few tiles are small ones, many are large ones."""
    call = Call("cuda", "", torch.bfloat16, 3, 64, kernel=7, stride=2)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)).to(call.dtype)
    o = replace(operands(call), x=x)
    tensors = (t.to(device) for t in (o.x, o.weight, o.scale, o.shift))
    geometry = {"kernel_size": (7, 7), "stride": (2, 2), "padding": (3, 3)}
    y = _ops.conv_bn_act_pool_cuda(*tensors, **geometry).cpu()
    return error(y, reference.max_pool(exact(call, o))) <= allowed(call.dtype)


def check_tail(device: torch.device, between: int) -> bool:
    """A bottleneck's last two convolutions in one kernel; channels between choose its tile."""
    first = Call("cuda", "", torch.bfloat16, 64, between)
    last = Call("cuda", "", torch.bfloat16, between, 136, kernel=1, extra="residual")
    a, b = operands(first), operands(last)
    tensors = (a.x, a.weight, a.scale, a.shift, b.weight, b.scale, b.shift, b.residual)
    on_device = (t.to(device) for t in tensors)
    y = _ops.bottleneck_tail_cuda(*on_device, kernel_size=(3, 3), padding=(1, 1)).cpu()
    oracle = exact(last, replace(b, x=exact(first, a).to(first.dtype)))
    return error(y, oracle) <= allowed(first.dtype)


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--most", type=click.IntRange(min=1), help="Calls at most, for a short look.")
def main(device: str, most: int | None) -> None:
    """Call each kernel once; the last line, for programs, says how many answers were wrong."""
    where = torch.device(device, 0)
    wrong = []
    todo = list(calls(where))[:most]
    for call in todo:
        o = operands(call)
        try:
            off = error(run(call, o, where), exact(call, o))
        except RuntimeError as refused:
            wrong.append(f"{call}: {str(refused).splitlines()[0]}")
            continue
        if not off <= allowed(call.dtype):
            wrong.append(f"{call}: off by {off:.2g}, {allowed(call.dtype):.2g} allowed")
    for backend in ("triton", "cuda"):
        if not _missing(backend, where) and not check_add_relu(backend, where):
            wrong.append(f"{backend}: add_relu is wrong")
    for size in (41, 320):
        if not _missing("cuda", where) and not check_stem(where, size):
            wrong.append(f"cuda: a stem of {size} x {size} with its max-pool is wrong")
    for between in (64, 128):
        if not _missing("cuda", where) and not check_tail(where, between):
            wrong.append(f"cuda: a bottleneck's tail with {between} channels between is wrong")
    print("\n".join(wrong))
    print(f"{len(todo)} calls, {len(wrong)} wrong")
    sys.exit(bool(wrong) or not todo)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gpu_check.ops_once")
