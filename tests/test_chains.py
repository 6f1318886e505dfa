"""Chains: the first of adjacent fused modules computes all of them, and nobody can tell."""

from __future__ import annotations

import copy
import gc
import itertools
import logging
import pickle
import threading
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, needs_extension, randomize, use_isa
from torch import nn

import resnet_fused as rf
from resnet_fused import _chain, _find_chains, _fused, _ready, guard

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    needs_extension,
    pytest.mark.skipif(guard.watch([]) is None, reason="guards were not compiled"),
]

_ops = torch.ops.resnet_fused


# ---- nets ----------------------------------------------------------------------------------------


def block(channels, width, stride=1):
    return rf.reference.Residual(channels, width, (channels, stride) != (width, 1), stride)


def stage(channels, width, stride):
    return nn.Sequential(block(channels, width, stride), block(width, width))


class Net(nn.Module):
    """As torchvision's: helper methods, Sequentials, torch.flatten."""

    def __init__(self, classes=7):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2 = stage(8, 8, 1), stage(8, 16, 2)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, classes)
        self.features_too = False

    def stem(self, x):
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))

    def forward(self, x):
        return self._forward(x)

    def _forward(self, x):
        x = self.layer1(self.stem(x))
        y = self.layer2(x)
        out = self.fc(torch.flatten(self.avgpool(y), 1))
        return (out, x, y) if self.features_too else out


class Method(Net):
    def _forward(self, x):
        return self.fc(self.avgpool(self.layer2(self.layer1(self.stem(x)))).flatten(start_dim=1))


class Loop(Net):
    """Blocks in a list."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([*self.layer1, *self.layer2])
        del self.layer1, self.layer2

    def _forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Nested(nn.Module):
    """A backbone below a head of other layers."""

    def __init__(self):
        super().__init__()
        self.backbone = Net(5)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.relu(self.backbone(x)))


class Between(Net):
    """A layer between that hands its input on."""

    def __init__(self):
        super().__init__()
        self.identity = nn.Identity()

    def _forward(self, x):
        y = self.layer2(self.identity(self.layer1(self.stem(x))))
        return self.fc(torch.flatten(self.avgpool(y), 1))


class Decorated(Net):
    @torch.inference_mode()
    def forward(self, x):
        return self._forward(x)


def lesson():
    return rf.models.resnet18(6, block=rf.reference.Residual)


NETS = [Net, Method, Loop, Nested, Between, Decorated, lesson]


def built(kind=Net):
    torch.manual_seed(0)
    return randomize(kind()).eval()


def fused_of(kind=Net):
    return rf.fuse(built(kind))


def images(batch=2, seed=0, side=32):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


X = images()


def run(net, x=X):
    with torch.no_grad():
        return net(x)


def single(net):
    """A copy without chains."""
    twin = copy.deepcopy(net)
    _find_chains.part_chains(twin)
    return twin


def warm(net, x=X):
    run(net, x), run(net, x)
    return net


@pytest.fixture
def calls(monkeypatch):
    """The prepared ops that run, by their handles."""
    seen = []
    op = _ready._run

    def counted(x, prepared, linear):
        seen.append(prepared)
        return op(x, prepared, linear)

    monkeypatch.setattr(_ready, "_run", counted)
    return seen


def modules(net):
    return [m for m in net.modules() if isinstance(m, _fused.FusedModule)]


def chains(net):
    return list(
        {id(m._chain()): m._chain() for m in modules(net) if m._chain() is not None}.values()
    )


def served_at_once(net, calls, x=X):
    """How many prepared ops a call runs, after two that leave everything behind."""
    warm(net, x)
    calls.clear()
    run(net, x)
    return len(calls)


# ---- what is a chain -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETS)
def test_a_net_is_one_op(kind, calls):
    plain, fused = built(kind), fused_of(kind)
    assert served_at_once(fused, calls) == 1
    assert_same(run(fused), run(single(fused)))
    torch.testing.assert_close(run(fused), run(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 8, 9])
def test_same_bits(dtype, batch, calls):
    fused = fused_of().to(dtype)
    x = images(batch).to(dtype)
    assert served_at_once(fused, calls, x) == 1
    assert_same(run(fused, x), run(single(fused), x))


def test_float64_has_no_kernels_for_the_head(calls):
    fused = fused_of().double()
    assert served_at_once(fused, calls, X.double()) <= 1
    torch.testing.assert_close(run(fused, X.double()), run(built().double(), X.double()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("output_format", ["channels_last", "preserve"])
def test_layouts(layout, output_format):
    body = nn.Sequential(*list(built().children())[:6])
    fused = warm(rf.fuse(body, output_format=output_format))
    x = X.contiguous(memory_format=layout)
    want = run(single(fused), x)
    for _ in range(3):
        y = run(fused, x)
        assert_same(y, want)
        assert y.stride() == want.stride()


def test_without_a_batch(calls):
    body = nn.Sequential(*list(built().children())[:6])
    fused = rf.fuse(body)
    assert served_at_once(fused, calls, X[0]) == 1
    assert_same(run(fused, X[0]), run(single(fused), X[0]))


def test_shapes_take_turns(calls):
    fused = fused_of()
    inputs = [images(1), images(3), images(2, side=40), images(9)]
    want = [run(single(fused), x) for x in inputs]
    for _ in range(4):
        for x, y in zip(inputs, want, strict=True):
            torch.testing.assert_close(run(fused, x), y, rtol=1e-4, atol=1e-4)
    calls.clear()
    for x in inputs:
        run(fused, x)
    assert len(calls) == len(inputs)


def test_shapes_without_end_are_forgotten(monkeypatch):
    monkeypatch.setattr(_chain, "_MOST_READY", 3)
    fused = fused_of()
    for side in range(32, 46, 2):
        warm(fused, images(1, side=side))
    (chain,) = chains(fused)
    assert 0 < len(chain._servings) <= 3


def test_a_linear_layer_for_few_images_only(calls):
    """For more, PyTorch's is faster."""
    fused = fused_of()
    warm(fused, images(9))
    (serving,) = modules(fused)[0]._chain()._servings.values()
    assert serving.last is fused.avgpool
    assert_same(run(fused, images(9)), run(single(fused), images(9)))


