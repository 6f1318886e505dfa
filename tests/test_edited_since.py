"""Layers that users edit after fusing: patched, compiled, parametrized, with other settings or with
tensors that do not fit. The fused module computes what eager would, or raises what eager raises."""

from __future__ import annotations

import copy
import threading
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, randomize
from torch import nn
from torch.nn.utils import parametrize

import resnet_fused as rf

pytestmark = pytest.mark.usefixtures("one_thread")


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


@pytest.fixture(autouse=True)
def no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def stem():
    return randomize(Stem()).eval()


@pytest.fixture
def block():
    return randomize(rf.reference.Residual(64, 64)).eval()


IMAGE, MAP = torch.randn(2, 3, 12, 12), torch.randn(1, 64, 8, 8)


def close(found, want):
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def row(fused, name):
    return next(row for row in rf.report(fused) if row.name == name)


@pytest.mark.parametrize(
    ("layer", "function"),
    [("relu", F.silu), ("bn", lambda y: 2 * y), ("conv", lambda x: x.repeat(1, 3, 1, 1)[:, :8])],
)
@pytest.mark.parametrize("warm", [False, True])
def test_a_forward_patched_on_a_layer_of_a_site(stem, layer, function, warm):
    fused = rf.fuse(stem)
    if warm:
        fused(IMAGE), fused(IMAGE)
    for net in (stem, fused):
        getattr(net, layer).forward = function
    close(fused(IMAGE), stem(IMAGE))
    assert row(fused, "conv").reason == f"forward of {layer} was patched"


def test_the_forward_of_a_convolution_compiled_by_itself(stem):
    fused = rf.fuse(stem)
    fused.conv.forward = torch.compile(fused.conv.forward, backend="eager")
    close(fused(IMAGE), stem(IMAGE))


def test_layers_of_a_site_compiled_by_themselves(stem):
    fused = rf.fuse(stem)
    for layer in fused.modules():
        if isinstance(layer, nn.Conv2d):
            layer.compile(backend="eager")
    close(fused(IMAGE), stem(IMAGE))
    assert row(fused, "conv").reason == "conv is compiled on its own"


SETTINGS = [("stride", 1), ("stride", 2), ("padding", 0), ("dilation", 2), ("padding", (1, 2))]


@pytest.mark.parametrize(("setting", "value"), SETTINGS)
@pytest.mark.parametrize("before", [True, False])
def test_settings_that_are_ints(stem, setting, value, before):
    """As surgery on dilations leaves them; PyTorch's convolution takes ints."""
    fused = rf.fuse(stem)
    setattr(stem.conv, setting, value)
    if before:
        fused = rf.fuse(stem)
    else:
        setattr(fused.conv, setting, value)
    close(fused(IMAGE), stem(IMAGE))
    assert row(fused, "conv").fused


@pytest.mark.parametrize("before", [True, False])
def test_a_block_dilated_by_ints(block, before):
    def edit(net):
        for conv in (net.conv1, net.conv2):
            conv.dilation = conv.padding = 2
            conv.kernel_size = 3
        return net

    if before:
        fused = rf.fuse(edit(block))
    else:
        fused = edit(rf.fuse(block))
        edit(block)
    close(fused(MAP), block(MAP))
    assert row(fused, "").fused


def test_a_list_that_is_edited_in_place(stem):
    fused = rf.fuse(stem)
    for net in (stem, fused):
        net.conv.stride = [1, 1]
    for _ in range(2):
        close(fused(IMAGE), stem(IMAGE))
    for net in (stem, fused):
        net.conv.stride[0] = 2
    close(fused(IMAGE), stem(IMAGE))
    assert row(fused, "conv").reason == "conv has stride [2, 1]"


def test_padding_that_is_no_longer_the_same(block):
    block.conv1.padding = "same"
    fused = rf.fuse(block)
    close(fused(MAP), block(MAP))
    assert row(fused, "").fused
    for net in (block, fused):
        net.conv1.weight = nn.Parameter(net.conv1.weight[..., 1:, 1:].clone())
    close(fused(MAP), block(MAP))
    assert row(fused, "").reason == "conv1 pads one side more than the other"


