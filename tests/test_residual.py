"""FusedResidual and FusedBottleneck: the lesson's block and every block like it, only faster."""

from __future__ import annotations

import copy
import io
import pickle
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    DTYPES,
    KERNEL_DTYPES,
    LAYOUTS,
    NATIVE,
    assert_close_as_eager,
    assert_same,
    is_dense_channels_last,
    poison,
    randomize,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import resnet_fused as rf
from resnet_fused import select
from resnet_fused.reference import Bottleneck, Residual

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = {rf.FusedResidual: Residual, rf.FusedBottleneck: Bottleneck}
# (class, input_channels, num_channels, use_1x1conv, strides)
BLOCKS = [
    (rf.FusedResidual, 8, 8, False, 1),
    (rf.FusedResidual, 3, 17, True, 1),
    (rf.FusedResidual, 16, 33, True, 2),
    (rf.FusedResidual, 64, 64, False, 1),
    (rf.FusedResidual, 5, 1, True, 3),
    (rf.FusedResidual, 1, 1, False, 1),
    (rf.FusedBottleneck, 16, 4, False, 1),
    (rf.FusedBottleneck, 7, 5, True, 2),
    (rf.FusedBottleneck, 64, 16, False, 1),
]


def name_of(row):
    return f"{row[0].__name__}-{'-'.join(map(str, row[1:]))}"


def build(row, dtype=torch.float32, seed=0):
    """A fused block in eval mode with batch norms that look trained."""
    torch.manual_seed(seed)
    return randomize(row[0](*row[1:])).eval().to(dtype)


def image(channels, size=(7, 6), batch=2, dtype=torch.float32, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=g).to(dtype)


def plain_twin(fused):
    """The plain block with the same values, in fused's mode."""
    return copy.deepcopy(fused.original())


def exact(fused, x):
    with torch.no_grad():
        return plain_twin(fused).double()(x.double())


def check_block(fused, x, allowed=0.0):
    """Fused, accurate and dense channels_last; returns the output."""
    poison(4 * x.numel())
    with torch.no_grad():
        got, theirs = fused(x), plain_twin(fused)(x)
    assert fused.status().fused, fused.status().reason
    assert_close_as_eager(got, theirs, exact(fused, x), allowed)
    assert is_dense_channels_last(got)
    return got


# ---- a drop-in for the lesson's block ------------------------------------------------------------


@pytest.mark.parametrize("row", BLOCKS, ids=name_of)
def test_same_children_keys_and_initial_values(row):
    torch.manual_seed(3)
    fused = row[0](*row[1:])
    after = torch.rand(1)
    torch.manual_seed(3)
    plain = PLAIN[row[0]](*row[1:])
    assert torch.equal(after, torch.rand(1)), "another number of random numbers was drawn"
    assert [n for n, _ in fused.named_children()] == [n for n, _ in plain.named_children()]
    assert [n for n, _ in fused.named_parameters()] == [n for n, _ in plain.named_parameters()]
    want, got = plain.state_dict(), fused.state_dict()
    assert list(got) == list(want)
    for key, value in want.items():
        assert_same(got[key], value)
        assert got[key].dtype == value.dtype
    assert fused.training == plain.training is True


def test_arguments_have_the_lessons_names_and_defaults():
    block = rf.FusedResidual(input_channels=4, num_channels=6, use_1x1conv=True, strides=2)
    assert block.conv3.weight.shape == (6, 4, 1, 1)
    assert block.conv1.stride == (2, 2)
    assert rf.FusedResidual(4, 4).conv3 is None


@pytest.mark.parametrize("row", BLOCKS, ids=name_of)
def test_checkpoints_go_both_ways(row):
    fused, plain = build(row), PLAIN[row[0]](*row[1:]).eval()
    plain.load_state_dict(fused.state_dict())
    other = randomize(PLAIN[row[0]](*row[1:]), seed=9).eval()
    x = image(row[1])
    with torch.no_grad():
        assert_same(plain(x), plain_twin(fused)(x))
        fused.load_state_dict(other.state_dict())
        assert_same(plain_twin(fused)(x), other(x))
    check_block(fused, x)