class ReadsTwice(Net):
    def _forward(self, x):
        x = self.layer1(self.stem(x))
        return self.layer2(x), self.fc(torch.flatten(self.avgpool(self.layer2(x)), 1))


class Returns(Net):
    def _forward(self, x):
        features = [self.layer1(self.stem(x))]
        features.append(self.layer2(features[-1]))
        return features


class LooksAtSize(Net):
    def _forward(self, x):
        x = self.layer1(self.stem(x))
        return F.interpolate(self.layer2(x), scale_factor=2) + x.shape[-1]


class Views(Net):
    """Which would make something else of what the linear layer returns."""

    def _forward(self, x):
        return self.fc(self.avgpool(self.layer2(self.layer1(self.stem(x)))).view(-1, 16))


class FlattensMore(Net):
    def _forward(self, x):
        return self.fc(
            torch.flatten(self.avgpool(self.layer2(self.layer1(self.stem(x)))), 1, 2)[..., 0]
        )


class Means(Net):
    def _forward(self, x):
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


class Autocasts(Net):
    def _forward(self, x):
        x = self.layer1(self.stem(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.layer2(x)
        return self.fc(torch.flatten(self.avgpool(x.float()), 1))


class Grows(Net):
    """Cannot be traced as a whole."""

    def _forward(self, x):
        x = self.layer2(self.layer1(self.stem(x)))
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("kind", "ops"),
    [
        (ReadsTwice, None),
        (Returns, 2),
        (LooksAtSize, 2),
        (Views, 1),
        (FlattensMore, 1),
        (Means, 1),
        (Autocasts, None),
        (Grows, 2),
    ],
)
def test_only_what_nobody_else_sees(kind, ops, calls):
    plain, fused = built(kind), fused_of(kind)
    count = served_at_once(fused, calls)
    assert ops is None or count == ops
    tolerance = 5e-2 if kind is Autocasts else 1e-4
    torch.testing.assert_close(run(fused), run(plain), rtol=tolerance, atol=tolerance)


# ---- edits ---------------------------------------------------------------------------------------

EDITS = {}


def edit(function):
    EDITS[function.__name__] = function
    return function


@edit
def weights_in_place(net):
    with torch.no_grad():
        net.layer2[1].conv2.weight.mul_(-1.5)


@edit
def weights_by_data(net):
    net.layer1[0].conv1.weight.data.mul_(3)


@edit
def statistics(net):
    net.layer1[1].bn1.running_mean.add_(1)


@edit
def linear_weights(net):
    with torch.no_grad():
        net.fc.weight.mul_(2)


@edit
def linear_bias_replaced(net):
    net.fc.bias = nn.Parameter(torch.ones_like(net.fc.bias))


@edit
def no_linear_bias(net):
    net.fc.bias = None


@edit
def linear_weights_of_another_size(net):
    net.fc.weight.data, net.fc.bias.data = torch.ones(4, 16), torch.ones(4)


@edit
def state(net):
    net.load_state_dict({key: value * 0.9 for key, value in net.state_dict().items()})


@edit
def state_assigned(net):
    net.load_state_dict({k: v.clone() * 1.1 for k, v in net.state_dict().items()}, assign=True)


@edit
def another_block(net):
    torch.manual_seed(3)
    net.layer1[1] = randomize(block(8, 8)).eval()


@edit
def one_more_block(net):
    torch.manual_seed(4)
    net.layer1.append(randomize(block(8, 8)).eval())


@edit
def one_block_less(net):
    del net.layer2[1]


@edit
def another_linear_layer(net):
    torch.manual_seed(5)
    net.fc = nn.Linear(16, 3)


@edit
def no_linear_layer(net):
    net.fc = nn.Identity()


@edit
def another_pool(net):
    net.avgpool = nn.AdaptiveMaxPool2d(1)


@edit
def stage_forward_patched(net):
    forward = type(net.layer1).forward
    net.layer1.forward = lambda x: 2 * forward(net.layer1, x)


@edit
def block_forward_patched(net):
    forward = net.layer2[0].forward
    net.layer2[0].forward = lambda x: 2 * forward(x)


@edit
def helper_patched(net):
    net.stem = lambda x: net.maxpool(net.relu(net.bn1(net.conv1(x)))) + 1


@edit
def a_flag(net):
    net.features_too = True


@edit
def eps(net):
    net.layer1[0].bn2.eps = 0.5


@edit
def stride(net):
    net.layer2[0].conv1.stride = net.layer2[0].conv3.stride = (4, 4)


@edit
def training_block(net):
    net.layer1[1].train()


@edit
def training(net):
    net.train()


@edit
def casts(net):
    net.double().float()
    net.layer1.half().float()


@edit
def swapped(net):
    torch.manual_seed(6)
    net.layer1[0], net.layer1[1] = net.layer1[1], net.layer1[0]


@pytest.mark.parametrize("name", EDITS)
def test_edits(name):
    """What holds after each: the net is what the plain net with the same edit is."""
    plain, fused = built(), warm(fused_of())
    for net in (plain, fused):
        EDITS[name](net)
    for _ in range(4):
        if name == "training":
            plain, fused = copy.deepcopy(plain), copy.deepcopy(fused)  # the same statistics
        got, want = run(fused), run(plain)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_an_edit_is_followed_by_one_op_again(calls):
    fused = warm(fused_of())
    weights_in_place(fused)
    assert served_at_once(fused, calls) == 1


def test_flags_are_as_they_were_when_it_was_fused(calls):
    fused = warm(fused_of())
    fused.features_too = True
    run(fused)
    fused.features_too = False
    assert served_at_once(fused, calls) == 1


def test_attributes_that_nobody_reads(calls):
    fused = warm(fused_of())
    fused.epoch, fused.name = 3, "net"
    assert served_at_once(fused, calls) == 1


def test_fused_in_training_mode(calls):
    fused = rf.fuse(built().train()).eval()
    assert served_at_once(fused, calls) == 1


class Config:
    def __init__(self, inner=True):
        self.both, self.wanted, self.itself = False, [], self
        self.inner = {"config": Config(inner=False)} if inner else None


class Reads(Net):
    """Settings of many kinds."""

    def __init__(self):
        super().__init__()
        self.wanted, self.options, self.extra = [], {"both": False}, None
        self.config = Config()
        self.nested = {"wanted": [[], {"both": False}], "configs": (Config(),)}
        self.logger = logging.getLogger("a net")

    def forward(self, x):
        self.logger.debug("forward")
        x = self.layer1(self.stem(x))
        y = self.layer2(x)
        both = self.wanted or self.options["both"] or self.config.both or self.extra is not None
        both = both or self.config.wanted or self.config.inner["config"].both
        (wanted, options), (config,) = self.nested["wanted"], self.nested["configs"]
        both = both or wanted or options["both"] or config.both
        return (x, y) if both or getattr(self, "late", False) else y


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.wanted.append(1),
        lambda net: net.options.update(both=True),
        lambda net: setattr(net.config, "both", True),
        lambda net: net.config.wanted.append(1),
        lambda net: setattr(net.config.inner["config"], "both", True),
        lambda net: net.nested["wanted"][0].append(1),
        lambda net: net.nested["wanted"][1].update(both=True),
        lambda net: setattr(net.nested["configs"][0], "both", True),
        lambda net: setattr(net, "extra", nn.Identity()),
        lambda net: setattr(net, "late", True),
    ],
    ids=[
        *("list", "dict", "object", "list of an object", "object in a dict of an object"),
        *("list in a list", "dict in a list", "object in a tuple", "module", "late"),
    ],
)
def test_settings_that_the_forward_reads(change):
    plain, fused = built(Reads), warm(fused_of(Reads))
    for net in (plain, fused):
        change(net)
    for _ in range(3):
        torch.testing.assert_close(run(fused), run(plain), rtol=1e-4, atol=1e-4)


