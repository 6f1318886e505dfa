"""What all tests share: oracle, tolerances, layouts, the sweep over instruction sets."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

# Before the package is imported, which reads the file: no test may see the user's or write to it.
os.environ["RESNET_FUSED_TUNE_FILE"] = "none"

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from torch import Tensor

import resnet_fused as rf
from resnet_fused import backends, check, select, tuned
from resnet_fused.check import CPU_PLANS, PLAN_TRAITS

NATIVE = rf.ops.extension_error is None
# What the variable names is run whatever the CPU has (run_variant.py).
ISAS = (
    os.environ.get("RESNET_FUSED_TEST_ISAS", "").split()
    or [isa for isa in ("scalar", "avx2", "avx512", "avx512bf16") if isa in rf.ops.CPU_FEATURES]
    or ["none"]
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KERNEL_DTYPES = DTYPES[:3]  # what kernels of ours compute; float64 runs on PyTorch's convolution
DTYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
NAN = float("nan")

needs_extension = pytest.mark.skipif(not NATIVE, reason="the C++ extension is not loaded")


# How many examples hypothesis draws; `make sanitize` takes the fewer ones.
settings.register_profile(
    "full",
    deadline=None,
    derandomize=True,
    max_examples=250,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("sanitized", settings.get_profile("full"), max_examples=60)
settings.load_profile("full")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """What tests ops runs kernels. Long tests first, so that no process ends with one alone."""
    for item in items:
        if item.path.name.startswith("test_ops_"):
            item.add_marker("kernels")
        plan = item.callspec.params.get("gpu_plan") if hasattr(item, "callspec") else None
        if plan == "triton" and item.get_closest_marker("compiles"):
            item.add_marker("slow")
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


# ---- plans -------------------------------------------------------------------------------------


def runs_here(plan: str) -> bool:
    """Whether the plan's kernel is built, and one of the instruction set in use."""
    if plan == "torch":
        return True
    return NATIVE and plan in CPU_PLANS and PLAN_TRAITS[plan].isa in ("", rf.ops.cpu_isa())


def _parameters(rows: list[tuple]) -> list:
    """Rows of test parameters, a plan first; skipped where this machine cannot run it."""
    return [
        pytest.param(*row, marks=pytest.mark.skipif(not runs_here(row[0]), reason="not built here"))
        for row in rows
    ]


EVERY_PLAN = _parameters([(plan,) for plan in CPU_PLANS])
PLAN_DTYPES = _parameters(
    [(plan, dtype) for plan in CPU_PLANS for dtype in PLAN_TRAITS[plan].dtypes]
)


# ---- around a call -----------------------------------------------------------------------------


def message(result) -> str:
    """The sentence after "Error:" of a command that click's runner ran, on one line."""
    return " ".join(result.output.partition("Error: ")[2].split())


