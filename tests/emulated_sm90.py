"""Builds and calls the sm_90a kernel under emulation: g++ compiles its source, no GPU is needed."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


def words(text: str) -> list[str]:
    return text.split()


ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
TILES = words(
    "c128x256 c128x192 p128x256 c64x256 p128x128 p128x64 p64x128 p64x64 p64x32 "
    "p128x64k32 p128x64k16"
)
FLOAT16_TILES = ("c64x256", "p128x128", "p64x64")
SPLIT_TILES = ("p64x128", "p64x64", "p64x32")

_EMULATOR = (
    "fibers",
    "cluster",
    "memory",
    "mbarrier",
    "async",
    "tma",
    "bulk_store",
    "wgmma",
    "mma",
)
# The kernel's own loads and stores are seen through the calls that gcc inserts for its thread
# sanitizer, whose runtime is not linked.
_SEEN = words(
    "-fsanitize=thread -Wno-unknown-pragmas --param tsan-instrument-func-entry-exit=0 "
    "--param tsan-distinguish-volatile=1"
)


@functools.cache
def cuda_headers() -> Path | None:
    """The folder of cuda_bf16.h and cuda_fp16.h, or None."""
    folders = []
    if home := os.environ.get("CUDA_HOME"):
        folders.append(Path(home) / "include")
    if nvcc := shutil.which("nvcc"):
        dry = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True
        )
        if top := re.search(r"^#\$ TOP=(.*)$", dry.stderr, re.MULTILINE):
            folders += [Path(top[1].strip()) / "include"]
            folders += [Path(top[1].strip()) / "targets/x86_64-linux/include"]
    return next((f for f in folders if (f / "cuda_bf16.h").exists()), None)


def why_not() -> str | None:
    """Why the kernel cannot be built here, or None."""
    if shutil.which("g++") is None:
        return "there is no g++"
    return None if cuda_headers() else "there are no CUDA headers (CUDA_HOME or nvcc)"


def build(folder: Path, csrc: Path = CSRC, defines: tuple[str, ...] = ()) -> ctypes.CDLL:
    """Compiles the kernels of `csrc` and the emulator into `folder`, unless they are there."""
    kernels, plans = ["emulate/run_sm90", "emulate/run_tap_shift"], ["sm90/plan", "sm90/tap_shift"]
    return _declare(build_library(folder, "sm90", csrc, kernels, plans, defines))


@contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Tests run in several processes, which share `folder`: one of them at a time does `what`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{what}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build_library(
    folder: Path,
    name: str,
    csrc: Path,
    kernels: list[str],
    plans: list[str],
    defines: tuple[str, ...] = (),
) -> ctypes.CDLL:
    """The library `name`: files with kernels, files with plans, and the emulator."""
    jobs = [
        *((csrc, kernel, ("-O1", *_SEEN, *defines)) for kernel in kernels),
        *((csrc, plan, ("-O1",)) for plan in plans),
        *((CSRC, f"emulate/{file}", ("-O2", "-march=native")) for file in _EMULATOR),
    ]
    with alone(folder, "build"):
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda job: _compile(folder, *job), jobs))
        digest = hashlib.sha256(" ".join(map(str, objects)).encode())
        library = folder / f"{name}_{digest.hexdigest()[:16]}.so"
        if not library.exists():
            fresh = library.with_suffix(".new")
            command = ["g++", "-shared", "-pthread", *map(str, objects), "-o", str(fresh)]
            subprocess.run(command, check=True)
            fresh.rename(library)
    return ctypes.CDLL(str(library))


def _compile(folder: Path, csrc: Path, name: str, flags: tuple[str, ...]) -> Path:
    """One object file, named by what it was made from; the same is not made twice."""
    digest = hashlib.sha256(repr((name, flags)).encode())
    for header in [csrc / "check.h", *sorted((csrc / "cuda").rglob("*.*h"))]:
        digest.update(header.read_bytes())
    source = csrc / "cuda" / f"{name}.cpp"
    digest.update(source.read_bytes())
    to = folder / f"{source.parent.name}_{source.stem}_{digest.hexdigest()[:16]}.o"
    if to.exists():
        return to
    command = ["g++", "-std=c++17", "-fPIC", "-Wall", "-DRESNET_FUSED_EMULATE", *flags]
    command += [f"-I{csrc}", f"-isystem{cuda_headers()}", "-c", str(source)]
    fresh = to.with_suffix(".new")
    done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ failed on {name}.cpp:\n{done.stderr}")
    fresh.rename(to)
    return to


class Problem(ctypes.Structure):
    """csrc/cuda/problem.h."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in words(
            "n h w c k r s groups stride_h stride_w pad_h pad_w dilation_h dilation_w shortcut_c "
            "shortcut_h shortcut_w shortcut_stride_h shortcut_stride_w"
        )
    ]


