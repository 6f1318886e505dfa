"""Every GPU kernel once on small data, for sanitizers: python -m benchmarks.gpu_check.ops_once

Each Triton tile, each CUDA C++ tile that this GPU has, alone and sharing a reduction, with residual
or joined shortcut or neither; a stem with its max-pool; a bottleneck's tail; a head; the epilogue
alone; add_relu. Inputs are made on the CPU, so that no kernels but ours run, and each answer is
held against float64. Each call is announced before it runs. `--device cpu` takes Triton's
interpreter.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import click
import torch
from torch import Tensor

from resnet_fused import backends, reference
from resnet_fused.ops import _cuda
from resnet_fused.triton_kernels import config as triton_configs
from resnet_fused.triton_kernels.device import INTERPRETED, device_of

from . import faults

_ops = torch.ops.resnet_fused
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Of the largest output, for one rounding of the output and sums in another order; TF32 products.
ALLOWED = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2e-6}
TF32_ALLOWED = 2**-9
WRONG = "! "  # begins a line about a wrong answer


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
    batch: int = 2
    size: int = 9

    def __str__(self) -> str:
        shape = f"{self.kernel}x{self.kernel}/{self.stride} {self.in_channels}>{self.out_channels}"
        shape += f" of {self.batch}x{self.size}x{self.size}"
        parts = (self.backend, self.config or "by rule", shape, self.extra, str(self.dtype))
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Check:
    """A kernel to run once. run: gives its error on a device, and the error that is allowed."""

    name: str
    run: Callable[[torch.device], tuple[float, float]]


@dataclass(frozen=True)
class Operands:
    """On the CPU. x (N, C, H, H), weight (K, C/groups, R, R), residual and shortcut's x to fit."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor | None
    shortcut: tuple[Tensor, ...]  # x, weight, scale, shift; or empty


def calls(device: torch.device) -> Iterator[Call]:
    """What can run on the device."""
    if works_here("triton", device):
        gpu = INTERPRETED if device.type == "cpu" else device_of(device.index or 0)
        for i, tile in enumerate(triton_configs.TILES):
            # 16-bit tiles: 32-bit operands would need twice the shared memory. Ragged channels
            # need many registers, with which large tiles are not compiled otherwise.
            channels = 40 if tile.sums_per_thread <= 32 else 64
            text = str(replace(tile, split=(1, 3)[i % 2]))
            if tile.shared_bytes(2) <= gpu.shared_bytes:
                yield Call("triton", text, DTYPES[i % 2], channels, 72, extra=_extra(i))
        yield Call("triton", "", torch.float32, 40, 48, stride=2, extra="residual")
        yield Call("triton", "", torch.bfloat16, 3, 64, kernel=7, stride=2)
        yield Call("triton", "", torch.float16, 32, 48, groups=2)
    if not works_here("cuda", device):
        return
    for i, name in enumerate(cuda_tiles("sm80")):
        yield Call("cuda", f"sm80 {name} split {(1, 3)[i % 2]}", DTYPES[i % 3], extra=_extra(i))
    sm90 = (*cuda_tiles("sm90"), "tap-shift") if works_here("sm90", device) else ()
    for i, name in enumerate(sm90):
        chunk = int((re.findall(r"k(\d+)$", name) or ["64"])[0])
        yield Call("cuda", f"sm90 {name} split 1", DTYPES[i % 2], chunk, extra=_extra(i))
        if name.startswith("p64x"):  # those whose blocks form clusters
            split = (2, 4, 8)[i % 3]
            yield Call("cuda", f"sm90 {name} split {split}", DTYPES[i % 2], extra=_extra(i + 1))
    yield Call("cuda", "", torch.bfloat16, 3, 64, kernel=7, stride=2)
    yield Call("cuda", "", torch.float16, 32, 48, groups=2)


def _extra(index: int) -> str:
    return ("residual", "shortcut", "")[index % 3]


def cuda_tiles(family: str) -> tuple[str, ...]:
    """The names of those that are compiled; none where the kernels are not loaded."""
    names = (configuration.name.split() for configuration in _cuda.configurations())
    return tuple(tile for of, tile in names if of == family)


@functools.cache
def works_here(kernels: str, device: torch.device) -> bool:
    """kernels: "triton", "cuda", or "sm90" for those of CUDA C++ that only sm_90 has."""
    if kernels == "sm90":
        return works_here("cuda", device) and torch.cuda.get_device_capability(device) == (9, 0)
    return not backends.missing(kernels, device.type, device.index or 0)


