"""The ops as PyTorch sees them: schemas, fakes, autograd, autocast, compile, export, functorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    DTYPES,
    EVERY_PLAN,
    KERNEL_DTYPES,
    LAYOUTS,
    NATIVE,
    Case,
    assert_close_as_eager,
    assert_same,
    eager,
    exact,
    integers,
    normals,
)
from torch._subclasses.fake_tensor import FakeTensorMode

import resnet_fused as rf
from resnet_fused import reference, select
from resnet_fused.check import PLAN_TRAITS

pytestmark = pytest.mark.usefixtures("one_thread")
_ops = torch.ops.resnet_fused
ONE, TWO = (1, 1), (2, 2)
LAYOUT_NAMES = ["contiguous", "channels_last", "sliced", "channels_last_sliced", "expanded_rows"]

CASES = [
    Case(2, 5, 7, 6, 9, (3, 3), padding=ONE),
    Case(1, 32, 4, 4, 40, (3, 3), padding=ONE, residual=False, act="none"),
    Case(2, 6, 5, 5, 4, (2, 2), stride=TWO, groups=2),
    Case(1, 7, 6, 5, 34, (3, 3), stride=TWO, padding=ONE),
    Case(3, 1, 1, 1, 1, (1, 1)),
    Case(2, 1, 4, 3, 6, (1, 1)),
    Case(2, 6, 4, 3, 1, (1, 1)),
    Case(1, 4, 3, 3, 4, (3, 3)),
    Case(0, 4, 5, 5, 3, (3, 3), padding=ONE),
    Case(None, 3, 5, 6, 7, (3, 3), padding=ONE),
    Case(None, 1, 1, 1, 1, (1, 1)),
]


def packed_call(o, case, plan):
    packed = rf.ops.pack_conv(o.weight.detach(), case.groups, plan=plan)
    keywords = {"kernel_size": case.kernel, "plan": plan, **case.keywords}
    return (o.x, packed, *o.args()[2:]), keywords


# ---- opcheck -----------------------------------------------------------------------------------


CHECKED = [
    (CASES[0], torch.float32),
    (CASES[1], torch.bfloat16),
    (CASES[2], torch.float64),
    (CASES[3], torch.bfloat16),
    (CASES[9], torch.float16),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(("case", "dtype"), CHECKED)
def test_opcheck_conv_bn_act(case, layout, dtype):
    o = integers(case).to(dtype).laid_out(layout, layout)
    torch.library.opcheck(_ops.conv_bn_act, o.args(), case.keywords)
    for t in o.args():
        if t is not None:
            t.requires_grad_()
    torch.library.opcheck(_ops.conv_bn_act, o.args(), case.keywords)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(("case", "dtype"), CHECKED)
def test_opcheck_packed(case, layout, dtype):
    o = integers(case).to(dtype).laid_out(layout, layout)
    for plan in case.plans(dtype):
        args, keywords = packed_call(o, case, plan)
        torch.library.opcheck(_ops.conv_bn_act_packed, args, keywords)
        torch.library.opcheck(_ops.pack_conv, (o.weight, case.groups), {"plan": plan})


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck_add_relu(layout, dtype):
    a, b = (LAYOUTS[layout](torch.randn(2, 3, 4, 5).to(dtype)) for _ in range(2))
    torch.library.opcheck(_ops.add_relu, (a, b))
    torch.library.opcheck(_ops.add_relu, (a.requires_grad_(), b.requires_grad_()))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_opcheck_content(layout, dtype):
    tensors = [LAYOUTS[layout](torch.randn(8, 3, 5, 5).to(dtype)), torch.randn(7).to(dtype)]
    sample = _ops.content_sample(tensors)
    utils = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(_ops.content_sample, (tensors,), test_utils=utils)
    torch.library.opcheck(_ops.content_equal, (tensors, sample), test_utils=utils)
    torch.library.opcheck(_ops.content_hash, (tensors,), test_utils=utils)


# ---- fake and real agree -------------------------------------------------------------------------


def assert_agree(real, fake):
    assert real.shape == fake.shape
    assert real.stride() == fake.stride()
    assert real.dtype == fake.dtype
    assert real.storage_offset() == fake.storage_offset() == 0


def as_fake(mode, value):
    return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_and_real_conv_agree(case, layout, dtype):
    o = integers(case).to(dtype).laid_out(layout, layout)
    for force in ("ours", *case.plans(dtype)):
        with select.forced(force):
            real = _ops.conv_bn_act(*o.args(), **case.keywords)
        with FakeTensorMode() as mode:
            assert_agree(
                real, _ops.conv_bn_act(*(as_fake(mode, t) for t in o.args()), **case.keywords)
            )
    for plan in case.plans(dtype):
        args, keywords = packed_call(o, case, plan)
        real = _ops.conv_bn_act_packed(*args, **keywords)
        with FakeTensorMode() as mode:
            fake = _ops.conv_bn_act_packed(*(as_fake(mode, t) for t in args), **keywords)
            assert_agree(real, fake)
            fake = _ops.pack_conv(as_fake(mode, o.weight), case.groups, plan=plan)
            assert_agree(args[1], fake)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize(
    "shape", [(2, 5, 4, 3), (2, 1, 4, 3), (3, 4, 1, 1), (0, 2, 2, 2), (5, 3, 2)]
)
def test_fake_and_real_add_relu_agree(shape, layout, dtype):
    a = LAYOUTS[layout](torch.randn(shape).to(dtype))
    b = torch.randn(shape).to(dtype)
    with FakeTensorMode() as mode:
        fake = _ops.add_relu(as_fake(mode, a), as_fake(mode, b))
    assert_agree(_ops.add_relu(a, b), fake)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_meta_tensors_give_shapes(case):
    o = integers(case).to(torch.float32)
    args = [None if t is None else t.to("meta") for t in o.args()]
    y = rf.ops.conv_bn_act(*args, **case.keywords)
    assert y.is_meta
    assert y.shape == case.y_shape
    if case.residual:
        assert rf.ops.add_relu(y, args[4]).shape == case.y_shape
    assert rf.ops.pack_conv(args[1], case.groups, plan="torch").shape == case.weight_shape


# ---- autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", KERNEL_DTYPES[1:])
@pytest.mark.parametrize("call", [rf.ops.conv_bn_act, _ops.conv_bn_act])
@pytest.mark.parametrize("force", ["ours", "torch"])
def test_autocast_casts_images_and_weights_only(force, call, low):
    case = Case(2, 5, 6, 6, 9, (3, 3), padding=ONE)
    o = normals(case).to(torch.float32)
    cast = normals(case).to(low)
    with select.forced(force):
        want = call(*cast.args(), **case.keywords)
        with torch.autocast("cpu", dtype=low):
            got = call(*o.args(), **case.keywords)
            mixed = call(cast.x, *o.args()[1:], **case.keywords)
    assert got.dtype == low
    assert_same(got, want)
    assert_same(mixed, want)
    assert call(*o.args(), **case.keywords).dtype == torch.float32


@pytest.mark.parametrize("call", [rf.ops.conv_bn_act, _ops.conv_bn_act])
def test_autocast_leaves_float64_alone(call):
    case = Case(1, 4, 4, 4, 3, (3, 3))
    o = integers(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(call(*o.args(), **case.keywords), exact(o, case))


def test_autocast_back_propagates_in_the_operands_dtypes():
    case = Case(2, 5, 6, 6, 9, (3, 3), padding=ONE, act="none")
    o = normals(case).to(torch.float32)
    leaves = [t.requires_grad_() for t in o.args()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rf.ops.conv_bn_act(*leaves, **case.keywords).sum().backward()
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact(type(o)(*wide), case).sum().backward()
    for t, w in zip(leaves, wide, strict=True):
        assert t.grad.dtype == torch.float32
        assert (t.grad - w.grad).norm() <= 0.02 * w.grad.norm()


def test_autocast_can_be_disabled_within():
    case = Case(1, 4, 4, 4, 3, (3, 3))
    o = integers(case).to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert_same(rf.ops.conv_bn_act(*o.args(), **case.keywords), exact(o, case).float())


def test_autocast_is_asked_for_in_words_that_dynamo_traces(monkeypatch):
    """That of torch 2.11 cannot trace is_autocast_available: devices that graphs are of do without.

    fullgraph=True and strict exports failed there.
    """
    on = rf.ops.is_autocast_on
    assert not on(torch.device("meta"))  # about which is_autocast_enabled raises
    monkeypatch.delattr(torch.amp, "is_autocast_available")
    assert not any(on(torch.device(name)) for name in ("cpu", "cuda"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert on(torch.device("cpu"))


# ---- gradients ---------------------------------------------------------------------------------

GRADIENTS = [
    Case(2, 3, 5, 4, 4, (3, 3), padding=ONE),
    Case(1, 4, 5, 5, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
    Case(None, 2, 4, 4, 3, (3, 3), padding=ONE, residual=False),
    Case(2, 3, 4, 4, 2, (1, 1), stride=TWO, act="none"),
    Case(0, 3, 5, 4, 4, (3, 3), padding=ONE),
]


@pytest.mark.parametrize("case", GRADIENTS[:4], ids=str)
def test_gradcheck(case):
    o = normals(case)
    leaves = [t if t is None else t.requires_grad_() for t in o.args()]

    def call(*args):
        return rf.ops.conv_bn_act(*args, **case.keywords)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_gradients_are_as_good_as_eagers(case, layout, dtype):
    o = normals(case).to(dtype).laid_out(layout, layout)
    weights = torch.randn(case.y_shape).to(dtype)

    def gradients(call, operands, weights):
        leaves = [t if t is None else t.detach().clone().requires_grad_() for t in operands.args()]
        (call(type(o)(*leaves), case) * weights).sum().backward()
        return [t.grad for t in leaves if t is not None]

    ours = gradients(lambda o, case: rf.ops.conv_bn_act(*o.args(), **case.keywords), o, weights)
    if case.n == 0:
        assert all(not g.any() for g in ours)
        return
    eagers = gradients(eager, o, weights)
    exacts = gradients(exact, o.to(torch.float64), weights.double())
    for got, theirs, oracle in zip(ours, eagers, exacts, strict=True):
        # Where our output and the oracle's lie on different sides of 0, one element's gradient
        # differs wholly: rounding to 16 bits never changes the sign, so that cannot happen here.
        assert_close_as_eager(got, theirs, oracle)


@pytest.mark.parametrize("needs", range(5))
def test_gradient_of_one_operand_alone(needs):
    case = GRADIENTS[0]
    leaves = list(normals(case).args())
    wide = list(normals(case).args())
    leaves[needs].requires_grad_()
    wide[needs].requires_grad_()
    rf.ops.conv_bn_act(*leaves, **case.keywords).sum().backward()
    exact(type(normals(case))(*wide), case).sum().backward()
    torch.testing.assert_close(leaves[needs].grad, wide[needs].grad)
    assert all(t.grad is None for i, t in enumerate(leaves) if i != needs)


def test_no_graph_where_no_gradient_is_needed():
    o = normals(CASES[0]).to(torch.float32)
    assert rf.ops.conv_bn_act(*o.args(), **CASES[0].keywords).grad_fn is None
    o.x.requires_grad_()
    with torch.no_grad():
        assert rf.ops.conv_bn_act(*o.args(), **CASES[0].keywords).grad_fn is None
    with torch.inference_mode():
        assert rf.ops.conv_bn_act(*o.args(), **CASES[0].keywords).is_inference()
    assert rf.ops.conv_bn_act(*o.args(), **CASES[0].keywords).grad_fn is not None


@pytest.mark.parametrize("plan", EVERY_PLAN)
def test_packed_ops_refuse_what_needs_gradients(plan):
    case = CASES[0].fitted(plan)
    for needs in range(5):
        o = normals(case).to(PLAN_TRAITS[plan].dtypes[0])
        args, keywords = packed_call(o, case, plan)
        args[needs].requires_grad_()
        sentence = "conv_bn_act_packed: is forward only"
        with pytest.raises(RuntimeError, match=sentence):
            _ops.conv_bn_act_packed(*args, **keywords)
        with torch.no_grad():
            assert_same(_ops.conv_bn_act_packed(*args, **keywords), _unneeding(args, keywords))
    with pytest.raises(RuntimeError, match="pack_conv: is forward only"):
        rf.ops.pack_conv(o.weight.requires_grad_(), case.groups, plan=plan)


def _unneeding(args, keywords):
    return _ops.conv_bn_act_packed(*(t.detach() for t in args), **keywords)


# ---- compile, export, transforms ---------------------------------------------------------------


def both(x, weight, scale, shift, residual):
    y = rf.ops.conv_bn_act(x, weight, scale, shift, residual, padding=1)
    return rf.ops.add_relu(y, residual)


def definition(x, weight, scale, shift, residual):
    y = reference.conv_bn_act(x, weight, scale, shift, residual, padding=1)
    return reference.add_relu(y, residual)


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiles_without_graph_breaks(backend, fresh_dynamo):
    case = Case(2, 5, 6, 7, 9, (3, 3), padding=ONE)
    compiled = torch.compile(both, fullgraph=True, backend=backend)
    for dtype in (torch.float32, torch.bfloat16):
        o = integers(case).to(dtype)
        assert_same(compiled(*o.args()), both(*o.args()))


def test_compiles_for_all_sizes_at_once(fresh_dynamo):
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, h, w in ((2, 6, 7), (3, 9, 5), (5, 4, 8)):
        o = integers(Case(n, 5, h, w, 9, (3, 3), padding=ONE)).to(torch.float32)
        with torch._dynamo.config.patch(error_on_recompile=n > 2):
            assert_same(compiled(*o.args()), both(*o.args()))


def test_compiles_with_gradients(fresh_dynamo):
    case = Case(2, 5, 6, 7, 9, (3, 3), padding=ONE)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    found = []
    for call in (compiled, both):
        leaves = [t.requires_grad_() for t in normals(case).to(torch.float32).args()]
        call(*leaves).square().sum().backward()
        found.append([t.grad for t in leaves])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_compiles_under_autocast(fresh_dynamo):
    case = Case(2, 5, 6, 7, 9, (3, 3), padding=ONE)
    o = normals(case).to(torch.float32)

    def call(*args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return rf.ops.conv_bn_act(*args, padding=1)

    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*o.args())
    assert got.dtype == torch.bfloat16
    assert_same(got, call(*o.args()))


@pytest.mark.parametrize("strict", [False, True])
def test_exports(strict):
    class Both(torch.nn.Module):
        def forward(self, *args):
            return both(*args)

    case = Case(2, 5, 6, 7, 9, (3, 3), padding=ONE)
    o = integers(case).to(torch.float32)
    program = torch.export.export(Both(), o.args(), strict=strict)
    targets = [str(node.target) for node in program.graph.nodes]
    assert "resnet_fused.conv_bn_act.default" in targets
    assert "resnet_fused.add_relu.default" in targets
    assert_same(program.module()(*o.args()), both(*o.args()))
    program.run_decompositions()


def test_bad_input_is_found_while_compiling(fresh_dynamo):
    o = integers(Case(2, 5, 6, 7, 9, (3, 3), padding=ONE)).to(torch.float32)
    compiled = torch.compile(both, backend="eager")
    with pytest.raises(Exception, match=r"conv_bn_act: shift must have shape \(9,\), got \(8,\)"):
        compiled(o.x, o.weight, o.scale, o.shift[:8], o.residual)


def test_vmap():
    case = Case(2, 5, 6, 7, 9, (3, 3), padding=ONE)
    many = [integers(case.but(c=5)).to(torch.float32) for _ in range(3)]
    stacked = [torch.stack(ts) for ts in zip(*(o.args() for o in many), strict=True)]
    stacked[0] = torch.randint(-3, 4, stacked[0].shape).float()
    got = torch.vmap(both)(*stacked)
    for i in range(3):
        torch.testing.assert_close(got[i], both(*(t[i] for t in stacked)), rtol=1e-4, atol=1e-4)


# ---- without the extension ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not NATIVE, reason="this already is the run without the extension")
def test_everything_holds_without_the_extension():
    """The same tests on the fallback in plain PyTorch, in a process without the kernels.

    Gradients are Python's in either case, and compiling takes long.
    """
    here = Path(__file__).parent
    files = ["test_ops_errors.py", "test_ops_registration.py", "test_ops_add_relu.py"]
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"),
            *("-k", "not compiles and not every_length and not gradcheck and not gradients"),
            *(str(here / name) for name in files),
        ],
        env={**os.environ, "RESNET_FUSED_DISABLE_EXT": "1"},
        cwd=here.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout


def test_dtypes_are_those_of_the_check():
    assert rf.check.FLOAT_DTYPES == DTYPES
