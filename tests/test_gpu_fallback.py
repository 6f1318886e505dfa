"""What runs on a GPU beside the convolutions of ours: which kernel, by what is there for a device.

The kernels are stand-ins; test_cuda_pointwise and test_gpu_ops have the real ones.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import Case, exact, normals

from resnet_fused import reference
from resnet_fused.ops import _gpu


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
    }
    stands = {name: stand_in(name, function) for name, function in ops.items()}
    monkeypatch.setattr(_gpu, "_ops", SimpleNamespace(**stands))

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