# ---- outputs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("force", ["ours", "torch", "none"])
@pytest.mark.parametrize("row", BLOCKS, ids=name_of)
def test_outputs(row, force, dtype):
    with select.forced(force):
        fused = build(row, dtype)
        for size in ((7, 6), (1, 1), (8, 13)):
            check_block(fused, image(row[1], size, dtype=dtype), allowed=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("row", [BLOCKS[1], BLOCKS[3], BLOCKS[7]], ids=name_of)
def test_layouts(row, layout):
    fused = build(row)
    x = LAYOUTS[layout](image(row[1]))
    got = check_block(fused, x)
    if NATIVE or "shifted" not in layout:  # PyTorch's sums depend on where the input begins
        with torch.no_grad():
            assert_same(got, fused(x.clone()))


@pytest.mark.parametrize("row", [BLOCKS[0], BLOCKS[2], BLOCKS[6], BLOCKS[7]], ids=name_of)
def test_batch_of_none_and_3d(row, dtype):
    fused, x = build(row, dtype), image(row[1], dtype=dtype)
    with torch.no_grad():
        whole = fused(x)
        single = fused(x[0])
        assert_same(single, fused(x[:1])[0])
        assert single.dim() == 3
        assert is_dense_channels_last(single)
        none = fused(x[:0])
        assert none.shape == (0, *whole.shape[1:])
        assert is_dense_channels_last(none)


@pytest.mark.parametrize("row", [BLOCKS[0], BLOCKS[2], BLOCKS[6]], ids=name_of)
def test_input_is_left_alone(row):
    """The lesson's `Y += X` writes to a result of its own, never to the block's input."""
    fused = build(row)
    x = image(row[1])
    before = x.clone()
    with torch.no_grad():
        y = fused(x)
    assert_same(x, before)
    assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_parameters_may_be_channels_last():
    fused = build(BLOCKS[2]).to(memory_format=torch.channels_last)
    check_block(fused, image(16).to(memory_format=torch.channels_last))


def test_norms_may_stay_float32_beside_bfloat16():
    fused = build(BLOCKS[2])
    fused.conv1.bfloat16(), fused.conv2.bfloat16(), fused.conv3.bfloat16()
    x = image(16, dtype=torch.bfloat16)
    with torch.no_grad():
        got = fused(x)
        assert fused.status().fused
        assert_close_as_eager(got, plain_twin(fused)(x), exact(fused, x))


def test_same_bits_every_time(threads):
    fused, x = build(BLOCKS[3]), image(64, (14, 14))
    with torch.no_grad():
        for count in (1, 2):
            threads(count)
            want = fused(x)
            for _ in range(10):
                assert_same(fused(x), want)


# ---- other blocks -------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block to bend: conv -> bn -> act, ..., + shortcut, act."""

    expansion = 1

    def __init__(self, main, shortcut=None, final=True):
        super().__init__()
        self.shortcut = shortcut
        self.main = main
        self.final = final

    def forward(self, x):
        y = self.main(x)
        y = y + (x if self.shortcut is None else self.shortcut(x))
        return F.relu(y) if self.final else y


def layers(*channels, kernel=3, bn=True, **options):
    found = []
    for i, (c, k) in enumerate(pairwise(channels)):
        if i:
            found.append(nn.ReLU(inplace=True))
        found.append(nn.Conv2d(c, k, kernel, padding="same", **options))
        if bn:
            found.append(nn.BatchNorm2d(k))
    return nn.Sequential(*found)


def conv1x1(c, k, stride=1, **options):
    return nn.Conv2d(c, k, 1, stride=stride, **options)


VARIANTS = {
    "no biases": lambda: Block(layers(6, 8, 6, bias=False)),
    "no norms": lambda: Block(layers(6, 8, 6, bn=False)),
    "no final activation": lambda: Block(layers(6, 8, 6), final=False),
    "three convolutions": lambda: Block(layers(6, 8, 8, 6)),
    "five convolutions": lambda: Block(layers(6, 8, 5, 7, 8, 6)),
    "groups": lambda: Block(layers(12, 24, 12, groups=4)),
    "many small groups": lambda: Block(layers(24, 24, 24, groups=8)),
    "depthwise": lambda: Block(layers(8, 8, 8, groups=8)),
    "dilation": lambda: Block(layers(6, 8, 6, dilation=2)),
    "5x5": lambda: Block(layers(6, 8, 6, kernel=5)),
    "1x3": lambda: Block(layers(6, 8, 6, kernel=(1, 3))),
    "1x1 shortcut": lambda: Block(layers(6, 8, 9), conv1x1(6, 9)),
    "1x1 shortcut and norm": lambda: Block(
        layers(6, 8, 9), nn.Sequential(conv1x1(6, 9, bias=False), nn.BatchNorm2d(9))
    ),
    "3x3 shortcut": lambda: Block(layers(6, 8, 9), nn.Conv2d(6, 9, 3, padding=1)),
    "large eps": lambda: _with_norms(Block(layers(6, 8, 6)), eps=0.7),
    "tiny eps": lambda: _with_norms(Block(layers(6, 8, 6)), eps=1e-12),
}


def _with_norms(block, **settings):
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            vars(m).update(settings)
    return block


def _unaffine(block):
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.affine, m.weight, m.bias = False, None, None
    return block


VARIANTS["no affine"] = lambda: _unaffine(Block(layers(6, 8, 6)))


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("force", ["ours", "none"])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name, force, dtype):
    torch.manual_seed(2)
    block = randomize(VARIANTS[name]()).eval().to(dtype)
    fused = rf.FusedResidual.from_block(block)
    channels = next(m for m in block.modules() if isinstance(m, nn.Conv2d)).in_channels
    with select.forced(force):
        check_block(fused, image(channels, (9, 8), dtype=dtype), allowed=2e-6)