def operands(call: Call, seed: int = 0) -> Operands:
    """Normal values, outputs of order 1; scales of both signs, one of them 0."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, of: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=g) * of
        if len(shape) != 4:
            return values
        return values.to(call.dtype).contiguous(memory_format=torch.channels_last)

    k, n, size = call.out_channels, call.batch, -(-call.size // call.stride)
    group = call.in_channels // call.groups
    fan_in = group * call.kernel**2
    scale, shift = normal(k), normal(k)
    scale[0] = 0
    shortcut = ()
    if call.extra == "shortcut":
        x, weight = normal(n, 64, 2 * size, 2 * size), normal(k, 64, 1, 1, of=64**-0.5)
        second = normal(k)
        second[1] = 0
        shortcut = (x, weight, second, normal(k))
    return Operands(
        normal(n, call.in_channels, call.size, call.size),
        normal(k, group, call.kernel, call.kernel, of=fan_in**-0.5),
        *(scale, shift, normal(n, k, size, size) if call.extra == "residual" else None, shortcut),
    )


def run(call: Call, o: Operands, device: torch.device) -> Tensor:
    """The op's answer, on the CPU."""
    return launch(call, *on_device(o, device)).cpu()


def on_device(o: Operands, device: torch.device) -> list[Tensor | None]:
    tensors = [o.x, o.weight, o.scale, o.shift, o.residual, *(o.shortcut or [None] * 4)]
    return [t if t is None else t.to(device) for t in tensors]


