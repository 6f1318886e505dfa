"""residual_block against the float64 oracle and against the single ops that it replaces.

The same kernels run on the same operands, so that the single ops must give the same bits, however
the images are cut into slices; the oracle holds both to what a block is.
"""

from __future__ import annotations

import threading
import zlib
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ISAS,
    KERNEL_DTYPES,
    LAYOUTS,
    NATIVE,
    assert_close_as_eager,
    assert_nearly_whole,
    assert_same,
    is_dense_channels_last,
    needs_extension,
    poison,
    resident_bytes,
    use_isa,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import resnet_fused as rf
from resnet_fused import check, reference, select

pytestmark = [pytest.mark.kernels, pytest.mark.usefixtures("one_thread")]
_ops = torch.ops.resnet_fused
NAN = float("nan")


# ---- blocks ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv:
    k: int  # output channels
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    act: str = "relu"


def one(k, stride=(1, 1), **rest):
    return Conv(k, (1, 1), stride, (0, 0), **rest)


@dataclass(frozen=True)
class Block:
    """x (n, c, h, w), or (c, h, w) where n is None; shortcut None: the identity."""

    name: str
    n: int | None
    c: int
    h: int
    w: int
    main: tuple[Conv, ...]
    shortcut: Conv | None = None

    def __str__(self) -> str:
        return f"{self.name}-{self.n}"

    @property
    def convs(self) -> tuple[Conv, ...]:
        return self.main if self.shortcut is None else (*self.main, self.shortcut)

    @property
    def x_shape(self) -> tuple[int, ...]:
        return (*(() if self.n is None else (self.n,)), self.c, self.h, self.w)

    def but(self, **changes) -> Block:
        return replace(self, **changes)


TWO = (2, 2)
BASIC = Block("basic", 3, 8, 9, 7, (Conv(8), Conv(8)))
STRIDED = Block("strided", 3, 8, 9, 7, (Conv(33, stride=TWO), Conv(33)), one(33, TWO, act="none"))
BOTTLENECK = Block("bottleneck", 3, 33, 8, 9, (one(8), Conv(8), one(33)))
WIDE = Block("wide", 2, 5, 6, 5, (one(7), Conv(7), one(40)), one(40, act="none"))
FOUR = Block("four", 2, 6, 7, 8, (Conv(9), one(4), Conv(12, groups=4), Conv(6)))
# Two Winograd convolutions in one parallel region: a job of the second must not take the first's
# transformed windows for its own.
TWICE = Block("twice", 3, 40, 12, 11, (Conv(40), Conv(34)), Conv(34, act="none"))
ALONE = Block("alone", 2, 5, 6, 6, (Conv(9),), one(9))
ODD = Block(
    "odd",
    2,
    6,
    11,
    10,
    (
        Conv(10, (3, 2), (2, 1), (2, 1), (2, 1), groups=2),
        Conv(12, (1, 5), padding=(0, 2), act="none"),
    ),
    Conv(12, (2, 2), (2, 1), (1, 1), act="none"),
)
BLOCKS = [BASIC, STRIDED, BOTTLENECK, WIDE, FOUR, TWICE, ALONE, ODD]
BLOCKS += [BASIC.but(n=None), STRIDED.but(n=None), BASIC.but(n=1, h=1, w=1)]


@dataclass
class Operands:
    x: Tensor
    weights: list[Tensor]
    scales: list[Tensor]
    shifts: list[Tensor]

    def to(self, dtype: torch.dtype) -> Operands:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        vectors = ([t.to(wide) for t in ts] for ts in (self.scales, self.shifts))
        return Operands(self.x.to(dtype), [w.to(dtype) for w in self.weights], *vectors)


