"""Residual blocks that must be left alone, each with the reason that the report has to give.

`CASES` maps a name to (block, part of the reason). Every block takes (N, 8, H, W) in eval mode.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision_style import BasicBlock

CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {}


def case(reason: str) -> Callable:
    """Registers a class or a function that builds a block."""

    def add(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        CASES[build.__name__] = (build, reason)
        return build

    return add


class Plain(nn.Module):
    """conv bn relu conv bn, and a 1x1 convolution with its BN; subclasses say how it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.shortcut = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.relu = nn.ReLU()

    def main(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))


def with_child(name: str, child: nn.Module) -> nn.Module:
    """torchvision's block with one child replaced."""
    block = BasicBlock(8, 8)
    setattr(block, name, child)
    return block


# ---- operations that the fused modules do not compute ----------------------------------------


@case("the activation after the addition is GELU (relu)")
def gelu_module():
    return with_child("relu", nn.GELU())


@case("the activation after the addition is ReLU6 (relu)")
def relu6_module():
    return with_child("relu", nn.ReLU6())


@case("the activation after conv1 is silu")
class SiluFunction(Plain):
    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.silu(self.bn1(self.conv1(x))))) + x)


@case("the activation after the addition is leaky_relu")
class LeakyAfterAddition(Plain):
    def forward(self, x):
        return F.leaky_relu(self.main(x) + x)


@case("unexpected operation mul in se")
class SqueezeExcite(Plain):
    class SE(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return x * torch.sigmoid(self.fc(F.adaptive_avg_pool2d(x, 1)))

    def __init__(self):
        super().__init__()
        self.se = self.SE()

    def forward(self, x):
        return self.relu(self.se(self.main(x)) + x)


@case("unexpected operation MaxPool2d (pool)")
class PoolInMainPath(Plain):
    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(3, 1, 1)

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.pool(self.relu(self.bn1(self.conv1(x)))))) + x)


@case("unexpected operation mul")
class ScaledMainPath(Plain):
    def forward(self, x):
        return self.relu(self.main(x) * 0.1 + x)


@case("unexpected operation mul")
class ScaledShortcut(Plain):
    def forward(self, x):
        return self.relu(self.main(x) + x * 0.5)


@case("unexpected operation clamp")
class ClampForRelu(Plain):
    def forward(self, x):
        return torch.clamp(self.main(x) + x, min=0)


@case("forward uses gain directly")
class LearnedGain(Plain):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x):
        return self.relu(self.main(x) * self.gain + x)


@case("unexpected operation pad")
class PaddedShortcut(Plain):
    """Option A of the ResNet paper, here with a shift so that it is no identity."""

    def forward(self, x):
        return self.relu(self.main(x) + F.pad(x[:, 2:], (0, 0, 0, 0, 0, 2)))


@case("the shortcut is AvgPool2d (pool)")
class PoolShortcut(Plain):
    def __init__(self):
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1)

    def forward(self, x):
        return self.relu(self.main(x) + self.pool(x))


@case("unexpected operation AvgPool2d (pool)")
class PoolBeforeMainPath(Plain):
    def __init__(self):
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1)

    def forward(self, x):
        return self.relu(self.main(self.pool(x)) + x)


@case("unexpected operation MaxPool2d (pool)")
class MaxPoolBeforeShortcut(Plain):
    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(3, 1, 1)

    def forward(self, x):
        return self.relu(self.main(x) + self.shortcut(self.pool(x)))


@case("unexpected operation AvgPool2d (pool)")
class PoolAfterShortcut(Plain):
    def __init__(self):
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1)

    def forward(self, x):
        return self.relu(self.main(x) + self.pool(self.shortcut(x)))


@case("an activation follows shortcut.0 in the shortcut")
class ReluInShortcut(Plain):
    def forward(self, x):
        return self.relu(self.main(x) + F.relu(self.shortcut(x)))


@case("an activation follows conv2 before the addition")
class ReluBeforeAddition(Plain):
    def forward(self, x):
        return F.relu(self.main(x)) + x


@case("the shorter of the two paths has 2 convolutions")
class TwoLongPaths(Plain):
    def __init__(self):
        super().__init__()
        self.other = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))

    def forward(self, x):
        return self.relu(self.main(x) + self.other(x))