@pytest.mark.parametrize("stride", [1, 2])
def test_strided_shortcut_with_norm(stride):
    main = nn.Sequential(
        nn.Conv2d(6, 8, 3, stride, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 9, 3, 1, 1)
    )
    block = Block(main, nn.Sequential(conv1x1(6, 9, stride), nn.BatchNorm2d(9)))
    fused = rf.FusedResidual.from_block(randomize(block).eval())
    for size in ((8, 8), (7, 9), (1, 1)):
        check_block(fused, image(6, size))


def test_average_pool_shortcut():
    """Left alone or fused: right in either case."""
    main = nn.Sequential(
        nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 9, 3, 1, 1)
    )
    block = Block(main, nn.Sequential(nn.AvgPool2d(2), conv1x1(6, 9), nn.BatchNorm2d(9)))
    x = image(6, (8, 8))
    with torch.no_grad():
        want = randomize(block).eval()(x)
        torch.testing.assert_close(rf.FusedResidual.from_block(block)(x), want)


def test_from_block_keeps_children_names_and_attributes():
    block = Block(layers(6, 8, 6)).eval()
    block.note = "mine"
    fused = rf.FusedResidual.from_block(block)
    assert type(fused) is rf.FusedResidual
    assert fused.main is block.main
    assert fused.note == "mine"
    assert fused.expansion == 1
    assert fused.shortcut is None
    assert fused.original() is block
    assert not fused.training
    assert [id(p) for p in fused.parameters()] == [id(p) for p in block.parameters()]
    with pytest.raises(AttributeError, match="nothing"):
        _ = fused.nothing