def draw(block: Block, whole: bool = False) -> Operands:
    """Float64 operands; whole: small whole numbers, whose results float32 holds exactly."""
    g = torch.Generator().manual_seed(zlib.crc32(str(block).encode()))

    def numbers(*shape: int) -> Tensor:
        if whole:
            return torch.randint(-1, 2, shape, generator=g).double()
        return torch.randn(shape, generator=g, dtype=torch.float64)

    o, channels = Operands(numbers(*block.x_shape), [], [], []), block.c
    for conv in block.convs:
        if conv is block.shortcut:
            channels = block.c
        weight = numbers(conv.k, channels // conv.groups, *conv.kernel)
        o.weights.append(weight if whole else weight / weight[0].numel() ** 0.5)
        o.scales.append(numbers(conv.k) if whole else 0.5 + numbers(conv.k).abs())
        o.shifts.append(numbers(conv.k))
        channels = conv.k
    return o


def apply(o: Operands, block: Block, conv_bn_act) -> Tensor:
    """The block by conv_bn_act(i, x, residual)."""
    last = len(block.main) - 1
    y, shortcut = o.x, o.x
    for i in range(last):
        y = conv_bn_act(i, y, None)
    if block.shortcut is not None:
        shortcut = conv_bn_act(last + 1, o.x, None)
    return conv_bn_act(last, y, shortcut)


def eager(o: Operands, block: Block) -> Tensor:
    """In the operands' own dtype; the oracle for float64."""

    def conv_bn_act(i: int, x: Tensor, residual: Tensor | None) -> Tensor:
        c = block.convs[i]
        y = F.conv2d(x, o.weights[i], None, c.stride, c.padding, c.dilation, c.groups)
        wide = y.to(o.scales[i].dtype) * o.scales[i][:, None, None] + o.shifts[i][:, None, None]
        y = wide.to(y.dtype)
        y = y if residual is None else y + residual
        return F.relu(y) if c.act == "relu" else y

    return apply(o, block, conv_bn_act)


@dataclass
class Call:
    """Arguments of residual_block."""

    x: Tensor
    packed: list[Tensor]
    scales: list[Tensor]
    shifts: list[Tensor]
    lists: dict = field(default_factory=dict)

    def args(self) -> tuple:
        return (self.x, self.packed, self.scales, self.shifts)

    def run(self) -> Tensor:
        return _ops.residual_block(*self.args(), **self.lists)

    def singly(self, block: Block) -> Tensor:
        """By one op for each convolution."""

        def conv_bn_act(i: int, x: Tensor, residual: Tensor | None) -> Tensor:
            c = block.convs[i]
            return _ops.conv_bn_act_packed(
                *(x, self.packed[i], self.scales[i], self.shifts[i], residual),
                kernel_size=c.kernel,
                stride=c.stride,
                padding=c.padding,
                dilation=c.dilation,
                groups=c.groups,
                act=c.act,
                plan=self.lists["plans"][i],
            )

        return apply(self, block, conv_bn_act)


def call(o: Operands, block: Block, plans: list[str]) -> Call:
    convs = block.convs
    packed = [
        rf.ops.pack_conv(w, c.groups, plan=plan)
        for w, c, plan in zip(o.weights, convs, plans, strict=True)
    ]
    lists = {
        "kernel_sizes": [size for c in convs for size in c.kernel],
        "strides": [size for c in convs for size in c.stride],
        "paddings": [size for c in convs for size in c.padding],
        "dilations": [size for c in convs for size in c.dilation],
        "groups": [c.groups for c in convs],
        "acts": [c.act for c in convs],
        "plans": list(plans),
        "has_shortcut": block.shortcut is not None,
    }
    return Call(o.x, packed, o.scales, o.shifts, lists)


def able(block: Block, dtype: torch.dtype, wanted: str) -> list[str]:
    """For each convolution the wanted plan where it can compute it here, else a plain one."""
    plans, channels = [], block.c
    for conv in block.convs:
        channels = block.c if conv is block.shortcut else channels
        shape = select.ConvShape(
            *("cpu", dtype, channels, conv.k, conv.kernel, (4, 4)),
            *(conv.stride, conv.dilation, conv.groups),
        )
        here = select.candidates(shape, allow=check.CPU_PLANS)
        plans.append(wanted if wanted in here else here[0])
        channels = conv.k
    return plans


def plans_of(block: Block, dtype: torch.dtype = torch.float32) -> list[list[str]]:
    """Each plan wherever it can run, and a mixture; every row once."""
    rows = [able(block, dtype, plan) for plan in check.CPU_PLANS]
    rows.append([rows[i % len(rows)][i] for i in range(len(block.convs))])
    rows.append([rows[-1 - i % len(rows)][i] for i in range(len(block.convs))])
    return [list(row) for row in dict.fromkeys(map(tuple, rows))]


@pytest.fixture
def budget():
    """Sets the bytes of activations that go through a block together; as measured afterwards."""
    yield _ops.set_block_budget
    if NATIVE:
        _ops.set_block_budget(0)


def poison_arena() -> None:
    """Leaves NaN in all that a usual block takes of the calling thread's memory."""
    block = Block("poison", 2, 64, 16, 16, (Conv(64), Conv(64), Conv(64)), one(64))
    o = draw(block).to(torch.float32)
    o.x.fill_(NAN)
    if NATIVE:
        assert call(o, block, ["direct"] * 4).run().isnan().any()


# ---- results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_whole_numbers(block, isa):
    """Exact, but for Winograd kernels with points that are no powers of two."""
    whole = draw(block, whole=True)
    want = eager(whole, block)
    largest = want.abs().max()
    assert largest < 2**22
    o = whole.to(torch.float32)
    for plans in plans_of(block):
        poison_arena()
        poison(want.numel() * 4)
        got = call(o, block, plans).run()
        if all(plan in ("direct", "torch", "winograd2", "winograd2s2") for plan in plans):
            assert_same(got, want.float(), str(plans))
        else:
            assert_nearly_whole(got, want, 1e-5 * float(largest), str(plans))
        assert is_dense_channels_last(got)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_as_good_as_eager(block, dtype, isa):
    normal = draw(block)
    o = normal.to(dtype)
    oracle = eager(o.to(torch.float64), block)
    for plans in plans_of(block, dtype):
        poison_arena()
        got = call(o, block, plans).run()
        # F(5x5) and, with one rounding of the transformed operands, products of bfloat16.
        loose = 2e-2 if any(plan.endswith("bf16") for plan in plans) else 1e-5
        assert_close_as_eager(got, eager(o, block), oracle, loose)


def test_float64_runs_on_torch():
    for block in BLOCKS:
        o = draw(block)
        got = call(o, block, ["torch"] * len(block.convs)).run()
        torch.testing.assert_close(got, eager(o, block), rtol=1e-12, atol=1e-12)


@pytest.mark.threads
@pytest.mark.parametrize("together", [0, 1, 2])
@pytest.mark.parametrize("n", [0, 1, 3, 21])
@pytest.mark.parametrize("block", BLOCKS[:8], ids=str)
def test_same_bits_as_single_ops(block, n, together, budget, threads):
    """However many images go through together: 0 as measured, 1 one by one, 2 two by two."""
    block = block.but(n=n)
    o = draw(block).to(torch.float32)
    image = 4 * (block.c + 3 * max(c.k for c in block.convs)) * block.h * block.w
    for count in (1, 3):
        threads(count)
        for plans in plans_of(block):
            c = call(o, block, plans)
            want = c.singly(block)
            if NATIVE:
                budget((0, 1, 2 * image)[together])
            poison_arena()
            assert_same(c.run(), want, f"{plans}, {count} threads")
            if NATIVE:
                budget(0)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("block", [BASIC, STRIDED], ids=str)
def test_any_layout(block, layout):
    o = draw(block).to(torch.float32)
    for plans in plans_of(block):
        c = call(o, block, plans)
        c.x = LAYOUTS[layout](o.x)
        before = c.x.clone()
        assert_same(c.run(), replace(c, x=c.x.contiguous()).run())
        assert_same(c.x, before, "x was written to")


def test_vectors_need_not_be_dense():
    o = draw(STRIDED).to(torch.float32)
    c = call(o, STRIDED, able(STRIDED, torch.float32, "winograd4"))
    want = c.run()
    spread = [torch.stack((t, torch.full_like(t, NAN)), 1)[:, 0] for t in c.scales]
    assert_same(replace(c, scales=spread).run(), want)


@needs_extension
@pytest.mark.parametrize("block", [STRIDED, BOTTLENECK], ids=str)
def test_a_nan_stays_in_its_image(block, budget):
    """Also where images go through the block one by one, in the same memory."""
    o = draw(block.but(n=5)).to(torch.float32)
    for plans in plans_of(block):
        c = call(o, block, plans)
        want = c.run()
        c.x = o.x.clone()
        c.x[2] = NAN
        for size in (0, 1):
            budget(size)
            got = c.run()
            assert got[2].isnan().any()
            others = [0, 1, 3, 4]
            assert_same(got[others], want[others])


@pytest.mark.threads
@needs_extension
def test_intermediates_of_a_slice_are_all_there_is(budget, threads):
    """The memory that a thread keeps is that of a slice; the output is the only other one."""
    threads(1)
    block = Block(
        "thick", 48, 1, 64, 64, (one(32), one(1))
    )  # 24 MiB between, 0.8 before and behind
    c = call(draw(block).to(torch.float32), block, ["direct", "direct"])

    def grown(size: int) -> int:
        grown = []

        def run() -> None:  # in a thread of its own, which has kept nothing yet
            budget(size)
            before = resident_bytes()
            c.run()
            grown.append(resident_bytes() - before)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return grown[0]

    c.run()
    assert grown(1 << 30) > 20 << 20
    assert grown(1) < 8 << 20


@pytest.mark.threads
@needs_extension
def test_threads_do_not_share_intermediates(threads):
    threads(2)
    calls = []
    for block in (BASIC.but(n=7), STRIDED.but(n=5), BOTTLENECK.but(n=9), TWICE):
        for plan in ("direct", "winograd2"):
            c = call(draw(block).to(torch.float32), block, able(block, torch.float32, plan))
            calls.append((c, c.run()))
    wrong: list[str] = []

    def work(c: Call, want: Tensor) -> None:
        for _ in range(60):
            if not torch.equal(c.run(), want):
                wrong.append(str(c.lists["plans"]))

    workers = [threading.Thread(target=work, args=row) for row in calls]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@needs_extension
def test_plans_of_another_instruction_set_follow_it():
    """Packed on one, run on another: a block's operands do not depend on the instruction set."""
    o = draw(STRIDED, whole=True).to(torch.float32)
    c = call(o, STRIDED, ["direct", "winograd2", "direct"])
    want = eager(draw(STRIDED, whole=True), STRIDED).float()
    try:
        for isa in ISAS:
            use_isa(isa)
            assert_same(c.run(), want, isa)
    finally:
        use_isa("")


# ---- as PyTorch sees it --------------------------------------------------------------------------


@pytest.mark.parametrize("block", [BASIC, STRIDED.but(n=None), BASIC.but(n=0)], ids=str)
def test_opcheck(block):
    for dtype in (torch.float32, torch.bfloat16):
        for plans in plans_of(block, dtype):
            c = call(draw(block).to(dtype), block, plans)
            torch.library.opcheck(_ops.residual_block, c.args(), c.lists)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "expanded_rows"])