@case("the longer of the two paths has 1 convolution")
class OneConvolution(Plain):
    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)) + x)


@case("relu does not follow a convolution")
class PreActivation(Plain):
    def forward(self, x):
        y = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(y))) + x


@case("unexpected operation relu")
class ReluBeforeNorm(Plain):
    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.bn1(F.relu(self.conv1(x))))) + x)


@case("unexpected operation addition")
class TwoAdditions(Plain):
    def forward(self, x):
        return self.relu(self.main(x) + x + self.shortcut(x))


@case("the addition has alpha=2")
class AlphaTwo(Plain):
    def forward(self, x):
        return self.relu(torch.add(self.main(x), x, alpha=2))


@case("the addition has unexpected arguments")
class AddInto(Plain):
    def forward(self, x):
        y = self.main(x)
        return self.relu(torch.add(y, x, out=y))


@case("an addition adds a constant")
class AddsConstant(Plain):
    def forward(self, x):
        return self.relu((self.main(x) + x) + 1.0)


@case("unexpected operation detach")
class DetachedShortcut(Plain):
    def forward(self, x):
        return self.relu(self.main(x) + x.detach())


@case("unexpected operation to")
class CastInside(Plain):
    def forward(self, x):
        return self.relu(self.main(x).to(torch.float32) + x)


@case("a tuple")
class ReturnsTuple(Plain):
    def forward(self, x):
        y = self.main(x) + x
        return F.relu(y), 3


# ---- uses of values that a fused op would not show -------------------------------------------


@case("forward changes its input in place")
class AddsOntoInput(Plain):
    def forward(self, x):
        y = self.main(x)
        x += y
        return F.relu(x)


@case("forward changes its input in place")
class AddMethodOntoInput(Plain):
    def forward(self, x):
        return F.relu(x.add_(self.main(x)))


@case("forward changes its input in place")
class ReluOntoInput(Plain):
    def __init__(self):
        super().__init__()
        self.first = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.main(self.first(x)) + x)


@case("forward changes its input in place")
class AddsOntoAliasOfInput(Plain):
    def __init__(self):
        super().__init__()
        self.same = nn.Identity()

    def forward(self, x):
        y = self.same(x)
        y += self.main(x)
        return F.relu(y)


@case("the result of BatchNorm2d (bn1) is used 2 times")
class ShortcutFromTheMiddle(Plain):
    def forward(self, x):
        y = self.bn1(self.conv1(x))
        return self.relu(self.bn2(self.conv2(y)) + y)


@case("the shorter of the two paths has 2 convolutions")
class InPlaceSeenThroughAnotherName(Plain):
    def forward(self, x):
        y = self.bn1(self.conv1(x))
        z = F.relu(y, inplace=True)
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(z))


@case("conv1 is called 2 times")
class ConvCalledTwice(Plain):
    def forward(self, x):
        return self.relu(self.bn2(self.conv1(F.relu(self.bn1(self.conv1(x))))) + x)