def launch(call: Call, *tensors: Tensor | None) -> Tensor:
    return getattr(_ops, f"conv_bn_act_{call.backend}")(
        *tensors,
        kernel_size=(call.kernel, call.kernel),
        stride=(call.stride, call.stride),
        padding=(call.kernel // 2, call.kernel // 2),
        groups=call.groups,
        shortcut_stride=(2, 2),
        config=call.config,
    )


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


def conv(call: Call) -> Check:
    def run_once(device: torch.device) -> tuple[float, float]:
        o = operands(call)
        return error(run(call, o, device), exact(call, o)), allowed(call.dtype)

    return Check(str(call), run_once)


def rewritten(call: Call, times: int = 16) -> Check:
    """Weights that the kernel just before has written, again and again: one that begins while that
    one ends must not read the former ones.
    """

    def run_once(device: torch.device) -> tuple[float, float]:
        o = operands(call)
        both = [o, replace(o, weight=operands(call, seed=1).weight)]
        weights = [each.weight.to(device) for each in both]
        x, weight, *rest = on_device(o, device)
        weight, answers = weight.clone(), []
        for i in range(times):
            weight.copy_(weights[i % 2])
            answers.append(launch(call, x, weight, *rest))
        oracles = [exact(call, each) for each in both]
        worst = max(error(y.cpu(), oracles[i % 2]) for i, y in enumerate(answers))
        return worst, allowed(call.dtype)

    return Check(f"{call}, weights just written", run_once)


def add_relu(backend: str) -> Check:
    def run_once(device: torch.device) -> tuple[float, float]:
        a, b = (torch.randn(5003, generator=torch.Generator().manual_seed(i)) for i in range(2))
        y = getattr(_ops, f"add_relu_{backend}")(a.to(device), b.to(device)).cpu()
        return error(y, torch.relu(a + b)), 0.0

    return Check(f"{backend}, add_relu", run_once)


def scale_shift_act() -> Check:
    """The epilogue alone."""

    def run_once(device: torch.device) -> tuple[float, float]:
        call = Call("cuda", "", torch.bfloat16, extra="residual")
        o = operands(call, seed=2)
        tensors = (o.x, o.scale, o.shift, o.residual)
        y = _ops.scale_shift_act_cuda(*(t.to(device) for t in tensors), act="relu").cpu()
        x, scale, shift, residual = (t.double() for t in tensors)
        oracle = (x * scale[:, None, None] + shift[:, None, None] + residual).relu()
        return error(y, oracle), allowed(call.dtype)

    return Check("cuda, scale_shift_act", run_once)


def stem(size: int) -> Check:
    """Convolution and max-pool in one kernel: few tiles are small ones, many are large ones."""

    def run_once(device: torch.device) -> tuple[float, float]:
        call = Call("cuda", "", torch.bfloat16, 3, 64, kernel=7, stride=2, size=size)
        o = operands(call, seed=1)
        tensors = (t.to(device) for t in (o.x, o.weight, o.scale, o.shift))
        geometry = {"kernel_size": (7, 7), "stride": (2, 2), "padding": (3, 3)}
        y = _ops.conv_bn_act_pool_cuda(*tensors, **geometry).cpu()
        return error(y, reference.max_pool(exact(call, o))), allowed(call.dtype)

    return Check(f"cuda, a stem of {size} x {size} with its max-pool", run_once)


def tail(between: int) -> Check:
    """A bottleneck's last two convolutions in one kernel; channels between choose its tile."""

    def run_once(device: torch.device) -> tuple[float, float]:
        first = Call("cuda", "", torch.bfloat16, 64, between)
        last = Call("cuda", "", torch.bfloat16, between, 136, kernel=1, extra="residual")
        a, b = operands(first), operands(last)
        tensors = (a.x, a.weight, a.scale, a.shift, b.weight, b.scale, b.shift, b.residual)
        on_device = (t.to(device) for t in tensors)
        y = _ops.bottleneck_tail_cuda(*on_device, kernel_size=(3, 3), padding=(1, 1)).cpu()
        oracle = exact(last, replace(b, x=exact(first, a).to(first.dtype)))
        return error(y, oracle), allowed(first.dtype)

    return Check(f"cuda, a bottleneck's tail with {between} channels between", run_once)


def head(images: int, dtype: torch.dtype) -> Check:
    """Global average pool and linear layer; several images share the loads of weights."""

    def run_once(device: torch.device) -> tuple[float, float]:
        g = torch.Generator().manual_seed(images)
        shapes = ((images, 7, 7, 64), (100, 64), (100,))
        x, weight, bias = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
        x = x.permute(0, 3, 1, 2)
        tensors = (tensor.to(device) for tensor in (x, weight, bias))
        x_on, *layer = tensors
        pooled = _ops.global_avg_pool(x_on)
        y, pooled = _ops.linear(pooled.flatten(1), *layer).cpu(), pooled.cpu()
        mean = x.double().mean((2, 3), keepdim=True)
        products = pooled.flatten(1).double() @ weight.double().t() + bias.double()
        return max(error(pooled, mean), error(y, products)), ALLOWED[dtype]

    return Check(f"cuda, a head of {images} images, {dtype}", run_once)


def checks(device: torch.device) -> Iterator[Check]:
    """What can run on the device."""
    yield from map(conv, calls(device))
    for backend in ("triton", "cuda"):
        if works_here(backend, device):
            yield add_relu(backend)
    if works_here("cuda", device):
        yield from (scale_shift_act(), *map(stem, (41, 320)), *map(tail, (64, 128)))
        yield from (head(images, dtype) for dtype in DTYPES for images in (1, 6))


def run_all(todo: Sequence[Check], device: torch.device, each_s: float = 0.0) -> int:
    """Runs them until the GPU can be used no more and prints what was wrong; the exit status.

    each_s: a call that takes longer ends the process; 0 for no limit.
    """
    wrong = []
    if todo:
        torch.empty(1, device=device)  # CUDA starts, which takes long where many processes do so
    for check in todo:
        faults.announce(check.name)
        try:
            with faults.limit(each_s):
                off, limit = check.run(device)
        except Exception as refused:  # Triton's are of many kinds
            first = (str(refused).splitlines() or [""])[0]
            wrong.append(f"{check.name}: {type(refused).__name__}: {first}")
            if faults.broken():
                break
        else:
            found = f"off by {off:.2g}, {limit:.2g} allowed"
            print(f"  {found}", flush=True)
            if not off <= limit:
                wrong.append(f"{check.name}: {found}")
    print("".join(f"{WRONG}{line}\n" for line in wrong), end="")
    print(f"{len(todo)} calls, {len(wrong)} wrong")
    return faults.BROKEN if faults.broken() else int(bool(wrong) or not todo)


@click.command()
@click.option("--device", default="cuda", show_default=True)
@click.option("--most", type=click.IntRange(min=1), help="Calls at most, for a short look.")
@click.option("--each", type=click.FloatRange(min=0), default=0.0, help="Seconds for a call.")
def main(device: str, most: int | None, each: float) -> None:
    """Call each kernel once; the last line, for programs, says how many answers were wrong."""
    where = torch.device(device, 0)
    sys.exit(run_all(list(checks(where))[:most], where, each))


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.gpu_check.ops_once")