@pytest.mark.parametrize("block", [*BLOCKS, BASIC.but(n=0)], ids=str)
def test_fake_and_real_agree(block, layout):
    for plans in plans_of(block):
        c = call(draw(block).to(torch.float32), block, plans)
        c.x = LAYOUTS[layout](c.x)
        real = c.run()
        with FakeTensorMode() as mode:

            def fake(ts: list[Tensor], mode=mode) -> list[Tensor]:
                return [mode.from_tensor(t) for t in ts]

            got = Call(*fake([c.x]), *map(fake, c.args()[1:]), c.lists).run()
        assert (got.shape, got.stride(), got.dtype) == (real.shape, real.stride(), real.dtype)


def test_refuses_what_needs_gradients():
    sentence = "residual_block: is forward only"
    for where in range(4):
        c = call(draw(BASIC).to(torch.float32), BASIC, able(BASIC, torch.float32, "direct"))
        want = c.run()
        (c.x if where == 0 else c.args()[where][1]).requires_grad_()
        with pytest.raises(RuntimeError, match=sentence):
            c.run()
        with torch.no_grad():
            assert_same(c.run(), want)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic, fresh_dynamo):
    def run(x: Tensor, packed: list[Tensor], scales: list[Tensor], shifts: list[Tensor]) -> Tensor:
        return _ops.residual_block(x, packed, scales, shifts, **c.lists) + 1

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (5, 7, 10):  # no other size of the operands: equal ones are guarded to stay equal
        block = STRIDED.but(n=n)
        c = call(draw(block).to(torch.float32), block, able(block, torch.float32, "winograd2"))
        with torch._dynamo.config.patch(error_on_recompile=dynamic and n > 5):
            assert_same(compiled(*c.args()), run(*c.args()))