class Choice(ctypes.Structure):
    _fields_ = [("tile", ctypes.c_int), ("splits", ctypes.c_int)]


class Device(ctypes.Structure):
    """csrc/cuda/sm90/plan.h."""

    _fields_ = [(name, ctypes.c_int) for name in words("multiprocessors largest_cluster")]


H100 = Device(132, 8)


class Run(ctypes.Structure):
    """csrc/cuda/emulate/run_sm90.cpp."""

    _fields_ = (
        [("problem", Problem)]
        + [
            (name, ctypes.c_int)
            for name in words("tile splits blocks bfloat16 relu early_weights order race")
        ]
        + [
            (name, ctypes.c_void_p)
            for name in words(
                "x weight shortcut_x shortcut_weight scale shift shortcut_scale shortcut_shift "
                "residual y"
            )
        ]
        + [("error", ctypes.c_char * 800)]
    )


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    library.sm90_run.restype = None
    library.sm90_tile_name.restype = ctypes.c_char_p
    library.sm90_cost.restype = ctypes.c_double
    return library


class StreamEnd(ctypes.Structure):
    """csrc/cuda/sm90/overlap.h."""

    _fields_ = [("runs", ctypes.c_bool), ("capture", ctypes.c_uint64), ("node", ctypes.c_void_p)]


class Range(ctypes.Structure):
    _fields_ = [("begin", ctypes.c_size_t), ("end", ctypes.c_size_t)]


def pair(value) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


@dataclass(frozen=True)
class Conv:
    """One convolution: batch, height, width, channels in and out, kernel, ..."""

    n: int
    h: int
    w: int
    c: int
    k: int
    kernel: int | tuple[int, int] = 3
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | None = None  # None: half the kernel
    dilation: int | tuple[int, int] = 1
    shortcut: int = 0  # channels of the 1x1 shortcut's input
    shortcut_stride: int = 2
    residual: bool = False
    relu: bool = True
    groups: int = 1
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def __str__(self) -> str:
        text = f"{self.n}x{self.h}x{self.w}x{self.c}-{self.k}"
        for name in words("kernel stride padding dilation shortcut residual groups"):
            value = getattr(self, name)
            if value != Conv.__dataclass_fields__[name].default:
                text += f"-{name}{value}"
        return text.replace(" ", "")


@dataclass
class Data:
    """Operands of a Conv, and what comes out in float64, with the size of what was summed."""

    conv: Conv
    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    shortcut_x: Tensor | None = None
    shortcut_weight: Tensor | None = None
    shortcut_scale: Tensor | None = None
    shortcut_shift: Tensor | None = None
    residual: Tensor | None = None

    def problem(self) -> Problem:
        c = self.conv
        (r, s), (sh, sw), (dh, dw) = pair(c.kernel), pair(c.stride), pair(c.dilation)
        ph, pw = self.padding()
        shortcut = (0, 0, 0)
        if self.shortcut_x is not None:
            shortcut = (c.shortcut, *self.shortcut_x.shape[2:])
        t = c.shortcut_stride
        return Problem(
            c.n, c.h, c.w, c.c, c.k, r, s, c.groups, sh, sw, ph, pw, dh, dw, *shortcut, t, t
        )

    def padding(self) -> tuple[int, int]:
        c = self.conv
        if c.padding is not None:
            return pair(c.padding)
        return tuple(d * (k // 2) for d, k in zip(pair(c.dilation), pair(c.kernel), strict=True))

    def out_size(self) -> tuple[int, int]:
        c = self.conv
        return tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                (c.h, c.w),
                self.padding(),
                pair(c.dilation),
                pair(c.kernel),
                pair(c.stride),
                strict=True,
            )
        )

    @functools.cached_property
    def oracle(self) -> Tensor:
        """In float64. Computed once: no operand may change after it was asked for."""
        return self._compute(absolute=False)

    @functools.cached_property
    def magnitude(self) -> Tensor:
        """The oracle of everything's absolute value, without the activation."""
        return self._compute(absolute=True)

    def _compute(self, absolute: bool) -> Tensor:
        to = (lambda t: t.double().abs()) if absolute else (lambda t: t.double())
        c = self.conv
        channel = (-1, 1, 1)
        y = F.conv2d(
            to(self.x), to(self.weight), None, c.stride, self.padding(), c.dilation, c.groups
        )
        y = y * to(self.scale).view(channel) + to(self.shift).view(channel)
        if self.shortcut_x is not None:
            z = F.conv2d(to(self.shortcut_x), to(self.shortcut_weight), stride=c.shortcut_stride)
            y = y + z * to(self.shortcut_scale).view(channel)
            y = y + to(self.shortcut_shift).view(channel)
        if self.residual is not None:
            y = y + to(self.residual)
        return y if absolute or not c.relu else torch.where(y < 0, 0.0, y)  # NaN passes