class Flattens(Net):
    def __init__(self):
        super().__init__()
        self.flatten = nn.Flatten()

    def _forward(self, x):
        return self.fc(self.flatten(self.avgpool(self.layer2(self.layer1(self.stem(x))))))


def test_settings_of_a_flatten():
    plain, fused = built(Flattens), warm(fused_of(Flattens))
    plain.flatten.start_dim = fused.flatten.start_dim = -3
    for _ in range(3):
        torch.testing.assert_close(run(fused), run(plain), rtol=1e-4, atol=1e-4)


STALE = {
    "weights by data": weights_by_data,
    "statistics by data": lambda net: net.layer1[1].bn2.bias.data.add_(2),
    "through numpy": lambda net: net.layer2[1].conv1.weight.detach().numpy().__imul__(2),
    "eps": eps,
    "dilation and padding": lambda net: (
        setattr(net.layer2[1].conv1, "dilation", (2, 2)),
        setattr(net.layer2[1].conv1, "padding", (2, 2)),
    ),
    "batch statistics": lambda net: net.layer2[1].bn1.train(),
    "padding mode": lambda net: setattr(net.layer2[1].conv1, "padding_mode", "circular"),
}


@pytest.mark.parametrize("before", [1, 2, 5], ids="after {} calls".format)
@pytest.mark.parametrize("name", STALE)
def test_what_was_prepared_before_an_edit(name, before):
    """Of some modules, and is not made anew for a chain."""
    plain, fused = built(), fused_of()
    for _ in range(before):
        run(fused)
    for net in (plain, fused):
        STALE[name](net)
    for _ in range(4):
        if name == "batch statistics":
            plain, fused = copy.deepcopy(plain), copy.deepcopy(fused)  # the same running ones
        torch.testing.assert_close(run(fused), run(plain), rtol=1e-3, atol=1e-3)


