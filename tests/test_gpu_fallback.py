"""What runs on a GPU beside the convolutions of ours: which kernel, by what is there for a device.

The kernels are stand-ins; test_cuda_pointwise and test_gpu_ops have the real ones.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import Case, exact, normals

from resnet_fused import _gpu_kernels, packing, reference, select, tuned
from resnet_fused._launches import prepare_block, prepare_unit
from resnet_fused.measure import candidates
from resnet_fused.measure.candidates import ConvCall
from resnet_fused.ops import _composite, _cuda, _gpu, _triton
from resnet_fused.packing import PackedUnit, at_once

configs = []  # that conv was given, "" for none


def conv(x, packed, scale, shift, residual=None, *shortcut, kernel_size, config="", **keywords):
    configs.append(config)
    assert packed.shape[2:] == kernel_size
    stride = keywords.pop("shortcut_stride", None)
    if shortcut:
        residual = reference.conv_bn_act(*shortcut, stride=stride, act="none")
    return reference.conv_bn_act(x, packed, scale, shift, residual, **keywords)


def refusal(x, out_channels, kernel_size, stride, padding):
    """As the kernel's own, csrc/cuda/sm80/stem.cpp, as far as the tests here need it."""
    return "" if out_channels % 8 == 0 and stride[1] * x[1] % 2 == 0 else "a sentence"