def test_from_block_of_three_convolutions_is_a_bottleneck():
    fused = rf.FusedResidual.from_block(Block(layers(6, 8, 8, 6)))
    assert type(fused) is rf.FusedBottleneck
    assert fused.kind == "bottleneck"
    assert rf.FusedResidual.from_block(Block(layers(6, 8, 6))).kind == "basic"


# ---- bad arguments ------------------------------------------------------------------------------

BAD_ARGUMENTS = [
    ((0, 8), ValueError, "input_channels must be at least 1, got 0"),
    ((8, -1), ValueError, "num_channels must be at least 1, got -1"),
    ((8, 8, True, 0), ValueError, "strides must be at least 1, got 0"),
    ((8.0, 8), TypeError, "input_channels must be an int, got float"),
    ((8, "8"), TypeError, "num_channels must be an int, got str"),
    ((8, 8, True, (2, 2)), TypeError, "strides must be an int, got tuple"),
    ((True, 8), TypeError, "input_channels must be an int, got bool"),
    ((8, 8, "yes"), TypeError, "use_1x1conv must be a bool, got str"),
]


@pytest.mark.parametrize(("arguments", "error", "sentence"), BAD_ARGUMENTS)
@pytest.mark.parametrize("kind", PLAIN)
def test_bad_arguments(kind, arguments, error, sentence):
    with pytest.raises(error) as caught:
        kind(*arguments)
    assert str(caught.value) == f"{kind.__name__}: {sentence}"


@pytest.mark.parametrize(
    ("kind", "arguments", "outputs"),
    [
        (rf.FusedResidual, (3, 8, False, 1), 8),
        (rf.FusedResidual, (8, 8, False, 2), 8),
        (rf.FusedBottleneck, (8, 8, False, 1), 32),
    ],
)
def test_shortcut_that_cannot_fit(kind, arguments, outputs):
    """The plain block is built and fails at its first call; ours says so at once."""
    with pytest.raises(ValueError, match="use_1x1conv") as caught:
        kind(*arguments)
    assert str(caught.value) == (
        f"{kind.__name__}: use_1x1conv must be True where the shortcut changes shape, got False "
        f"with {arguments[0]} input channels, {outputs} output channels and strides {arguments[3]}"
    )


@pytest.mark.parametrize(
    ("block", "got"), [(5, "int"), (None, "NoneType"), (Residual, "the class Residual")]
)
def test_from_block_of_no_module(block, got):
    with pytest.raises(TypeError) as caught:
        rf.FusedResidual.from_block(block)
    want = f"FusedResidual.from_block: block must be a torch.nn.Module, got {got}"
    assert str(caught.value) == want


def test_from_block_of_no_residual_block():
    with pytest.raises(rf.NoMatch) as caught:
        rf.FusedResidual.from_block(nn.Sequential(nn.Conv2d(3, 3, 3)))
    assert isinstance(caught.value, ValueError)
    assert str(caught.value) == "no addition of two paths"


BAD_INPUTS = [
    (lambda x: None, TypeError, "x must be a torch.Tensor, got NoneType"),
    (lambda x: x.numpy(), TypeError, "x must be a torch.Tensor, got ndarray"),
    (
        lambda x: x[0, 0],
        ValueError,
        "x must be 3-D (C, H, W) or 4-D (N, C, H, W), got shape (7, 6)",
    ),
    (lambda x: x[:, :5], ValueError, "x must have 8 channels, got shape (2, 5, 7, 6)"),
    (lambda x: x.movedim(1, 3), ValueError, "x must have 8 channels, got shape (2, 7, 6, 8)"),
    (lambda x: x.double(), TypeError, "x must be float32, as the weights are, got float64"),
    (lambda x: x.bfloat16(), TypeError, "x must be float32, as the weights are, got bfloat16"),
    (lambda x: x.long(), TypeError, "x must be float32, bfloat16, float16 or float64, got int64"),
    (lambda x: x.to("meta"), ValueError, "x must be on cpu, where the weights are, got meta"),
    (
        lambda x: x.to_sparse(),
        TypeError,
        "x must be a strided tensor, got layout torch.sparse_coo",
    ),
]


