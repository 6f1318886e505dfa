"""FusedConvBN and the slots of fused sites: convolution, BN and ReLU as one op, keys unchanged."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import (
    LAYOUTS,
    assert_close_as_eager,
    assert_same,
    is_dense_channels_last,
    randomize,
)
from torch import nn
from torch.nn.utils import parametrize, prune

import resnet_fused as rf
from resnet_fused import select
from resnet_fused.recipe import ConvUnit, Site
from resnet_fused.slots import BatchNormSlot, ConvSlot, ReLUSlot, install_site

pytestmark = pytest.mark.usefixtures("one_thread")

CONVS = {
    "lesson's stem": lambda: nn.Conv2d(1, 64, 7, stride=2, padding=3),
    "stem": lambda: nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
    "3x3": lambda: nn.Conv2d(16, 24, 3, padding=1),
    "1x1": lambda: nn.Conv2d(17, 5, 1, bias=False),
    "strided": lambda: nn.Conv2d(8, 8, (1, 3), stride=(2, 1), padding=(0, 2)),
    "same": lambda: nn.Conv2d(6, 7, (3, 5), padding="same", dilation=(2, 1)),
    "valid": lambda: nn.Conv2d(6, 7, 3, padding="valid"),
    "depthwise": lambda: nn.Conv2d(12, 12, 3, padding=1, groups=12),
    "groups": lambda: nn.Conv2d(32, 64, 3, padding=1, groups=2),
    "dilated": lambda: nn.Conv2d(4, 33, 3, padding=2, dilation=2),
    "one by one": lambda: nn.Conv2d(1, 1, 1),
}


def build(name, act="relu", dtype=torch.float32):
    torch.manual_seed(2)
    conv = CONVS[name]()
    module = rf.FusedConvBN(conv, nn.BatchNorm2d(conv.out_channels, eps=1e-3), act)
    return randomize(module).eval().to(dtype)


def plain(fused):
    """conv, bn and the activation as a plain sequence of copies."""
    layers = [copy.deepcopy(fused.conv), copy.deepcopy(fused.bn)]
    return nn.Sequential(*layers, nn.ReLU() if fused.act == "relu" else nn.Identity())


def image(channels, size=(11, 9), dtype=torch.float32):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("force", ["ours", "torch", "none"])
@pytest.mark.parametrize("act", ["relu", "none"])
@pytest.mark.parametrize("name", CONVS)
def test_outputs(name, act, force, dtype):
    fused = build(name, act, dtype)
    x = image(fused.conv.in_channels, dtype=dtype)
    with torch.no_grad(), select.forced(force):
        got, theirs = fused(x), plain(fused)(x)
        assert_close_as_eager(got, theirs, plain(fused).double()(x.double()), allowed=2e-6)
    assert fused.status().fused
    assert is_dense_channels_last(got)
    assert act == "none" or got.min() >= 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    fused = build("stem")
    x = LAYOUTS[layout](image(3))
    with torch.no_grad():
        assert_same(fused(x), fused(x.clone()))
        torch.testing.assert_close(fused(x), plain(fused)(x))


def test_children_are_the_modules_themselves():
    conv, bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    fused = rf.FusedConvBN(conv, bn)
    assert fused.conv is conv
    assert fused.bn is bn
    assert fused.act == "relu"
    assert list(fused.state_dict()) == [
        *("conv.weight", "conv.bias", "bn.weight", "bn.bias"),
        *("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"),
    ]
    assert rf.FusedConvBN(conv, bn, "none").act == "none"
    assert rf.FusedConvBN(conv.eval(), bn.eval()).training is False


def test_activation_set_later():
    fused = build("3x3")
    fused.act = "none"
    with torch.no_grad():
        got = fused(image(16))
    assert_same(got, plain(fused)(image(16)).detach())
    assert got.min() < 0


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(how):
    fused = build("3x3")
    twin = how(fused)
    with torch.no_grad():
        assert_same(twin(image(16)), fused(image(16)))
        twin.bn.bias += 1
        torch.testing.assert_close(twin(image(16)), plain(twin)(image(16)))


class OddConv(nn.Conv2d):
    pass


BAD = [
    ((nn.Conv1d(3, 4, 3), nn.BatchNorm2d(4)), TypeError, "conv must be a Conv2d, got Conv1d"),
    (
        (nn.Conv2d(3, 4, 3), nn.BatchNorm1d(4)),
        TypeError,
        "bn must be a BatchNorm2d, got BatchNorm1d",
    ),
    ((nn.Conv2d(3, 4, 3), None), TypeError, "bn must be a BatchNorm2d, got NoneType"),
    (("conv", nn.BatchNorm2d(4)), TypeError, "conv must be a Conv2d, got str"),
    (
        (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), "gelu"),
        ValueError,
        'act must be "relu" or "none", got "gelu"',
    ),
    ((nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5)), ValueError, "bn has 5 channels, conv 4"),
    (
        (OddConv(3, 4, 3), nn.BatchNorm2d(4)),
        ValueError,
        "conv is a OddConv, not a plain Conv2d",
    ),
    (
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)),
        ValueError,
        "conv pads with 'reflect', not with zeros",
    ),
    (
        (nn.Conv2d(3, 4, 2, padding="same"), nn.BatchNorm2d(4)),
        ValueError,
        "conv pads one side more than the other",
    ),
    (
        (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
        ValueError,
        "bn keeps no running statistics",
    ),
    (
        (nn.Conv2d(3, 4, 3).double(), nn.BatchNorm2d(4)),
        ValueError,
        "mixes float32, float64",
    ),
    (
        (nn.Conv2d(3, 4, 3, device="meta"), nn.BatchNorm2d(4)),
        ValueError,
        "lies on several devices (cpu, meta)",
    ),
    (
        (nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)),
        ValueError,
        "conv is a LazyConv2d that has not seen its shapes yet",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "sentence"), BAD)
def test_bad_arguments(arguments, error, sentence):
    with pytest.raises(error) as caught:
        rf.FusedConvBN(*arguments)
    assert str(caught.value) == f"FusedConvBN: {sentence}"


def hooked(conv):
    conv.register_forward_hook(lambda *_: None)
    return conv


def parametrized(conv):
    return parametrize.register_parametrization(conv, "weight", nn.Identity())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [(hooked, "conv has a forward hook"), (parametrized, "conv is parametrized")],
)
def test_altered_convolution(change, sentence):
    with pytest.raises(ValueError, match="FusedConvBN") as caught:
        rf.FusedConvBN(change(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    assert sentence in str(caught.value)


def test_bad_inputs():
    fused = build("3x3")
    for x, error, sentence in (
        (image(5), ValueError, "x must have 16 channels, got shape (2, 5, 11, 9)"),
        (image(16).double(), TypeError, "x must be float32, as the weights are, got float64"),
        (3, TypeError, "x must be a torch.Tensor, got int"),
    ):
        with pytest.raises(error) as caught:
            fused(x)
        assert str(caught.value) == f"FusedConvBN: {sentence}"
    small = rf.FusedConvBN(nn.Conv2d(3, 4, 7), nn.BatchNorm2d(4)).eval()
    sentence = "^FusedConvBN: x must be at least as large as the kernel: the padded input is 4 x 9"
    with torch.no_grad(), pytest.raises(ValueError, match=sentence):
        small(image(3, (4, 9)))


def test_bad_input_of_a_site_names_its_convolution():
    with pytest.raises(ValueError, match=r"^convolution 0: x must have 6 channels, got shape"):
        fused_sequence()(image(5))


# ---- sites in a parent ---------------------------------------------------------------------------


def sequence(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(6, 9, 3, padding=1), nn.BatchNorm2d(9), nn.ReLU(), nn.Tanh())
    return randomize(net).eval()


def fused_sequence():
    net = sequence()
    install_site(net, Site(ConvUnit(net[0], net[1], "relu", "0", "1"), "2"))
    return net


def test_slots_share_everything():
    plain_net, net = sequence(), fused_sequence()
    assert [type(m) for m in net] == [ConvSlot, BatchNormSlot, ReLUSlot, nn.Tanh]
    assert list(net.state_dict()) == list(plain_net.state_dict())
    assert [n for n, _ in net.named_modules()] == [n for n, _ in plain_net.named_modules()]
    with torch.no_grad():
        torch.testing.assert_close(net(image(6)), plain_net(image(6)))
    assert net[0].status().fused


class Double(nn.Module):
    def forward(self, w):
        return 2 * w


@pytest.mark.parametrize("index", [0, 1])
def test_parametrization_on_a_slot(index):
    """The slot is what the user sees as the layer: a parametrization of it must count."""
    net, want = fused_sequence(), sequence()
    for target in (net, want):
        parametrize.register_parametrization(target[index], "weight", Double())
    with torch.no_grad():
        assert_same(net(image(6)), want(image(6)))
        assert not net[0].status().fused
        assert f"{index} became a Parametrized" in net[0].status().reason
    for target in (net, want):
        for p in target.parameters():
            p.grad = None
        target(image(6)).sum().backward()
    for a, b in zip(net.parameters(), want.parameters(), strict=True):
        assert_same(a.grad, b.grad)
    parametrize.remove_parametrizations(net[index], "weight", leave_parametrized=False)
    with torch.no_grad():
        torch.testing.assert_close(net(image(6)), sequence()(image(6)))
    assert net[0].status().fused


@pytest.mark.parametrize("index", [0, 1])
def test_pruning_a_slot(index):
    net, want = fused_sequence(), sequence()
    for target in (net, want):
        prune.l1_unstructured(target[index], "weight", 0.5)
    with torch.no_grad():
        assert_same(net(image(6)), want(image(6)))
    assert list(net.state_dict()) == list(want.state_dict())
    assert net[0].status().reason == f"{index} has hooks"
    for target in (net, want):
        prune.remove(target[index], "weight")
    with torch.no_grad():
        torch.testing.assert_close(net(image(6)), want(image(6)))
    assert net[0].status().fused


@pytest.mark.parametrize("index", [0, 1, 2])
def test_hooks_on_slots_see_what_eager_shows(index):
    net, want = fused_sequence(), sequence()
    seen = []
    for target in (net, want):
        target[index].register_forward_hook(
            lambda module, args, output: seen.append((args[0], output)) or output + 1
        )
    with torch.no_grad():
        assert_same(net(image(6)), want(image(6)))
    for a, b in zip(*seen, strict=True):
        assert_same(a, b)
    assert net[0].status().reason == f"{index} has hooks"


@pytest.mark.parametrize(
    ("index", "new"),
    [(0, nn.Conv2d(6, 9, 1)), (1, nn.Identity()), (1, nn.GroupNorm(3, 9)), (2, nn.LeakyReLU())],
)
def test_replaced_layers_of_a_site(index, new):
    net, want = fused_sequence(), sequence()
    net[index] = want[index] = new
    with torch.no_grad():
        assert_same(net(image(6)), want(image(6)))


def test_settings_made_through_slots():
    """The slots stand for the layers: eps, stride and the rest reach the layers themselves."""
    net, want = fused_sequence(), sequence()
    for target in (net, want):
        target[1].eps = 0.25
        target[0].stride = (2, 1)
        target[0].dilation = (1, 2)
        target[1].momentum = 0.5
    with torch.no_grad():
        torch.testing.assert_close(net(image(6)), want(image(6)))
    for target in (net, want):
        target[0].padding_mode = "circular"
        target[0]._reversed_padding_repeated_twice = [1, 1, 1, 1]
    with torch.no_grad():
        assert_same(net(image(6)), want(image(6)))
    for target in (net, want):
        target.train()(image(6))
    assert_same(net[1].running_mean, want[1].running_mean)


def test_norm_of_a_site_in_training_mode():
    net, want = fused_sequence(), sequence()
    for target in (net, want):
        target[1].train()
    with torch.no_grad():
        assert_same(net(image(6)), want(image(6)))
        assert net[0].status().reason == "1 uses batch statistics"
        for target in (net, want):
            target[1].eval()
        torch.testing.assert_close(net(image(6)), want(image(6)))
    assert net[0].status().fused


def test_unfusing_a_site_puts_the_layers_back():
    net = sequence()
    layers = list(net)
    install_site(net, Site(ConvUnit(net[0], net[1], "relu", "0", "1"), "2"))
    rf.unfuse(net, inplace=True)
    assert all(a is b for a, b in zip(net, layers, strict=True))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_site_are_independent(how):
    net = fused_sequence()
    with torch.no_grad():
        before = net(image(6))
        twin = how(net)
        assert_same(twin(image(6)), before)
        assert twin[0].status().fused
        twin[1].bias += 1
        twin[0].weight *= 2
        assert not torch.equal(twin(image(6)), before)
        assert_same(net(image(6)), before)
    rf.unfuse(twin, inplace=True)
    assert type(twin[0]) is nn.Conv2d
    assert type(net[0]) is ConvSlot
    assert_same(twin(image(6)), how(twin)(image(6)))
