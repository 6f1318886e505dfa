"""What a GPU would be asked to launch, on a null device: a block prepared as one op launches what
its ops launch one by one, with the same operands.

Run by test_null_device.py in a process of its own, because the null device takes CPU tensors for
its own from then on:

    python -m pytest tests/null_launches.py
"""

from __future__ import annotations

import copy
import gc
import re

import emulated_sm80
import emulated_sm90
import null_device
import pytest
import torch
from conftest import randomize
from torch import nn

import resnet_fused as rf
from resnet_fused import (
    _extension,
    _find_chains,
    _fused,
    _gpu_kernels,
    _ready,
    conv_bn,
    packing,
    residual,
    select,
    tuned,
)
from resnet_fused._fused import FusedModule
from resnet_fused.ops import _cuda, _gpu

OPS = torch.ops.resnet_fused
LIBRARY = null_device.load()


@pytest.fixture(autouse=True)
def on_the_null_device(monkeypatch):
    """As if the CPU were an H100, and every convolution's plan its kernels."""

    def pack(unit, dtype, choice):
        scale, shift = (t.detach() for t in packing.fold(unit))
        weight = unit.conv.weight.detach().to(dtype, memory_format=torch.channels_last)
        keywords = {"kernel_size": packing.kernel_size(unit.conv), "plan": choice.plan}
        keywords |= packing.conv_keywords(unit) | {"pool": unit.max_pool}
        return packing.PackedUnit(weight, scale, shift, keywords, choice)

    def choose_all(module, x, dtype, batch):
        return tuple(select.Choice("cuda", "") for _ in module._units)

    monkeypatch.setattr(packing, "pack", pack)
    monkeypatch.setattr(FusedModule, "_choose_all", choose_all)
    monkeypatch.setattr(_gpu_kernels, "extension_error", None)
    monkeypatch.setattr(_gpu_kernels, "cuda_error", lambda device: None)
    monkeypatch.setattr(_cuda, "has_wgmma", lambda device: True)
    monkeypatch.setattr(_cuda, "multiprocessors", lambda device: 132)
    release = _extension.release_of(str(LIBRARY._name), _gpu_kernels.RELEASE)
    monkeypatch.setattr(_gpu_kernels, "release_prepared", release)
    _cuda._measured.cache_clear()


