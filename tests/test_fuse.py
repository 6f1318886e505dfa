"""fuse, unfuse, refresh: what is swapped, what stays, and that nobody notices but by the clock."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refused_blocks import CASES, Plain, randomized
from torch import nn
from torchvision_style import BasicBlock, Bottleneck, ResNet

from resnet_fused import ops, reference, select
from resnet_fused._fused import FusedModule
from resnet_fused._wrapper import Wrapper
from resnet_fused.conv_bn import FusedConvBN
from resnet_fused.fuse import fuse, refresh, unfuse
from resnet_fused.report import report
from resnet_fused.residual import FusedBottleneck, FusedResidual
from resnet_fused.slots import ConvSlot

# ---- models ----------------------------------------------------------------------------------


def seeded(build, seed=0):
    torch.manual_seed(seed)
    return randomized(build()).eval()


def lesson_net():
    """The lesson's ResNet in small."""
    stem = nn.Sequential(
        nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    )
    stages = [
        nn.Sequential(reference.Residual(8, 8), reference.Residual(8, 8)),
        nn.Sequential(reference.Residual(8, 16, True, 2), reference.Residual(16, 16)),
    ]
    return nn.Sequential(stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def lesson_bottlenecks():
    blocks = [reference.Bottleneck(3, 4, True), reference.Bottleneck(16, 4)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


MODELS = {
    # model: (builder, names of what must be fused, fused modules of each kind)
    "lesson": (lesson_net, ["0.0", "1.0", "1.1", "2.0", "2.1"], {"conv_bn": 1, "basic": 4}),
    "lesson_bottleneck": (lesson_bottlenecks, ["0", "1"], {"bottleneck": 2}),
    "basic": (
        lambda: ResNet(BasicBlock, [2, 1, 1, 1], width=8),
        ["conv1", "layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0"],
        {"conv_bn": 1, "basic": 5},
    ),
    "bottleneck": (
        lambda: ResNet(Bottleneck, [1, 1, 1, 1], width=8),
        ["conv1", "layer1.0", "layer2.0", "layer3.0", "layer4.0"],
        {"conv_bn": 1, "bottleneck": 4},
    ),
}
X = torch.randn(2, 3, 33, 35, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=MODELS)
def model(request):
    return seeded(MODELS[request.param][0])


def fused_modules(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, FusedModule)}


def classes(model):
    return {name: type(m) for name, m in model.named_modules()}


@torch.no_grad()
def assert_as_exact(fused, plain, x):
    """Within the promised bound of float64: twice eager's own error, or 2e-6."""
    exact = copy.deepcopy(plain).double()(x.double())
    eager = plain(x)
    ours = fused(x)
    assert ours.shape == eager.shape
    assert ours.isfinite().all()
    bound = max(2 * (eager - exact).norm().item(), 2e-6 * exact.norm().item())
    assert (ours - exact).norm().item() <= bound
    assert exact.norm() > 0.01


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


# ---- what is swapped -------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_fuses_every_block_and_the_stem(name):
    build, names, kinds = MODELS[name]
    plain = seeded(build)
    fused = fuse(plain)
    found = fused_modules(fused)
    assert list(found) == names
    assert {k: sum(m.kind == k for m in found.values()) for k in kinds} == kinds
    assert all(m.status().fused for m in found.values())
    assert_as_exact(fused, plain, X)
    assert all(m.status().packed_bytes > 0 for m in found.values()), "they all ran fused"


def test_original_is_untouched(model):
    before, state = classes(model), copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(X)
        fused = fuse(model)
        for p in fused.parameters():
            p.add_(1)
        assert classes(model) == before
        assert torch.equal(model(X), expected)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_inplace_keeps_the_model_and_its_parameters(model):
    parameters = dict(model.named_parameters())
    fused = fuse(model, inplace=True)
    assert fused is model
    assert fused_modules(model)
    for name, p in fused.named_parameters():
        assert p is parameters[name]


def test_state_dict_goes_both_ways(model):
    fused = fuse(model)
    assert_same_state(fused, model)
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in fused.named_buffers()] == [n for n, _ in model.named_buffers()]
    torch.manual_seed(5)
    other = randomized(copy.deepcopy(model), seed=9)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn_like(p) * 0.02)
        fused(X)  # packs the old weights
    fused.load_state_dict(other.state_dict())
    assert_same_state(fused, other)
    assert_as_exact(fused, other, X)
    assert list(model.load_state_dict(fused.state_dict())) == [[], []]
    assert_as_exact(fused, model, X)