def test_an_edit_while_a_hook_holds_the_chain_up():
    plain, fused = built(), warm(fused_of())
    hook = fused.layer1.register_forward_hook(lambda *_: None)
    run(fused)
    for net in (plain, fused):
        weights_by_data(net)
    hook.remove()
    for _ in range(3):
        torch.testing.assert_close(run(fused), run(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["fc", "avgpool", "layer2", "layer2.1", "conv1"])
def test_a_layer_that_is_compiled_by_itself(where, monkeypatch):
    """It is told, and no chain made at each call that cannot hold."""
    fused = warm(fused_of())
    fused.get_submodule(where).compile(backend="eager")
    warm(fused)
    made = []
    chain = _ready.Ready.chain
    monkeypatch.setattr(_ready.Ready, "chain", lambda *given: made.append(given) or chain(*given))
    for _ in range(3):
        torch.testing.assert_close(run(fused), run(built()), rtol=1e-4, atol=1e-4)
    assert not made


# ---- layers between ------------------------------------------------------------------------------


class Tap(nn.Module):
    """Hands its input on, and leaves nothing in a trace."""

    def forward(self, x):
        return x


class DropPath(nn.Module):
    def forward(self, x):
        return 2 * x if self.training else x


class Taps(Net):
    between: type = Tap

    def __init__(self):
        super().__init__()
        self.tap = self.between()

    def _forward(self, x):
        y = self.layer2(self.tap(self.layer1(self.stem(x))))
        return self.fc(torch.flatten(self.avgpool(y), 1))


TAPS = [type(kind.__name__, (Taps,), {"between": kind}) for kind in (Tap, nn.Sequential, DropPath)]


@pytest.mark.parametrize("kind", TAPS)
@pytest.mark.parametrize("change", ["hook", "early hook", "replace", "train", "append"])
def test_layers_that_leave_nothing_in_a_trace(kind, change):
    plain = built(kind)
    seen = {id(plain): []}

    def hook(net):
        found = seen.setdefault(id(net), [])
        net.tap.register_forward_hook(lambda m, x, y: found.append(x[0]))

    fused = fused_of(kind)
    if change == "early hook":
        source = built(kind)
        hook(source)
        fused = rf.fuse(source, inplace=True)
        seen[id(fused)] = seen[id(source)]
    else:
        warm(fused)
    for net in (plain, fused):
        if change == "hook" or (change == "early hook" and net is plain):
            hook(net)
        elif change == "replace":
            net.tap = nn.Tanh()
        elif change == "train":
            net.tap.train()
        elif change == "append" and isinstance(net.tap, nn.Sequential):
            net.tap.append(nn.Tanh())
    for _ in range(3):
        torch.testing.assert_close(run(fused), run(plain), rtol=1e-4, atol=1e-4)
    if "hook" in change:
        for got, want in zip(seen[id(fused)], seen[id(plain)], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


class Streams(nn.Module):
    """Two chains whose modules take turns."""

    def __init__(self):
        super().__init__()
        self.a, self.b = stage(3, 8, 1), stage(3, 8, 1)

    def forward(self, x):
        a, b = self.a[0](x), self.b[0](x)
        a, b = self.a[1](a), self.b[1](b)
        return a - b


class Teacher(Net):
    """Another fused net runs between the modules of a chain."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "other", [])

    def _forward(self, x):
        y = self.layer1(self.stem(x))
        for other in self.other:
            other(torch.ones(2, 3, 32, 32))
        return self.layer2(y)


def test_chains_take_turns(calls):
    plain, fused = built(Streams), fused_of(Streams)
    assert served_at_once(fused, calls) == 2
    for _ in range(3):
        torch.testing.assert_close(run(fused), run(plain), rtol=1e-4, atol=1e-4)


def test_another_net_between():
    plain, fused = built(Teacher), warm(fused_of(Teacher))
    fused.other.append(warm(fused_of(Net)))
    for _ in range(3):
        torch.testing.assert_close(run(fused), run(plain), rtol=1e-4, atol=1e-4)


# ---- arguments, and values that are kept ---------------------------------------------------------


class Backbone(Net):
    def forward(self, x, features=None, both=False):
        x = self.layer1(self.stem(x))
        y = self.layer2(x)
        if isinstance(features, list):
            features.append(x)
        return (x, y) if both is True else y


class UsesBackbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.last = Backbone(), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.last(self.backbone(x))


@pytest.mark.parametrize("kind", [Backbone, UsesBackbone])
def test_other_arguments(kind):
    plain, fused = built(kind), warm(fused_of(kind))
    backbones = [net.backbone if kind is UsesBackbone else net for net in (plain, fused)]
    for _ in range(3):
        torch.testing.assert_close(run(fused), run(plain), rtol=1e-4, atol=1e-4)
        kept = [[], []]
        with torch.no_grad():
            want, got = (net(X, f, both=True) for net, f in zip(backbones, kept, strict=True))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(kept[1], kept[0], rtol=1e-4, atol=1e-4)


FEATURES = {}


class Keeps(Net):
    """What lies between, where no module has it."""

    def _forward(self, x):
        x = FEATURES["layer1"] = self.layer1(self.stem(x))
        return self.fc(torch.flatten(self.avgpool(self.layer2(x)), 1))


def test_values_that_are_kept_elsewhere():
    plain, fused = built(Keeps), warm(fused_of(Keeps))
    for _ in range(3):
        run(plain)
        want = FEATURES["layer1"]
        run(fused)
        torch.testing.assert_close(FEATURES["layer1"], want, rtol=1e-4, atol=1e-4)


def named():
    return nn.Sequential(OrderedDict((name, block(8, 8)) for name in "abc"))


def moved_to_the_end(net):
    a = net._modules.pop("a")
    net.add_module("a", a)


def inserted(net):
    layers = dict(net._modules)
    net._modules.clear()
    torch.manual_seed(9)
    net._modules.update(a=layers["a"], new=randomize(block(8, 8)).eval(), b=layers["b"])


def other_dict(net):
    net._modules = {name: net._modules[name] for name in "bc"}


def one_again(net):
    """A block of the chain at another place, too."""
    net._modules["a"] = net._modules["c"]


class InLists(Net):
    """The same functions call every block."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([block(8, 8) for _ in range(4)])
        self.last = nn.Linear(8, 3)

    def _forward(self, x):
        x = self.stem(x)
        for layer in self.blocks:
            x = layer(x)
        return self.last(torch.flatten(self.avgpool(x), 1))


def test_a_block_that_is_called_twice_now(calls):
    plain, fused = built(InLists), fused_of(InLists)
    assert served_at_once(fused, calls) == 1
    for net in (plain, fused):
        net.blocks[1] = net.blocks[3]
    for _ in range(3):
        torch.testing.assert_close(run(fused), run(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [moved_to_the_end, inserted, other_dict, one_again])
def test_the_order_of_layers(change):
    x = torch.randn(1, 8, 6, 6)
    plain, fused = built(named), warm(fused_of(named), x)
    change(plain), change(fused)
    for _ in range(3):
        torch.testing.assert_close(run(fused, x), run(plain, x), rtol=1e-4, atol=1e-4)


class Named(rf.reference.Residual):
    """With attributes and layers of names that a fused module might want for itself."""

    def __init__(self):
        super().__init__(8, 8)
        self.join, self.packing = self.conv1, self.conv2
        self.ready, self.formatted, self.output_shape = 1, 2, 3


def test_attributes_of_a_block_stay_its_own():
    blocks = nn.Sequential(Named(), Named())
    fused = rf.fuse(blocks)
    for layer, plain in zip(fused, blocks, strict=True):
        assert isinstance(layer.join, nn.Conv2d)
        assert isinstance(layer.packing, nn.Conv2d)
        assert (layer.ready, layer.formatted, layer.output_shape) == (1, 2, 3)
        layer.ready = plain.ready = 5
        assert layer.original().ready == 5


# ---- hooks and other callers ---------------------------------------------------------------------

HOOKED = ["conv1", "bn1", "maxpool", "layer1", "layer1.0", "layer1.1.bn2", "layer2", "layer2.1"]
HOOKED += ["avgpool", "fc", ""]


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_see_what_they_would(name):
    nets = [built(), warm(fused_of())]
    seen = [[], []]
    for net, found in zip(nets, seen, strict=True):
        hooked = net.get_submodule(name)
        hooked.register_forward_hook(lambda m, x, y, found=found: found.append((x[0], y)))
        hooked.register_forward_pre_hook(lambda m, x, found=found: found.append((x[0],)))
    for _ in range(3):
        want, got = run(nets[0]), run(nets[1])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for want, got in zip(*seen, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_hook_takes_nothing_from_what_is_before_it(calls):
    fused = warm(fused_of())
    fused.avgpool.register_forward_hook(lambda *_: None)
    assert served_at_once(fused, calls) == 1
    fused.layer2[1].register_forward_hook(lambda *_: None)
    assert served_at_once(fused, calls) == 1 + 1


@pytest.mark.parametrize("at", ["avgpool", "fc", ""])
def test_a_hook_that_calls_the_first_layers(at):
    """Not as the parent's forward calls them."""
    nets, found = [built(), warm(fused_of())], [[], []]
    for net, seen in zip(nets, found, strict=True):
        hooked = net.get_submodule(at)
        hooked.register_forward_pre_hook(
            lambda m, x, net=net, seen=seen: seen.append((net.conv1(X), net.layer1(net.stem(X))))
        )
    for _ in range(3):
        torch.testing.assert_close(run(nets[1]), run(nets[0]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


class CallsBack(Net):
    """A layer that is no part of the chain calls one that is."""

    def __init__(self):
        super().__init__()
        self.outer = Outer(self)

    def forward(self, x):
        return self._forward(self.outer(x))


class Outer(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = [net]

    def forward(self, x):
        return x + self.net[0].layer1[0](x.repeat(1, 3, 1, 1)[:, :8]).mean()


def test_a_layer_that_calls_one_of_the_chain():
    plain, fused = built(CallsBack), warm(fused_of(CallsBack))
    for _ in range(3):
        torch.testing.assert_close(run(fused), run(plain), rtol=1e-4, atol=1e-4)


def test_layers_called_by_others():
    plain, fused = built(), warm(fused_of())
    for _ in range(3):
        for net in (plain, fused):
            run(net)
        a, b = run(plain.stem), run(fused.stem)
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
        for name in ("layer1", "layer2", "avgpool"):
            a, b = run(getattr(plain, name), a), run(getattr(fused, name), b)
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


def test_features_of_a_sequence_of_the_same_layers(calls):
    plain, fused = built(), warm(fused_of())
    for cut in (2, 5, 7):
        a = nn.Sequential(*list(plain.children())[:cut])
        b = nn.Sequential(*list(fused.children())[:cut])
        for _ in range(3):
            torch.testing.assert_close(run(b), run(a), rtol=1e-4, atol=1e-4)


def test_another_net_of_the_same_class():
    """Whose forward takes the same path."""
    first, second = warm(fused_of()), fused_of()
    second.layer1 = first.layer1  # which now has two parents
    plain = copy.deepcopy(rf.unfuse(second))
    for _ in range(3):
        run(first)
        torch.testing.assert_close(run(second), run(plain), rtol=1e-4, atol=1e-4)


def test_the_forward_of_the_class_is_replaced(monkeypatch):
    plain, fused = built(), warm(fused_of())

    def forward(self, x):
        x = self.stem(x)
        return self.layer2(self.layer1(x) + x)

    monkeypatch.setattr(Net, "_forward", forward)
    for _ in range(3):
        torch.testing.assert_close(run(fused), run(plain), rtol=1e-4, atol=1e-4)


def test_what_a_call_returned_is_given_in_again():
    """To a module that passed it on."""
    fused = rf.fuse(nn.Sequential(*list(built().children())[4:6]))
    plain = rf.unfuse(fused)
    x = torch.randn(2, 8, 8, 8)
    warm(fused, x)
    y = run(fused, x)
    z = run(fused[0][1], torch.cat([y[:, :8]]))
    torch.testing.assert_close(z, run(plain[0][1], y[:, :8]), rtol=1e-4, atol=1e-4)
    same = run(fused[1][1], y)
    torch.testing.assert_close(same, run(plain[1][1], y), rtol=1e-4, atol=1e-4)


def test_a_call_that_ends_in_the_middle():
    """Its outcome, which nobody took, is passed on to nobody."""
    fused, plain = warm(fused_of()), built()
    kept = []

    def give_up(*_):
        raise KeyboardInterrupt

    original = _chain.passes_on

    def interrupted(module, x):
        if module is modules(fused)[2]:
            kept.append(x)
            give_up()
        return original(module, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fused, "passes_on", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(fused)
    assert kept
    for _ in range(3):
        torch.testing.assert_close(run(fused), run(plain), rtol=1e-4, atol=1e-4)


# ---- modes ---------------------------------------------------------------------------------------


def test_gradients_then_none():
    plain, fused = built(), warm(fused_of())
    for _ in range(2):
        x, z = X.clone().requires_grad_(), X.clone().requires_grad_()
        plain(x).sum().backward()
        fused(z).sum().backward()
        torch.testing.assert_close(z.grad, x.grad, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(run(fused), run(plain), rtol=1e-4, atol=1e-4)


def test_modes_do_not_forget(calls):
    """What is served at once is served so after a call in another mode."""
    fused = warm(fused_of())
    fused(X)
    calls.clear()
    run(fused)
    assert len(calls) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes(mode):
    fused = warm(fused_of())
    want = run(single(fused))
    for _ in range(3):
        with mode():
            assert_same(fused(X), want)


def test_compiled(calls):
    fused = warm(fused_of())
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(compiled), run(fused), rtol=1e-4, atol=1e-4)


def test_function_transforms():
    plain, fused = built(), warm(fused_of())
    stacked = torch.stack([X, X + 1])
    with torch.no_grad():
        got, want = torch.func.vmap(fused)(stacked), torch.func.vmap(plain)(stacked)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    state = {key: value * 0.8 for key, value in plain.state_dict().items()}
    with torch.no_grad():
        got = torch.func.functional_call(fused, state, (X,))
        want = torch.func.functional_call(plain, state, (X,))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_exact_nonfinite(calls):
    fused = rf.fuse(built(), exact_nonfinite=True)
    assert served_at_once(fused, calls) == 1
    assert_same(run(fused), run(single(fused)))


@pytest.mark.parametrize("plan", ["torch", "direct", "ours"])
def test_forced_plans(plan, calls):
    fused = warm(fused_of())
    with rf.select.forced(plan):
        assert served_at_once(fused, calls) == 1
        assert_same(run(fused), run(single(fused)))
    torch.testing.assert_close(run(fused), run(built()), rtol=1e-4, atol=1e-4)


@pytest.mark.threads
def test_threads():
    fused = fused_of()
    inputs = [images(1, seed) for seed in range(4)]
    want = [run(single(fused), x) for x in inputs]
    wrong = []

    def work(x, y):
        for turn in range(40):
            if turn % 10 == 5:
                rf.refresh(fused)
            if not torch.equal(run(fused, x), y):
                wrong.append(turn)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- copies and memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_have_chains_of_their_own(how, calls):
    fused = warm(fused_of())
    twin = how(fused)
    assert served_at_once(twin, calls) == 1
    with torch.no_grad():
        twin.fc.weight.zero_(), twin.layer1[0].conv1.weight.zero_()
    assert_same(run(fused), run(single(fused)))
    assert_same(run(twin), run(single(twin)))
    assert {id(c.parent) for c in chains(twin)}.isdisjoint(id(c.parent) for c in chains(fused))


def test_parts_are_copied_without_the_rest():
    fused = warm(fused_of())
    for part in (fused.layer1[0], fused.layer1, fused.layer2[1]):
        twin = copy.deepcopy(part)
        assert all(chain.parent in set(twin.modules()) for chain in chains(twin))
        assert_same(
            run(twin, torch.ones(1, 16, 8, 8)[:, : _inputs(twin)]),
            run(part, torch.ones(1, 16, 8, 8)[:, : _inputs(part)]),
        )
    whole = len(pickle.dumps(fused))
    assert len(pickle.dumps(fused.layer1[0])) < whole / 2


def _inputs(module):
    return next(m for m in module.modules() if isinstance(m, nn.Conv2d)).in_channels


def test_shallow_copies():
    fused = warm(fused_of())
    twin = copy.copy(fused)
    for _ in range(3):
        torch.testing.assert_close(run(twin), run(fused), rtol=1e-4, atol=1e-4)


def test_unfuse_leaves_nothing():
    plain, fused = built(), warm(fused_of())
    back = rf.unfuse(fused)
    for a, b in zip(plain.modules(), back.modules(), strict=True):
        assert type(a) is type(b)
        assert vars(a).keys() == vars(b).keys()
    assert chains(fused)
    assert_same(run(back), run(plain))


def test_fused_again(calls):
    """Blocks that came later join."""
    fused = warm(fused_of())
    one_more_block(fused)
    again = rf.fuse(fused)
    assert served_at_once(again, calls) == 1
    torch.testing.assert_close(run(again), run(rf.unfuse(fused)), rtol=1e-4, atol=1e-4)
    assert_same(run(fused), run(single(fused)))


def test_refresh_frees_packed_weights():
    fused = warm(fused_of())
    packed = weakref.ref(modules(fused)[3]._cache.held()[0].weight)
    rf.refresh(fused)
    gc.collect()
    assert packed() is None


def test_old_weights_are_freed_at_the_next_calls():
    fused = warm(fused_of())
    run(fused, images(3)), run(fused, images(3))
    packed = weakref.ref(modules(fused)[1]._cache.held()[0].weight)
    weights_by_data(fused)
    warm(fused)
    gc.collect()
    assert packed() is None


def test_nets_are_freed():
    fused = warm(fused_of())
    held = [weakref.ref(fused), weakref.ref(fused.layer2[1]), weakref.ref(fused.fc.weight)]
    held.append(weakref.ref(modules(fused)[1]._cache.held()[0].weight))
    del fused
    gc.collect()
    assert [ref() for ref in held] == [None] * 4


def test_weights_of_every_edit_are_freed():
    """Also where no input has a shape that it had before."""
    fused = fused_of()
    packed = []
    for side in range(32, 44, 2):
        weights_in_place(fused)
        warm(fused, images(1, side=side))
        packed.append(weakref.ref(modules(fused)[-1]._cache.held()[0].weight))
    gc.collect()
    assert [ref() is None for ref in packed] == [True] * 5 + [False]


def test_a_part_does_not_hold_the_rest():
    fused = warm(fused_of())
    part, rest = fused.layer1, weakref.ref(fused.layer2)
    del fused
    gc.collect()
    assert rest() is None
    run(part, torch.randn(1, 8, 4, 4))


def test_a_net_is_freed_after_an_exception():
    fused = warm(fused_of(Breaks))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "BREAKS", [1])
        with pytest.raises(ZeroDivisionError):
            run(fused)
    held = weakref.ref(fused)
    del fused
    gc.collect()
    assert held() is None


class Breaks(Net):
    def _forward(self, x):
        x = self.layer1(self.stem(x))
        for _ in BREAKS:
            raise ZeroDivisionError
        return self.layer2(x)


BREAKS = []


def test_fusing_keeps_no_frames_values():
    net = built()
    held = weakref.ref(net)
    fused = rf.fuse(net)
    del net
    gc.collect()
    assert held() is None
    run(fused)


def test_outputs_are_freed():
    fused = warm(fused_of())
    y = weakref.ref(run(fused))
    assert y() is None


def test_linear_weights_can_be_swapped():
    """Nothing holds a reference that would keep swap_tensors from its work."""
    fused = warm(fused_of())
    torch.utils.swap_tensors(fused.fc.weight, nn.Parameter(torch.zeros_like(fused.fc.weight)))
    for _ in range(3):
        assert_same(run(fused), run(single(fused)))


# ---- the op --------------------------------------------------------------------------------------


def test_prepare_chain_refuses():
    handle, _ = prepared()
    weight = torch.randn(5, 16)
    for handles, pools, linear, want in (
        ([], False, [], "prepared must not be empty"),
        (
            [handle, 0],
            False,
            [],
            "each of prepared must be what prepare returned, not yet released",
        ),
        ([handle], False, [weight], "linear must be empty without a pool before it, got 1 tensors"),
        (
            [handle],
            True,
            [weight] * 3,
            "linear must be a weight, or weight and bias, got 3 tensors",
        ),
        ([handle], True, [weight.double()], "linear must be float32, got float64"),
        (
            [handle],
            True,
            [weight[:, :3]],
            r"linear must begin with a 2-D weight \(outputs, 16\), got shape \(5, 3\)",
        ),
        ([handle], True, [weight, weight[0]], r"linear's bias must have shape \(5,\), got \(16,\)"),
    ):
        with pytest.raises(RuntimeError, match="prepare_chain: " + want):
            _ops.prepare_chain(WIDE, handles, pools=pools, linear=linear)
    for x in (WIDE[:1], WIDE[:, :8], WIDE.bfloat16(), WIDE[0]):
        assert _ops.prepare_chain(x, [handle], pools=False, linear=[]) is None, "it takes no such x"
    rf._extension.release_prepared(handle)


def test_prepare_chain_computes_one_after_the_other():
    (first, one), (second, two) = prepared(), prepared()
    weight, bias = torch.randn(5, 16), torch.randn(5)
    both = _ops.prepare_chain(WIDE, [first, second], pools=True, linear=[weight, bias])
    for handle in (first, second):
        rf._extension.release_prepared(handle)  # which the chain does not need
    y = _ops.run_prepared(WIDE, both, [weight, bias])
    want = F.linear(F.conv2d(F.conv2d(WIDE, one), two).mean((2, 3)), weight, bias)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="got a chain"):
        _ops.prepare_chain(WIDE, [both], pools=False, linear=[])
    for linear, want in (
        ([], "linear must have the 2 tensors that were prepared, got 0"),
        ([weight, bias[:3]], r"linear's bias must have shape \(5,\), got \(3,\)"),
        ([weight.double(), bias], "linear must be float32, got float64"),
    ):
        with pytest.raises(RuntimeError, match="run_prepared: " + want):
            _ops.run_prepared(WIDE, both, linear)
    rf._extension.release_prepared(both)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("plans", list(itertools.product(("direct", "torch"), repeat=3)))
def test_steps_of_pytorchs_lie_between_those_of_ours(plans, head):
    """What is ours goes at once as far as it goes."""
    handles, weights = zip(*(prepared(plan) for plan in plans), strict=True)
    linear = [torch.randn(5, 16)] if head else []
    chain = _ops.prepare_chain(WIDE, list(handles), pools=head, linear=linear)
    want = WIDE
    for weight in weights:
        want = F.conv2d(want, weight)
    if head:
        want = F.linear(want.mean((2, 3)), *linear)
    torch.testing.assert_close(_ops.run_prepared(WIDE, chain, linear), want, rtol=1e-3, atol=1e-3)
    for handle in (*handles, chain):
        rf._extension.release_prepared(handle)


@pytest.mark.threads
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_a_chain_has_the_same_bits_with_every_number_of_threads(count, threads):
    """More than there are cores or jobs, too, and several callers at once."""
    net = rf.fuse(randomize(rf.models.resnet18(num_classes=7)).eval())
    sizes = [(2, 3, 40, 56), (2, 3, 33, 64)]  # of one batch, which plans follow
    images = [torch.randn(size).to(memory_format=torch.channels_last) for size in sizes]
    with torch.inference_mode():
        threads(1)
        want = [net(x) for x in images]

        def work(i):
            torch.set_num_threads(count)
            with torch.inference_mode():
                return [net(images[i % 2]) for _ in range(10)]

        with ThreadPoolExecutor(3) as pool:
            for i, results in enumerate(pool.map(work, range(3))):
                for y in results:
                    assert_same(y, want[i % 2])


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_within_a_chain_arrives_once(count, threads):
    """The instruction set was changed since it was prepared."""
    if rf.ops.cpu_isa() != "avx512bf16":
        pytest.skip("this CPU multiplies no bfloat16")
    threads(count)
    x = WIDE.bfloat16()
    handles = [prepared("direct_bf16", x)[0] for _ in range(2)]
    chain = _ops.prepare_chain(x, handles, pools=False, linear=[])
    want = _ops.run_prepared(x, chain, [])
    use_isa("avx2")
    try:
        with pytest.raises(RuntimeError, match="needs avx512_bf16, the kernels in use are avx2"):
            _ops.run_prepared(x, chain, [])
    finally:
        use_isa("")
    assert_same(_ops.run_prepared(x, chain, []), want)
    for handle in (*handles, chain):
        rf._extension.release_prepared(handle)


WIDE = torch.randn(2, 16, 5, 5, generator=torch.Generator().manual_seed(2))


def prepared(plan="direct", x=WIDE):
    weight = torch.randn(16, 16, 1, 1, dtype=x.dtype)
    keywords = {"kernel_sizes": [1, 1], "strides": [1, 1], "paddings": [0, 0]}
    keywords |= {"dilations": [1, 1], "groups": [1], "acts": ["none"], "plans": [plan]}
    packed = _ops.pack_conv(weight, 1, plan=plan)
    tensors = [packed], [torch.ones(16)], [torch.zeros(16)]
    flags = {"has_shortcut": False, "adds": False, "pool": False}
    return _ops.prepare(x, *tensors, **keywords, **flags), weight