class Grouped(nn.Module):
    """A block whose shortcut no kernel joins with the last convolution, which has groups."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 32, 3, 1, 1, groups=2), nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(16, 32, 1, 2)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.conv3(x))


def stem():
    net = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    )
    return rf.fuse(randomize(net).eval())[0]


BUILDS = {
    "identity": lambda: rf.FusedResidual(16, 16),
    "joined": lambda: rf.FusedResidual(16, 32, use_1x1conv=True, strides=2),
    "bottleneck": lambda: rf.FusedBottleneck(16, 4),
    "bottleneck_joined": lambda: rf.FusedBottleneck(16, 8, use_1x1conv=True, strides=2),
    "wide_bottleneck": lambda: rf.FusedBottleneck(256, 64),
    "grouped": lambda: rf.FusedResidual.from_block(Grouped()),
    "deep": lambda: rf.FusedResidual(512, 512),  # split over clusters, and with float32 in memory
    "conv_bn": lambda: rf.FusedConvBN(nn.Conv2d(16, 24, 3, 2, 1), nn.BatchNorm2d(24), "none"),
    "stem": stem,
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def made(name, dtype, batch=2, size=15):
    module = randomize(BUILDS[name]()).eval().to(dtype)
    channels = module._units[0].conv.in_channels
    x = torch.randn(batch, channels, size, size, dtype=dtype)
    return module, x.to(memory_format=torch.channels_last)


def prepared(module, x):
    with torch.inference_mode():
        return module._launches(x, module._pack(x, x.dtype))


def by_ops(module, x, monkeypatch):
    with monkeypatch.context() as patch:
        for place in (residual, conv_bn):
            patch.setattr(place, "prepare_at_once", lambda *_, **__: None)
        return prepared(module, x)


def launches(run, x):
    """The output, and what was launched for it."""
    LIBRARY.null_device_record()
    with torch.inference_mode():
        y = run(x)
    return y, LIBRARY.null_device_launches().decode().splitlines()


def forms(x):
    """x in every form of memory that a kernel must not see."""
    yield x
    yield x.contiguous()
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 1, dtype=x.dtype)
    wide = wide.to(memory_format=torch.channels_last)
    wide[..., 1:] = x
    yield wide[..., 1:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BUILDS)
def test_one_op_launches_what_its_parts_do(name, dtype, monkeypatch):
    module, x = made(name, dtype)
    one, parts = prepared(module, x), by_ops(module, x, monkeypatch)
    if name == "stem" and dtype == torch.float32:  # no kernel pools it
        assert not isinstance(one, _gpu.Prepared)
        return
    assert isinstance(one, _gpu.Prepared)
    for form in forms(x):
        # The first launch of a split in memory makes room for its tickets.
        want, expected = [launches(parts, form) for _ in range(2)][1]
        got, seen = launches(one, form)
        assert seen == expected
        assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)
    joined = name in ("joined", "bottleneck_joined")
    assert len(expected) == len(module._units) - joined


def test_the_comparison_sees_operands(monkeypatch):
    """Launches of two blocks differ: in the addresses of weights, at least."""
    (first, x), (second, _) = made("identity", torch.bfloat16), made("identity", torch.bfloat16)
    assert launches(prepared(first, x), x)[1] != launches(prepared(second, x), x)[1]
    assert launches(prepared(first, x), x)[1] == launches(prepared(first, x), x)[1]
    assert launches(prepared(first, x), x + 1)[1] != launches(prepared(first, x), x)[1]


@pytest.mark.parametrize("name", ["identity", "joined", "bottleneck_joined"])
def test_one_op_takes_what_was_measured(name, monkeypatch):
    module, x = made(name, torch.bfloat16)
    _, by_rule = launches(prepared(module, x), x)
    config = "sm90 p128x64 split 1"
    monkeypatch.setattr(tuned, "config", lambda plan, shape: config if plan == "cuda" else "")
    _cuda._measured.cache_clear()
    one, parts = prepared(module, x), by_ops(module, x, monkeypatch)
    _, seen = launches(one, x)
    assert seen == launches(parts, x)[1] != by_rule


def test_a_tail_is_left_to_its_own_kernel(monkeypatch):
    monkeypatch.setattr(_cuda, "has_wgmma", lambda device: False)
    monkeypatch.setattr(_cuda, "multiprocessors", lambda device: 1)
    module, x = made("wide_bottleneck", torch.bfloat16)
    run = prepared(module, x)
    assert not isinstance(run, _gpu.Prepared)
    assert "tail_bfloat16" in launches(run, x)[1][-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 5000, 2**22])
@pytest.mark.parametrize("skip", [0, 1])
def test_add_relu_fills_the_device_or_less(dtype, count, skip):
    """256 threads of 16 bytes, of an element where addresses do not allow that."""
    x = torch.zeros(count + skip, dtype=dtype)[skip:]
    each = 1 if skip else 16 // x.element_size()
    blocks = min(-(-count // (256 * each)), 8 * 132)
    _, (line,) = launches(lambda a: OPS.add_relu_cuda(a, a), x)
    assert line.startswith(f"add_relu_{str(dtype)[6:]} grid {blocks} 1 1 block 256 shared 0")


def test_other_plans_are_left_to_python(monkeypatch):
    module, x = made("joined", torch.bfloat16)
    units = list(module._pack(x, x.dtype).units)
    order = [units[0], units[2], units[1]]
    for i in range(3):
        mixed = list(order)
        unit = mixed[i]
        keywords = unit.keywords | {"plan": "torch"}
        mixed[i] = packing.PackedUnit(*unit.operands, keywords, unit.choice)
        assert residual.prepare_at_once(mixed[:2], mixed[2], x, adds=True) is None


def test_what_was_prepared_is_released(monkeypatch):
    module, x = made("identity", torch.bfloat16)
    run = prepared(module, x)
    handle = run._prepared
    OPS.run_prepared_cuda(x, handle)
    del run
    gc.collect()
    with pytest.raises(RuntimeError, match=f"not yet released, got {handle}$"):
        OPS.run_prepared_cuda(x, handle)


def test_an_input_that_was_not_prepared():
    module, x = made("identity", torch.bfloat16)
    run = prepared(module, x)
    for other in (x[:1], x.float(), x[0], x[:, :8]):
        got = f"got shape {tuple(other.shape)}, {str(other.dtype)[6:]} and cuda:0"
        with pytest.raises(RuntimeError, match=re.escape(got) + "$"):
            run(other)


def test_a_chain_launches_what_its_modules_do(monkeypatch):
    """One after the other, and what follows them."""

    def compute(module, x):
        packed = module._pack(x, x.dtype)
        module._make_ready(x, x.dtype, packed)
        return packed.ready[x.shape](x)

    monkeypatch.setattr(FusedModule, "_compute", compute)
    for place in (_fused, _ready):
        monkeypatch.setattr(place, "takes_launches", lambda x: True)
    blocks = [rf.FusedResidual(64, 64), rf.FusedResidual(64, 32, use_1x1conv=True, strides=2)]
    stem = [nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 16)]
    net = rf.fuse(nn.Sequential(*stem, *blocks, *head)).eval().bfloat16()
    x = torch.randn(2, 3, 64, 64, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        net(x), net(x)
    (serving,) = net[0]._chain()._servings.values()
    assert isinstance(serving.run, _ready.ReadyOnGpu)
    assert serving.last is net[-1]
    y, seen = launches(net, x)
    _find_chains.part_chains(net)
    want, expected = launches(net, x)
    assert seen == expected
    assert len(seen) == 1 + 2 + 2
    assert (y.shape, y.dtype) == (want.shape, want.dtype)


def test_gradients_are_not_lost():
    module, x = made("identity", torch.bfloat16)
    run = prepared(module, x)
    with pytest.raises(RuntimeError, match="run_prepared_cuda: is forward only"):
        run(x.requires_grad_())


def test_copies_prepare_their_own():
    module, x = made("identity", torch.bfloat16)
    assert copy.copy(prepared(module, x)) is None


def lists(**changed):
    w, v = torch.randn(16, 16, 3, 3, dtype=torch.bfloat16), torch.randn(16)
    given = {
        "packed": [w, w],
        "scales": [v, v],
        "shifts": [v, v],
        "kernel_sizes": [3] * 4,
        "strides": [1] * 4,
        "paddings": [1] * 4,
        "dilations": [1] * 4,
        "groups": [1, 1],
        "acts": ["relu", "relu"],
        "configs": ["", ""],
        "has_shortcut": False,
        "joined": False,
        "adds": True,
        "pool": False,
    }
    return given | changed


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"scales": []}, "scales must have 1 for each of the 2 convolutions, got 0"),
        ({"paddings": [1]}, "paddings must have 2 for each of the 2 convolutions, got 1"),
        ({"configs": [""]}, "configs must have 1 for each of the 2 convolutions, got 1"),
        ({"joined": True}, "joined must be False without a shortcut, got True"),
        (
            {"joined": True, "has_shortcut": True},
            'the shortcut must have padding 0, dilation 1, groups 1 and act "none" to be joined',
        ),
        ({"pool": True}, "pool must be False for 2 convolutions, got True"),
        ({"groups": [1, 3]}, "groups must divide the 16 input and 16 output channels, got 3"),
        (
            {"adds": False, "has_shortcut": True},
            "has_shortcut must be False where nothing is added, got True",
        ),
        ({"strides": [1, 1, 2, 2]}, "residual must have shape (2, 16, 8, 8), got (2, 16, 15, 15)"),
        ({"acts": ["relu", "gelu"]}, 'act must be "relu" or "none", got "gelu"'),
        ({"packed": [torch.ones(16, 16, 3, 3)] * 2}, "packed must be bfloat16, got float32"),
    ],
)
def test_bad_arguments(changed, sentence):
    x = torch.randn(2, 16, 15, 15, dtype=torch.bfloat16)
    OPS.prepare_cuda(x, **lists())
    with pytest.raises(RuntimeError, match=re.escape(f"prepare_cuda: {sentence}") + "$"):
        OPS.prepare_cuda(x, **lists(**changed))


def test_the_op_lists_every_tile():
    """benchmarks/gpu_check calls each of them once."""
    names = [configuration.name for configuration in _cuda.configurations()]
    sm80 = [f"sm80 {tile}" for tile in emulated_sm80.TILES]
    assert names == [*sm80, *(f"sm90 {tile}" for tile in emulated_sm90.TILES)]


def test_nothing_is_added_to_what_is_pooled():
    w, v = torch.randn(16, 3, 7, 7, dtype=torch.bfloat16), torch.randn(16)
    one = {"packed": [w], "scales": [v], "shifts": [v], "kernel_sizes": [7, 7], "pool": True}
    one |= {"strides": [2, 2], "paddings": [3, 3], "dilations": [1, 1], "groups": [1]}
    one |= {"acts": ["relu"], "configs": [""]}
    x = torch.randn(2, 3, 15, 15, dtype=torch.bfloat16)
    OPS.prepare_cuda(x, **lists(**one, adds=False))
    sentence = "prepare_cuda: pool must be False where something is added, got True$"
    with pytest.raises(RuntimeError, match=sentence):
        OPS.prepare_cuda(x, **lists(**one))


def direct(op, *arguments, **keywords):
    """Calls the kernel itself: for tensors of two devices the dispatcher would choose another."""
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)  # the null device's
    return op.default.redispatch(cpu, *arguments, **keywords)


def test_which_device_came():
    x, w = torch.randn(2, 16, 15, 15).bfloat16(), torch.randn(16, 16, 1, 1).bfloat16()
    v, one = torch.randn(16), [1, 1]
    calls = {
        "x": lambda t: direct(OPS.conv_bn_act_cuda, t(x), w, v, v, kernel_size=one),
        "packed": lambda t: direct(OPS.conv_bn_act_cuda, x, t(w), v, v, kernel_size=one),
        "shift": lambda t: direct(OPS.scale_shift_act_cuda, x, v, t(v)),
        "b": lambda t: direct(OPS.add_relu_cuda, x, t(x)),
        "last_scale": lambda t: direct(
            OPS.bottleneck_tail_cuda, x, w, v, v, w, t(v), v, kernel_size=one
        ),
    }
    for name, call in calls.items():
        call(lambda tensor: tensor)
        with pytest.raises(RuntimeError) as caught:
            call(lambda tensor: tensor.to("meta"))
        where = {"x": "on a CUDA device", "b": "on cuda:0, where a is"}
        where = where.get(name, "on cuda:0, where x is")
        assert str(caught.value).endswith(f": {name} must be {where}, got meta")