def sparse(like: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A share of its signs, zero elsewhere."""
    kept = torch.rand(like.shape, generator=generator) < share
    return torch.where(kept, torch.sign(like.float()), 0.0).to(like.dtype)


def draw(conv: Conv) -> Data:
    generator = torch.Generator().manual_seed(conv.seed)

    def normal(*shape, of: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * of

    kernel = pair(conv.kernel)
    fan_in = conv.c // conv.groups * kernel[0] * kernel[1]
    data = Data(
        conv,
        normal(conv.n, conv.c, conv.h, conv.w).to(conv.dtype),
        normal(conv.k, conv.c // conv.groups, *kernel, of=fan_in**-0.5).to(conv.dtype),
        normal(conv.k),
        normal(conv.k),
    )
    p, q = data.out_size()
    if conv.shortcut:
        size = [(n - 1) * conv.shortcut_stride + 1 for n in (p, q)]
        if conv.shortcut_stride > 1:
            size[0] += 1  # one row that no output sees
        data.shortcut_x = normal(conv.n, conv.shortcut, *size).to(conv.dtype)
        data.shortcut_weight = normal(conv.k, conv.shortcut, 1, 1, of=conv.shortcut**-0.5).to(
            conv.dtype
        )
        data.shortcut_scale, data.shortcut_shift = normal(conv.k), normal(conv.k)
    if conv.residual:
        data.residual = normal(conv.n, conv.k, p, q).to(conv.dtype)
    return data


def nhwc(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 2, 3, 1).contiguous()


def run(
    library: ctypes.CDLL,
    data: Data,
    tile: str,
    splits: int = 1,
    blocks: int = 2,
    order: int = 0,
    window: tuple[int, int, int] = (0, 0, 0),
    early: bool = False,
) -> tuple[Tensor, str]:
    """The output (NCHW), poisoned before, and the emulator's report, empty where it has none.

    blocks: without splits. early: whether weights may be loaded before the kernel before has ended.
    The tile "tap-shift" is the other kernel; its window is (rows, images, positions), or chosen.
    """
    c = data.conv
    operands = {
        name: None if value is None else nhwc(value) if value.ndim == 4 else value.contiguous()
        for name, value in ((f.name, getattr(data, f.name)) for f in fields(data)[1:])
    }
    operands["y"] = torch.full((c.n, *data.out_size(), c.k), float("nan"), dtype=c.dtype)
    call = Run(
        problem=data.problem(),
        tile=TILES.index(tile) if tile in TILES else -1,
        splits=splits,
        blocks=blocks,
        bfloat16=c.dtype == torch.bfloat16,
        relu=c.relu,
        early_weights=early,
        order=order,
        race=1,
        **{name: None if t is None else t.data_ptr() for name, t in operands.items()},
    )
    if tile == "tap-shift":
        library.tap_shift_run(ctypes.byref(call), *window)
    else:
        library.sm90_run(ctypes.byref(call))
    return operands["y"].permute(0, 3, 1, 2), call.error.decode()


UNITS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def differs(data: Data, y: Tensor, product: float = 0.0) -> str:
    """How the output differs from float64 by more than one rounding and float32 sums explain.

    product: the relative error that each product may have besides.
    """
    oracle = data.oracle
    finite = oracle.isfinite()
    if not torch.equal(y.isfinite(), finite):
        return "finite, or not, in other places than float64"
    unit = UNITS[data.conv.dtype]
    allowed = 1.01 * unit * oracle.abs() + (4e-6 + product) * data.magnitude + 1e-7
    error = ((y.double() - oracle).abs() / allowed)[finite]
    return f"error {float(error.max()):.3g} of what is allowed" if bool((error > 1).any()) else ""


def beyond_allowed(data: Data, y: Tensor) -> str:
    """How the output differs from float64 by more than `data.magnitude`, or in its NaN and Inf."""
    oracle = data.oracle
    if not torch.equal(y.isnan(), oracle.isnan()):
        return "NaN in other places than float64"
    finite = oracle.isfinite()
    if not torch.equal(y[~finite].double().nan_to_num(7.0), oracle[~finite].nan_to_num(7.0)):
        return "Inf in other places than float64"
    error = ((y.double() - oracle).abs() / data.magnitude)[finite]
    return f"error {float(error.max()):.3g} of what is allowed" if bool((error > 1).any()) else ""
