"""verify: says yes to what is right, no to every way of being wrong, and touches nothing."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from refused_blocks import randomized
from torch import nn
from torchvision_style import BasicBlock, ResNet

from resnet_fused.fuse import fuse
from resnet_fused.verify import verify

X = torch.randn(4, 3, 33, 35, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return randomized(ResNet(BasicBlock, [1, 1, 1, 1], width=8)).eval()


def test_a_fused_model_is_ok(net):
    result = verify(net, fuse(net), X)
    assert result.ok
    assert result.problems == ()
    (row,) = result.rows
    assert row.name == "output"
    assert row.shape == (4, 10)
    assert row.dtype == torch.float32
    assert 0 < row.error <= row.limit
    assert 0 < row.eager_error < 1e-6
    assert row.limit == max(2 * row.eager_error, 2e-6)
    assert 0 < row.max_difference < 1e-5
    assert row.top1 == 1.0


def test_numbers_are_those_of_the_definition(net):
    """The errors, computed here by hand."""
    fused = fuse(net)
    with torch.no_grad():
        exact = copy.deepcopy(net).double()(X.double())
        eager, ours = net(X), fused(X)
    (row,) = verify(net, fused, X).rows
    assert row.error == pytest.approx(((ours - exact).norm() / exact.norm()).item(), rel=1e-6)
    assert row.eager_error == pytest.approx(
        ((eager - exact).norm() / exact.norm()).item(), rel=1e-6
    )
    assert row.max_difference == pytest.approx((ours - eager).abs().max().item(), rel=1e-6)


def test_prints_as_a_table(net):
    text = str(verify(net, fuse(net), X))
    lines = text.splitlines()
    for heading in ("output", "error", "eager's", "limit", "max difference", "top-1 agreement"):
        assert heading in lines[0]
    assert "output: 4 x 10 float32" in lines[2]
    assert "100.00%" in lines[2]
    assert lines[-2:] == ["state_dict: the same keys and values", "ok"]
    assert repr(verify(net, fuse(net), X)) == text


@pytest.mark.parametrize("training", [True, False])
def test_arguments_stay_untouched(net, training):
    fused = fuse(net).train(training)
    net.train(training)
    x = X.clone()
    before = [
        (m, {k: v.clone() for k, v in m.state_dict().items()}, [s.training for s in m.modules()])
        for m in (net, fused)
    ]
    rng = torch.get_rng_state()
    assert verify(net, fused, x).ok
    assert torch.equal(x, X)
    assert torch.equal(torch.get_rng_state(), rng)
    for m, state, flags in before:
        assert [s.training for s in m.modules()] == flags
        for key, value in m.state_dict().items():
            assert torch.equal(value, state[key]), key
    assert all(s.packed_bytes == 0 for s in _statuses(fused)), "it ran a copy"
    assert torch.is_grad_enabled()


def _statuses(model):
    return [m.status() for m in model.modules() if hasattr(m, "status")]


# ---- wrong models ----------------------------------------------------------------------------


class Wrong(nn.Module):
    """A model whose output is altered; keys and values are those of the model inside."""

    def __init__(self, inner, alter):
        super().__init__()
        self._modules = inner._modules
        self.__dict__["inner"], self.__dict__["alter"] = inner, alter

    def forward(self, x):
        self.__dict__["inner"].eval()
        return self.alter(self.__dict__["inner"](x))


def _lose_one(y):
    y = y.clone()
    y[1, 2] = float("nan")
    return y


@pytest.mark.parametrize(
    "alter",
    [
        lambda y: y * 1.00001,
        lambda y: y + 1e-4,
        lambda y: y.flip(1),
        lambda y: torch.zeros_like(y),
        _lose_one,
        lambda y: torch.full_like(y, float("inf")),
    ],
)
def test_wrong_numbers_are_found(net, alter):
    result = verify(net, Wrong(copy.deepcopy(net), alter), X)
    assert not result.ok
    assert result.problems == ()
    assert not result.rows[0].ok
    assert str(result).splitlines()[-1] == "NOT OK"
    assert "too far" in str(result)


def test_the_wrapper_of_these_tests_is_right_without_an_alteration(net):
    assert verify(net, Wrong(copy.deepcopy(net), lambda y: y), X).ok


def test_top1_disagreement_is_shown(net):
    (row,) = verify(net, Wrong(copy.deepcopy(net), lambda y: -y), X).rows
    assert row.top1 == 0.0


@pytest.mark.parametrize(
    ("alter", "problem"),
    [
        (
            lambda y: y.double(),
            "output: model gives (4, 10) of torch.float32, fused (4, 10) of torch",
        ),
        (lambda y: y[:1], "output: model gives (4, 10) of torch.float32, fused (1, 10) of"),
        (lambda y: (y, y), "outputs: model gives output, fused output[0], output[1]"),
        (lambda y: None, "output: model gives"),
    ],
)
def test_wrong_kinds_of_output_are_found(net, alter, problem):
    result = verify(net, Wrong(copy.deepcopy(net), alter), X)
    assert not result.ok
    assert problem in " ".join(result.problems)
    assert problem in str(result)


def test_other_weights_are_found(net):
    fused = fuse(net)
    with torch.no_grad():
        fused.layer4[0].bn2.num_batches_tracked.add_(1)
    result = verify(net, fused, X)
    assert result.rows[0].ok, "the numbers are the same"
    assert not result.ok
    assert result.problems == ("state_dict: layer4.0.bn2.num_batches_tracked differ",)


def test_other_keys_and_dtypes_are_found(net):
    fused = fuse(net)
    fused.register_buffer("extra", torch.zeros(1))
    fused.bn1.num_batches_tracked = fused.bn1.num_batches_tracked.int()
    problems = verify(net, fused, X).problems
    assert problems == (
        "state_dict: only fused has extra",
        "state_dict: bn1.num_batches_tracked differ",
    )
    lacks = verify(nn.Sequential(nn.Linear(35, 35)), nn.Sequential(nn.Identity()), X)
    assert lacks.problems == ("state_dict: only model has 0.weight, 0.bias",)


def test_stale_weights_are_found(net):
    """The one thing that a user of packed weights must be able to rule out."""
    fused = fuse(net)
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.layer2[0].conv1.weight.mul_(1.001)
    assert not verify(other, fused, X).ok


# ---- every kind of output, input and dtype ---------------------------------------------------


class Pair(NamedTuple):
    logits: torch.Tensor
    mask: torch.Tensor


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = BasicBlock(3, 3)

    def forward(self, a, b=2.0):
        y = self.block(a) * b
        return {"pair": Pair(y.mean((2, 3)), y > 0.5), "y": [y], "name": "done"}


def test_nested_outputs_and_arguments():
    torch.manual_seed(0)
    model = randomized(Nested()).eval()
    for x in ((X, 3.0), {"a": X, "b": 3.0}, [X]):
        result = verify(model, fuse(model), x)
        assert result.ok, str(result)
        assert [row.name for row in result.rows] == [
            "output['pair'].logits",
            "output['pair'].mask",
            "output['y'][0]",
        ]
        assert [row.dtype for row in result.rows] == [torch.float32, torch.bool, torch.float32]
        assert [row.top1 is None for row in result.rows] == [False, True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(net, dtype):
    net = net.to(dtype)
    result = verify(net, fuse(net), X.to(dtype))
    assert result.ok, str(result)
    assert result.rows[0].dtype == dtype
    wrong = Wrong(copy.deepcopy(net), lambda y: y * 1.05)
    assert not verify(net, wrong, X.to(dtype)).ok


def test_autocast(net):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = verify(net, fuse(net), X)
    assert result.ok, str(result)
    assert result.rows[0].dtype == torch.bfloat16
    assert result.rows[0].eager_error > 1e-4, "eager ran in bfloat16, the exact one did not"


def test_what_is_not_finite_in_eager_may_not_become_finite(net):
    x = X.clone()
    x[0, 0, 3, 3] = float("nan")
    assert verify(net, fuse(net), x).ok

    def hide(y):
        return torch.nan_to_num(y)

    assert not verify(net, Wrong(copy.deepcopy(net), hide), x).ok


def test_empty_batch(net):
    assert verify(net, fuse(net), X[:0]).ok


def test_model_may_be_a_fused_one(net):
    """Its plain modules are what counts."""
    fused = fuse(net)
    result = verify(fused, fused, X)
    assert result.ok
    assert result.rows == verify(net, fused, X).rows
    assert not verify(fused, Wrong(copy.deepcopy(net), lambda y: y * 1.01), X).ok


def test_model_that_writes_to_its_input():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = BasicBlock(3, 3)

        def forward(self, x):
            x += 1
            return self.block(x)

    torch.manual_seed(0)
    model = randomized(Writes()).eval()
    x = X.clone()
    assert verify(model, fuse(model), x).ok
    assert torch.equal(x, X)


# ---- wrong arguments -------------------------------------------------------------------------


def test_wrong_arguments(net):
    with pytest.raises(TypeError, match=r"verify: model must be a torch.nn.Module, got int"):
        verify(3, net, X)
    with pytest.raises(TypeError, match=r"verify: fused must be a torch.nn.Module, got Tensor"):
        verify(net, X, X)
    with pytest.raises(TypeError, match=r"verify: x must be a tensor, .*, got NoneType"):
        verify(net, net, None)
    with pytest.raises(ValueError, match=r"verify: model in float64 must run on x, got .*channels"):
        verify(net, fuse(net), torch.randn(2, 5, 8, 8))
    with pytest.raises(ValueError, match=r"verify: fused must run on x, got "):
        verify(net, nn.Linear(3, 3), X)


def test_sums_beyond_float16_before_the_batch_norm():
    """Eager rounds them to +Inf there; ours keeps them in float32, and is right."""
    net = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
    nn.init.constant_(net[0].weight, 30)
    nn.init.constant_(net[1].running_var, 1e4)
    x = torch.full((1, 8, 3, 3), 60.0).half()
    fused = fuse(net.half())
    with torch.no_grad():
        assert net(x).isinf().all()
    assert verify(net, fused, x).ok
    nn.init.constant_(net[1].running_var, 1e-2)  # then float64's are beyond float16, too
    with torch.no_grad():
        assert fuse(net)(x).isinf().all()
    assert verify(net, fuse(net), x).ok
    assert not verify(net, Wrong(copy.deepcopy(net), torch.nan_to_num), x).ok
