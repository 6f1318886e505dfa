"""Sites with a max-pool: found, fused, reported, given up and taken out again."""

from __future__ import annotations

import copy
import pickle
import weakref

import pytest
import torch
from conftest import assert_same, is_dense_channels_last, needs_extension, randomize
from torch import nn
from torchvision_style import BasicBlock, ResNet

import resnet_fused as rf
from resnet_fused import select
from resnet_fused.match import find_sites
from resnet_fused.slots import BatchNormSlot, ConvSlot, MaxPoolSlot, ReLUSlot

pytestmark = pytest.mark.usefixtures("one_thread")


def sequential(channels=9, pool=None):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, channels, 7, 2, 3), nn.BatchNorm2d(channels), nn.ReLU()]
    return randomize(nn.Sequential(*layers, pool or nn.MaxPool2d(3, 2, 1), nn.Tanh())).eval()


def torchvision(channels=8):
    torch.manual_seed(0)
    return randomize(ResNet(BasicBlock, [1, 1, 1, 1], width=channels)).eval()


def lesson(channels=64):
    torch.manual_seed(0)
    return randomize(rf.models.resnet18(10, block=rf.reference.Residual)).eval()


SLOTS = [ConvSlot, BatchNormSlot, ReLUSlot, MaxPoolSlot]

NETS = {  # the net, and where conv, bn, relu and pool are
    "sequential": (sequential, "", ["0", "1", "2", "3"]),
    "torchvision": (torchvision, "", ["conv1", "bn1", "relu", "maxpool"]),
    "lesson": (lesson, "0", ["0", "1", "2", "3"]),
}


@pytest.fixture(params=NETS)
def net(request):
    return NETS[request.param][0]()


def image(size=(45, 38), dtype=torch.float32):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("name", NETS)
def test_every_stem_takes_its_pool(name):
    build, parent, layers = NETS[name]
    plain = build()
    fused = rf.fuse(plain)
    stem = fused.get_submodule(parent)
    assert [type(stem.get_submodule(layer)) for layer in layers] == SLOTS
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in fused.named_modules()] == [n for n, _ in plain.named_modules()]
    with torch.no_grad():
        torch.testing.assert_close(fused(image()), plain(image()), rtol=1e-4, atol=1e-4)
    (row,) = [row for row in rf.report(fused, image()) if row.kind == "conv_bn"]
    assert row.fused
    assert "max-pool" in row.reason
    back = rf.unfuse(fused)
    assert [type(m) for m in back.modules()] == [type(m) for m in plain.modules()]
    with torch.no_grad():
        assert_same(back(image()), plain(image()))


@needs_extension
def test_report_says_how_the_pool_is_computed():
    fused = rf.fuse(sequential())
    with torch.no_grad():
        for word, how in (("stem", "the same pass"), ("direct", "a second"), ("torch", "a second")):
            with select.forced(word):
                fused(image())
            assert f"its max-pool in {how}" in fused[0].status().reason
            assert fused[0].status().backend.startswith(word)


@pytest.mark.parametrize("word", ["stem", "direct", "torch", "none"])
def test_outputs(word, dtype):
    plain = sequential(40).to(dtype)
    fused = rf.fuse(plain)
    x = image(dtype=dtype)
    oracle = copy.deepcopy(plain).double()(x.double())
    with torch.no_grad(), select.forced(word):
        got = fused[:4](x)
        assert got.shape == (2, 40, 12, 10)
        assert is_dense_channels_last(got)
        ours, theirs = (m(x).double() - oracle for m in (fused, plain))
        assert ours.norm() <= 2 * theirs.norm() + 2e-6 * oracle.norm()


