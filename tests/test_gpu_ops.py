"""The ops of the plans "triton" and "cuda" on a GPU, against the float64 oracle on the CPU.

Whole numbers are compared exactly in every dtype: products of +-1 are exact in TF32 and in 16 bits,
and their sums in float32. Without a GPU, what needs none runs in Triton's interpreter:

    RESNET_FUSED_TEST_DEVICE=cpu TRITON_INTERPRET=1 RESNET_FUSED_DISABLE_EXT=1 \\
        python -m pytest tests/test_gpu_ops.py
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    LAYOUTS,
    Operands,
    assert_close_as_eager,
    assert_same,
    eager,
    exact,
    integers,
    is_dense_channels_last,
    normals,
)
from emulated_sm90 import SPLIT_TILES
from emulated_sm90 import TILES as SM90_TILES
from gpu_cases import (
    MODES,
    ONE,
    SCALES,
    SMALL,
    THREE,
    TWO,
    exact_with_shortcut,
    gpu_conv,
    moved,
    multiplied,
    shortcut_of,
    spoil,
    with_shortcut,
)
from test_ops_conv import CASES, CHANNELS, FLOAT_CASES, GEOMETRIES, GROUPS, RESNET, square

from resnet_fused.triton_kernels import config as configs
from resnet_fused.triton_kernels.device import INTERPRETED, device_of

pytestmark = pytest.mark.gpu
_ops = torch.ops.resnet_fused
EPILOGUES = list(itertools.product((True, False), ("relu", "none")))


def in_turn(cases, modes):
    """Every case in every mode; with Triton, which compiles each, only one a case is not slow."""
    return [
        pytest.param(case, mode, marks=() if i % len(modes) == j else pytest.mark.compiles)
        for (i, case), (j, mode) in itertools.product(enumerate(cases), enumerate(modes))
    ]


def check_whole(plan, device, case, mode, config="", layout="contiguous"):
    """One convolution of whole numbers, exactly."""
    with multiplied(mode) as dtype:
        o = moved(integers(case).to(dtype), device).laid_out(layout, layout)
        got = gpu_conv(plan, o, case, config)
    want = exact(moved(o, "cpu"), case).to(dtype)
    assert_same(got.cpu(), want, f"({plan}, {case}, {mode}, {config or 'chosen'}, {layout})")
    assert is_dense_channels_last(got)
    assert got.device == o.x.device


def check_joined(plan, device, case, mode, config="", channels=24, stride=2):
    """A convolution and the shortcut that joins it, exactly."""
    with multiplied(mode) as dtype:
        o, s, branch = with_shortcut(case, dtype, channels, stride)
        want = exact_with_shortcut(o, case, s, branch).to(dtype)
        o, s = moved(o, device), moved(s, device)
        got = gpu_conv(plan, o, case.but(residual=False), config, **shortcut_of(s, branch))
    assert_same(got.cpu(), want, f"({plan}, {case}, {mode}, {config or 'chosen'}, shortcut)")
    assert is_dense_channels_last(got)


# ---- every row ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "case"), list(enumerate(CASES)), ids=str)
def test_whole_numbers(index, case, device, gpu_plan):
    """Every geometry, dtypes and epilogues in turn: one wrong tap, channel or rounding shows."""
    mode = list(MODES)[index % len(MODES)]
    residual, act = EPILOGUES[index // len(MODES) % len(EPILOGUES)]
    check_whole(gpu_plan, device, case.but(residual=residual, act=act), mode)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_numbers_in_every_dtype(case, device, gpu_plan):
    for mode, (residual, act) in itertools.product(MODES, EPILOGUES):
        check_whole(gpu_plan, device, case.but(residual=residual, act=act), mode)


# ---- every configuration -----------------------------------------------------------------------

ALIGNED = square(2, 64, 5, 128, padding=ONE)  # the one that every tile can be for


def fits(config, case, mode, device, shortcut=0):
    """Whether the rule could take a Triton configuration: others spill, or find no room. shortcut:
    the channels of one that joins."""
    from resnet_fused.triton_kernels.launch import problem_of

    x = torch.empty(1, dtype=MODES[mode]).expand(case.x_shape)
    branch = None
    if shortcut:
        size = (case.n, shortcut, 2 * case.y_shape[2], 2 * case.y_shape[3])
        branch = x[:1, :1, :1, :1].expand(size)
    with multiplied(mode):
        problem = problem_of(
            x,
            case.weight_shape,
            case.y_shape[-2:],
            stride=case.stride,
            padding=case.padding,
            dilation=case.dilation,
            groups=case.groups,
            act=case.act,
            residual=case.residual and not shortcut,
            shortcut_x=branch,
            shortcut_stride=TWO,
        )
    facts = device_of(device.index) if device.type == "cuda" else INTERPRETED
    return configs.fits(configs.fitted(config, problem), problem, facts)


# A case, and the channels of a shortcut that joins it: whole chunks where the case has them, too.
JOINED = [(ALIGNED, 0), (ALIGNED, 64), *itertools.product(SMALL, (0, 24))]
JOINED = [(case, channels) for case, channels in JOINED if case.groups == 1 or not channels]


def check_triton_configuration(tile, split, device, rows, turn, modes):
    """Over rows of JOINED, each in the first modes that the tile is for; how many ran."""
    ran = 0
    for i, (case, channels) in enumerate(rows):
        first = (turn + i) % len(MODES)
        turned = [*MODES][first:] + [*MODES][:first]
        able = [mode for mode in turned if fits(tile, case, mode, device, channels)]
        for mode in able[:modes]:
            depth = tile.depth // 2 if MODES[mode] == torch.float32 else tile.depth
            config = str(replace(tile, depth=depth, split=split))
            if channels:
                check_joined("triton", device, case, mode, config, channels)
            else:
                check_whole("triton", device, case, mode, config)
            ran += 1
    return ran


def is_for(tile, device):
    """Whether any of JOINED can be cut into the tile on a GPU."""
    rows = itertools.product(JOINED, MODES)
    return any(fits(tile, case, mode, device, channels) for (case, channels), mode in rows)


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("tile", configs.TILES, ids=str)
def test_every_triton_configuration(tile, split, device):
    """Each tile alone and shared, forced by its text; more parts than steps leave some empty.

    Whole chunks, and of the others one in turn: tiles share the code for those.
    """
    turn = configs.TILES.index(tile) + split
    rows = [*JOINED[:2], JOINED[2 + turn % (len(JOINED) - 2)]]
    ran = check_triton_configuration(tile, split, device, rows, turn, modes=1)
    assert (ran > 0) == is_for(tile, device)
    if not ran:
        pytest.skip("the tile is for other GPUs")


@pytest.mark.slow
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("tile", configs.TILES, ids=str)
def test_every_triton_configuration_in_every_mode(tile, split, device):
    ran = check_triton_configuration(tile, split, device, JOINED, 0, modes=len(MODES))
    assert (ran > 0) == is_for(tile, device)


# What the CUDA kernels say of a tile that is not for a convolution.
NOT_FOR = re.compile(
    "is not compiled for|needs channels in multiples|has no (float32|groups)|steps to split"
    "|tap-shift|TMA"
)


def check_cuda_configuration(config, device, modes):
    """Over convolutions that one can serve; how many it did serve."""
    ran = 0
    tap = square(3, 64, 14, 72, padding=ONE)
    for case, mode, joins in itertools.product([ALIGNED, tap, *SMALL], modes, (False, True)):
        if joins and case.groups > 1:
            continue
        try:
            if joins:
                check_joined("cuda", device, case, mode, config, channels=64)
            else:
                check_whole("cuda", device, case, mode, config)
        except RuntimeError as error:
            if not NOT_FOR.search(str(error)):
                raise
        else:
            ran += 1
    return ran


# Several of the largest tiles for each block, some of whose warpgroups have no residual in some.
MANY_TILES = square(24, 64, 56, 136, 1)

SM80_TILES = ("128x128", "128x64", "64x64", "64x64k64", "64x32", "any64x64")


@pytest.fixture
def cuda_kernels(gpu):
    from resnet_fused import backends

    error = backends.missing("cuda", "cuda", gpu.index)
    if error:
        pytest.skip(error)


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("tile", SM80_TILES)
def test_every_sm80_configuration(tile, split, gpu):
    least = 6 if tile in SM80_TILES[:2] else 12
    assert check_cuda_configuration(f"sm80 {tile} split {split}", gpu, MODES) >= least


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize(
    ("tile", "split"),
    [*((t, 1) for t in SM90_TILES), *((t, n) for t in SPLIT_TILES for n in (2, 8))],
)
def test_every_sm90_configuration(tile, split, gpu):
    if torch.cuda.get_device_capability(gpu) != (9, 0):
        pytest.skip("its kernel is for sm_90")
    assert check_cuda_configuration(f"sm90 {tile} split {split}", gpu, ("bfloat16", "float16")) >= 2
    if split == 1 and "k" not in tile:
        check_whole("cuda", gpu, MANY_TILES, "bfloat16", f"sm90 {tile} split 1")


@pytest.mark.usefixtures("cuda_kernels")
def test_tap_shift(gpu):
    if torch.cuda.get_device_capability(gpu) != (9, 0):
        pytest.skip("its kernel is for sm_90")
    modes = ("bfloat16", "float16")
    assert check_cuda_configuration("sm90 tap-shift split 1", gpu, modes) >= 2
    check_whole("cuda", gpu, MANY_TILES, "bfloat16", "sm90 tap-shift split 1")


POOLED = [
    square(3, 3, 61, 64, 7, stride=TWO, padding=THREE, residual=False),
    square(2, 1, 40, 24, 7, stride=TWO, padding=THREE, residual=False, act="none"),
    square(1, 4, 23, 72, padding=ONE, residual=False),
    square(2, 3, 20, 12, 5, stride=TWO, padding=TWO, residual=False),  # in two kernels
]


@pytest.mark.usefixtures("cuda_kernels")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", POOLED, ids=str)
def test_a_max_pool_behind_a_convolution(case, mode, gpu):
    """Whole numbers against float64, exactly, whether one kernel computes both or two do."""
    with multiplied(mode) as dtype:
        o = integers(case).to(dtype)
        there = moved(o, gpu)
        packed = _ops.pack_conv(there.weight, plan="cuda")
        keywords = {"kernel_size": case.kernel, "plan": "cuda", "pool": True, **case.keywords}
        spoil(torch.Size(case.y_shape).numel() // 2, gpu)
        got = _ops.conv_bn_act_packed(there.x, packed, *there.args()[2:], **keywords)
    want = F.max_pool2d(exact(o, case), 3, 2, 1).to(dtype)
    assert_same(got.cpu(), want, f"({case}, {mode})")
    assert is_dense_channels_last(got)


@pytest.mark.parametrize("config", ["fast", "64x64x64 warps 3 stages 2", "sm80 63x64 split 1"])
def test_unknown_configurations(config, device, gpu_plan):
    o = moved(normals(SMALL[1]).to(torch.bfloat16), device)
    with pytest.raises(RuntimeError, match="config must"):
        gpu_conv(gpu_plan, o, SMALL[1], config)


# ---- shortcuts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "mode"), in_turn([1, 16, 40, 70], MODES))
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_shortcuts(stride, channels, mode, device, gpu_plan):
    act = "none" if mode == "bfloat16" else "relu"
    case = square(2, 20, 4, 33, padding=ONE, residual=False, act=act)
    check_joined(gpu_plan, device, case, mode, "", channels, stride)


@pytest.mark.parametrize("mode", ["tf32", "float16"])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_shortcuts_of_whole_chunks(stride, mode, device, gpu_plan):
    case = square(2, 64, 4, 128, padding=ONE, residual=False)
    check_joined(gpu_plan, device, case, mode, "", 64, stride)


def scaled_branches(n):
    """Every pair of SCALES, one a channel: normal operands on the CPU in float32."""
    pairs = list(itertools.product(SCALES, SCALES))
    case = square(n, 16, 4, len(pairs), padding=ONE, residual=False, act="none")
    branch = case.but(c=24, h=8, w=8, kernel=(1, 1), padding=(0, 0), stride=TWO)
    o, s = normals(case).to(torch.float32), normals(branch).to(torch.float32)
    o.scale, s.scale = (torch.tensor(side) for side in zip(*pairs, strict=True))
    return pairs, case, branch, o, s


# Error of a 16-bit or TF32 operand's sums and of the result, relative to the sizes of the branches.
UNITS = {"ieee": 1e-6, "tf32": 4e-3, "bfloat16": 1.6e-2, "float16": 2e-3}


@pytest.mark.parametrize("n", [1, 9])
@pytest.mark.parametrize("mode", MODES)
def test_scales_of_both_branches(mode, n, device, gpu_plan):
    """Zero, tiny and negative on either side: last batch norms often begin with gamma = 0."""
    pairs, case, branch, o, s = scaled_branches(n)
    with multiplied(mode) as dtype:
        o, s = o.to(dtype), s.to(dtype)
        there, side = moved(o, device), moved(s, device)
        got = gpu_conv(gpu_plan, there, case, **shortcut_of(side, branch)).cpu()
    parts = [exact(o, case), exact(s, branch)]
    sizes = sum(part.abs().amax((0, 2, 3)) for part in parts)
    error = (got.double() - sum(parts)).abs().amax((0, 2, 3))
    fine = error <= UNITS[mode] * sizes
    if mode == "float16":
        fine |= sizes > 6e4  # beyond its range
    assert fine.all(), pairs[int((error / sizes).argmax())]


# ---- NaN and Inf -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["x", "shortcut_x", "scale", "shortcut_scale", "residual"])
@pytest.mark.parametrize("mode", ["ieee", "bfloat16"])
def test_nothing_wild_becomes_tame(value, place, mode, device, gpu_plan):
    """What eager makes NaN or +Inf is not finite, whatever the scales; NaN passes the ReLU."""
    joined = place.startswith("shortcut")
    case = square(1, 16, 4, 32, padding=ONE, residual=not joined)
    branch = case.but(c=24, h=8, w=8, kernel=(1, 1), padding=(0, 0), stride=TWO, residual=False)
    with multiplied(mode) as dtype:
        o, s = normals(case).to(dtype), normals(branch).to(dtype)
        for scale in (o.scale, s.scale):
            scale[::3] = 0
        o.scale[1], s.scale[1] = 1e-6, -1e-6
        target = (s if joined else o).__dict__[place.removeprefix("shortcut_")]
        target.view(-1)[target.numel() // 2] = value
        there, side = moved(o, device), moved(s, device)
        shortcut = shortcut_of(side, branch) if joined else {}
        got = gpu_conv(gpu_plan, there, case, **shortcut).cpu()
    conv = F.conv2d(o.x.float(), o.weight.float(), padding=1)
    conv = conv * o.scale[:, None, None] + o.shift[:, None, None]
    if joined:
        second = F.conv2d(s.x.float(), s.weight.float(), stride=2)
        conv += second * s.scale[:, None, None] + s.shift[:, None, None]
    else:
        conv += o.residual
    want = conv.relu()
    wild = ~want.isfinite()
    assert wild.any() or value == -math.inf
    assert not got[wild].isfinite().any()
    assert got[want.isnan()].isnan().all()


# ---- errors ------------------------------------------------------------------------------------


def tf32_bound(o, case):
    """Of each sum when its operands have 11 bits, rounded or cut off: 2^-10 each, and float32's."""
    sizes = Operands(*(None if t is None else t.abs() for t in o.args()))
    return exact(sizes, case) * (2 * 2.0**-10 + 2.0**-20)


