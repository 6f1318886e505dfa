"""What runs on a GPU beside the convolutions of ours: which kernel, by what is there for a device.

The kernels are stand-ins; test_cuda_pointwise and test_gpu_ops have the real ones.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import Case, exact, normals

from resnet_fused import reference, select
from resnet_fused._launches import prepare_unit
from resnet_fused.ops import _fallback, _gpu
from resnet_fused.packing import PackedUnit


def conv(x, packed, scale, shift, residual=None, *, kernel_size, **keywords):
    assert packed.shape[2:] == kernel_size
    return reference.conv_bn_act(x, packed, scale, shift, residual, **keywords)


def refusal(x, out_channels, kernel_size, stride, padding):
    """As the kernel's own, csrc/cuda/sm80/stem.cpp, as far as the tests here need it."""
    return "" if out_channels % 8 == 0 and stride[1] * x[1] % 2 == 0 else "a sentence"


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
    }
    stands = {name: stand_in(name, function) for name, function in ops.items()}
    stands["conv_bn_act_pool_refusal"] = refusal  # not counted: it launches nothing
    monkeypatch.setattr(_gpu, "_ops", SimpleNamespace(**stands))
    monkeypatch.setattr(_gpu, "conv_op", lambda plan: stands[f"conv_bn_act_{plan}"])
    monkeypatch.setattr(_fallback, "check_packed", lambda *arguments: None)

    def there(*backends):
        for name in ("cuda", "triton"):
            module = getattr(_gpu, f"_{name}")
            error = None if name in backends else "not there"
            monkeypatch.setattr(module, f"{name}_error", lambda device, error=error: error)
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
    y = _fallback._conv_bn_act_packed(o.x, *o.args()[1:], **unit.keywords)
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
    assert (run is unit) == (called == TWO)
    if called == ONE:
        assert torch.equal(run(o.x, None), y)
        assert calls == [ONE, ONE]


def test_a_stem_without_the_kernels(kernels):
    calls = kernels("triton")
    unit, o = packed_unit(STEM, "cuda", True, torch.bfloat16)
    _fallback._conv_bn_act_packed(o.x, *o.args()[1:], **unit.keywords)
    assert calls == [TWO]
    assert unit.reason.endswith("in a second pass")