def test_exports():
    class Net(torch.nn.Module):
        def forward(self, x, packed, scales, shifts):
            return _ops.residual_block(x, packed, scales, shifts, **c.lists)

    c = call(draw(STRIDED).to(torch.float32), STRIDED, able(STRIDED, torch.float32, "direct"))
    program = torch.export.export(Net(), c.args())
    targets = [str(node.target) for node in program.graph.nodes]
    assert "resnet_fused.residual_block.default" in targets
    assert_same(program.module()(*c.args()), c.run())


def test_autocast_changes_nothing():
    c = call(draw(STRIDED).to(torch.float32), STRIDED, able(STRIDED, torch.float32, "torch"))
    want = c.run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(c.run(), want)


# ---- bad input -----------------------------------------------------------------------------------


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


def good() -> dict:
    """A block of 6 to 8 channels, 8 x 7 pixels, plans that need no extension."""
    return {
        "x": ones(2, 6, 8, 7),
        "packed": [ones(4, 6, 3, 3), ones(8, 4, 3, 3), ones(8, 6, 1, 1)],
        "scales": [ones(4), ones(8), ones(8)],
        "shifts": [ones(4), ones(8), ones(8)],
        "kernel_sizes": [3, 3, 3, 3, 1, 1],
        "strides": [1, 1, 1, 1, 1, 1],
        "paddings": [1, 1, 1, 1, 0, 0],
        "dilations": [1, 1, 1, 1, 1, 1],
        "groups": [1, 1, 1],
        "acts": ["relu", "relu", "none"],
        "plans": ["torch", "torch", "torch"],
        "has_shortcut": True,
    }