def test_padding_same_with_a_stride(block):
    block.conv1.padding = "same"
    fused = rf.fuse(block)
    fused(MAP)
    for net in (block, fused):
        net.conv1.stride = 2
    with pytest.raises(RuntimeError) as wanted:
        block(MAP)
    with pytest.raises(RuntimeError) as caught:
        fused(MAP)
    assert str(caught.value) == str(wanted.value)


def test_a_weight_that_is_looked_at_in_another_shape(stem):
    """Through `.data`: the same tensor, version, address and values."""
    fused = rf.fuse(stem)
    fused(IMAGE), fused(IMAGE)
    for net in (stem, fused):
        net.conv.weight.data = net.conv.weight.data.view(8, 3, 1, 9)
    close(fused(IMAGE), stem(IMAGE))


def test_statistics_that_are_no_buffers_any_more(block):
    fused = rf.fuse(block)
    fused(MAP)
    for net in (block, fused):
        mean = net.bn1.running_mean.clone()
        del net.bn1.running_mean
        net.bn1.running_mean = mean
    close(fused(MAP), block(MAP))
    assert not row(fused, "").fused


@pytest.mark.parametrize("value", [(1, 1, 1), 1.0, "all", 0])
def test_a_setting_that_is_none_is_left_to_eager(block, value):
    block.conv1.stride = value
    fused = rf.fuse(block)
    assert row(fused, "").reason == f"conv1 has stride {value!r}"


def halved(tensor):
    return nn.Parameter(tensor[:48].clone())