class Twice(nn.Module):
    """The ReLU's output goes to the pool and to the result."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 7, 2, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return self.pool(y), y


class PoolTwice(Twice):
    def forward(self, x):
        return self.pool(self.pool(self.relu(self.bn(self.conv(x)))))


class PoolInEval(Twice):
    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return y if self.training else self.pool(y)


class OddPool(nn.MaxPool2d):
    pass


def hooked():
    pool = nn.MaxPool2d(3, 2, 1)
    pool.register_forward_hook(lambda *_: None)
    return pool


OTHER_POOLS = [
    lambda: nn.MaxPool2d(2, 2, 1),
    lambda: nn.MaxPool2d(3, 1, 1),
    lambda: nn.MaxPool2d(3),
    lambda: nn.MaxPool2d(3, 2, 0),
    lambda: nn.MaxPool2d((3, 2), 2, 1),
    lambda: nn.MaxPool2d(3, 2, 1, dilation=2),
    lambda: nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    lambda: nn.AvgPool2d(3, 2, 1),
    lambda: OddPool(3, 2, 1),
    hooked,
]


@pytest.mark.parametrize("pool", OTHER_POOLS)
def test_other_pools_stay(pool):
    plain = sequential(pool=pool())
    fused = rf.fuse(plain)
    assert [type(m) for m in fused][:3] == SLOTS[:3]
    assert type(fused[3]) is type(plain[3])
    with torch.no_grad():
        torch.testing.assert_close(fused(image()), plain(image()))


@pytest.mark.parametrize("build", [Twice, PoolTwice, PoolInEval])
def test_pools_that_are_not_the_only_reader_in_every_mode_stay(build):
    (site,), refused = find_sites(build())
    assert (site.act_name, site.max_pool, site.max_pool_name) == ("relu", None, None)
    assert not site.unit.max_pool
    assert refused == []


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d((3, 3), (2, 2), (1, 1)), nn.MaxPool2d([3, 3], [2, 2], [1, 1])]
)
def test_settings_as_pairs(pool):
    plain = sequential(pool=pool)
    fused = rf.fuse(plain)
    assert type(fused[3]) is MaxPoolSlot
    with torch.no_grad():
        torch.testing.assert_close(fused(image()), plain(image()))


def test_pool_without_relu():
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.MaxPool2d(3, 2, 1)]
    plain = randomize(nn.Sequential(*layers)).eval()
    fused = rf.fuse(plain)
    assert type(fused[2]) is MaxPoolSlot
    with torch.no_grad():
        got = fused(image())
        torch.testing.assert_close(got, plain(image()))
    assert got.min() < 0


# ---- what comes later ----------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(4))
def test_hooks_see_what_eager_shows(index):
    plain, fused = sequential(), rf.fuse(sequential())
    seen = []
    for m in (fused, plain):
        m[index].register_forward_hook(
            lambda module, args, output: seen.append((args[0], output)) or output + 1
        )
    with torch.no_grad():
        assert_same(fused(image()), plain(image()))
    for a, b in zip(*seen, strict=True):
        assert_same(a, b)
    assert fused[0].status().reason == f"{index} has hooks"


@pytest.mark.parametrize("new", [nn.Identity(), nn.MaxPool2d(2), nn.AvgPool2d(3, 2, 1)])
def test_another_pool_in_its_place(new):
    plain, fused = sequential(), rf.fuse(sequential())
    plain[3] = fused[3] = new
    with torch.no_grad():
        assert_same(fused(image()), plain(image()))
    assert fused[0].status().reason == "3 was replaced"


@pytest.mark.parametrize(
    ("name", "value"),
    [("kernel_size", 2), ("stride", 1), ("padding", 0), ("dilation", 2), ("ceil_mode", True)],
)
def test_settings_of_the_pool_made_later(name, value):
    plain, fused = sequential(), rf.fuse(sequential())
    for m in (fused, plain):
        setattr(m[3], name, value)
    with torch.no_grad():
        assert_same(fused(image()), plain(image()))
    assert fused[0].status().reason == "3 has other settings than it had"
    assert getattr(rf.unfuse(fused)[3], name) == value
    setattr(fused[3], name, getattr(nn.MaxPool2d(3, 2, 1), name))
    with torch.no_grad():
        fused(image())
    assert fused[0].status().fused


def test_training_and_back(net):
    fused = rf.fuse(net)
    for m in (fused, net):
        m.train()
    torch.manual_seed(5)
    want = net(image())
    torch.manual_seed(5)
    assert_same(fused(image()), want)
    for m in (fused, net):
        m.eval()
    with torch.no_grad():
        torch.testing.assert_close(fused(image()), net(image()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("word", ["stem", "direct", "torch"])
def test_gradients_in_eval(word):
    plain, fused = sequential().double(), rf.fuse(sequential().double())
    if word != "torch":
        plain, fused = sequential(), rf.fuse(sequential())
    results = []
    for m in (plain, fused):
        x = image(dtype=m[0].weight.dtype).requires_grad_()
        with select.forced(word):
            y = m(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        results.append([y, x.grad, *(p.grad for p in m.parameters())])
    assert fused[0].status().fused
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(how):
    fused = rf.fuse(sequential())
    with torch.no_grad():
        before = fused(image())
        twin = how(fused)
        assert_same(twin(image()), before)
        twin[3].padding = 0
        assert twin(image()).shape != before.shape
        assert_same(fused(image()), before)
        twin[3].padding = 1
        assert_same(twin(image()), before)
    twin = rf.unfuse(twin, inplace=True)
    assert type(twin[3]) is nn.MaxPool2d
    assert type(fused[3]) is MaxPoolSlot


def test_autocast():
    plain = sequential(32)
    fused = rf.fuse(plain)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = fused(image()), plain(image())
    assert got.dtype == want.dtype
    torch.testing.assert_close(got.float(), want.float(), rtol=3e-2, atol=3e-2)


def test_preserve_gives_the_layout_back():
    fused = rf.fuse(sequential(), output_format="preserve")
    with torch.no_grad():
        assert fused[:4](image()).is_contiguous()
        x = image().contiguous(memory_format=torch.channels_last)
        assert fused[:4](x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_and_exported(grad):
    fused = rf.fuse(sequential())
    with torch.set_grad_enabled(grad):
        want = fused(image())
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(image()), want)
        exported = torch.export.export(fused, (image(),)).module()
        torch.testing.assert_close(exported(image()), want)


def test_empty_batch():
    fused = rf.fuse(sequential())
    with torch.no_grad():
        assert fused(image()[:0]).shape == (0, 9, 12, 10)


# ---- the layers as others see them ---------------------------------------------------------------


class UNet(nn.Module):
    """Wants what lies between a stem's layers, and calls them itself."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        skipped = self.net.relu(self.net.bn1(self.net.conv1(x)))
        y = self.net.layer2(self.net.layer1(self.net.maxpool(skipped)))
        return skipped.sum((2, 3)), y