def at(name: str, index: int, value) -> dict:
    values = good()[name]
    values[index] = value
    return {name: values}


PLAN_LIST = " or ".join(f'"{plan}"' for plan in check.CPU_PLANS)
EACH = "for each of the 3 convolutions"
BAD = [
    ({"x": ones(6, 8)}, "x must be 3-D (C, H, W) or 4-D (N, C, H, W), got shape (6, 8)"),
    (
        {"x": ones(2, 6, 8, 7, dtype=torch.int64)},
        "x must be float32, bfloat16, float16 or float64, got int64",
    ),
    ({"packed": []}, "packed must have at least 2 convolutions, got 0"),
    ({"packed": [ones(4, 6, 3, 3)]}, "packed must have at least 2 convolutions, got 1"),
    (
        {"packed": [], "has_shortcut": False},
        "packed must have at least 1 convolution, got 0",
    ),
    ({"scales": [ones(4), ones(8)]}, f"scales must have one {EACH}, got 2"),
    ({"shifts": [ones(4)] * 4}, f"shifts must have one {EACH}, got 4"),
    ({"kernel_sizes": [3, 3]}, f"kernel_sizes must have two {EACH}, got 2"),
    ({"strides": [1] * 5}, f"strides must have two {EACH}, got 5"),
    ({"paddings": []}, f"paddings must have two {EACH}, got 0"),
    ({"dilations": [1] * 7}, f"dilations must have two {EACH}, got 7"),
    ({"groups": [1]}, f"groups must have one {EACH}, got 1"),
    ({"acts": ["relu"]}, f"acts must have one {EACH}, got 1"),
    ({"plans": ["torch"] * 4}, f"plans must have one {EACH}, got 4"),
    (
        at("kernel_sizes", 3, 0),
        "convolution 1: kernel_size must be at least 1, got (3, 0)",
    ),
    (at("strides", 0, 0), "convolution 0: stride must be at least 1, got (0, 1)"),
    (at("paddings", 5, -1), "convolution 2: padding must be at least 0, got (0, -1)"),
    (at("dilations", 2, 0), "convolution 1: dilation must be at least 1, got (0, 1)"),
    (at("groups", 1, 0), "convolution 1: groups must be at least 1, got 0"),
    (
        at("groups", 0, 4),
        "convolution 0: groups must divide the 6 input and 4 output channels, got 4",
    ),
    (at("acts", 2, "gelu"), 'convolution 2: act must be "relu" or "none", got "gelu"'),
    (at("plans", 1, "fast"), f'convolution 1: plan must be {PLAN_LIST}, got "fast"'),
    (
        at("scales", 1, ones(8, dtype=torch.float64)),
        "convolution 1: scale must be float32, got float64",
    ),
    (at("shifts", 2, ones(7)), "convolution 2: shift must have shape (8,), got (7,)"),
    (
        at("packed", 1, ones(8, 5, 3, 3)),
        "convolution 1: packed must have shape (8, 4, 3, 3), got (8, 5, 3, 3)",
    ),
    (
        at("packed", 2, ones(8, 6, 1, 1, dtype=torch.bfloat16)),
        "convolution 2: packed must be float32, got bfloat16",
    ),
    (
        at("kernel_sizes", 2, 11) | at("packed", 1, ones(8, 4, 11, 3)),
        "convolution 1: x must be at least as large as the kernel: the padded input is 10 x 9, "
        "the kernel spans 11 x 3",
    ),
    (
        {"strides": [1, 1, 1, 1, 2, 1]},
        "the shortcut's output must have the main path's shape (2, 8, 8, 7), got (2, 8, 4, 7)",
    ),
    (
        {"x": ones(6, 8, 7), "strides": [2, 2, 1, 1, 1, 1]},
        "the shortcut's output must have the main path's shape (8, 4, 4), got (8, 8, 7)",
    ),
    (
        {name: values[:2] for name, values in good().items() if isinstance(values, list)}
        | {name: good()[name][:4] for name in ("kernel_sizes", "strides", "paddings", "dilations")}
        | {"has_shortcut": False},
        "x, added as it is, must have the main path's shape (2, 8, 8, 7), got (2, 6, 8, 7)",
    ),
]