def test_checkpoints_from_before_batches_were_counted(model):
    """Eager fills in num_batches_tracked where an old checkpoint lacks it; so must we."""
    old = {k: v for k, v in model.state_dict().items() if "num_batches_tracked" not in k}
    assert list(copy.deepcopy(model).load_state_dict(dict(old))) == [[], []]
    assert list(fuse(model).load_state_dict(dict(old))) == [[], []]


def test_state_dict_metadata(model):
    """Versions decide how a checkpoint is read."""
    ours, theirs = (m.state_dict()._metadata for m in (fuse(model), model))
    assert ours == theirs


def test_names_of_modules_stay(model):
    assert [n for n, _ in fuse(model).named_modules()] == [n for n, _ in model.named_modules()]


def test_fusing_twice_changes_nothing(model):
    fused = fuse(model)
    found = fused_modules(fused)
    again = fuse(fused, inplace=True)
    assert again is fused
    assert fused_modules(again) == found
    assert classes(fuse(fused)) == classes(fused)
    assert_as_exact(fuse(fused), model, X)


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (lambda: reference.Residual(3, 8, True, 2), FusedResidual),
        (lambda: Bottleneck(3, 2, downsample=nn.Conv2d(3, 8, 1)), FusedBottleneck),
    ],
)
@pytest.mark.parametrize("inplace", [True, False])
def test_a_model_that_is_one_block(build, kind, inplace):
    block = seeded(build)
    plain = copy.deepcopy(block)
    fused = fuse(block, inplace=inplace)
    assert type(fused) is kind
    assert_as_exact(fused, plain, X)
    assert type(unfuse(fused, inplace=inplace)) is type(plain)


def test_attributes_of_blocks_stay_readable():
    fused = fuse(ResNet(BasicBlock, [1, 1, 1, 1], width=8))
    assert fused.layer2[0].stride == 2
    assert fused.layer2[0].expansion == 1
    assert fused.layer2[0].downsample[0].out_channels == 16
    assert fused.conv1.out_channels == 8
    assert fused.conv1.weight.shape == (8, 3, 7, 7)
    assert fused.bn1.running_mean.shape == (8,)


# ---- what stays ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_refused_blocks_compute_what_they_did(name):
    build, reason = CASES[name]

    def net():
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(3, 8, 1), randomized(build()), nn.Identity()).eval()

    plain, fused = net(), fuse(net(), inplace=True)
    assert type(fused[1]) is type(plain[1])
    assert not any(isinstance(m, Wrapper) for m in fused.modules()), "its insides stay too"
    rows = [row for row in report(fused) if row.name == "1"]
    assert len(rows) == 1
    assert not rows[0].fused
    assert rows[0].backend == "eager"
    assert reason in rows[0].reason
    outputs = []
    for m in (plain, fused):
        torch.manual_seed(4)
        with torch.no_grad():
            try:
                outputs.append(m(X))
            except Exception as error:
                outputs.append(str(error))
    assert _equal(*outputs)


def _equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_refused_block_beside_fused_ones():
    plain = seeded(lambda: ResNet(BasicBlock, [2, 1, 1, 1], width=8))
    plain.layer1[1].relu = nn.GELU()
    fused = fuse(plain)
    assert "layer1.0" in fused_modules(fused)
    assert "layer1.1" not in fused_modules(fused)
    assert type(fused.layer1[1]) is BasicBlock
    assert_as_exact(fused, plain, X)


def test_residual_of_residuals():
    """An addition around blocks (EDSR): the inner blocks are fused, the outer one is no block."""

    class Group(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8), nn.Conv2d(8, 8, 3, 1, 1))

        def forward(self, x):
            return x + self.body(x)

    plain = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), Group()))
    fused = fuse(plain)
    assert list(fused_modules(fused)) == ["1.body.0", "1.body.1"]
    assert len(report(fused)) == 2
    assert_as_exact(fused, plain, X)