class Cut(nn.Module):
    """The same through containers that cut the stem in two."""

    def __init__(self, net):
        super().__init__()
        layers = list(net.children())
        self.first, self.rest = nn.Sequential(*layers[:3]), nn.Sequential(*layers[3:6])

    def forward(self, x):
        skipped = self.first(x)
        return skipped.sum((2, 3)), self.rest(skipped)


@pytest.mark.parametrize("wrap", [UNet, Cut])
def test_layers_that_others_call_are_what_they_were(wrap):
    plain = torchvision()
    fused = rf.fuse(plain)
    with torch.no_grad():
        fused(image())  # leaves prepared calls behind
        for got, want in zip(wrap(fused)(image()), wrap(plain)(image()), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fused(image()), plain(image()), rtol=1e-4, atol=1e-4)
        assert_same(fused.conv1(image()), plain.conv1(image()))


def test_a_sequence_that_keeps_the_layers_together_stays_fused():
    plain = torchvision()
    fused = rf.fuse(plain)
    features, want = (nn.Sequential(*list(net.children())[:5]) for net in (fused, plain))
    with torch.no_grad():
        got = features[:4](image())
        torch.testing.assert_close(features(image()), want(image()), rtol=1e-4, atol=1e-4)
    assert is_dense_channels_last(got), "computed by the first slot"
    assert fused.conv1.status().backend != "not run yet"