@case("bn1 is called 2 times")
class NormCalledTwice(Plain):
    def forward(self, x):
        return self.relu(self.bn1(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


@case("unexpected operation sub_")
class DroppedInPlace(Plain):
    """The in-place operation's result is dropped, its effect is not."""

    def forward(self, x):
        y = self.conv1(x)
        y.sub_(0.5)
        return self.relu(self.bn2(self.conv2(F.relu(self.bn1(y)))) + x)


@case("unexpected operation relu")
class DeadRelu(Plain):
    def forward(self, x):
        y = self.main(x)
        F.relu(y)
        return y + x


@case("unexpected operation")
class DeadAssertion(Plain):
    def forward(self, x):
        torch._assert(x.sum() == x.sum(), "never")
        return self.relu(self.main(x) + x)


@case("forward sets the attribute data of a tensor")
class WritesData(Plain):
    def forward(self, x):
        y = self.main(x)
        y.data = y.data * 2
        return self.relu(y + x)


@case("forward changes the attribute seen")
class KeepsFeatures(Plain):
    def __init__(self):
        super().__init__()
        self.seen = None

    def forward(self, x):
        self.seen = self.main(x)
        return self.relu(self.seen + x)


@case("forward changes the attribute calls")
class CountsCalls(Plain):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.relu(self.main(x) + x)


@case("forward changes the attribute log")
class AppendsToList(Plain):
    def __init__(self):
        super().__init__()
        self.log = {"deep": []}

    def forward(self, x):
        self.log["deep"].append("called")
        return self.relu(self.main(x) + x)


# ---- control flow ----------------------------------------------------------------------------


@case("forward branches on the values or the shape of a tensor")
class BranchOnValues(Plain):
    def forward(self, x):
        y = self.main(x)
        return self.relu(y + x) if x.mean() > 0 else y + x


@case("forward branches on the values or the shape of a tensor")
class BranchOnShape(Plain):
    def forward(self, x):
        if x.shape[-1] > 100:
            return x
        return self.relu(self.main(x) + x)


@case("forward branches on the values or the shape of a tensor")
class BranchOnBuffer(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("on", torch.tensor(1.0))

    def forward(self, x):
        return self.relu(self.main(x) + x) if self.on > 0 else x


@case("forward computes")
class BranchOnStoredTensor(Plain):
    def __init__(self):
        super().__init__()
        self.on = torch.tensor(1.0)

    def forward(self, x):
        return self.relu(self.main(x) + x) if bool(self.on > 0) else x


@case("forward computes rand apart from its input")
class StochasticDepthByTorch(Plain):
    def forward(self, x):
        if self.training and torch.rand(()) < 1e-9:
            return x
        return self.relu(self.main(x) + x)


@case("forward draws random numbers")
class StochasticDepthByPython(Plain):
    def forward(self, x):
        if self.training and random.random() < 1e-9:
            return x
        return self.relu(self.main(x) + x)


@case("forward differs between train() and eval()")
class DropPath(Plain):
    def forward(self, x):
        y = self.main(x)
        if self.training:
            y = y * torch.empty_like(y).bernoulli_(0.9)
        return self.relu(y + x)


@case("forward differs between train() and eval()")
class DropoutFunction(Plain):
    def forward(self, x):
        return self.relu(F.dropout(self.main(x), 0.1, self.training) + x)


@case("Dropout2d (drop) is in use (p=0.1)")
class DropoutModule(Plain):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout2d(0.1)

    def forward(self, x):
        return self.relu(self.drop(self.main(x)) + x)


@case("forward depends on whether gradients are on")
class DependsOnGradients(Plain):
    def forward(self, x):
        y = self.main(x) + x
        return self.relu(y) if torch.is_grad_enabled() else F.relu(y).clone()


@case("forward changes the gradient or autocast mode")
class NoGradInside(Plain):
    def forward(self, x):
        with torch.no_grad():
            y = self.conv1(x)
        return self.relu(self.bn2(self.conv2(F.relu(self.bn1(y)))) + x)


@case("forward changes the gradient or autocast mode")
class AutocastOffInside(Plain):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.conv1(x)
        return self.relu(self.bn2(self.conv2(F.relu(self.bn1(y)))) + x)


@case("forward does something else with tensors than what its trace shows")
class BranchOnType(Plain):
    def forward(self, x):
        y = self.main(x)
        if type(x) is Tensor:
            y = torch.neg(y)
        return self.relu(y + x)


@case("forward does something else with tensors than what its trace shows")
class SwappedByType(Plain):
    """The same operations in another order: only their wiring tells."""

    def forward(self, x):
        if type(x) is Tensor:
            return self.relu(self.bn1(self.conv1(F.relu(self.bn2(self.conv2(x))))) + x)
        return self.relu(self.main(x) + x)


@case("forward does something else with tensors than what its trace shows")
class WritesByType(Plain):
    """Leaves the result alone, but not the caller's input."""

    def forward(self, x):
        y = self.relu(self.main(x) + x)
        if type(x) is Tensor:
            x.mul_(2)
        return y


@case("forward asks for the shape of a tensor, and may branch on it")
class BranchOnShapeByType(Plain):
    def forward(self, x):
        y = self.main(x)
        if type(x) is Tensor and x.shape[-1] < 30:
            y = torch.neg(y)
        return self.relu(y + x)


@case("forward asks for the numel of a tensor, and may branch on it")
class BranchOnSizeByType(Plain):
    def forward(self, x):
        y = self.main(x)
        if type(x) is Tensor and torch.numel(x) < 1000:
            y = torch.neg(y)
        return self.relu(y + x)


@case("forward asks for the requires_grad of a tensor, and may branch on it")
class BranchOnGradientByType(Plain):
    def forward(self, x):
        y = self.main(x)
        if type(x) is Tensor and x.requires_grad:
            y = torch.neg(y)
        return self.relu(y + x)


@case("forward branches on the values or the shape of a tensor")
class BranchOnShapeOfTensor(Plain):
    """For a traced value that is no tensor, the shape would never be asked for."""

    def forward(self, x):
        y = self.main(x)
        if isinstance(x, Tensor) and x.shape[-1] > 30:
            y = torch.neg(y)
        return self.relu(y + x)


def _is_matched(x):
    match x:
        case Tensor():
            return True
    return False


def _branches_where(name, asks):
    class Asks(Plain):
        def forward(self, x):
            y = self.main(x)
            if asks(x) and x.shape[-1] > 30:
                y = torch.neg(y)
            return self.relu(y + x)

    Asks.__name__ = name
    return Asks


for _name, _asks in {
    "IsTensor": torch.is_tensor,
    "IsMatched": _is_matched,
    "IsOfClass": lambda x: x.__class__ is Tensor,
    "IsOneOf": lambda x: isinstance(x, (int, Tensor)),
    "IsOfUnion": lambda x: isinstance(x, int | Tensor),
}.items():
    case("forward branches on the values or the shape of a tensor")(_branches_where(_name, _asks))


@case("forward uses the argument extra")
class SecondArgument(Plain):
    def forward(self, x, extra=None):
        return self.relu(self.main(x) + (x if extra is None else extra))


@case("unexpected operation")
class StarArguments(Plain):
    def forward(self, *xs):
        return self.relu(self.main(xs[0]) + xs[0])


@case("cannot be traced")
class Raises(Plain):
    def forward(self, x):
        y = self.main(x) + x
        return self.relu(y) if float(x.sum()) else y


@case("a ReLU that is not one of its submodules")
class ModuleMadeInForward(Plain):
    def forward(self, x):
        return nn.ReLU()(self.main(x) + x)


# ---- layers of another kind ------------------------------------------------------------------


class MyConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


CASES |= {
    "conv_subclass": (
        lambda: with_child("conv1", MyConv(8, 8, 3, padding=1)),
        "conv1 is a MyConv, not a plain Conv2d",
    ),
    "conv3d_like": (
        lambda: with_child("conv1", nn.ConvTranspose2d(8, 8, 3, padding=1)),
        "conv1 is a ConvTranspose2d, not a plain Conv2d",
    ),
    "reflect_padding": (
        lambda: with_child("conv1", nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")),
        "conv1 pads with 'reflect'",
    ),
    "uneven_same_padding": (
        lambda: with_child("conv1", nn.Conv2d(8, 8, 4, padding="same")),
        "conv1 pads one side more than the other",
    ),
    "group_norm": (
        lambda: with_child("bn1", nn.GroupNorm(2, 8)),
        "the norm after conv1 is GroupNorm",
    ),
    "instance_norm": (
        lambda: with_child("bn2", nn.InstanceNorm2d(8)),
        "the norm after conv2 is InstanceNorm2d",
    ),
    "sync_batch_norm": (
        lambda: with_child("bn1", nn.SyncBatchNorm(8)),
        "the norm after conv1 is SyncBatchNorm",
    ),
    "no_running_stats": (
        lambda: with_child("bn1", nn.BatchNorm2d(8, track_running_stats=False)),
        "bn1 keeps no running statistics",
    ),
    "lazy_conv": (
        lambda: with_child("conv1", nn.LazyConv2d(8, 3, padding=1)),
        "conv1 is a LazyConv2d that has not seen its shapes yet",
    ),
    "lazy_batch_norm": (
        lambda: with_child("bn2", nn.LazyBatchNorm2d()),
        "bn2 is a LazyBatchNorm2d that has not seen its shapes yet",
    ),
}


@case("conv1.weight has shape (8, 8, 1, 1) where conv1 says (8, 8, 3, 3)")
def replaced_weight():
    block = BasicBlock(8, 8)
    block.conv1.weight = nn.Parameter(torch.randn(8, 8, 1, 1))
    block.conv1.padding = (0, 0)
    return block


@case("the shortcut gives 1 channels, the main path 8")
class BroadcastShortcut(Plain):
    def __init__(self):
        super().__init__()
        self.shortcut = nn.Conv2d(8, 1, 1)

    def forward(self, x):
        return self.relu(self.main(x) + self.shortcut(x))


@case("adds (8, 1024, 1) to (8, 1024, 1024), which broadcasts or fails")
class BroadcastPlane(Plain):
    """A shortcut as large as a column: eager broadcasts it."""

    def __init__(self):
        super().__init__()
        self.shortcut = nn.Conv2d(8, 8, 1, stride=(1, 1024))

    def forward(self, x):
        return self.relu(self.main(x) + self.shortcut(x))


# ---- modules that were altered ---------------------------------------------------------------


def altered(alter: Callable[[BasicBlock], object]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        block = BasicBlock(8, 8)
        alter(block)
        return block

    return build


def _double_output(module, args, output):
    return output * 2


def _double_input(module, args):
    return tuple(a * 2 for a in args)


def _patch_forward(block):
    forward = block.forward
    block.forward = lambda x: forward(x) * 2


def _patch_conv(block):
    forward = block.conv1._conv_forward
    block.conv1._conv_forward = lambda x, weight, bias: forward(x, weight, bias) * 2


CASES |= {
    "forward_hook": (
        altered(lambda b: b.bn1.register_forward_hook(_double_output)),
        "bn1 has a forward hook",
    ),
    "forward_hook_on_block": (
        altered(lambda b: b.register_forward_hook(_double_output)),
        "the block has a forward hook",
    ),
    "forward_pre_hook": (
        altered(lambda b: b.conv2.register_forward_pre_hook(_double_input)),
        "conv2 has a forward pre-hook",
    ),
    "forward_hook_with_kwargs": (
        altered(lambda b: b.register_forward_hook(lambda m, a, k, out: out * 2, with_kwargs=True)),
        "the block has a forward hook",
    ),
    "backward_hook": (
        altered(lambda b: b.conv1.register_full_backward_hook(lambda m, i, o: None)),
        "conv1 has a backward hook",
    ),
    "backward_pre_hook": (
        altered(lambda b: b.relu.register_full_backward_pre_hook(lambda m, o: None)),
        "relu has a backward pre-hook",
    ),
    "parametrized": (
        altered(lambda b: parametrizations.weight_norm(b.conv1)),
        "conv1 is parametrized",
    ),
    "pruned": (
        altered(lambda b: prune.l1_unstructured(b.conv1, "weight", 0.5)),
        "conv1 has a forward pre-hook",
    ),
    "patched_forward": (altered(_patch_forward), "the block has forward replaced on the instance"),
    "patched_conv_forward": (
        altered(_patch_conv),
        "conv1 has _conv_forward replaced on the instance",
    ),
}


@case("its class overrides __call__")
class OwnCall(BasicBlock):
    def __init__(self):
        super().__init__(8, 8)

    def __call__(self, x):
        return super().__call__(x) * 2


@case("its class overrides state_dict")
class OwnStateDict(BasicBlock):
    def __init__(self):
        super().__init__(8, 8)

    def state_dict(self, *args, **kwargs):
        return {f"my_{key}": value for key, value in super().state_dict(*args, **kwargs).items()}


@case("its class overrides train")
class OwnTrain(BasicBlock):
    def __init__(self):
        super().__init__(8, 8)

    def train(self, mode=True):
        return super().train(False)


@case("cannot be copied for tracing")
class Uncopyable(Plain):
    def __init__(self):
        super().__init__()
        self.generator = (i for i in range(3))

    def forward(self, x):
        return self.relu(self.main(x) + x)


@case("mixes bfloat16, float32")
def mixed_dtypes():
    block = BasicBlock(8, 8)
    block.conv2.bfloat16()
    return block


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random batch-norm statistics and affine values, so that nothing is accidentally 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and isinstance(
                m.running_mean, Tensor
            ):
                if isinstance(m, nn.modules.lazy.LazyModuleMixin):
                    continue
                m.running_mean.normal_(0, 0.3, generator=generator)
                m.running_var.uniform_(0.5, 1.5, generator=generator)
                if m.weight is not None:
                    m.weight.uniform_(-1.5, 1.5, generator=generator)
                    m.bias.normal_(0, 0.3, generator=generator)
    return module