EDITS = {
    "filters": (lambda b: setattr(b.conv1, "weight", halved(b.conv1.weight)),
                "conv1.bias has shape (64,), conv1 48 channels"),
    "bias": (lambda b: setattr(b.conv1, "bias", nn.Parameter(torch.ones(1))),
             "conv1.bias has shape (1,), conv1 64 channels"),
    "mean": (lambda b: setattr(b.bn1, "running_mean", torch.zeros(1)),
             "bn1.running_mean has shape (1,), conv1 64 channels"),
    "scale": (lambda b: setattr(b.bn2, "weight", nn.Parameter(torch.ones(1))),
              "bn2.weight has shape (1,), conv2 64 channels"),
    "no variance": (lambda b: setattr(b.bn1, "running_var", None), "bn1 has no running_var"),
    "no weight": (lambda b: setattr(b.conv1, "weight", None),
                  "conv1.weight has no four dimensions"),
    "three dimensions": (lambda b: setattr(b.conv2, "weight", nn.Parameter(torch.ones(64, 64, 3))),
                         "conv2.weight has no four dimensions"),
    "a negative eps": (lambda b: setattr(b.bn1, "eps", -0.1), "bn1 has eps -0.1"),
    "other dtypes": (lambda b: (b.conv2.double(), b.bn2.double()), "mixes float32, float64"),
    "fewer inputs": (lambda b: setattr(b.conv2, "weight", nn.Parameter(b.conv2.weight[:, :48])),
                     "conv1 gives 64 channels, conv2 takes 48"),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("warm", [False, True])
def test_tensors_that_do_not_belong_together(block, edit, warm):
    change, reason = EDITS[edit]
    fused = rf.fuse(block)
    if warm:
        fused(MAP), fused(MAP)
    change(block), change(fused)
    with pytest.raises((RuntimeError, TypeError, ValueError)) as wanted:
        block(MAP)
    with pytest.raises(type(wanted.value)) as caught:
        fused(MAP)
    assert str(caught.value) == str(wanted.value)
    assert row(fused, "").reason == reason


def test_a_block_made_narrower_stays_fused(block):
    """As pruning whole channels does; the layers' own out_channels stay what they were."""

    def narrow(net):
        net.conv1.weight, net.conv1.bias = halved(net.conv1.weight), halved(net.conv1.bias)
        for key in ("weight", "bias"):
            setattr(net.bn1, key, halved(getattr(net.bn1, key)))
        for key in ("running_mean", "running_var"):
            setattr(net.bn1, key, getattr(net.bn1, key)[:48].clone())
        net.conv2.weight = nn.Parameter(net.conv2.weight[:, :48].clone())

    fused = rf.fuse(block)
    fused(MAP)
    narrow(block), narrow(fused)
    close(fused(MAP), block(MAP))
    assert row(fused, "").fused


class Times(nn.Module):
    def forward(self, weight):
        return weight * 1.5


@pytest.mark.parametrize("layer", ["conv", "bn"])
def test_unfuse_takes_parametrizations_along(stem, layer):
    fused = rf.fuse(stem)
    for net in (stem, fused):
        parametrize.register_parametrization(getattr(net, layer), "weight", Times())
    assert_same(rf.unfuse(fused)(IMAGE), stem(IMAGE))
    plain = rf.unfuse(fused, inplace=True)
    assert_same(plain(IMAGE), stem(IMAGE))
    parametrize.remove_parametrizations(getattr(plain, layer), "weight")
    assert type(getattr(plain, layer)) is type(getattr(Stem(), layer))
    assert_same(plain(IMAGE), stem(IMAGE))


def test_unfuse_takes_weight_norm_along(stem):
    fused = rf.fuse(stem)
    nn.utils.parametrizations.weight_norm(fused.conv)
    close(rf.unfuse(fused)(IMAGE), stem(IMAGE))
    assert rf.verify(fused, fused, IMAGE).ok


def test_unfuse_takes_a_patched_forward_along(block):
    fused = rf.fuse(block)
    fused.forward = lambda x: 2 * x
    assert_same(rf.unfuse(fused)(MAP), 2 * MAP)


@pytest.mark.parametrize("layer", ["conv", "relu"])
def test_unfuse_takes_a_forward_that_calls_the_old_one_along(stem, layer):
    fused = rf.fuse(stem)
    for net in (stem, fused):
        patch_twice(getattr(net, layer))
    for plain in (rf.unfuse(fused), rf.unfuse(fused, inplace=True)):
        close(plain(IMAGE), stem(IMAGE))


def patch_twice(layer):
    old = layer.forward
    layer.forward = lambda x: 2 * old(x)


def test_unfuse_takes_a_blocks_forward_that_calls_the_old_one_along(block):
    fused = rf.fuse(block)
    patch_twice(block), patch_twice(fused)
    close(fused(MAP), block(MAP))
    plain = rf.unfuse(fused, inplace=True)
    close(plain(MAP), block(MAP))
    block.train(), plain.train()
    close(plain(MAP), block(MAP))


def test_unfuse_binds_a_patched_method_to_the_layer_it_gives(stem):
    fused = rf.fuse(stem)
    fused.conv.forward = MethodType(lambda conv, x: type(conv).forward(conv, x), fused.conv)
    plain = rf.unfuse(fused, inplace=True)
    assert plain.conv.forward.__self__ is plain.conv
    assert_same(plain(IMAGE), stem(IMAGE))


def test_unfuse_of_a_parametrized_layer_with_two_names(stem):
    fused = rf.fuse(stem)
    fused.alias = fused.conv
    for net in (stem, fused):
        parametrize.register_parametrization(net.conv, "weight", Times())
    assert_same(rf.unfuse(fused, inplace=True)(IMAGE), stem(IMAGE))


def test_a_shallow_copy_has_its_own_flags(block):
    fused = rf.fuse(block)
    fused(MAP), fused(MAP)
    twin = copy.copy(fused)
    twin.training = True
    block.training = True
    close(twin(MAP), block(MAP))
    assert not fused.training


def test_an_eps_that_is_a_tensor(stem):
    fused = rf.fuse(stem)
    for net in (stem, fused):
        net.bn.eps = torch.tensor(1e-5)
    fused(IMAGE), fused(IMAGE)
    for net in (stem, fused):
        net.bn.eps.fill_(3.0)
    close(fused(IMAGE), stem(IMAGE))


@pytest.mark.parametrize("layer", ["conv", "bn", "relu"])
@pytest.mark.parametrize("run", ["eager", "compiled", "exported"])
def test_a_layer_of_a_site_that_is_a_copy(stem, layer, run):
    fused = rf.fuse(stem)
    fused(IMAGE), fused(IMAGE)
    setattr(fused, layer, copy.deepcopy(getattr(fused, layer)))
    if run == "compiled":
        y = torch.compile(fused, backend="eager", fullgraph=True)(IMAGE)
    elif run == "exported":
        y = torch.export.export(fused, (IMAGE,)).module()(IMAGE)
    else:
        y = fused(IMAGE)
    close(y, stem(IMAGE))


def test_a_convolution_fused_by_torch(stem):
    fused = rf.fuse(stem)
    fused.conv = nn.utils.fusion.fuse_conv_bn_eval(fused.conv, fused.bn)
    fused.bn = nn.Identity()
    close(fused(IMAGE), stem(IMAGE))
    close(torch.compile(fused, backend="eager", fullgraph=True)(IMAGE), stem(IMAGE))


def test_a_copied_layer_leaves_its_net_behind(stem):
    fused = rf.fuse(stem)
    fused.lock = threading.Lock()  # which cannot be copied
    conv = copy.deepcopy(fused.conv)
    close(conv(IMAGE), stem.conv(IMAGE))
    close(copy.deepcopy(conv)(IMAGE), stem.conv(IMAGE))


def test_gradients_enabled_in_inference_mode(stem):
    net = nn.Sequential(stem, rf.reference.Residual(8, 8)).eval()
    fused = rf.fuse(net)
    for _ in range(2):
        with torch.inference_mode(), torch.enable_grad():
            close(fused(IMAGE), net(IMAGE))


def test_onnx_export_sees_pytorchs_operations(stem, monkeypatch):
    """The exporter that goes through torch.export, which knows no op of ours."""
    from torch.onnx._internal.exporter import _flags

    fused = rf.fuse(nn.Sequential(stem, rf.reference.Residual(8, 8)).eval())
    monkeypatch.setattr(_flags, "_is_onnx_exporting", True)
    program = torch.export.export(fused, (IMAGE,), strict=False)
    assert not [node for node in program.graph.nodes if "resnet_fused" in str(node.target)]
    monkeypatch.undo()
    close(program.module()(IMAGE), fused(IMAGE))
    program = torch.export.export(fused, (IMAGE,), strict=False)
    assert [node for node in program.graph.nodes if "resnet_fused" in str(node.target)]


@pytest.mark.parametrize("call", [lambda f: f(), lambda f: f(MAP, MAP), lambda f: f(image=MAP)])
def test_arguments_that_no_forward_takes(block, call):
    with pytest.raises(TypeError, match=r"^FusedResidual: "):
        call(rf.fuse(block))


def test_from_block_says_what_it_got(block):
    for given, message in (
        (nn.Conv2d(3, 3, 3), "block must hold convolutions, got a Conv2d"),
        (rf.fuse(block), "block is fused already"),
    ):
        with pytest.raises(rf.NoMatch) as caught:
            rf.FusedResidual.from_block(given)
        assert str(caught.value) == f"FusedResidual.from_block: {message}"


def test_a_block_class_that_is_none():
    with pytest.raises(TypeError) as caught:
        rf.models.resnet18(block=nn.Linear)
    assert str(caught.value).startswith(
        "resnet18: block must take (input_channels, num_channels, use_1x1conv, strides) as "
        "FusedResidual or reference.Residual do, got Linear: "
    )


@pytest.mark.parametrize("layout", ["sparse", "mkldnn"])
def test_a_head_takes_the_layouts_that_eager_takes(layout):
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    net = nn.Sequential(rf.reference.Residual(8, 8), *head).eval()
    fused = rf.fuse(net)
    if layout == "sparse":
        x = torch.randn(2, 8).to_sparse()
        close(fused[3](x), net[3](x))
        for linear in (net[3], fused[3]):
            linear.weight = nn.Parameter(linear.weight.to_sparse_csr())
        close(fused[3](x.to_dense()), net[3](x.to_dense()))
    else:
        x = torch.randn(2, 8, 3, 3).to_mkldnn()
        close(fused[1](x).to_dense(), net[1](x).to_dense())