@pytest.mark.parametrize(("bad", "sentence"), BAD, ids=[sentence[:60] for _, sentence in BAD])
def test_bad_input(bad, sentence):
    """The kernel's own checks, or the fallback's, and the fake's: never a crash, one sentence."""
    arguments = good() | bad
    with pytest.raises(RuntimeError) as caught:
        _ops.residual_block(**arguments)
    assert str(caught.value) == f"residual_block: {sentence}"
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = dict(arguments)
        fakes["x"] = mode.from_tensor(arguments["x"])
        for name in ("packed", "scales", "shifts"):
            fakes[name] = [mode.from_tensor(t) for t in arguments[name]]
        with pytest.raises((ValueError, TypeError)) as caught:
            _ops.residual_block(**fakes)
    assert str(caught.value) == f"residual_block: {sentence}"


def test_good_input():
    assert _ops.residual_block(**good()).shape == (2, 8, 8, 7)


def test_operands_on_another_device():
    for name in ("packed", "scales", "shifts"):
        arguments = good() | at(name, 1, good()[name][1].to("meta"))
        with pytest.raises((RuntimeError, ValueError)) as caught:
            _ops.residual_block(**arguments)
        want = f"residual_block: convolution 1: {name.removesuffix('s')} must be on cpu, where x is"
        assert str(caught.value).startswith(want)


@needs_extension
def test_budget_must_not_be_negative():
    with pytest.raises(RuntimeError, match=r"^set_block_budget: bytes must be at least 0, got -1$"):
        _ops.set_block_budget(-1)


@needs_extension
@pytest.mark.parametrize("size", [2**40, 2**50, 2**58, 2**59, 2**60])
def test_what_lies_between_must_fit_in_memory(size):
    """Paddings that would overflow sizes between the convolutions are refused by name."""
    main = (Conv(33, padding=(size, 1)), Conv(33, stride=(2**62, 2)))
    block = replace(STRIDED, main=main, shortcut=one(33, (2**62, 2)))
    c = call(draw(block).to(torch.float32), block, ["direct"] * 3)
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        c.run()
    sentence = "residual_block: convolution 0: padding must be at most 2147483647, got"
    assert str(caught.value).startswith(sentence)


@needs_extension
@pytest.mark.parametrize("size", [2**31, 2**40, 2**62])
@pytest.mark.parametrize("name", ["strides", "paddings", "dilations"])
def test_absurd_sizes_do_not_crash(name, size):
    o = draw(STRIDED).to(torch.float32)
    for where in range(4):  # a 1 x 1 kernel on the shortcut has nothing to dilate
        c = call(o, STRIDED, ["direct"] * 3)
        c.lists[name][where] = size
        with pytest.raises((RuntimeError, MemoryError)):
            c.run()


# ---- from modules --------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """The ops of ours that were called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "resnet_fused":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


@needs_extension
@pytest.mark.parametrize("kind", [rf.FusedResidual, rf.FusedBottleneck])
@pytest.mark.parametrize("arguments", [(8, 2), (8, 16, True, 2)])
def test_an_eager_block_is_one_op(kind, arguments):
    expansion = getattr(kind, "expansion", 1)
    fused = kind(arguments[0], 8 // expansion, *arguments[2:]).eval()
    x = torch.randn(2, 8, 9, 8)
    with torch.inference_mode(), select.forced("ours"):
        want = fused(x)
        with Calls() as calls:
            got = fused(x)
    computing = [name for name in calls.names if not name.startswith("content")]
    assert computing == ["residual_block"]
    assert_same(got, want)
    torch.testing.assert_close(got, fused.original()(x), rtol=1e-4, atol=1e-5)


def test_reference_residual_agrees():
    """The op's composition is the lesson's block."""
    fused = rf.FusedResidual(6, 9, True, 2).eval()
    assert isinstance(fused.original(), reference.Residual)
    x = torch.randn(3, 6, 11, 10)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), fused.original()(x), rtol=1e-4, atol=1e-5)