@pytest.mark.parametrize("mode", ["no_grad", "grad", "train"])
@pytest.mark.parametrize(("change", "error", "sentence"), BAD_INPUTS)
def test_bad_inputs(change, error, sentence, mode):
    fused = build(BLOCKS[0]).train(mode == "train")
    with pytest.raises(error) as caught, torch.set_grad_enabled(mode != "no_grad"):
        fused(change(image(8)))
    assert str(caught.value) == f"FusedResidual: {sentence}"


@pytest.mark.parametrize(
    ("arguments", "keywords", "got"),
    [
        ((), {}, "missing a required argument: 'X'"),
        ((1, 2), {}, "too many positional arguments"),
        ((1,), {"y": 2}, "got an unexpected keyword argument 'y'"),
    ],
)
def test_calls_that_do_not_fit(arguments, keywords, got):
    with pytest.raises(TypeError) as caught:
        build(BLOCKS[0])(*arguments, **keywords)
    assert str(caught.value) == f"FusedResidual: arguments must fit forward(X): {got}"


# ---- what is done to a block later --------------------------------------------------------------


class Double(nn.Module):
    def forward(self, w):
        return 2 * w


@contextmanager
def global_hook(fused):
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    yield
    handle.remove()


@contextmanager
def hook_on_child(fused):
    handle = fused.conv2.register_forward_hook(lambda module, args, output: output * 3)
    yield
    handle.remove()


@contextmanager
def pre_hook_on_child(fused):
    handle = fused.bn1.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    yield
    handle.remove()


@contextmanager
def parametrized_child(fused):
    parametrize.register_parametrization(fused.conv1, "weight", Double())
    yield
    parametrize.remove_parametrizations(fused.conv1, "weight", leave_parametrized=False)


@contextmanager
def weight_norm_on_child(fused):
    parametrizations.weight_norm(fused.conv1)
    yield
    with torch.enable_grad():  # without, the weight comes back as a buffer
        parametrize.remove_parametrizations(fused.conv1, "weight")


@contextmanager
def weight_made_a_buffer(fused):
    weight = fused.conv1.weight
    del fused.conv1.weight
    fused.conv1.register_buffer("weight", weight.detach())
    yield
    del fused.conv1.weight
    fused.conv1.weight = weight


@contextmanager
def pruned_child(fused):
    prune.l1_unstructured(fused.conv1, "weight", 0.5)
    yield
    prune.remove(fused.conv1, "weight")


@contextmanager
def replaced_child(fused):
    before = fused.conv2
    fused.conv2 = nn.Conv2d(before.in_channels, before.out_channels, 3, padding=1)
    yield
    fused.conv2 = before


@contextmanager
def replaced_norm(fused):
    before = fused.bn1
    fused.bn1 = nn.GroupNorm(1, before.num_features)
    yield
    fused.bn1 = before


@contextmanager
def child_made_none(fused):
    before = fused.conv3
    fused.conv3 = None
    yield
    fused.conv3 = before


@contextmanager
def patched_forward(fused):
    plain = fused.conv2.forward
    fused.conv2.forward = lambda x: plain(x) * 2
    yield
    del fused.conv2.forward


@contextmanager
def other_padding_mode(fused):
    """What people do to generate textures that tile."""
    fused.conv1.padding_mode = "circular"
    yield
    fused.conv1.padding_mode = "zeros"


@contextmanager
def norm_in_training_mode(fused):
    fused.bn2.train()
    yield
    fused.bn2.eval()