def test_block_registered_twice_is_left_alone():
    block = BasicBlock(8, 8)
    plain = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), block, nn.Sequential(block)))
    fused = fuse(plain)
    assert not fused_modules(fused)
    assert fused[1] is fused[2][0]
    assert [r.reason for r in report(fused)] == ["it is shared: also registered as 2.0"]
    with torch.no_grad():
        assert torch.equal(fused(X), plain(X))


def test_layers_shared_between_blocks_are_left_alone():
    first, second, third = (BasicBlock(8, 8) for _ in range(3))
    second.conv2 = first.conv2
    plain = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), first, second, third))
    fused = fuse(plain)
    assert list(fused_modules(fused)) == ["3"]
    reasons = {r.name: r.reason for r in report(fused) if not r.fused}
    assert reasons == {
        "1": "conv2 is shared: also registered as 2.conv2",
        "2": "conv2 is shared: also registered as 1.conv2",
    }
    with torch.no_grad():
        assert_as_exact(fused, plain, X)


def test_stateless_layers_may_be_shared():
    relu = nn.ReLU(inplace=True)
    blocks = [BasicBlock(8, 8) for _ in range(2)]
    for block in blocks:
        block.relu = relu
    plain = seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), *blocks, relu))
    fused = fuse(plain)
    assert list(fused_modules(fused)) == ["1", "2"]
    assert_as_exact(fused, plain, X)


def test_norm_shared_with_a_site_is_left_alone():
    bn = nn.BatchNorm2d(8)
    plain = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1), bn, nn.Sequential(nn.Conv2d(8, 8, 1), bn))
    )
    fused = fuse(plain)
    assert not fused_modules(fused)
    assert {r.reason for r in report(fused)} == {
        "1 is shared: also registered as 2.1",
    }
    with torch.no_grad():
        assert torch.equal(fused(X), plain(X))


# ---- sites that somebody else calls into -----------------------------------------------------


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        )


class AsAWhole(Features):
    def forward(self, x):
        return self.features(x).flatten(1)


class TapsByIndex(Features):
    """Perceptual losses read layers in the middle of a Sequential."""

    def forward(self, x):
        taps = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in (0, 4):
                taps.append(x)
        return taps


class UntraceableRoot(Features):
    def __init__(self):
        super().__init__()
        self.block = BasicBlock(8, 8)

    def forward(self, x):
        if x.shape[-1] < 8:
            raise ValueError("too small")
        return self.block(self.features(x))


def test_sequential_called_as_a_whole_is_fused():
    plain = seeded(AsAWhole)
    fused = fuse(plain)
    assert list(fused_modules(fused)) == ["features.0", "features.3"]
    assert_as_exact(fused, plain, X)


def test_sequential_that_is_read_in_the_middle_is_left_alone():
    plain = seeded(TapsByIndex)
    fused = fuse(plain)
    assert not fused_modules(fused)
    with torch.no_grad():
        for a, b in zip(fused(X), plain(X), strict=True):
            assert torch.equal(a, b)
    assert {r.reason for r in report(fused)} == {
        "TapsByIndex calls features.0 apart from the rest of features"
    }


def test_sites_below_an_untraceable_module_are_left_alone_but_blocks_are_not():
    plain = seeded(UntraceableRoot)
    fused = fuse(plain)
    assert list(fused_modules(fused)) == ["block"]
    reasons = {r.name: r.reason for r in report(fused) if not r.fused}
    assert reasons.keys() == {"features.0", "features.3"}
    for reason in reasons.values():
        assert "UntraceableRoot may call it apart from the rest of features" in reason
        assert "branches on the values or the shape" in reason
    assert_as_exact(fused, plain, X)


# ---- strict, arguments -----------------------------------------------------------------------


