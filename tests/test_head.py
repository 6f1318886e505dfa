"""The layers behind the last block: the mean over the map and the linear layer of a few images."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import KERNEL_DTYPES, LAYOUTS, assert_same, needs_extension
from gpu_cases import multiplied
from torch import nn
from torch.nn.utils import parametrize, prune

import resnet_fused as rf
from resnet_fused import head
from resnet_fused._gpu_kernels import cuda_error

pytestmark = [needs_extension, pytest.mark.kernels]

_ops = torch.ops.resnet_fused


# ---- the ops -------------------------------------------------------------------------------------

ERROR = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def assert_near(got, want64, dtype, slack=1):
    assert got.dtype == dtype
    error = (got.double() - want64).norm() / want64.norm().clamp_min(1e-30)
    assert error <= slack * ERROR[dtype], float(error)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 512, 7, 7), (3, 100, 5, 6), (2, 1, 1, 1), (8, 33, 1, 9), (1, 2048, 32, 32), (0, 4, 3, 3)],
)
def test_global_avg_pool(shape, dtype, isa):
    x = (torch.randn(shape) + 1).to(dtype)
    for layout in LAYOUTS.values():
        laid = layout(x)
        y = _ops.global_avg_pool(laid)
        want = laid.double().mean((2, 3), keepdim=True)
        assert y.shape == want.shape
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_near(y, want, dtype)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("images", "inputs", "outputs"),
    [
        (1, 512, 10),
        (1, 2048, 1000),
        (8, 37, 5),
        (2, 1, 1),
        (3, 16, 4),
        (1, 0, 3),
        (0, 5, 3),
        (1, 5, 0),
    ],
)
def test_linear(images, inputs, outputs, bias, dtype, isa):
    x, weight = torch.randn(images, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    b = torch.randn(outputs).to(dtype) if bias else None
    want = F.linear(x.double(), weight.double(), b if b is None else b.double())
    got = _ops.linear(x, weight, b)
    assert got.shape == want.shape
    assert_near(got, want, dtype)
    spread = _ops.linear(x.t().contiguous().t(), weight.t().contiguous().t(), b)
    assert_same(spread, got)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_nan_stays_where_it_is(dtype, isa):
    x = torch.zeros(2, 40, 3, 3, dtype=dtype)
    x[1, 7, 2, 2] = float("nan")
    pooled = _ops.global_avg_pool(x)
    assert pooled.isnan().nonzero().tolist() == [[1, 7, 0, 0]]
    y = _ops.linear(pooled.flatten(1), torch.ones(5, 40, dtype=dtype))
    assert y.isnan().tolist() == [[False] * 5, [True] * 5]


def test_sums_are_kept_in_float32(isa):
    x = torch.full((1, 3, 64, 64), 1.0, dtype=torch.bfloat16)
    x[..., 0, 0] = 256  # in bfloat16, 256 + 1 is 256
    want = torch.tensor((256 + 4095) / 4096).bfloat16()
    assert_same(_ops.global_avg_pool(x).flatten(), want.expand(3))
    row = x.reshape(3, -1)[:1]
    assert _ops.linear(row, torch.ones_like(row)).item() == torch.tensor(4351.0).bfloat16().item()


X4, X2, W = torch.zeros(1, 4, 3, 3), torch.zeros(2, 4), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: _ops.global_avg_pool(X4[0]),
            "global_avg_pool: x must be 4-D (N, C, H, W), got shape (4, 3, 3)",
        ),
        (
            lambda: _ops.global_avg_pool(X4[..., :0]),
            "global_avg_pool: x must have pixels, got shape (1, 4, 3, 0)",
        ),
        (
            lambda: _ops.global_avg_pool(X4.double()),
            "global_avg_pool: x must be float32, bfloat16 or float16, got float64",
        ),
        (
            lambda: _ops.global_avg_pool(X4.int()),
            "global_avg_pool: x must be float32, bfloat16, float16 or float64, got int32",
        ),
        (lambda: _ops.linear(X4, W), "linear: x must be 2-D (N, inputs), got shape (1, 4, 3, 3)"),
        (
            lambda: _ops.linear(X2, W.t()),
            "linear: weight must be 2-D (outputs, inputs) with the 4 inputs of x, got shape (4, 5)",
        ),
        (lambda: _ops.linear(X2, W.half()), "linear: weight must be float32, got float16"),
        (
            lambda: _ops.linear(X2, W, torch.zeros(4)),
            "linear: bias must have shape (5,), got (4,)",
        ),
        (
            lambda: _ops.linear(X2, W, torch.zeros(5).half()),
            "linear: bias must be float32, got float16",
        ),
        (
            lambda: _ops.linear(X2.requires_grad_(), W),
            "linear: is forward only: call it under torch.no_grad(), or conv_bn_act for gradients",
        ),
    ],
)
def test_refuses(call, sentence):
    with pytest.raises(RuntimeError) as caught:
        call()
    assert str(caught.value) == sentence


# ---- the modules ---------------------------------------------------------------------------------


class Net(nn.Module):
    """In torchvision's style: flatten is a function."""

    def __init__(self, size=1, bias=True):
        super().__init__()
        self.block = rf.reference.Residual(8, 8)
        self.avgpool = nn.AdaptiveAvgPool2d(size)
        self.fc = nn.Linear(8, 5, bias=bias)

    def forward(self, x):
        return self.fc(torch.flatten(self.avgpool(self.block(x)), 1))