def resident_bytes() -> int:
    """Memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- fixtures ----------------------------------------------------------------------------------


def use_isa(isa: str) -> None:
    if NATIVE:
        torch.ops.resnet_fused.set_cpu_isa(isa)


@pytest.fixture(params=ISAS)
def isa(request):
    """Every instruction set that this CPU has, the usual one again afterwards."""
    use_isa(request.param)
    yield request.param
    use_isa("")


@pytest.fixture(params=DTYPES, ids=DTYPE_IDS)
def dtype(request):
    return request.param


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_more_threads_than_cores(request):
    """Oracles of GPU tests, computed in 16 processes with a thread for each of 16 cores, took 20 s
    instead of 0.1. Other tests keep their threads: kernels that share work are what they test."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers == 1 or request.node.get_closest_marker("gpu") is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads():
    """torch.set_num_threads, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads):
    """For many small calls: waking a second thread for each takes ten times as long as the call."""
    threads(1)


@pytest.fixture
def device():
    """The first GPU, or the CPU where RESNET_FUSED_TEST_DEVICE=cpu.

    There the Triton kernels are interpreted (TRITON_INTERPRET=1 must be set), so that the tests for
    GPUs can be tried on a machine without one.
    """
    if os.environ.get("RESNET_FUSED_TEST_DEVICE") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return torch.device("cuda", 0)


@pytest.fixture
def gpu(device):
    """As `device`, for what only a GPU has: streams, graphs, tensor cores."""
    if device.type != "cuda":
        pytest.skip("there is no GPU")
    return device


@pytest.fixture(params=["triton", "cuda"])
def gpu_plan(request, device):
    """Each plan that GPUs have of ours."""
    error = backends.missing(request.param, device.type, 0)
    if error:
        pytest.skip(error)
    return request.param


@pytest.fixture
def tuning_file(tmp_path, monkeypatch):
    """A file for tuned answers that is not there yet; what was learned is forgotten afterwards."""
    path = tmp_path / "cache" / "tuning.json"
    monkeypatch.setenv("RESNET_FUSED_TUNE_FILE", str(path))
    yield path
    monkeypatch.setenv("RESNET_FUSED_TUNE_FILE", "none")
    tuned.load()


# ---- poison ------------------------------------------------------------------------------------


def poison(*sizes: int) -> None:
    """Leaves NaN in freed memory of these sizes in bytes, which the next allocations then get."""
    for size in sizes:
        blocks = [torch.full((max(size // 2, 1),), NAN, dtype=torch.bfloat16) for _ in range(4)]
        del blocks


def dirty_arena() -> None:
    """Leaves NaN in the kernels' scratch memory, in all that a usual job takes of it.

    As many tiles as a job can have, of the plan with the most products a tile; more channels than
    leave room for that many.
    """
    vector = torch.full((32,), NAN)
    for channels in (64, 128):
        x = torch.full((1, channels, 32, 64), NAN)
        with select.forced("winograd4s2"):
            weight = torch.full((32, channels, 3, 3), NAN)
            rf.ops.conv_bn_act(x, weight, vector, vector, stride=2, padding=1)


# ---- layouts: the same values, other memory ------------------------------------------------------


def _dense(t: Tensor, order: list[int]) -> Tensor:
    """A dense copy whose dimensions lie in memory in this order."""
    copy = t.new_empty([t.shape[d] for d in order])
    return copy.permute([order.index(d) for d in range(t.dim())]).copy_(t)


def _surrounded(t: Tensor, order: list[int]) -> Tensor:
    """A slice of a larger tensor full of NaN whose dimensions lie in memory in this order."""
    big = t.new_full([t.shape[d] + 3 + i for i, d in enumerate(order)], NAN)
    back = [order.index(d) for d in range(t.dim())]
    view = big.permute(back)[tuple(slice(1 + i, 1 + i + n) for i, n in enumerate(t.shape))]
    return view.copy_(t)


def _shifted(t: Tensor, order: list[int]) -> Tensor:
    """Dense in this order of dimensions, one element off any alignment, NaN before and behind."""
    flat = t.new_full([t.numel() + 18], NAN)
    dense = flat[1 : 1 + t.numel()].view([t.shape[d] for d in order])
    return dense.permute([order.index(d) for d in range(t.dim())]).copy_(t)


def _orders(t: Tensor) -> tuple[list[int], list[int], list[int]]:
    """Orders of dimensions in memory: contiguous, channels last, height and width swapped."""
    batch = list(range(t.dim() - 3))
    c, h, w = range(t.dim() - 3, t.dim())
    return [*batch, c, h, w], [*batch, h, w, c], [*batch, c, w, h]


def _every_other(t: Tensor, dim: int) -> Tensor:
    """Every second image (row, ...) of a dense channels_last tensor, NaN between them."""
    big = t.new_full([2 * n if d == dim else n for d, n in enumerate(t.shape)], NAN)
    view = _dense(big, _orders(t)[1])[
        tuple(slice(None, None, 1 + (d == dim)) for d in range(t.dim()))
    ]
    return view.copy_(t)


def _expanded(t: Tensor, dim: int) -> Tensor:
    """One image (row, ...) seen as many: stride 0. Changes the values."""
    one = _dense(t.narrow(dim, 0, min(1, t.shape[dim])), _orders(t)[1])
    return one.expand(t.shape)


LAYOUTS = {
    "contiguous": lambda t: _dense(t, _orders(t)[0]),
    "channels_last": lambda t: _dense(t, _orders(t)[1]),
    "shifted": lambda t: _shifted(t, _orders(t)[0]),
    "channels_last_shifted": lambda t: _shifted(t, _orders(t)[1]),
    "sliced": lambda t: _surrounded(t, _orders(t)[0]),
    "channels_last_sliced": lambda t: _surrounded(t, _orders(t)[1]),
    "transposed": lambda t: _shifted(t, _orders(t)[2]),
    "every_other_image": lambda t: _every_other(t, 0),
    "every_other_row": lambda t: _every_other(t, t.dim() - 2),
    "every_other_column": lambda t: _every_other(t, t.dim() - 1),
    "every_other_channel": lambda t: _every_other(t, t.dim() - 3),
    "expanded_images": lambda t: _expanded(t, 0),
    "expanded_rows": lambda t: _expanded(t, t.dim() - 2),
    "expanded_channels": lambda t: _expanded(t, t.dim() - 3),
}


# ---- convolutions ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One convolution: x (n, c, h, w), k output channels; n None means 3-D."""

    n: int | None
    c: int
    h: int
    w: int
    k: int
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    act: str = "relu"
    residual: bool = True

    def __str__(self) -> str:
        kind = f"{self.n}x{self.c}x{self.h}x{self.w}-{self.k}k{self.kernel[0]}x{self.kernel[1]}"
        extras = (
            ("s", self.stride, (1, 1)),
            ("p", self.padding, (0, 0)),
            ("d", self.dilation, (1, 1)),
        )
        for name, value, usual in extras:
            kind += f"{name}{value[0]}{value[1]}" if value != usual else ""
        return kind + (f"g{self.groups}" if self.groups > 1 else "")

    @property
    def keywords(self) -> dict:
        names = ("stride", "padding", "dilation", "groups")
        return {name: getattr(self, name) for name in names} | {"act": self.act}

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (*((self.n,) if self.n is not None else ()), self.c, self.h, self.w)

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.k, self.c // self.groups, *self.kernel)

    @property
    def y_shape(self) -> tuple[int, ...]:
        sizes = [
            (size + 2 * p - d * (r - 1) - 1) // s + 1
            for size, p, d, r, s in zip(
                (self.h, self.w), self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        ]
        return (*self.x_shape[:-3], self.k, *sizes)

    def plans(self, dtype: torch.dtype) -> list[str]:
        """Every plan that can compute it in dtype, on the instruction set in use."""
        geometry = (self.kernel, self.stride, self.dilation, self.groups)
        return [
            plan
            for plan, traits in PLAN_TRAITS.items()
            if dtype in traits.dtypes and runs_here(plan) and check.fits_plan(plan, *geometry)
        ]

    def fitted(self, plan: str) -> Case:
        """Changed as little as lets the plan compute it, with padding for a larger kernel."""
        traits = PLAN_TRAITS[plan]
        if traits.kernel is None:
            return self
        side, step = traits.kernel, traits.stride
        least = side // 2 if side > max(self.kernel) else 0
        return self.but(
            kernel=(side, side),
            stride=(step, step),
            padding=tuple(max(pad, least) for pad in self.padding),
            dilation=(1, 1),
            groups=1,
        )

    def but(self, **changes) -> Case:
        return replace(self, **changes)


@dataclass
class Operands:
    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    residual: Tensor | None

    def to(self, dtype: torch.dtype) -> Operands:
        """Operands of a computation in dtype: scale and shift stay float32 beside 16-bit images."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        images = [t if t is None else t.to(dtype) for t in (self.x, self.weight, self.residual)]
        return Operands(images[0], images[1], self.scale.to(wide), self.shift.to(wide), images[2])

    def laid_out(self, x: str = "contiguous", residual: str = "contiguous") -> Operands:
        moved = None if self.residual is None else LAYOUTS[residual](self.residual)
        return replace(self, x=LAYOUTS[x](self.x), residual=moved)

    def args(self) -> tuple:
        return (self.x, self.weight, self.scale, self.shift, self.residual)


def _signs(shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=g).double() * 2 - 1


def integers(case: Case) -> Operands:
    """Float64 operands of whole numbers, none zero.

    The result is exact in float32 whatever the order of summation; in 16 bits the bare convolution
    is exact and the result must be rounded once.
    """
    g = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))

    def draw(shape, largest):
        return torch.randint(1, largest + 1, shape, generator=g).double() * _signs(shape, g)

    return Operands(
        x=_signs(case.x_shape, g),
        weight=_signs(case.weight_shape, g),
        scale=draw((case.k,), 31),
        shift=draw((case.k,), 200),
        residual=draw(case.y_shape, 100) if case.residual else None,
    )


def normals(case: Case, seed: int = 0) -> Operands:
    """Float64 operands from normal distributions; scale spreads over two octaves, both signs."""
    g = torch.Generator().manual_seed(zlib.crc32(str(case).encode()) + seed)

    def draw(shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    scale = torch.exp2(torch.rand(case.k, generator=g, dtype=torch.float64) * 2 - 1)
    reduction = torch.Size(case.weight_shape[1:]).numel()
    return Operands(
        x=draw(case.x_shape),
        weight=draw(case.weight_shape) / reduction**0.5,
        scale=scale * _signs((case.k,), g),
        shift=draw((case.k,)),
        residual=draw(case.y_shape) if case.residual else None,
    )


def exact(o: Operands, case: Case) -> Tensor:
    """The oracle: act(conv(x, weight) * scale + shift + residual) in float64."""
    x, weight, scale, shift, residual = (None if t is None else t.double() for t in o.args())
    if x.numel() == 0:
        return x.new_empty(case.y_shape)
    y = F.conv2d(x, weight, None, case.stride, case.padding, case.dilation, case.groups)
    y = y * scale[:, None, None] + shift[:, None, None]
    if residual is not None:
        y = y + residual
    return y.clamp_min(0.0) if case.act == "relu" else y


def eager(o: Operands, case: Case) -> Tensor:
    """What a plain module computes in the operands' own dtype: conv, batch norm, +=, relu."""
    batched = o.x.dim() == 4
    x = o.x if batched else o.x[None]
    y = F.conv2d(x, o.weight, None, case.stride, case.padding, case.dilation, case.groups)
    zero, one = torch.zeros_like(o.scale), torch.ones_like(o.scale)
    # 1 + eps is 1, and torch 2.11 takes no eps of 0.
    y = F.batch_norm(y, zero, one, o.scale, o.shift, eps=1e-30)
    if o.residual is not None:
        y += o.residual if batched else o.residual[None]
    y = F.relu(y) if case.act == "relu" else y
    return y if batched else y[0]


def fused(o: Operands, case: Case, force: str = "ours") -> Tensor:
    """Ours, by the plan that `force` leads to ("ours": a direct kernel), into poisoned memory."""
    size = o.x.element_size()
    for shape in (case.y_shape, case.weight_shape):
        poison(torch.Size(shape).numel() * size)
    with select.forced(force):
        y = rf.ops.conv_bn_act(*o.args(), **case.keywords)
    assert y.dtype == o.x.dtype
    return y


def sprinkled(t: Tensor, value: float, count: int, seed: int = 0) -> Tensor:
    """t with `count` of its elements set to value."""
    t = t.clone()
    g = torch.Generator().manual_seed(seed)
    t.view(-1)[torch.randperm(t.numel(), generator=g)[:count]] = value
    return t


# ---- comparisons -------------------------------------------------------------------------------


def assert_same(got: Tensor, want: Tensor, hint: str = "") -> None:
    """Every element equal, bit for bit but for the sign of zero; NaN equals NaN."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)} {hint}"
    assert got.dtype == want.dtype, f"{got.dtype}, expected {want.dtype} {hint}"
    wrong = ~((got == want) | (got.isnan() & want.isnan()))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} elements differ, the first at {at}: "
            f"{got[at].item()}, expected {want[at].item()} {hint}"
        )


# Plans that are not exact on `integers`, because their transformed weights are no short binary
# fractions: the largest error per input channel, three times what was measured on 1 to 520
# channels. A wrong tap is off by 2 at least.
SLACK = {
    "winograd4": 2e-4,
    "winograd4_raw": 2e-4,
    "winograd5": 4e-4,
    "winograd4s2": 1e-4,
    "stem": 2e-3,
}


def assert_nearly_whole(got: Tensor, want: Tensor, slack: float, hint: str = "") -> None:
    """Within `slack` and one rounding to got's dtype of whole numbers: a wrong tap is off by 2."""
    assert got.shape == want.shape
    half_unit = torch.finfo(got.dtype).eps / 2 * want.abs()
    off = (got.double() - want).abs() - half_unit
    wrong = ~(off <= slack)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} elements are wrong, the largest error is "
        f"{off.max().item():.2g} and {slack:.2g} allowed {hint}"
    )