def test_strict_names_the_reasons():
    net = nn.Sequential(CASES["gelu_module"][0](), CASES["AlphaTwo"][0]())
    assert not fused_modules(fuse(net))
    with pytest.raises(
        ValueError, match="fuse: nothing could be fused in Sequential: 0: "
    ) as error:
        fuse(net, strict=True)
    assert "0: the activation after the addition is GELU (relu)" in str(error.value)
    assert "1: the addition has alpha=2" in str(error.value)
    with pytest.raises(ValueError, match="it has no residual block and no conv-BN sequence"):
        fuse(nn.Linear(2, 2), strict=True)


def test_strict_passes_where_something_is_fused(model):
    assert fused_modules(fuse(fuse(model, strict=True), strict=True))


def test_strict_leaves_the_model_alone_when_it_raises():
    net = nn.Sequential(CASES["gelu_module"][0]())
    before = classes(net)
    with pytest.raises(ValueError, match="nothing could be fused"):
        fuse(net, strict=True, inplace=True)
    assert classes(net) == before


@pytest.mark.parametrize("op", [fuse, unfuse, refresh])
@pytest.mark.parametrize(
    ("value", "got"), [(3, "int"), (None, "NoneType"), (nn.ReLU, "the class ReLU"), ({}, "dict")]
)
def test_wrong_arguments(op, value, got):
    name = "model" if op is fuse else "fused"
    with pytest.raises(TypeError) as error:
        op(value)
    assert str(error.value) == f"{op.__name__}: {name} must be a torch.nn.Module, got {got}"


def test_wrong_output_format():
    with pytest.raises(ValueError, match=r"fuse: output_format must be .* got \"nhwc\""):
        fuse(nn.ReLU(), output_format="nhwc")


def test_model_that_cannot_be_copied():
    net = nn.Sequential(CASES["Uncopyable"][0](), BasicBlock(8, 8))
    with pytest.raises(
        ValueError, match="fuse: model must be deep-copyable or be given with inplace"
    ):
        fuse(net)
    assert list(fused_modules(fuse(net, inplace=True))) == ["1"]


# ---- unfuse, refresh -------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [True, False])
def test_unfuse_is_the_exact_inverse(model, inplace):
    fused = fuse(model)
    with torch.no_grad():
        expected = model(X)
        fused(X)
    plain = unfuse(fused, inplace=inplace)
    assert classes(plain) == classes(model)
    assert_same_state(plain, model)
    with torch.no_grad():
        assert torch.equal(plain(X), expected)
    if inplace:
        assert plain is fused
    else:
        assert fused_modules(fused), "the fused one stays fused"
    assert_as_exact(fuse(plain), model, X)


def test_unfuse_inplace_gives_back_the_very_modules():
    net = ResNet(BasicBlock, [1, 1, 1, 1], width=8)
    modules, parameters = dict(net.named_modules()), dict(net.named_parameters())
    unfuse(fuse(net, inplace=True), inplace=True)
    assert dict(net.named_modules()) == modules
    assert all(p is parameters[n] for n, p in net.named_parameters())


@pytest.mark.parametrize("training", [True, False])
def test_unfuse_keeps_training_flags(model, training):
    fused = fuse(model)
    fused.train(training)
    for m in list(fused.modules())[::3]:
        m.training = not training
    flags = {name: m.training for name, m in fused.named_modules()}
    assert len(set(flags.values())) == 2
    assert {name: m.training for name, m in unfuse(fused).named_modules()} == flags


def test_fuse_keeps_training_flags(model):
    for m in list(model.modules())[::3]:
        m.training = True
    flags = {name: m.training for name, m in model.named_modules()}
    assert {name: m.training for name, m in fuse(model).named_modules()} == flags


def test_unfuse_of_modules_that_were_built_fused():
    torch.manual_seed(0)
    net = nn.Sequential(
        FusedConvBN(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), "none"),
        FusedResidual(8, 8),
        FusedBottleneck(8, 4, True, 2),
    )
    randomized(net).eval()
    plain = unfuse(net)
    assert not any(isinstance(m, Wrapper) for m in plain.modules())
    assert type(plain[1]) is reference.Residual
    assert type(plain[2]) is reference.Bottleneck
    assert_same_state(plain, net)
    assert_as_exact(net, plain, X)