def test_slots_are_instances_of_the_layers():
    plain, fused = torchvision(), rf.fuse(torchvision())
    kinds = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d)
    stem = ("conv1", "bn1", "relu", "maxpool")
    for name, kind in zip(stem, kinds, strict=True):
        assert isinstance(getattr(fused, name), kind)
    assert [n for n, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)] == [
        n for n, m in plain.named_modules() if isinstance(m, nn.BatchNorm2d)
    ]


def test_statistics_computed_anew():
    """As torch.optim.swa_utils does behind averaged weights."""
    plain, fused = torchvision(), rf.fuse(torchvision())
    batches = [image(), 3 * image() + 1]
    for net in (plain, fused):
        torch.optim.swa_utils.update_bn(batches, net)
    for (name, a), b in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad():
        torch.testing.assert_close(fused(image()), plain(image()), rtol=1e-4, atol=1e-4)


def test_batch_norms_that_a_loop_freezes():
    plain, fused = torchvision(), rf.fuse(torchvision())
    for net in (plain, fused):
        net.train()
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
        net(image())
    for a, b in zip(fused.buffers(), plain.buffers(), strict=True):
        assert_same(a, b)


def test_batch_norms_that_are_converted():
    net = rf.fuse(torchvision())
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert type(converted.bn1) is nn.SyncBatchNorm
    assert converted.conv1.status().reason == "bn1 was replaced"


class Features(ResNet):
    """As timm's nets: another method calls the layers one by one."""

    def between(self, x):
        return self.relu(self.bn1(self.conv1(x)))


class Helper(nn.Module):
    def run(self, layer, x):
        return layer(x)


class Helped(nn.Module):
    """Its layers are called by others' methods, each by another's."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.helper = Helper()

    def forward(self, x):
        return self.bn(self.helper.run(self.conv, x))


def test_another_method_of_the_parent_gets_what_lies_between():
    torch.manual_seed(0)
    plain = randomize(Features(BasicBlock, [1, 1, 1, 1], width=8)).eval()
    fused = rf.fuse(plain)
    with torch.no_grad():
        for net in (fused, plain):
            net(image())
        assert_same(fused.between(image()), plain.between(image()))


def test_helpers_that_call_the_layers():
    torch.manual_seed(0)
    plain = randomize(Helped()).eval()
    fused = rf.fuse(plain)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fused(image()), plain(image()), rtol=1e-4, atol=1e-4)


def test_a_layer_called_with_its_keyword():
    plain, fused = torchvision(), rf.fuse(torchvision())
    x = torch.randn(2, 8, 5, 5)
    for name in ("bn1", "relu", "maxpool"):
        assert_same(getattr(fused, name)(input=x), getattr(plain, name)(input=x))


def test_layers_of_a_traced_net_are_taken_out():
    traced = torch.fx.symbolic_trace(rf.fuse(torchvision()))
    back = rf.unfuse(traced)
    assert [type(getattr(back, name)) for name in ("conv1", "bn1", "relu", "maxpool")] == [
        nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d
    ]  # fmt: skip
    assert type(traced.conv1) is ConvSlot


def test_nothing_of_a_call_is_kept():
    """Neither what went in nor what came out, once the caller has let it go."""
    fused = rf.fuse(torchvision())
    x = image()
    with torch.no_grad():
        y = fused.maxpool(fused.relu(fused.bn1(fused.conv1(x))))
        fused(x)
    kept = [weakref.ref(t) for t in (x, y)]
    del x, y
    assert [r() for r in kept] == [None, None]