def assert_whole(got: Tensor, want: Tensor, plan: str, case: Case, hint: str = "") -> None:
    """What `plan` makes of `integers`, rounded to got's dtype, against the exact result."""
    if plan in SLACK:
        assert_nearly_whole(got, want, SLACK[plan] * (case.c + 3), f"({plan}, {case}) {hint}")
    else:
        assert_same(got, want.to(got.dtype), f"({plan}, {case}) {hint}")


def assert_close_as_eager(got: Tensor, theirs: Tensor, oracle: Tensor, allowed: float = 0) -> None:
    """Error against float64 at most twice eager's, as L2 norm and as maximum.

    Plus one rounding of the largest value: where eager happens to be exact, ours may round once.
    allowed: a relative error that is fine in any case.
    """
    assert got.shape == theirs.shape == oracle.shape
    assert got.dtype == theirs.dtype
    assert bool(torch.isfinite(got).all()), "not finite"
    if got.numel() == 0:
        return
    # Half a unit in the last place of the result, four of the sums inside. The oracle is float64
    # itself: there both errors are differences between two orders of summation.
    unit = 1e-14 if got.dtype == torch.float64 else max(torch.finfo(got.dtype).eps / 2, 4.8e-7)
    unit = max(unit, allowed)
    largest, size = oracle.abs().max(), oracle.norm()
    ours, eagers = (got.double() - oracle), (theirs.double() - oracle)
    assert ours.abs().max() <= 2 * eagers.abs().max() + unit * largest
    assert ours.norm() <= 2 * eagers.norm() + unit * size


def float32_bound(plan: str) -> float:
    """The relative L2 error against float64 that the project promises of one convolution."""
    return 4e-6 if PLAN_TRAITS[plan].opt_in else 2e-6


def is_dense_channels_last(y: Tensor) -> bool:
    """Exactly the strides of an empty (N, H, W, C) tensor seen as (N, C, H, W)."""
    *batch, c, h, w = y.shape
    want = torch.empty((*batch, h, w, c), device="meta").movedim(-1, -3).stride()
    return y.stride() == want


# ---- modules -----------------------------------------------------------------------------------


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Batch norms as after training: every parameter and statistic away from 0 and 1."""
    g = torch.Generator().manual_seed(seed)
    for m in module.modules():
        if isinstance(getattr(m, "running_mean", None), Tensor):
            with torch.no_grad():
                for t, low, high in (
                    (m.running_mean, -0.5, 0.5),
                    (m.running_var, 0.5, 1.5),
                    (m.weight, 0.5, 1.5),
                    (m.bias, -0.5, 0.5),
                ):
                    if t is not None:
                        t.copy_(torch.rand(t.shape, generator=g) * (high - low) + low)
    return module