def test_hooks_registered_since_fusing_move_along():
    net = fuse(seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), BasicBlock(8, 8))))
    net[1].register_forward_hook(lambda m, args, out: out * 2)
    net[1].register_forward_pre_hook(lambda m, args, kw: ((args[0] + 1,), kw), with_kwargs=True)
    with torch.no_grad():
        hooked = net(X)
        plain = unfuse(net)
        torch.testing.assert_close(plain(X), hooked)
        plain[1]._forward_hooks.clear()
        torch.testing.assert_close(plain(X) * 2, hooked)


def test_refresh_drops_every_packed_weight(model):
    fused = fuse(model)
    with torch.no_grad():
        before = fused(X)
        assert sum(m.status().packed_bytes for m in fused_modules(fused).values()) > 0
        assert refresh(fused) is None
        assert sum(m.status().packed_bytes for m in fused_modules(fused).values()) == 0
        assert torch.equal(fused(X), before)


# ---- a fused model is a model ----------------------------------------------------------------


def test_deepcopy_and_pickle(model):
    fused = fuse(model)
    with torch.no_grad():
        expected = fused(X)
    copied = copy.deepcopy(fused)
    stored = io.BytesIO()
    if all(type(m).__qualname__.count("<locals>") == 0 for m in model.modules()):
        pickle.dump(fused, stored)
        stored.seek(0)
        loaded = pickle.load(stored)
        copies = [copied, loaded]
    for other in copies:
        assert classes(other) == classes(fused)
        with torch.no_grad():
            assert torch.equal(other(X), expected)
            for p in other.parameters():
                p.mul_(0.5)
            assert not torch.equal(other(X), expected), "its own weights, packed anew"
            assert torch.equal(fused(X), expected)
        assert classes(unfuse(other)) == classes(model)