@pytest.mark.parametrize(("case", "mode"), in_turn(FLOAT_CASES, MODES), ids=str)
def test_errors(case, mode, device, gpu_plan):
    """At most twice eager's; TF32's within what its operands' 11 bits allow."""
    with multiplied(mode) as dtype:
        o = normals(case).to(dtype)
        there = moved(o, device)
        got = gpu_conv(gpu_plan, there, case).cpu()
        theirs = eager(there, case).cpu()
    oracle = exact(o, case)
    if mode == "tf32":
        assert ((got.double() - oracle).abs() <= tf32_bound(o, case)).all()
    else:
        # float32 sums of any order: the bound that the project promises of a convolution.
        assert_close_as_eager(got, theirs, oracle, 2e-6 if mode == "ieee" else 0)


def test_tf32_only_where_torch_says_so(gpu, gpu_plan):
    """1 + 2^-12 is 1 in TF32; each flag's result is that of its own products."""
    case = square(1, 64, 8, 64, padding=ONE, residual=False, act="none")
    o = moved(integers(case).to(torch.float32), gpu)
    o.x = torch.full_like(o.x, 1 + 2.0**-12)
    want = exact(moved(o, "cpu"), case)
    results = {}
    for mode in ("ieee", "tf32", "ieee"):
        with multiplied(mode):
            results[mode] = gpu_conv(gpu_plan, o, case).cpu().double()
    largest = want.abs().max()
    assert (results["ieee"] - want).abs().max() <= 1e-6 * largest
    assert (results["tf32"] - want).abs().max() > 1e-5 * largest
    flags = torch.backends.cudnn.conv
    before = flags.fp32_precision
    try:
        for mode in ("ieee", "tf32"):
            flags.fp32_precision = mode
            assert torch.equal(gpu_conv(gpu_plan, o, case).cpu().double(), results[mode])
    finally:
        flags.fp32_precision = before