def sequential():
    block = rf.reference.Residual(8, 8)
    return nn.Sequential(block, nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(8, 5))


X = torch.randn(2, 8, 9, 7, generator=torch.Generator().manual_seed(1))


def calls(net, x, monkeypatch):
    """What the net gives under no_grad, and the head's ops that it called."""
    seen = []
    for name in ("_global_avg_pool", "_linear"):
        op = getattr(head, name)

        def counted(*args, op=op, name=name):
            seen.append(name)
            return op(*args)

        monkeypatch.setattr(head, name, counted)
    with torch.no_grad():
        y = net(x)
    monkeypatch.undo()
    return y, seen


BOTH = ["_global_avg_pool", "_linear"]


@pytest.mark.parametrize("build", [Net, lambda: Net(bias=False), sequential])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_fuse_takes_the_head(build, dtype, monkeypatch):
    net = build().eval().to(dtype)
    fused = rf.fuse(net)
    y, seen = calls(fused, X.to(dtype), monkeypatch)
    assert seen == BOTH
    want = copy.deepcopy(net).double()(X.to(dtype).double())
    assert_near(y, want, dtype, slack=3)  # for the block before it
    assert list(fused.state_dict()) == list(net.state_dict())
    assert len(rf.report(fused)) == 1, "no rows of the report"


def test_the_layers_are_of_their_classes_still():
    fused = rf.fuse(Net().eval())
    assert isinstance(fused.avgpool, nn.AdaptiveAvgPool2d)
    assert isinstance(fused.fc, nn.Linear)
    assert (fused.fc.in_features, fused.fc.out_features) == (8, 5)
    assert fused.fc.weight is fused.state_dict(keep_vars=True)["fc.weight"]
    fused.fc.reset_parameters()


@pytest.mark.parametrize("inplace", [True, False])
def test_unfuse_puts_them_back(inplace):
    net = Net().eval()
    fused = rf.fuse(net)
    again = rf.unfuse(rf.fuse(fused), inplace=inplace)
    assert type(again.avgpool) is nn.AdaptiveAvgPool2d
    assert type(again.fc) is nn.Linear
    assert_same(again(X), net(X))


@pytest.mark.parametrize(
    "net",
    [
        Net(size=2),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
        nn.Sequential(nn.Flatten(), nn.Linear(8 * 63, 5)),
    ],
)
def test_leaves_other_layers_alone(net):
    fused = rf.fuse(net.eval())
    assert not any(isinstance(m, head.HeadLayer) for m in fused.modules())