def test_training_is_eager_training(model):
    plain, fused = copy.deepcopy(model).train(), fuse(model).train()
    for _ in range(2):
        outs = [m(X) for m in (plain, fused)]
        assert torch.equal(*outs)
        for m, out in zip((plain, fused), outs, strict=True):
            m.zero_grad()
            out.square().sum().backward()
            torch.optim.SGD(m.parameters(), 1e-3, momentum=0.9).step()
        for a, b in zip(plain.parameters(), fused.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
    assert_same_state(fused, plain)  # running statistics and the batch counter among it
    assert_as_exact(fused.eval(), plain.eval(), X)


def test_gradients_in_eval_mode(model):
    plain, fused = copy.deepcopy(model).double(), fuse(model).double()
    grads = []
    for m in (plain, fused):
        x = X.double().requires_grad_()
        m(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in m.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("act", [F.relu_, lambda y: y.add_(1), lambda y: y.mul_(2)])
def test_writing_to_the_output_of_a_linear_site_in_eval_mode(act):
    """conv-BN without a ReLU hands on a tensor that eager allows to overwrite, gradients or not."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, x):
            return act(self.bn(self.conv(x)))

    plain = seeded(Net).double()
    fused = fuse(plain)
    assert list(fused_modules(fused)) == ["conv"]
    grads = []
    for m in (plain, fused):
        x = X.double().requires_grad_()
        m(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_after_fusing(model, dtype):
    fused = fuse(model)
    with torch.no_grad():
        fused(X)
        half = copy.deepcopy(model).to(dtype)
        ours, eager = fused.to(dtype)(X.to(dtype)), half(X.to(dtype))
        exact = half.double()(X.to(dtype).double())
    assert ours.dtype == dtype
    assert (ours - exact).norm() <= max(2 * (eager - exact).norm(), 1e-3 * exact.norm())


class Arguments(nn.Module):
    """Calls a block as any caller may: the lesson's parameter is an upper-case X."""

    def __init__(self):
        super().__init__()
        self.conv, self.block = nn.Conv2d(3, 8, 1), reference.Residual(8, 8)

    def forward(self, x):
        return self.block(X=self.conv(x))


def test_block_called_by_keyword():
    plain = seeded(Arguments)
    fused = fuse(plain)
    assert list(fused_modules(fused)) == ["block"]
    assert_as_exact(fused, plain, X)


class ExtraArgument(Plain):
    def forward(self, x, unused=None):
        return self.relu(self.main(x) + x)


class PassesExtra(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.block = nn.Conv2d(3, 8, 1), ExtraArgument()

    def forward(self, x):
        return self.block(self.conv(x), 3)


def test_block_called_with_an_argument_that_it_does_not_use():
    plain = seeded(PassesExtra)
    fused = fuse(plain)
    assert list(fused_modules(fused)) == ["block"]
    assert_as_exact(fused, plain, X)


class Uneven(nn.Module):
    """A pool that rounds down on the shortcut: for 3 rows eager broadcasts its 1 row onto 2."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4)
        self.down = nn.Sequential(nn.AvgPool2d(2, 2), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.down(x))


@pytest.mark.parametrize("side", [2, 3, 4, 32])
def test_shortcut_of_another_size_does_what_eager_does(side):
    plain = seeded(Uneven)
    fused = fuse(plain)
    assert type(fused) is FusedResidual
    assert_as_exact(fused, plain, torch.randn(2, 3, side, side))


def test_shortcut_that_does_not_fit_fails_as_eager_does():
    plain = seeded(Uneven)
    with torch.no_grad():
        for m in (plain, fuse(plain)):
            with pytest.raises(RuntimeError, match="size"):
                m(torch.randn(2, 3, 9, 9))


# ---- output formats --------------------------------------------------------------------------


class Views(nn.Module):
    """Flattens with .view after a run of blocks and after the stem, as old code does."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.stage = nn.Sequential(reference.Residual(8, 8), reference.Residual(8, 8))
        self.single = reference.Residual(8, 8)

    def forward(self, x):
        y = self.stage(self.pool(self.relu(self.bn(self.conv(x)))))
        z = self.single(torch.sigmoid(y))
        return torch.cat([y.view(y.size(0), -1), z.view(z.size(0), -1)], 1)


def test_view_needs_preserve():
    plain = seeded(Views)
    with pytest.raises(RuntimeError, match="view"), torch.no_grad():
        fuse(plain)(X)


def test_preserve_converts_once_behind_each_run():
    plain = seeded(Views)
    fused = fuse(plain, output_format="preserve")
    formats = {name: m.output_format for name, m in fused_modules(fused).items()}
    assert formats == {
        "conv": "channels_last",  # the pool keeps what it gets and feeds the stage
        "stage.0": "channels_last",
        "stage.1": "contiguous",
        "single": "preserve",
    }
    assert_as_exact(fused, plain, X)
    x = torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        y = fused.stage[0](x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert fused.stage[1](y).is_contiguous()
        assert fused.single(x).is_contiguous()
        x = x.contiguous(memory_format=torch.channels_last)
        assert fused.single(x).is_contiguous(memory_format=torch.channels_last), "as eager gives it"


def test_preserve_looks_past_layers_that_keep_the_layout():
    """A pool behind a block is no end of a run by itself: what counts is what reads the pool."""
    blocks = [BasicBlock(8, 8) for _ in range(4)]
    plain = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 1),
            blocks[0],
            nn.MaxPool2d(2),
            blocks[1],
            nn.Sigmoid(),
            *blocks[2:],
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
    )
    fused = fuse(plain, output_format="preserve")
    formats = {name: m.output_format for name, m in fused_modules(fused).items()}
    assert formats == {
        "1": "channels_last",
        "3": "contiguous",
        "5": "channels_last",
        "6": "contiguous",
    }
    with torch.no_grad():
        assert fused[:8](X).is_contiguous()


class CalledTwice(nn.Module):
    """One call of the block feeds a view, the other one only a fused block."""

    def __init__(self):
        super().__init__()
        self.a, self.b = BasicBlock(3, 3), BasicBlock(3, 3)

    def forward(self, x):
        y = self.a(x)
        z = self.b(self.a(torch.sigmoid(x)))
        return y.view(y.size(0), -1) + z.view(z.size(0), -1)


class OtherwiseWithGradients(CalledTwice):
    def forward(self, x):
        y = self.a(x)
        if torch.is_grad_enabled():
            y = self.b(y)
        return y.view(y.size(0), -1)


@pytest.mark.parametrize("build", [CalledTwice, OtherwiseWithGradients])
def test_preserve_serves_every_call(build):
    plain = seeded(build)
    fused = fuse(plain, output_format="preserve")
    assert fused.a.output_format == fused.b.output_format == "contiguous"
    assert_as_exact(fused, plain, X)
    torch.testing.assert_close(fused(X), plain(X), rtol=1e-4, atol=1e-4)


def test_preserve_where_the_run_cannot_be_seen():
    """Below a module that cannot be traced every fused module gives its layout back by itself."""

    class Root(Views):
        def forward(self, x):
            return super().forward(x) if x.sum() > -1e9 else x

    plain = seeded(Root)
    fused = fuse(plain, output_format="preserve")
    formats = {name: m.output_format for name, m in fused_modules(fused).items()}
    assert formats == {"stage.0": "channels_last", "stage.1": "contiguous", "single": "preserve"}
    assert_as_exact(fused, plain, X)


def test_preserve_holds_in_training_and_with_hooks():
    plain = seeded(Views)
    fused = fuse(plain, output_format="preserve")
    assert torch.equal(fused.train()(X), plain.train()(X))
    fused.eval()
    plain.eval()
    fused.stage[1].register_forward_hook(lambda m, args, out: out)  # sends this block to eager
    assert_as_exact(fused, plain, X)


def test_a_later_fuse_sets_the_format_anew():
    fused = fuse(seeded(Views), output_format="preserve")
    again = fuse(fused)
    assert {m.output_format for m in fused_modules(again).values()} == {"channels_last"}


# ---- any model -------------------------------------------------------------------------------

LAYERS = {
    "conv": lambda: nn.Conv2d(8, 8, 3, padding=1),
    "conv1x1": lambda: nn.Conv2d(8, 8, 1, bias=False),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "bn": lambda: nn.BatchNorm2d(8),
    "gn": lambda: nn.GroupNorm(2, 8),
    "relu": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "pool": lambda: nn.MaxPool2d(3, 1, 1),
    "stem_pool": lambda: nn.MaxPool2d(3, 2, 1),
    "dropout": lambda: nn.Dropout(0.3),
    "block": lambda: BasicBlock(8, 8),
    "bottleneck": lambda: Bottleneck(8, 2),
    "odd_block": CASES["gelu_module"][0],
}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(sorted(LAYERS)), max_size=9), st.integers(0, 5), st.booleans())
def test_any_sequence_of_layers(names, cut, preserve):
    torch.manual_seed(0)
    layers = [LAYERS[name]() for name in names]
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Sequential(*layers[:cut]), nn.Sequential(*layers[cut:])
    )
    randomized(plain).eval()
    fused = fuse(plain, output_format="preserve" if preserve else "channels_last")
    assert_same_state(fused, plain)
    found = fused_modules(fused)
    blocks = sum(name in ("block", "bottleneck") for name in names)
    assert sum(m.kind != "conv_bn" for m in found.values()) == blocks
    convs = ("conv", "conv1x1", "depthwise")
    pairs = sum(
        a in convs and b == "bn" for part in (names[:cut], names[cut:]) for a, b in pairwise(part)
    )
    assert sum(isinstance(m, ConvSlot) for m in found.values()) == pairs
    with torch.no_grad():
        expected, ours = plain(X), fused(X)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        if preserve:
            assert ours.is_contiguous()
        assert torch.equal(unfuse(fused)(X), expected)


def test_exact_nonfinite_reaches_every_fused_module():
    model = nn.Sequential(reference.Residual(64, 64), reference.Residual(64, 64)).eval()
    x = torch.randn(1, 64, 32, 32)
    backends = {}
    for exact in (False, True):
        fused = fuse(model, exact_nonfinite=exact)
        with select.forced("ours"):
            backends[exact] = [row.backend for row in report(fused, x)]
    if ops.extension_error is None:
        assert all("winograd" in backend for backend in backends[False])
    assert not any("winograd" in backend for backend in backends[True])