CHANGES = {
    "hooks on all modules are set": global_hook,
    "conv2 has hooks": hook_on_child,
    "bn1 has hooks": pre_hook_on_child,
    "conv1 became a ParametrizedConv2d": parametrized_child,
    "conv1 became a ParametrizedConv2d ": weight_norm_on_child,
    "conv1 has hooks": pruned_child,
    "conv1 has other children or parameters than it had": weight_made_a_buffer,
    "conv2 was replaced": replaced_child,
    "bn1 was replaced": replaced_norm,
    "conv3 was replaced": child_made_none,
    "forward of conv2 was patched": patched_forward,
    "conv1 pads with 'circular'": other_padding_mode,
    "bn2 uses batch statistics": norm_in_training_mode,
}


@pytest.mark.parametrize("reason", CHANGES)
@pytest.mark.parametrize("gradients", [False, True])
def test_changed_block_runs_as_it_is_and_returns(reason, gradients):
    """Eager, bit for bit, while the change lasts; the report says why; fused again afterwards."""
    fused, x = build((rf.FusedResidual, 8, 8, True, 1)), image(8)
    with torch.set_grad_enabled(gradients):
        fused(x)
        with CHANGES[reason](fused):
            assert_same(fused(x), fused.original()(x))
            status = fused.status()
            assert not status.fused
            assert (status.backend, status.reason) == ("eager", reason.strip())
        assert fused.status().fused
        torch.testing.assert_close(fused(x), fused.original()(x))


def test_replaced_by_another_number_of_channels():
    fused = build((rf.FusedResidual, 8, 8, True, 1))
    fused.conv1, fused.conv3 = nn.Conv2d(5, 8, 3, padding=1), nn.Conv2d(5, 8, 1)
    x = image(5)
    with torch.no_grad():
        assert_same(fused(x), fused.original()(x))


def test_shortcut_given_later():
    """`conv3` of the lesson's block is a plain None without 1x1 convolution."""
    fused = build(BLOCKS[0])
    fused.conv3 = nn.Conv2d(8, 8, 1)
    plain = Residual(8, 8, use_1x1conv=True).eval()
    plain.load_state_dict(fused.state_dict())
    with torch.no_grad():
        assert_same(fused(image(8)), plain(image(8)))
    assert fused.status().reason == "conv3 was set"


def test_attribute_set_later():
    block = Block(layers(6, 8, 6)).eval()
    fused = rf.FusedResidual.from_block(block)
    fused.final = False
    assert block.final is False
    with torch.no_grad():
        assert_same(fused(image(6)), block(image(6)))
        assert fused(image(6)).min() < 0
    assert fused.status().reason == "final was set"


def test_new_attribute_and_deleted_attribute():
    block = Block(layers(6, 8, 6)).eval()
    fused = rf.FusedResidual.from_block(block)
    fused.note = "mine"
    assert fused.note == block.note == "mine"
    assert fused.status().fused, "nothing that the block reads was changed"
    del fused.note
    assert not hasattr(block, "note")


def test_grandchild_replaced_or_added():
    for change in (
        lambda fused: fused.main.__setitem__(0, nn.Conv2d(6, 8, 3, padding=1)),
        lambda fused: fused.main.append(nn.Tanh()),
        lambda fused: fused.main.__delitem__(2),
    ):
        block = randomize(Block(layers(6, 8, 6))).eval()
        fused = rf.FusedResidual.from_block(block)
        with torch.no_grad():
            fused(image(6))
            change(fused)
            assert_same(fused(image(6)), block(image(6)))
        assert not fused.status().fused


def test_hooks_on_the_block_itself():
    """They fire as on any module; the block stays fused."""
    fused, x = build(BLOCKS[0]), image(8)
    with torch.no_grad():
        want = fused(x)
        seen = []
        fused.register_forward_hook(lambda module, args, output: seen.append(output) or output * 2)
        assert_same(fused(x), want * 2)
    assert_same(seen[0], want)
    assert fused.status().fused