# ResNet's own sizes; the first with more tiles of 64 pixels than any GPU has multiprocessors.
REAL = [
    square(8, 64, 56, 64, padding=ONE),
    square(8, 64, 56, 128, stride=TWO, padding=ONE),
    square(3, 256, 14, 256, padding=ONE),
    square(1, 512, 7, 512, padding=ONE),
    square(8, 3, 224, 64, 7, stride=TWO, padding=THREE, residual=False),
    square(4, 1024, 14, 256, 1, residual=False),
]


@pytest.mark.parametrize(("case", "mode"), in_turn(REAL, ["tf32", "bfloat16", "float16"]), ids=str)
def test_real_sizes(case, mode, gpu, gpu_plan):
    check_whole(gpu_plan, gpu, case, mode)
    if case.residual and case.stride == ONE:
        check_joined(gpu_plan, gpu, case, mode, "", case.c // 2, 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", [REAL[0], REAL[3], SMALL[0]], ids=str)
def test_the_same_bits_every_time(case, mode, gpu, gpu_plan):
    with multiplied(mode) as dtype:
        o = moved(normals(case).to(dtype), gpu)
        first = gpu_conv(gpu_plan, o, case)
        for _ in range(20):
            assert torch.equal(gpu_conv(gpu_plan, o, case), first)


# ---- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device, gpu_plan):
    cases = (CHANNELS[8], GEOMETRIES[9], RESNET[1], GROUPS[4])
    for case, mode in zip(cases, MODES, strict=True):
        check_whole(gpu_plan, device, case, mode, layout=layout)


@pytest.mark.parametrize("mode", MODES)
def test_weights_and_vectors_of_any_strides(mode, device, gpu_plan):
    case = GEOMETRIES[9]
    with multiplied(mode) as dtype:
        o = integers(case).to(dtype)
        want = exact(o, case).to(dtype)
        o = moved(o, device)
        for layout in ("contiguous", "sliced", "shifted", "every_other_channel"):
            o.weight = LAYOUTS[layout](o.weight)
            o.scale, o.shift = torch.stack([o.scale, o.shift], dim=1).unbind(1)
            assert_same(gpu_conv(gpu_plan, o, case).cpu(), want, layout)


def test_no_images(device, gpu_plan):
    for mode in MODES:
        with multiplied(mode) as dtype:
            case = square(0, 16, 5, 24, padding=ONE)
            got = gpu_conv(gpu_plan, moved(normals(case).to(dtype), device), case)
            assert got.shape == (0, 24, 5, 5)


def test_operands_are_left_alone(device, gpu_plan):
    for case in SMALL:
        o = moved(integers(case).to(torch.bfloat16), device).laid_out("channels_last")
        before = [t.clone() for t in o.args()]
        got = gpu_conv(gpu_plan, o, case)
        for t, copy in zip(o.args(), before, strict=True):
            assert torch.equal(t, copy)
            assert got.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()


ADDED = [(0, 3, 4, 4), (2, 5, 7, 3), (3, 1000), (70_001,), ()]


@pytest.mark.parametrize("dtype", dict.fromkeys(MODES.values()), ids=str)
@pytest.mark.parametrize("shape", ADDED, ids=str)
def test_add_relu(shape, dtype, device, gpu_plan):
    op = getattr(_ops, f"add_relu_{gpu_plan}")
    a, b = (torch.randn(shape).to(dtype).to(device) for _ in range(2))
    if a.numel():
        a.view(-1)[0], b.view(-1)[-1] = math.nan, math.inf
    layouts = [a, b]
    if a.dim() == 4:
        layouts.append(b.to(memory_format=torch.channels_last))
    if a.dim() == 1:
        layouts.append(LAYOUTS["shifted"](b.view(1, 1, -1)).view(-1))  # off any alignment
    for left, right in itertools.permutations(layouts, 2):
        spoil(left.numel() * left.element_size(), device)
        got = op(left, right)
        assert_same(got, (left + right).relu())
        assert got.stride() == torch.empty_like(left).stride()


# ---- streams -----------------------------------------------------------------------------------


def test_on_the_current_stream(gpu, gpu_plan):
    """Operands that another stream writes late are read by an op that waits for it in order."""
    case = square(2, 64, 16, 64, padding=ONE)
    o = moved(integers(case).to(torch.bfloat16), gpu)
    want = gpu_conv(gpu_plan, o, case)
    late = replace(o, x=torch.full_like(o.x, math.nan))
    stream = torch.cuda.Stream(gpu)
    torch.cuda.synchronize(gpu)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late.x.copy_(o.x)
        got = gpu_conv(gpu_plan, late, case)
    stream.synchronize()
    assert torch.equal(got, want)


def test_shared_tiles_on_several_streams_at_once(gpu, gpu_plan):
    """Programs that share a reduction keep their sums apart from those of other streams."""
    case = square(1, 512, 7, 64, padding=ONE)  # so few tiles that the reduction is split
    several = [moved(normals(case, seed).to(torch.bfloat16), gpu) for seed in range(4)]
    wants = [gpu_conv(gpu_plan, o, case) for o in several]
    streams = [torch.cuda.Stream(gpu) for _ in several]
    torch.cuda.synchronize(gpu)
    results = []
    for _ in range(25):
        for stream, o in zip(streams, several, strict=True):
            with torch.cuda.stream(stream):
                results.append(gpu_conv(gpu_plan, o, case))
    torch.cuda.synchronize(gpu)
    for i, got in enumerate(results):
        assert torch.equal(got, wants[i % len(several)])


def test_no_synchronisation(gpu, gpu_plan):
    """From the second call on; the first may compile."""
    case = square(2, 64, 8, 64, padding=ONE)
    o = moved(integers(case).to(torch.bfloat16), gpu)
    plain = replace(o, residual=None)
    branch, s, at = with_shortcut(case, torch.bfloat16)
    branch, shortcut = moved(branch, gpu), shortcut_of(moved(s, gpu), at)
    add = getattr(_ops, f"add_relu_{gpu_plan}")

    def call():
        gpu_conv(gpu_plan, o, case)
        gpu_conv(gpu_plan, plain, case)
        gpu_conv(gpu_plan, branch, case, **shortcut)
        add(o.residual, o.residual)

    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_second_device(gpu, gpu_plan):
    """On cuda:1 while cuda:0 is the current device."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    other = torch.device("cuda", 1)
    with torch.cuda.device(0):
        for case, mode in itertools.product(SMALL, MODES):
            check_whole(gpu_plan, other, case, mode)
        check_joined(gpu_plan, other, SMALL[1], "bfloat16")
        a = torch.randn(1000, device=other)
        assert torch.equal(getattr(_ops, f"add_relu_{gpu_plan}")(a, -a / 2), (a - a / 2).relu())
        assert torch.cuda.current_device() == 0


# ---- more than 2^31 elements -------------------------------------------------------------------

TOO_MANY = "31 bits|2\\*\\*31|2\\^31"
SIDE = 5808  # SIDE^2 * 64 is just above 2^31


def room(device, gigabytes):
    if torch.cuda.mem_get_info(device)[0] < gigabytes * 1e9:
        pytest.skip(f"it needs {gigabytes} GB of GPU memory")


@pytest.mark.slow
@pytest.mark.parametrize(("c", "k"), [(64, 16), (16, 64)], ids=["input", "output"])
def test_beyond_32_bit_indices(c, k, gpu, gpu_plan):
    """A large x or output: right on both sides of element 2^31, or refused in a sentence."""
    assert SIDE * SIDE * 64 > 2**31
    room(gpu, 20)
    torch.cuda.empty_cache()
    x = torch.empty(1, SIDE, SIDE, c, dtype=torch.bfloat16, device=gpu)
    x = x.bernoulli_(0.5).mul_(2).sub_(1).permute(0, 3, 1, 2)
    case = square(1, c, 8, k, padding=ONE, residual=False)
    o = replace(moved(integers(case).to(torch.bfloat16), gpu), x=x)
    keywords = {"kernel_size": THREE, "padding": ONE}
    op = getattr(_ops, f"conv_bn_act_{gpu_plan}")
    if gpu_plan == "cuda":
        with pytest.raises(RuntimeError, match=TOO_MANY):
            op(*o.args(), **keywords)
        return
    y = op(*o.args(), **keywords)
    crossing = 2**31 // (SIDE * 64)  # the row of element 2^31 of the large tensor
    for row in (0, crossing - 3, SIDE - 8):
        first, last = max(row - 1, 0), min(row + 9, SIDE)
        band = replace(o, x=x[:, :, first:last])
        part = case.but(h=last - first, w=SIDE)
        want = exact(moved(band, "cpu"), part).to(torch.bfloat16)
        assert_same(y[:, :, row : row + 8].cpu(), want[:, :, row - first :][:, :, :8], f"row {row}")


@pytest.mark.slow
def test_add_relu_beyond_32_bit_indices(gpu, gpu_plan):
    room(gpu, 20)
    torch.cuda.empty_cache()
    count = 2**31 + 4099
    a = torch.ones(count, dtype=torch.bfloat16, device=gpu)
    a[-3:], a[2**31 - 1], a[0] = 5, -7, 3
    try:
        y = getattr(_ops, f"add_relu_{gpu_plan}")(a, a)
    except RuntimeError as error:
        assert re.search(TOO_MANY, str(error))  # noqa: PT017
        return
    assert y[-3:].tolist() == [10] * 3
    assert (y[2**31 - 1].item(), y[2**31].item(), y[0].item()) == (0, 2, 6)
    for part in y.split(2**28):
        assert int((part == 2).sum()) >= part.numel() - 3
