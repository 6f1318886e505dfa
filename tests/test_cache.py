"""Packed weights are a cache: whatever is done to a parameter, the next call computes with it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from conftest import assert_same, needs_extension, randomize
from torch import nn

import resnet_fused as rf
from resnet_fused import check, packing, select
from resnet_fused.recipe import ConvUnit, Site

pytestmark = pytest.mark.usefixtures("one_thread")


def block(seed=0):
    torch.manual_seed(seed)
    return randomize(rf.FusedResidual(16, 24, use_1x1conv=True, strides=2)).eval()


def bottleneck(seed=0):
    torch.manual_seed(seed)
    return randomize(rf.FusedBottleneck(16, 6, use_1x1conv=True)).eval()


def conv_bn(seed=0):
    torch.manual_seed(seed)
    return randomize(rf.FusedConvBN(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24))).eval()


class Stem(nn.Sequential):
    """A site: conv and BN in a parent, the conv's slot computes both."""

    def __init__(self):
        super().__init__(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        unit = ConvUnit(self[0], self[1], "relu", "0", "1")
        rf.slots.install_site(self, Site(unit, "2"))


def stem(seed=0):
    torch.manual_seed(seed)
    return randomize(Stem()).eval()


BUILDERS = [block, bottleneck, conv_bn, stem]


def image(dtype=torch.float32):
    return torch.randn(2, 16, 7, 6, generator=torch.Generator().manual_seed(5)).to(dtype)


def fresh(module):
    """The result for the values that module has now, by a module that never packed anything."""
    twin = copy.deepcopy(module)
    rf.refresh(twin)
    return twin


def assert_fresh(module, x=None):
    """The next call computes with what the parameters hold: as a module without a cache."""
    x = image(next(module.parameters()).dtype) if x is None else x
    with torch.no_grad():
        assert_same(module(x), fresh(module)(x))


def warm(module):
    """Packs; returns the output."""
    with torch.no_grad():
        return module(image(next(module.parameters()).dtype)).clone()


def each_tensor(module):
    """Everything that the result depends on, with its name."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: t for name, t in named.items() if "num_batches_tracked" not in name}


# ---- ordinary edits ------------------------------------------------------------------------------


def optimizer_step(module):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(image()).square().sum().backward()
    optimizer.step()


def adam_step(module):
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, foreach=True)
    module(image()).square().sum().backward()
    optimizer.step()


def moving_average(module):
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(0.9).add_(torch.randn_like(p), alpha=0.1)


def low_rank_update(module):
    with torch.no_grad():
        weight = next(p for p in module.parameters() if p.dim() == 4)
        rank = torch.randn(weight.shape[0], 2) @ torch.randn(2, weight[0].numel())
        weight += rank.view_as(weight)


def load_other(module, **options):
    other = {name: t + 0.25 * torch.rand_like(t) for name, t in each_tensor(module).items()}
    module.load_state_dict(module.state_dict() | other, **options)


def train_a_step(module):
    module.train()
    for _ in range(3):
        module(image() * 3 + 1)
    module.eval()


def new_parameters(module):
    for m in module.modules():
        if hasattr(m, "running_mean"):
            m.weight = nn.Parameter(torch.rand_like(m.weight))
            m.running_mean = torch.rand_like(m.running_mean)


def new_weight(module):
    conv = next(m for m in module.modules() if hasattr(m, "weight") and m.weight.dim() == 4)
    conv.weight = nn.Parameter(torch.randn_like(conv.weight))


def new_eps(module):
    for m in module.modules():
        if hasattr(m, "eps"):
            m.eps = 0.3


def eps_of_one_norm(module):
    next(m for m in module.modules() if hasattr(m, "eps")).eps = 0.5


def reset_statistics(module):
    for m in module.modules():
        if hasattr(m, "reset_running_stats"):
            m.reset_running_stats()


def initialize_anew(module):
    for p in module.parameters():
        nn.init.uniform_(p, -0.5, 0.5)


def apply_function(module):
    module.apply(lambda m: [p.data.normal_() for p in m.parameters(recurse=False)])


def copy_by_foreach(module):
    parameters = [p.detach() for p in module.parameters()]
    torch._foreach_mul_(parameters, 1.5)


def swap_contents(module):
    weight = next(p for p in module.parameters() if p.dim() == 4)
    torch.utils.swap_tensors(weight, nn.Parameter(torch.randn_like(weight)))


def no_affine(module):
    for m in module.modules():
        if hasattr(m, "running_mean"):
            m.weight = None
            m.bias = None


EDITS = [
    optimizer_step,
    adam_step,
    moving_average,
    low_rank_update,
    load_other,
    train_a_step,
    new_parameters,
    new_weight,
    new_eps,
    eps_of_one_norm,
    reset_statistics,
    initialize_anew,
    apply_function,
    copy_by_foreach,
    swap_contents,
    no_affine,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("build", BUILDERS, ids=lambda f: f.__name__)
def test_edits(build, edit):
    module = build()
    before = warm(module)
    edit(module)
    assert_fresh(module)
    assert not torch.equal(warm(module), before), "the edit changed nothing"


@pytest.mark.parametrize("build", BUILDERS, ids=lambda f: f.__name__)
def test_load_state_dict_by_assignment(build):
    module = build()
    before = warm(module)
    load_other(module, assign=True)
    assert_fresh(module)
    assert not torch.equal(warm(module), before)


@pytest.mark.parametrize("build", BUILDERS, ids=lambda f: f.__name__)
def test_every_single_tensor_counts(build):
    """In-place edits of one tensor at a time."""
    module = build()
    for name, tensor in each_tensor(module).items():
        before = warm(module)
        with torch.no_grad():
            tensor.add_(0.5)
        assert_fresh(module)
        assert not torch.equal(warm(module), before), f"{name} has no effect"


@pytest.mark.parametrize("build", BUILDERS, ids=lambda f: f.__name__)
def test_gradient_path_is_never_stale_either(build):
    module = build()
    warm(module)
    for name, tensor in each_tensor(module).items():
        with torch.no_grad():
            tensor.add_(0.5)
        got, want = module(image()), fresh(module)(image())
        assert got.requires_grad
        assert_same(got.detach(), want.detach(), name)


# ---- edits that no version counter tells of ------------------------------------------------------


@pytest.mark.parametrize("how", ["data", "numpy", "numpy one value", "data one value"])
@pytest.mark.parametrize("build", BUILDERS, ids=lambda f: f.__name__)
def test_vectors_edited_behind_the_version_counter(build, how):
    """Every value of batch norms and biases is compared at every call."""
    module = build()
    for name, tensor in each_tensor(module).items():
        if tensor.dim() != 1:
            continue
        before, version = warm(module), tensor._version
        values = tensor.detach().numpy() if how.startswith("numpy") else tensor.data
        if how.endswith("one value"):
            values[-1] += 0.5
        else:
            values += 0.5
        assert tensor._version == version
        assert_fresh(module)
        assert not torch.equal(warm(module), before), name


@pytest.mark.parametrize("edit", ["data", "numpy", "data zero", "data copy", "half and back"])
@pytest.mark.parametrize("build", BUILDERS, ids=lambda f: f.__name__)
def test_weights_edited_behind_the_version_counter(build, edit):
    """Samples find what changes a whole weight."""
    module = build()
    for name, tensor in each_tensor(module).items():
        if tensor.dim() != 4:
            continue
        before, version = warm(module), tensor._version
        if edit == "data":
            tensor.data.mul_(1.25)
        elif edit == "numpy":
            tensor.detach().numpy()[...] *= 1.25
        elif edit == "data zero":
            tensor.data.zero_()
        elif edit == "data copy":
            tensor.data = torch.randn_like(tensor)
        else:
            tensor.data = tensor.data.half().float()
        if edit != "data copy":
            assert tensor._version == version
        assert_fresh(module)
        assert not torch.equal(warm(module), before), name


@pytest.mark.parametrize("mode", ["train then eval", "eval"])
@pytest.mark.parametrize("build", BUILDERS, ids=lambda f: f.__name__)
def test_train_and_eval_find_a_single_value(build, mode):
    """One value of a large weight, which the samples may miss."""
    module = build()
    for name, tensor in each_tensor(module).items():
        for index in range(0, tensor.numel(), max(1, tensor.numel() // 7)):
            before = warm(module)
            tensor.data.view(-1)[index] += 1.0
            if mode == "train then eval":
                module.train()
            module.eval()
            assert_fresh(module)
            assert not torch.equal(warm(module), before), f"{name}[{index}]"


@pytest.mark.parametrize("build", BUILDERS, ids=lambda f: f.__name__)
def test_refresh_finds_everything(build):
    module = build()
    weight = next(p for p in module.parameters() if p.dim() == 4)
    for index in range(weight.numel()):
        weight.data.view(-1)[index] += 1.0
        if index % 50 == 0:
            rf.refresh(module)
            assert_fresh(module)


@pytest.mark.parametrize("build", BUILDERS, ids=lambda f: f.__name__)
def test_train_and_eval_keep_what_did_not_change(build):
    """Switching modes compares; it packs again only on a difference."""
    module = build()
    warm(module)
    packed = [m._cache.held() for m in module.modules() if hasattr(m, "drop_packed")]
    module.train()
    module.eval()
    warm(module)
    after = [m._cache.held() for m in module.modules() if hasattr(m, "drop_packed")]
    for old, new in zip(packed, after, strict=True):
        assert all(a is b for a, b in zip(old, new, strict=True))


@pytest.mark.parametrize("build", BUILDERS, ids=lambda f: f.__name__)
def test_inference_tensors(build):
    """They have no version: whole contents are compared at every call."""
    with torch.inference_mode():
        module = build()
        for name, tensor in each_tensor(module).items():
            assert tensor.is_inference()
            before = module(image()).clone()
            tensor.view(-1)[tensor.numel() // 2] += 1.0
            assert_same(module(image()), fresh(module)(image()))
            assert not torch.equal(module(image()), before), name
    with torch.no_grad():
        assert_same(module(image()), fresh(module)(image()))


# ---- dtypes, devices, contexts -------------------------------------------------------------------


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.bfloat16().float(),
        lambda m: m.half().float(),
        lambda m: m.double().float(),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.to("meta").to_empty(device="cpu").apply(fill),
    ],
)
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("build", BUILDERS, ids=lambda f: f.__name__)
def test_casts_and_moves(build, cast, swap):
    module = build()
    warm(module)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        cast(module)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert_fresh(module)


def fill(module):
    for t in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        t.data = torch.rand_like(t, dtype=torch.float32) + 0.1


def test_memory_handed_on_to_another_weight():
    """The same address, dtype and version may come back with other contents."""
    module = conv_bn()
    for _ in range(20):
        warm(module)
        module.conv.weight.data = torch.randn_like(module.conv.weight)
        assert_fresh(module)


@pytest.mark.parametrize("build", BUILDERS, ids=lambda f: f.__name__)
def test_contexts_taken_in_turns(build):
    """Autocast, sizes, forced plans, exact_nonfinite: each call gets the weights of its own."""
    module = build()
    small, large = image(), torch.randn(1, 16, 40, 33)
    with torch.no_grad():
        wanted = {}
        for again in range(2):
            for low in (None, torch.bfloat16, torch.float16):
                for word in select.FORCES:
                    for i, x in enumerate((small, large)):
                        for exact in (False, True):
                            for m in module.modules():
                                if hasattr(m, "drop_packed"):
                                    m.exact_nonfinite = exact
                            key = (low, word, i, exact)
                            enabled = low is not None
                            auto = torch.autocast("cpu", dtype=low, enabled=enabled)
                            with select.forced(word), auto:
                                y = module(x)
                            if again:
                                assert_same(y, wanted[key], str(key))
                            else:
                                twin = fresh(module)
                                with select.forced(word), auto:
                                    wanted[key] = twin(x)
                                assert_same(y, wanted[key], str(key))


def test_one_layout_at_a_time():
    """Other contexts replace the packed weights, they do not add to them."""
    module = conv_bn()
    sizes = set()
    with torch.no_grad():
        for word in (*check.CPU_PLANS, "direct"):
            with select.forced(word):
                module(image())
            held = module._cache.held()
            assert len(held) == 1
            sizes.add((held[0].choice.plan, held[0].nbytes))
            kept = weakref.ref(held[0])
            del held
            module.drop_packed()
            gc.collect()
            assert kept() is None, "something else holds on to packed weights"
    assert len(sizes) == len({plan for plan, _ in sizes})


# ---- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("build", BUILDERS[:3], ids=lambda f: f.__name__)
def test_copies_have_caches_of_their_own(build, how):
    module = build()
    before = warm(module)
    twin = how(module)
    moving_average(twin)
    assert_fresh(twin)
    assert_same(warm(module), before)
    moving_average(module)
    assert_fresh(module)
    assert_fresh(twin)


def test_shared_parameters():
    """Tied weights: an edit through one block reaches the other."""
    first, second = block(), block(seed=1)
    second.conv1.weight = first.conv1.weight
    warm(first), warm(second)
    with torch.no_grad():
        first.conv1.weight.add_(0.1)
    assert_fresh(first)
    assert_fresh(second)


def test_parameter_of_one_block_moved_to_another():
    first, second = block(), block(seed=1)
    warm(first), warm(second)
    first.conv2.weight, second.conv2.weight = second.conv2.weight, first.conv2.weight
    assert_fresh(first)
    assert_fresh(second)


# ---- what the cache reads ------------------------------------------------------------------------


def test_fold_is_batch_norm():
    """scale and shift against BN itself in float64, every combination of what may be missing."""
    for bias in (False, True):
        for affine in (False, True):
            conv, bn = nn.Conv2d(3, 7, 1, bias=bias), nn.BatchNorm2d(7, affine=affine, eps=0.01)
            randomize(bn).eval()
            scale, shift = packing.fold(ConvUnit(conv, bn, "none", "conv", "bn"))
            assert scale.dtype == shift.dtype == torch.float32
            x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
            bare = nn.functional.conv2d(x, conv.weight.double())
            want = copy.deepcopy(bn).double()(copy.deepcopy(conv).double()(x))
            got = bare * scale.double()[:, None, None] + shift.double()[:, None, None]
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    conv = nn.Conv2d(3, 7, 1).double()
    scale, shift = packing.fold(ConvUnit(conv, None, "none", "conv", None))
    assert scale.dtype == torch.float64
    assert_same(scale, torch.ones(7, dtype=torch.float64))
    assert_same(shift, conv.bias.detach())


def test_content_ops(dtype):
    """Equal contents compare equal; every value of vectors and small tensors counts."""
    ops = torch.ops.resnet_fused
    big = torch.randn(40, 16, 3, 3).to(dtype)
    tensors = [big, torch.randn(33).to(dtype), torch.randn(2, 3).to(dtype), torch.randn(0)]
    tensors.append(torch.randn(3, 5, 5, 3).to(dtype).permute(0, 3, 1, 2))
    sample, whole = ops.content_sample(tensors), ops.content_hash(tensors)
    assert ops.content_equal(tensors, sample)
    assert ops.content_hash([t.clone() for t in tensors]) == whole
    for t in tensors:
        for i in range(0, t.numel(), max(1, t.numel() // 40)):
            at = tuple(int(n) for n in torch.unravel_index(torch.tensor(i), t.shape))
            before = t[at].clone()
            t[at] += 1
            assert ops.content_hash(tensors) != whole
            if t.dim() == 1 or t.numel() < 64:
                assert not ops.content_equal(tensors, sample)
            t[at] = before
    assert ops.content_equal(tensors, sample)
    assert not ops.content_equal(tensors[:2], sample)
    assert not ops.content_equal([*tensors, tensors[1]], sample)
    assert not ops.content_equal(tensors, sample[:-1])
    assert not ops.content_equal([tensors[0], tensors[1].flip(0), *tensors[2:]], sample)
    assert ops.content_hash([tensors[1], big]) != ops.content_hash([big, tensors[1]])


def test_content_tells_zero_from_minus_zero_and_knows_nan():
    ops = torch.ops.resnet_fused
    zero, nan = torch.zeros(3), torch.full((3,), float("nan"))
    assert not ops.content_equal([-zero], ops.content_sample([zero]))
    assert ops.content_equal([nan], ops.content_sample([nan]))
    assert ops.content_hash([zero]) != ops.content_hash([-zero])


@needs_extension
def test_samples_are_spread():
    """64 of a weight's values, over all kernel positions and over the whole range of channels."""
    weight = torch.arange(64 * 32 * 9, dtype=torch.float64).view(64, 32, 3, 3)
    seen = torch.ops.resnet_fused.content_sample([weight]).view(torch.float64).long()
    assert seen.numel() == 64
    assert len(set((seen % 9).tolist())) == 9, "always the same tap"
    assert len(set((seen // (32 * 9)).tolist())) >= 32, "not every second output channel"
    assert len(set((seen // 9 % 32).tolist())) >= 16