# ---- modes of PyTorch ---------------------------------------------------------------------------


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("low", KERNEL_DTYPES[1:])
@pytest.mark.parametrize("row", [BLOCKS[0], BLOCKS[2], BLOCKS[6], BLOCKS[7]], ids=name_of)
def test_autocast(row, low, gradients):
    fused, x = build(row), image(row[1])
    oracle = exact(fused, x)
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", dtype=low):
        got, theirs = fused(x), plain_twin(fused)(x)
        again = fused(x.to(low))
    assert got.dtype == again.dtype == low
    assert fused.status().fused
    assert_close_as_eager(got.detach(), theirs.detach().to(low), oracle)
    with torch.no_grad():
        assert fused(x).dtype == torch.float32
        assert_close_as_eager(fused(x), plain_twin(fused)(x), oracle)


def test_autocast_leaves_float64_alone():
    fused, x = build(BLOCKS[0], torch.float64), image(8, dtype=torch.float64)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(fused(x), exact(fused, x))


@pytest.mark.parametrize("row", [BLOCKS[0], BLOCKS[2], BLOCKS[6]], ids=name_of)
def test_inference_mode(row):
    fused, x = build(row), image(row[1])
    with torch.no_grad():
        want = fused(x)
    fused.drop_packed()
    with torch.inference_mode():
        got = fused(x)
        assert got.is_inference()
        assert_same(got, want)
    # What was packed as inference tensors serves ordinary calls, with gradients too.
    with torch.no_grad():
        assert_same(fused(x), want)
    fused(x).sum().backward()
    assert fused.conv1.weight.grad is not None


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["no_grad", "inference", "grad", "autocast", "train"])
@pytest.mark.parametrize("row", [BLOCKS[0], BLOCKS[2], BLOCKS[7]], ids=name_of)
def test_compiles_without_graph_breaks(row, mode, fresh_dynamo):
    fused, x = build(row).train(mode == "train"), image(row[1])
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    contexts = {
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }
    # A graph that is not frozen takes direct kernels, eager mode Winograd: a few roundings apart in
    # bfloat16.
    tolerance = {"atol": 0.02, "rtol": 0.02} if mode == "autocast" else {}
    with contexts.get(mode, torch.enable_grad)():
        torch.testing.assert_close(compiled(x), fused(x), **tolerance)


def test_compiled_block_follows_its_parameters(fresh_dynamo):
    fused, x = build(BLOCKS[2]), image(16)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        for p in fused.parameters():
            p.mul_(1.5)
        fused.bn1.running_mean += 1
        torch.testing.assert_close(compiled(x), fused.original()(x), rtol=1e-4, atol=1e-4)


def test_compiled_with_gradients_matches(fresh_dynamo):
    fused, x = build(BLOCKS[2]), image(16)
    grads = []
    for call in (torch.compile(fused, fullgraph=True, backend="aot_eager"), fused.original()):
        fused.zero_grad()
        call(x).square().mean().backward()
        grads.append({name: p.grad.clone() for name, p in fused.named_parameters()})
    for name, want in grads[1].items():
        torch.testing.assert_close(grads[0][name], want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("row", [BLOCKS[0], BLOCKS[7]], ids=name_of)
def test_exports(row, gradients, strict):
    fused, x = build(row), image(row[1])
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(fused, (x,), strict=strict)
    assert any("resnet_fused" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), fused(x), rtol=1e-4, atol=1e-5)


def test_function_transforms_and_functional_call():
    fused, x = build(BLOCKS[2]), image(16)
    plain = plain_twin(fused)

    def loss(module):
        return lambda p: torch.func.functional_call(module, p, (x,)).square().mean()

    parameters = {name: p.detach() * 1.1 for name, p in fused.named_parameters()}
    with torch.no_grad():
        got = torch.func.functional_call(fused, parameters, (x,))
        torch.testing.assert_close(got, torch.func.functional_call(plain, parameters, (x,)))
    ours, theirs = (torch.func.grad(loss(m))(parameters) for m in (fused, plain))
    for name, want in theirs.items():
        torch.testing.assert_close(ours[name], want)
    stacked = torch.stack([x, x + 1])
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(fused)(stacked)[1], fused(x + 1))