def tail(x, packed, scale, shift, last_packed, last_scale, last_shift, residual, **keywords):
    last_act = keywords.pop("last_act")
    y = conv(x, packed, scale, shift, groups=1, **keywords)
    one = {"kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    return conv(y, last_packed, last_scale, last_shift, residual, **one, groups=1, act=last_act)


def tail_refusal(x, between, out_channels, *geometry):
    """As the kernel's own, csrc/cuda/sm80/tail.cpp, as far as the tests here need it."""
    return "a sentence" if x[1] % 8 or between % 8 or out_channels % 8 else ""


@pytest.fixture
def kernels(monkeypatch):
    """there("cuda", "triton"): as if those kernels served the CPU; a list of what was called."""
    calls = []

    def stand_in(name, function):
        def run(*operands, **keywords):
            calls.append(name)
            return function(*operands, **keywords)

        return run

    ops = {
        "add_relu_cuda": reference.add_relu,
        "add_relu_triton": reference.add_relu,
        "scale_shift_act_cuda": reference.scale_shift_act,
        "conv_bn_act_cuda": conv,
        "conv_bn_act_triton": conv,
        "conv_bn_act_pool_cuda": lambda *o, **k: reference.max_pool(conv(*o, **k)),
        "bottleneck_tail_cuda": tail,
    }
    stands = {name: stand_in(name, function) for name, function in ops.items()}
    # Not counted: they launch nothing.
    stands["conv_bn_act_pool_refusal"] = refusal
    stands["bottleneck_tail_refusal"] = tail_refusal
    monkeypatch.setattr(_gpu._cuda, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(_gpu._cuda, "has_wgmma", lambda device: False)
    monkeypatch.setattr(_gpu, "_ops", SimpleNamespace(**stands))
    monkeypatch.setattr(_gpu, "conv_op", lambda plan: stands[f"conv_bn_act_{plan}"])
    monkeypatch.setattr(_composite, "check_packed", lambda *arguments: None)

    def there(*backends):
        for name in ("cuda", "triton"):
            error = None if name in backends else "not there"
            monkeypatch.setattr(_gpu_kernels, f"{name}_error", lambda device, error=error: error)
        return calls

    return there


@pytest.mark.parametrize(
    ("backends", "called"),
    [
        (("cuda", "triton"), ["add_relu_cuda"]),
        (("triton",), ["add_relu_triton"]),
        ((), []),
    ],
)
def test_add_relu(kernels, backends, called):
    calls = kernels(*backends)
    a, b = torch.randn(3, 5), torch.randn(3, 5)
    assert torch.equal(_gpu.add_relu(a, b), (a + b).relu())
    assert calls == called
    _gpu.add_relu(a.double(), b.double())
    assert calls == called


@pytest.mark.parametrize("backends", [("cuda", "triton"), ("triton",), ()])
@pytest.mark.parametrize("residual", [False, True])
def test_behind_pytorchs_convolution(kernels, backends, residual):
    calls = kernels(*backends)
    case = Case(2, 6, 7, 9, 8, (3, 3), (2, 1), (1, 1), groups=2, residual=residual)
    o = normals(case).to(torch.float32)
    y = _gpu.conv_by_torch(*o.args(), **case.keywords)
    torch.testing.assert_close(y.double(), exact(o, case), rtol=1e-5, atol=1e-5)
    assert calls == ["scale_shift_act_cuda"] * ("cuda" in backends)
    wide = normals(case)
    _gpu.conv_by_torch(*wide.args(), **case.keywords)
    assert len(calls) == ("cuda" in backends)


# ---- a stem and its max-pool --------------------------------------------------------------------

STEM = Case(2, 3, 17, 20, 16, (7, 7), (2, 2), (3, 3), residual=False)
ONE, TWO = "conv_bn_act_pool_cuda", "conv_bn_act_cuda"


def packed_unit(case, plan, pool, dtype):
    """A convolution as a module packs it, and an input."""
    o = normals(case).to(dtype)
    keywords = {"kernel_size": case.kernel, "plan": plan, "pool": pool, **case.keywords}
    choice = select.Choice(plan, "a reason")
    return PackedUnit(o.weight, o.scale, o.shift, keywords, choice), o


@pytest.mark.parametrize(
    ("case", "plan", "pool", "dtype", "called"),
    [
        (STEM, "cuda", True, torch.bfloat16, ONE),
        (STEM.but(act="none", k=8), "cuda", True, torch.float16, ONE),
        (STEM.but(n=None), "cuda", True, torch.bfloat16, ONE),
        (STEM, "cuda", False, torch.bfloat16, TWO),
        (STEM, "cuda", True, torch.float32, TWO),
        (STEM.but(k=12), "cuda", True, torch.bfloat16, TWO),
        (STEM.but(stride=(2, 1)), "cuda", True, torch.bfloat16, TWO),
        (STEM.but(residual=True), "cuda", True, torch.bfloat16, TWO),
        (STEM.but(c=4, groups=2), "cuda", True, torch.bfloat16, TWO),
        (STEM.but(dilation=(1, 2)), "cuda", True, torch.bfloat16, TWO),
        (STEM, "triton", True, torch.bfloat16, "conv_bn_act_triton"),
    ],
)
def test_a_stem_and_its_pool(kernels, case, plan, pool, dtype, called):
    """One kernel where it serves the convolution; the same answer at every place that asks."""
    calls = kernels("cuda", "triton")
    unit, o = packed_unit(case, plan, pool, dtype)
    y = _composite._conv_bn_act_packed(o.x, *o.args()[1:], **unit.keywords)
    assert calls == [called]
    want = reference.conv_bn_act(*o.args(), **case.keywords)
    assert torch.equal(y, reference.max_pool(want) if pool else want)
    if case.residual or not pool:
        return
    how = "in the same pass" if called == ONE else "in a second pass"
    assert unit.reason == f"a reason; its max-pool {how}"
    if case.n is None or plan == "triton":
        return
    run = prepare_unit(unit, tuple(o.x.shape), o.x.device)
    assert torch.equal(run(o.x, None), y)
    assert calls == [called, called]


def test_a_stem_without_the_kernels(kernels):
    calls = kernels("triton")
    unit, o = packed_unit(STEM, "cuda", True, torch.bfloat16)
    _composite._conv_bn_act_packed(o.x, *o.args()[1:], **unit.keywords)
    assert calls == [TWO]
    assert unit.reason.endswith("in a second pass")


# ---- a bottleneck's last two convolutions -------------------------------------------------------

BETWEEN = Case(1, 8, 16, 17, 16, (3, 3), padding=(1, 1), residual=False)
TAIL = ["conv_bn_act_cuda", "bottleneck_tail_cuda"]


def bottleneck(middle, dtype, plan="cuda", last=None, shortcut=False):
    """A block's packed units: 1x1, `middle`, 1x1 to the input's channels; and an input."""
    out = middle.y_shape[-2:]
    first = Case(middle.n, 24, middle.h, middle.w, middle.c, (1, 1), residual=False)
    end = last or Case(middle.n, middle.k, *out, 24, (1, 1), residual=False)
    cases = [first, middle, end]
    if shortcut:
        cases.append(first.but(k=24, act="none", stride=middle.stride))
    units = [packed_unit(case, plan, False, dtype)[0] for case in cases]
    return units, normals(first).to(dtype).x


def runs_of(units, x, has_shortcut):
    """The block by residual_block's fallback, and by its prepared launches."""
    *main, shortcut = units if has_shortcut else [*units, None]
    joined = at_once(units)
    yield lambda: _composite._residual_block(
        x, *joined.tensors, has_shortcut=has_shortcut, **joined.keywords
    )
    if x.dim() == 4:
        run = prepare_block(main, shortcut, tuple(x.shape), x.device)
        yield lambda: run(x)


@pytest.fixture
def blocks(kernels, monkeypatch):
    """As if residual_block's plans of a GPU were the CPU's."""
    monkeypatch.setattr(_composite, "check_block", lambda *arguments: None)
    packed = SimpleNamespace(conv_bn_act_packed=_composite._conv_bn_act_packed)
    monkeypatch.setattr(_composite, "_ops", packed)
    monkeypatch.setattr(packing, "_ops", packed)
    return kernels("cuda", "triton")


@pytest.mark.parametrize(
    ("middle", "dtype", "tails"),
    [
        (BETWEEN, torch.bfloat16, True),
        (BETWEEN.but(k=64, act="none"), torch.float16, True),
        (BETWEEN.but(n=None), torch.bfloat16, True),
        (BETWEEN.but(n=3, h=8, w=11), torch.bfloat16, True),
        (BETWEEN.but(kernel=(5, 3), padding=(2, 1)), torch.bfloat16, True),
        (BETWEEN.but(w=15), torch.bfloat16, False),  # too few blocks
        (BETWEEN.but(k=72), torch.bfloat16, False),  # bound by products, not by memory
        (BETWEEN.but(k=12), torch.bfloat16, False),
        (BETWEEN.but(groups=2), torch.bfloat16, False),
        (BETWEEN, torch.float32, False),
    ],
    ids=str,
)
def test_the_tail_of_a_bottleneck(blocks, middle, dtype, tails):
    """One kernel where it serves, the same answer from the op and from prepared launches."""
    units, x = bottleneck(middle, dtype)
    y = x
    for unit in units[:-1]:
        y = reference.conv_bn_act(y, *unit.operands, None, **case_keywords(unit))
    want = reference.conv_bn_act(y, *units[-1].operands, x, **case_keywords(units[-1]))
    for run in runs_of(units, x, False):
        del blocks[:]
        torch.testing.assert_close(run(), want, rtol=2.0**-7, atol=2.0**-6)
        assert blocks == (TAIL if tails else ["conv_bn_act_cuda"] * 3)


def case_keywords(unit):
    return {name: unit.keywords[name] for name in packing.CONV_KEYWORDS}


def test_blocks_without_a_tail_of_one_kernel(blocks):
    """A 1x1 shortcut stays joined to the last convolution; a last one of 3x3 stays alone."""
    wide = BETWEEN.but(h=40)
    for run in runs_of(*bottleneck(wide, torch.bfloat16, shortcut=True), True):
        del blocks[:]
        run()
        assert blocks == ["conv_bn_act_cuda"] * 3
    last = Case(1, wide.k, wide.h, wide.w, 24, (3, 3), padding=(1, 1), residual=False)
    for run in runs_of(*bottleneck(wide, torch.bfloat16, last=last), False):
        del blocks[:]
        run()
        assert blocks == ["conv_bn_act_cuda"] * 3


def test_no_tail_without_the_kernels(kernels):
    units, x = bottleneck(BETWEEN, torch.bfloat16)
    where = (x.device, (1, 8, 16, 17), units[1].arguments, units[2].arguments)
    kernels("cuda")
    assert _gpu.tails(*where)
    kernels("triton")
    assert not _gpu.tails(*where)


def test_no_tail_where_single_convolutions_have_wgmma(kernels, monkeypatch):
    kernels("cuda")
    units, x = bottleneck(BETWEEN, torch.bfloat16)
    monkeypatch.setattr(_gpu._cuda, "has_wgmma", lambda device: True)
    assert not _gpu.tails(x.device, (1, 8, 16, 17), units[1].arguments, units[2].arguments)


def test_no_tail_of_another_plan(kernels):
    kernels("cuda", "triton")
    units, x = bottleneck(BETWEEN, torch.bfloat16, plan="triton")
    assert not _gpu.tails(x.device, (1, 8, 16, 17), units[1].arguments, units[2].arguments)


# ---- configurations that were measured ----------------------------------------------------------

FAST = "sm90 p64x64 split 4"


@pytest.fixture
def measured(monkeypatch):
    """As if `tune` had found FAST for every convolution; what was asked whether FAST serves."""
    asked = []

    def refusal(*arguments):
        asked.append(arguments)
        return "a sentence" if arguments[5] == (1, 2) else ""

    ops = SimpleNamespace(conv_bn_act_cuda_refusal=refusal, uses_tf32=lambda: False)
    monkeypatch.setattr(_cuda.torch.ops, "resnet_fused", ops)
    monkeypatch.setattr(tuned, "config", lambda plan, shape: FAST if plan == "cuda" else "")
    _cuda._measured.cache_clear()
    yield asked
    _cuda._measured.cache_clear()


@pytest.mark.parametrize("plan", ["cuda", "triton"])
def test_the_kernel_takes_the_configuration_that_was_measured(kernels, measured, plan):
    kernels("cuda", "triton")
    case = BETWEEN.but(residual=True, act="none")
    unit, o = packed_unit(case, plan, False, torch.bfloat16)
    del configs[:]
    _composite._conv_bn_act_packed(o.x, *o.args()[1:], **unit.keywords)
    assert configs == [FAST if plan == "cuda" else ""]
    if plan == "triton":
        return  # its op looks for itself
    run = prepare_unit(unit, tuple(o.x.shape), o.x.device)
    torch.testing.assert_close(
        run(o.x, o.residual), reference.conv_bn_act(*o.args(), **case.keywords)
    )
    assert configs == [FAST, FAST]
    geometry = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    assert measured == [((1, 8, 16, 17), 16, *geometry, (), (1, 1), "bfloat16", 0, FAST)]


def test_a_configuration_that_does_not_serve_is_left_alone(kernels, measured):
    kernels("cuda", "triton")
    unit, o = packed_unit(BETWEEN.but(dilation=(1, 2)), "cuda", False, torch.bfloat16)
    del configs[:]
    _composite._conv_bn_act_packed(o.x, *o.args()[1:], **unit.keywords)
    assert configs == [""]


def test_a_joined_shortcut_is_part_of_the_question(blocks, measured):
    for run in runs_of(*bottleneck(BETWEEN, torch.bfloat16, shortcut=True), True):
        del configs[:]
        run()
        assert configs == [FAST] * 3
    assert measured[-1][7:9] == ((1, 24, 16, 17), (1, 1))
    assert len(measured) == 3, "asked once for each convolution"


@pytest.mark.parametrize(("plan", "config"), [("cuda", ""), ("triton", _triton.BY_RULE)])
def test_measuring_again_times_the_rule_and_not_what_was_measured(kernels, measured, plan, config):
    kernels("cuda", "triton")
    case = BETWEEN.but(residual=True)
    o = normals(case).to(torch.bfloat16)
    shape = select.ConvShape(
        "cuda", torch.bfloat16, case.c, case.k, case.kernel, case.y_shape[-2:], batch=case.n
    )
    call = ConvCall(shape, case.padding, case.act, residual=True)
    del configs[:]
    y = candidates._run(call, o, plan, o.weight)
    assert configs == [config]
    assert torch.equal(y, reference.conv_bn_act(*o.args(), **case.keywords))
    candidates._run(call, o, f"{plan} {FAST}", o.weight)
    assert configs == [config, FAST]