class Squeeze(nn.Module):
    """A block that is left as it is, with a pool and linear layers inside."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        scale = torch.sigmoid(self.fc(self.pool(y).flatten(1)))
        return F.relu(y * scale[..., None, None] + x)


def test_blocks_that_are_left_keep_their_layers():
    net = nn.Sequential(rf.reference.Residual(8, 8), Squeeze()).eval()
    fused = rf.fuse(net)
    assert not any(isinstance(m, head.HeadLayer) for m in fused.modules())
    rows = {row.name: row for row in rf.report(fused)}
    assert rows["0"].fused
    assert not rows["1"].fused
    assert rows["1"].reason == {row.name: row for row in rf.report(net)}["1"].reason


def test_layers_with_hooks_are_left_alone():
    net = Net().eval()
    net.avgpool.register_forward_hook(lambda m, args, y: y * 2)
    net.fc.register_forward_pre_hook(lambda m, args: None)
    fused = rf.fuse(net)
    assert type(fused.avgpool) is nn.AdaptiveAvgPool2d
    assert type(fused.fc) is nn.Linear
    with torch.no_grad():
        torch.testing.assert_close(fused(X), net(X), rtol=1e-4, atol=1e-4)


def test_hooks_set_later_see_what_they_did():
    fused = rf.fuse(Net().eval())
    shapes = []
    fused.avgpool.register_forward_hook(lambda m, args, y: shapes.append(tuple(y.shape)))
    fused.fc.register_forward_hook(lambda m, args, y: y + 1)
    with torch.no_grad():
        y = fused(X)
        assert shapes == [(2, 8, 1, 1)]
        plain = rf.unfuse(fused)
        torch.testing.assert_close(y, plain(X), rtol=1e-4, atol=1e-4)


def edits():
    def own(fused):
        fused.fc.weight.data.mul_(2)

    def replaced(fused):
        fused.fc.weight = nn.Parameter(torch.randn(5, 8))

    def parametrized(fused):
        class Twice(nn.Module):
            def forward(self, weight):
                return weight * 2

        parametrize.register_parametrization(fused.fc, "weight", Twice())

    def parametrized_bias(fused):
        class Half(nn.Module):
            def forward(self, bias):
                return bias / 2

        parametrize.register_parametrization(fused.fc, "bias", Half())

    def pruned(fused):
        prune.l1_unstructured(fused.fc, "weight", 0.5)

    def no_bias(fused):
        fused.fc.bias = None

    def new_layer(fused):
        fused.fc = nn.Linear(8, 3)

    def pool_size(fused):
        fused.avgpool.output_size = (2, 2)
        fused.fc = nn.Linear(32, 5)

    def patched(fused):
        fused.fc.forward = lambda x: x + 1

    return [
        own,
        replaced,
        parametrized,
        parametrized_bias,
        pruned,
        no_bias,
        new_layer,
        pool_size,
        patched,
    ]


@pytest.mark.parametrize("edit", edits(), ids=lambda edit: edit.__name__)
def test_edits(edit):
    net = Net().eval()
    fused = rf.fuse(net)
    with torch.no_grad():
        fused(X)
        for each in (net, fused):
            torch.manual_seed(1)
            edit(each)
        torch.testing.assert_close(fused(X), net(X), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(fused)(X), net(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda net, x: (net, x.requires_grad_()),
        lambda net, x: (net.double(), x.double()),
        lambda net, x: (net, x.repeat(5, 1, 1, 1)),
    ],
)
def test_what_the_kernels_do_not_take(change, monkeypatch):
    fused, x = change(rf.fuse(Net().eval()), X.clone())
    plain = rf.unfuse(fused)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)
    y, seen = calls(fused, x.detach(), monkeypatch)
    assert "_linear" not in seen or x.requires_grad
    torch.testing.assert_close(y, plain(x).detach(), rtol=1e-4, atol=1e-4)


def test_hooks_on_the_original_itself():
    fused = rf.fuse(Net().eval())
    with torch.no_grad():
        before = fused(X)
        fused.fc.original().register_forward_hook(lambda m, args, y: y + 1)
        torch.testing.assert_close(fused(X), before + 1, rtol=1e-4, atol=1e-5)


def test_gradients_and_training():
    fused = rf.fuse(Net()).train()
    fused(X).sum().backward()
    assert fused.fc.weight.grad is not None
    assert fused.fc.weight.grad.abs().sum() > 0


def test_images_without_a_batch():
    fused = rf.fuse(Net().eval())
    with torch.no_grad():
        assert fused.avgpool(torch.ones(8, 3, 3)).shape == (8, 1, 1)
        assert fused.fc(torch.ones(8)).shape == (5,)
        assert fused.fc(input=torch.ones(2, 8)).shape == (2, 5)
        assert fused.fc(torch.ones(2, 3, 8)).shape == (2, 3, 5)


def test_wrong_inputs_are_refused_as_by_the_plain_layers():
    fused, net = rf.fuse(Net().eval()), Net().eval()
    for x in (torch.ones(2, 7), torch.ones(2, 8).double(), torch.ones(2, 8).int(), None):
        with torch.no_grad():
            with pytest.raises((RuntimeError, TypeError)) as got:
                fused.fc(x)
            with pytest.raises(type(got.value)) as want:
                net.fc(x)
            assert str(got.value) == str(want.value)


def test_compiled_and_exported_whole():
    fused = rf.fuse(Net().eval())
    with torch.no_grad():
        want = fused(X)
        compiled = torch.compile(fused, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), want, rtol=1e-4, atol=1e-5)
        exported = torch.export.export(fused, (X,)).module()
        torch.testing.assert_close(exported(X), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copier, monkeypatch):
    fused = rf.fuse(sequential().eval())
    with torch.no_grad():
        want = fused(X)
    twin = copier(fused)
    y, seen = calls(twin, X, monkeypatch)
    assert seen == BOTH
    assert_same(y, want)
    with torch.no_grad():
        twin[3].weight.mul_(2)
        assert_same(fused(X), want)


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
def test_what_the_kernels_of_a_gpu_take(dtype, monkeypatch):
    """Asked with tensors of the device "meta", as if it had kernels."""
    monkeypatch.setattr(head, "_has_kernels", lambda x: x.dtype in head._DTYPES)
    vector = 16 // dtype.itemsize
    pool = head.GlobalAvgPool(nn.AdaptiveAvgPool2d(1), "avgpool")
    image = torch.empty(1, 2 * vector, 7, 7, device="meta", dtype=dtype)
    last = image.to(memory_format=torch.channels_last)
    assert pool.serves(last)
    assert pool.serves(last[..., :1, :1].contiguous())
    odd = torch.empty_like(last[:, 1:], memory_format=torch.channels_last)
    for other in (image, last[:, :vector], odd, last.double(), last[:0], last[0]):
        assert not pool.serves(other)

    fc = head.Linear(nn.Linear(2 * vector, 5, device="meta", dtype=dtype), "fc")
    x = torch.empty(head._MOST_IMAGES, 2 * vector, device="meta", dtype=dtype)
    assert fc.serves(x)
    assert fc.serves(x[:1])
    for other in (x.repeat(2, 1), x[:0], x[:, :vector], x.t().contiguous().t(), x.double(), x[0]):
        assert not fc.serves(other)
    narrow = head.Linear(nn.Linear(2 * vector - 1, 5, device="meta", dtype=dtype), "fc")
    assert not narrow.serves(torch.empty(1, 2 * vector - 1, device="meta", dtype=dtype))
    fc.weight = nn.Parameter(torch.empty(2 * vector, 5, device="meta", dtype=dtype).t())
    assert not fc.serves(x)
    fc.weight = nn.Parameter(torch.empty(5, 2 * vector, dtype=dtype))
    assert not fc.serves(x), "on another device"


GPU = torch.device("cuda", 0)


@pytest.mark.gpu
@pytest.mark.skipif(cuda_error(GPU) is not None, reason=str(cuda_error(GPU)))
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fused_on_a_gpu(mode, dtype, monkeypatch):
    net = Net().eval()
    net.block = rf.reference.Residual(64, 64)
    net.fc = nn.Linear(64, 50)
    net = net.eval().to(GPU, dtype)
    fused = rf.fuse(net)
    exact = copy.deepcopy(net).double()
    x = torch.randn(2, 64, 7, 7, device=GPU).to(dtype)
    fused(x).sum().backward()
    assert fused.fc.weight.grad.abs().sum() > 0
    with mode(), multiplied("ieee"):
        y, seen = calls(fused, x, monkeypatch)
        assert seen == BOTH
        assert_near(y, exact(x.double()), dtype, slack=3)
        graphed = rf.graph(fused, x)
        for i in range(3):
            y = graphed(x + i)
            assert graphed.reason is None
            assert_near(y, exact((x + i).double()), dtype, slack=3)
    with mode():
        y, seen = calls(fused, x.repeat(5, 1, 1, 1), monkeypatch)
        assert seen == BOTH[:1]


@pytest.mark.gpu
@pytest.mark.skipif(cuda_error(GPU) is not None, reason=str(cuda_error(GPU)))
def test_other_channels_on_a_gpu(monkeypatch):
    """PyTorch computes what is not in whole vectors."""
    net = Net().eval()
    net.block, net.fc = rf.reference.Residual(12, 12), nn.Linear(12, 5)
    net = net.eval().to(GPU, torch.bfloat16)
    x = torch.randn(2, 12, 7, 7, device=GPU).bfloat16()
    y, seen = calls(rf.fuse(net), x, monkeypatch)
    assert seen == []
    assert_near(y, copy.deepcopy(net).double()(x.double()), torch.bfloat16, slack=3)