def test_meta_device():
    """Shapes without memory: built, moved and run."""
    with torch.device("meta"):
        fused = rf.FusedResidual(8, 12, use_1x1conv=True, strides=2).eval()
    x = torch.empty(2, 8, 9, 7, device="meta")
    assert fused(x).shape == (2, 12, 5, 4)
    with torch.no_grad():
        assert (
            fused(x).shape
            == build(BLOCKS[2]).to("meta")(torch.empty(2, 16, 9, 7, device="meta"))[:, :12].shape
        )
    fused = fused.to_empty(device="cpu")
    with torch.no_grad():
        for p in fused.parameters():
            p.normal_()
    randomize(fused)
    check_block(fused, image(8))


def test_tensor_subclasses_run_the_plain_block():
    class Mine(torch.Tensor):
        pass

    fused, x = build(BLOCKS[0]), image(8)
    with torch.no_grad():
        y = fused(x.as_subclass(Mine))
    assert type(y) is Mine
    assert_same(y.as_subclass(torch.Tensor), fused.original()(x).detach())


# ---- copies -------------------------------------------------------------------------------------


def by_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": by_torch_save,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("row", [BLOCKS[0], BLOCKS[2], BLOCKS[7]], ids=name_of)
def test_copies_are_independent(row, how):
    fused, x = build(row), image(row[1])
    with torch.no_grad():
        want = fused(x)
        twin = COPIES[how](fused)
        assert type(twin) is type(fused)
        assert_same(twin(x), want)
        twin.conv1.weight.mul_(2)
        twin.bn1.running_mean.add_(1)
        torch.testing.assert_close(twin(x), twin.original()(x))
        assert not torch.equal(twin(x), want)
        assert_same(fused(x), want)
        fused.conv2.weight.mul_(2)
        torch.testing.assert_close(twin(x), twin.original()(x))
    ours = {id(t) for t in (*fused.parameters(), *fused.buffers())}
    assert not ours & {id(t) for t in (*twin.parameters(), *twin.buffers())}
    assert twin.conv1 is twin.original().conv1


def test_shallow_copy_works():
    fused, x = build(BLOCKS[0]), image(8)
    with torch.no_grad():
        assert_same(copy.copy(fused)(x), fused(x))


def test_packed_weights_are_no_state():
    fused, x = build(BLOCKS[2]), image(16)
    keys, size = list(fused.state_dict()), len(pickle.dumps(fused))
    with torch.no_grad():
        fused(x)
    assert fused.status().packed_bytes > 0
    assert list(fused.state_dict()) == keys
    assert len(pickle.dumps(fused)) == size
    assert pickle.loads(pickle.dumps(fused)).status().backend == "not run yet"
    assert {n for n, _ in fused.named_buffers()} == {n for n, _ in fused.original().named_buffers()}


def test_printing_names_the_block():
    text = repr(build(BLOCKS[0]))
    assert text.startswith("FusedResidual(")
    assert "conv1" in text


# ---- status -------------------------------------------------------------------------------------


def test_status_before_and_after_a_call():
    fused, x = build(BLOCKS[2]), image(16)
    assert fused.status().backend == "not run yet"
    assert fused.status().packed_bytes == 0
    with torch.no_grad():
        fused(x)
    status = fused.status()
    assert status.fused
    assert status.packed_bytes > 0
    fused.train()
    assert (fused.status().fused, fused.status().reason) == (False, "training")
    fused.drop_packed()
    assert fused.status().packed_bytes == 0
    with select.forced("torch"), torch.no_grad():
        fused.eval()(x)
        assert fused.status().backend == "torch"
