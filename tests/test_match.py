"""match: which modules are proved to be residual blocks, as what, and why the others are not."""

from __future__ import annotations

import builtins
import contextlib
import random
import threading

import pytest
import torch
import torch.nn.functional as F
from refused_blocks import CASES, Plain, randomized, with_child
from torch import Tensor, nn
from torchvision_style import BasicBlock, Bottleneck, ResNet

from resnet_fused import fuse, reference
from resnet_fused._trace import EVAL, record, shadow, unit_leaf
from resnet_fused.match import find_sites, inspect_block, match_block
from resnet_fused.recipe import BlockRecipe, NoMatch


def run(recipe: BlockRecipe, x: Tensor) -> Tensor:
    """A recipe in eager operations: what any user of it computes."""

    def unit(u, y, extra=None):
        y = u.conv(y)
        y = u.bn(y) if u.bn is not None else y
        y = y + extra if extra is not None else y
        return F.relu(y) if u.act == "relu" else y

    skip = recipe.avg_pool(x) if recipe.avg_pool is not None else x
    skip = unit(recipe.shortcut, skip) if recipe.shortcut is not None else skip
    y = x
    for u in recipe.main[:-1]:
        y = unit(u, y)
    return unit(recipe.main[-1], y, skip)


def downsample(cin, cout, stride):
    return nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))


# ---- recording -------------------------------------------------------------------------------

# torch's C++ asks of each value whether it is a tensor; taking a recorded one for that, it read
# memory that was none of a tensor's.
TAKES_NUMBERS = {
    "reshape": lambda x: torch.reshape(x, (x.size(0), -1)),
    "flatten": lambda x: torch.flatten(x, x.dim() - 3),
    "transpose": lambda x: torch.transpose(x, 1, x.dim() - 1),
    "cat": lambda x: torch.cat([x, x], x.dim() - 3),
    "chunk": lambda x: torch.chunk(x, 2, x.dim() - 3)[0],
    "narrow": lambda x: torch.narrow(x, x.dim() - 3, 0, 1),
    "full": lambda x: x + torch.full((x.size(0), 1, 1, 1), 1.0),
    "alpha": lambda x: torch.add(x, x, alpha=x.size(0)),
    "clamp": lambda x: torch.clamp(x, min=x.mean()),
    "where": lambda x: torch.where(x > 0, x, 0.5),
    "tensor": lambda x: x + torch.tensor(x.size(1)),
    "as_tensor": lambda x: x + torch.as_tensor(x),
    "stored": lambda x: torch.ones(1) + x,
}


class Behind(Plain):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(self.relu(self.main(x) + x))


@pytest.mark.parametrize("function", TAKES_NUMBERS.values(), ids=TAKES_NUMBERS)
def test_values_are_no_tensors_to_torch_itself(function):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), Behind(function)).eval()
    x = torch.randn(2, 3, 6, 5)
    fused = [fuse(net) for _ in range(20)][-1]
    with torch.no_grad():
        torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [TAKES_NUMBERS["reshape"], lambda x: x.no_such_method()])
def test_isinstance_is_pythons_own_again(function):
    before = builtins.isinstance
    with contextlib.suppress(NoMatch):
        record(Behind(function), [EVAL], unit_leaf)
    assert builtins.isinstance is before


# ---- blocks that match -----------------------------------------------------------------------


class Operands(Plain):
    """The shortcut first, functions and methods mixed, in place where only the block sees it."""

    def forward(self, x):
        y = torch.relu_(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.add(input=self.shortcut(x), other=y, alpha=1).relu_()


class StatementStyle(Plain):
    """In-place operations whose results are dropped: later reads see them all the same."""

    def forward(self, x):
        y = self.bn1(self.conv1(x))
        F.relu(y, inplace=True)
        y = self.bn2(self.conv2(y))
        y.add_(x)
        y.relu_()
        return y


class InPlaceOnFreshShortcut(Plain):
    def forward(self, x):
        y = self.main(x)
        x = self.shortcut(x)
        x += y
        return F.relu(x)


class NoActivation(Plain):
    def forward(self, x):
        return self.main(x) + x


class NoNorms(Plain):
    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv1(x))) + x)


class LinearChain(Plain):
    def forward(self, x):
        return F.relu(self.bn2(self.conv2(self.conv1(x))) + x)


class RegisteredBackwards(nn.Module):
    """Children in an order that says nothing about the dataflow."""

    def __init__(self):
        super().__init__()
        self.bn2, self.relu = nn.BatchNorm2d(8), nn.ReLU()
        self.a, self.shortcut, self.b = (
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 8, 3, padding=1),
        )
        self.bn1 = nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.relu(self.bn1(self.b(x)))
        return self.relu(self.shortcut(x) + self.bn2(self.a(y)))


class Containers(nn.Module):
    """Units inside containers of the user's own, as Hugging Face writes them."""

    class Unit(nn.Module):
        def __init__(self, cin, cout, k, act):
            super().__init__()
            self.convolution = nn.Conv2d(cin, cout, k, padding=k // 2, bias=False)
            self.normalization = nn.BatchNorm2d(cout)
            self.activation = nn.ReLU() if act else nn.Identity()

        def forward(self, x):
            return self.activation(self.normalization(self.convolution(x)))

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(
            self.Unit(8, 4, 1, True), self.Unit(4, 4, 3, True), self.Unit(4, 8, 1, False)
        )
        self.shortcut = nn.Identity()
        self.tail = nn.ModuleList([nn.Sequential(), nn.ReLU()])

    def forward(self, x):
        y = self.layer(x) + self.shortcut(x)
        for m in self.tail:
            y = m(y)
        return y


class UnusedParts(Plain):
    """Dropout with p=0, a drop-path that is off, children and arguments that nothing uses."""

    class DropPath(nn.Module):
        def __init__(self, p):
            super().__init__()
            self.p = p

        def forward(self, x):
            if self.p == 0.0 or not self.training:
                return x
            return x * torch.empty(x.shape[0], 1, 1, 1).bernoulli_(1 - self.p)

    def __init__(self):
        super().__init__()
        self.drop, self.path, self.unused = nn.Dropout(0.0), self.DropPath(0.0), nn.Dropout(0.5)

    def forward(self, x, scale=None, **options):
        return self.relu(self.path(self.drop(self.main(x))) + x)


class PooledShortcut(nn.Module):
    """ResNet-D."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 16, 1), nn.BatchNorm2d(16)
        self.down = nn.Sequential(
            nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)
        )

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.down(x))


def frozen():
    block = BasicBlock(8, 8)
    for p in block.parameters():
        p.requires_grad = False
    block.bn1.eval()
    return block


def layers_of(**children):
    block = BasicBlock(8, 8)
    for name, child in children.items():
        setattr(block, name, child)
    return block


def half_with_wide_norms():
    block = BasicBlock(8, 8).bfloat16()
    block.bn1.float()
    block.bn2.float()
    return block


MATCHES = {
    "lesson": (lambda: reference.Residual(8, 8), "basic", "conv1 bn1 relu, conv2 bn2 relu"),
    "lesson_1x1": (
        lambda: reference.Residual(8, 16, True, 2),
        "basic",
        "conv1 bn1 relu, conv3 None none, conv2 bn2 relu",
    ),
    "lesson_bottleneck": (
        lambda: reference.Bottleneck(8, 8, True),
        "bottleneck",
        "conv1 bn1 relu, conv2 bn2 relu, conv4 None none, conv3 bn3 relu",
    ),
    "basic": (lambda: BasicBlock(8, 8), "basic", "conv1 bn1 relu, conv2 bn2 relu"),
    "basic_downsample": (
        lambda: BasicBlock(8, 16, 2, downsample(8, 16, 2)),
        "basic",
        "conv1 bn1 relu, downsample.0 downsample.1 none, conv2 bn2 relu",
    ),
    "bottleneck_grouped_dilated": (
        lambda: Bottleneck(8, 4, 1, downsample(8, 16, 1), groups=2, base_width=128, dilation=2),
        "bottleneck",
        "conv1 bn1 relu, conv2 bn2 relu, downsample.0 downsample.1 none, conv3 bn3 relu",
    ),
    "operands": (Operands, "basic", "conv1 bn1 relu, shortcut.0 shortcut.1 none, conv2 bn2 relu"),
    "statements": (StatementStyle, "basic", "conv1 bn1 relu, conv2 bn2 relu"),
    "fresh_shortcut": (
        InPlaceOnFreshShortcut,
        "basic",
        "conv1 bn1 relu, shortcut.0 shortcut.1 none, conv2 bn2 relu",
    ),
    "no_activation": (NoActivation, "basic", "conv1 bn1 relu, conv2 bn2 none"),
    "no_norms": (NoNorms, "basic", "conv1 None relu, conv2 None relu"),
    "linear_chain": (LinearChain, "basic", "conv1 None none, conv2 bn2 relu"),
    "backwards": (RegisteredBackwards, "basic", "b bn1 relu, shortcut None none, a bn2 relu"),
    "containers": (
        Containers,
        "bottleneck",
        "layer.0.convolution layer.0.normalization relu, "
        "layer.1.convolution layer.1.normalization relu, "
        "layer.2.convolution layer.2.normalization relu",
    ),
    "unused_parts": (UnusedParts, "basic", "conv1 bn1 relu, conv2 bn2 relu"),
    "pooled_shortcut": (
        PooledShortcut,
        "bottleneck",
        "conv1 bn1 relu, conv2 bn2 relu, down.1 down.2 none, conv3 bn3 relu",
    ),
    "no_affine": (
        lambda: layers_of(bn1=nn.BatchNorm2d(8, eps=0.1, affine=False)),
        "basic",
        "conv1 bn1 relu, conv2 bn2 relu",
    ),
    "same_and_valid": (
        lambda: layers_of(
            conv1=nn.Conv2d(8, 8, 5, padding="same"), conv2=nn.Conv2d(8, 8, 1, padding="valid")
        ),
        "basic",
        "conv1 bn1 relu, conv2 bn2 relu",
    ),
    "momentum_none": (
        lambda: layers_of(bn1=nn.BatchNorm2d(8, momentum=None)),
        "basic",
        "conv1 bn1 relu, conv2 bn2 relu",
    ),
    "no_relu_module": (
        lambda: layers_of(relu=nn.Identity()),
        "basic",
        "conv1 bn1 none, conv2 bn2 none",
    ),
    "frozen": (frozen, "basic", "conv1 bn1 relu, conv2 bn2 relu"),
    "half_with_wide_norms": (half_with_wide_norms, "basic", "conv1 bn1 relu, conv2 bn2 relu"),
    "on_meta": (lambda: BasicBlock(8, 8).to("meta"), "basic", "conv1 bn1 relu, conv2 bn2 relu"),
}


@pytest.mark.parametrize("name", MATCHES)
def test_matches(name):
    build, kind, units = MATCHES[name]
    block = randomized(build()).eval()
    recipe = match_block(block)
    assert recipe.kind == kind
    assert ", ".join(f"{u.conv_name} {u.bn_name} {u.act}" for u in recipe.units()) == units
    for unit in recipe.units():
        assert unit.conv is block.get_submodule(unit.conv_name)
        assert unit.bn is (block.get_submodule(unit.bn_name) if unit.bn_name else None)
    assert inspect_block(block).candidate
    first = next(block.parameters())
    if first.device.type != "meta":
        x = torch.randn(2, 8, 9, 9, dtype=first.dtype)
        with torch.no_grad():
            # The same eager operations in the same order: the same bits.
            assert torch.equal(run(recipe, x.clone()), block(x.clone()))


def test_pool_is_the_blocks_own():
    block = PooledShortcut()
    recipe = match_block(block)
    assert recipe.avg_pool is block.down[0]
    assert recipe.avg_pool_name == "down.0"


@pytest.mark.parametrize("training", [True, False])
def test_matching_leaves_no_trace(training):
    """Flags, statistics, attributes, gradient mode and random states are what they were."""
    block = randomized(BasicBlock(8, 8)).train(training)
    block.bn2.eval()
    flags = [m.training for m in block.modules()]
    attributes = [dict(vars(m)) for m in block.modules()]
    state = {key: value.clone() for key, value in block.state_dict().items()}
    states = torch.get_rng_state(), random.getstate()
    match_block(block)
    assert [m.training for m in block.modules()] == flags
    for m, before in zip(block.modules(), attributes, strict=True):
        assert vars(m).keys() == before.keys()
        assert all(vars(m)[key] is before[key] for key in before)
    for key, value in block.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_matches_under_any_gradient_mode(context):
    with context():
        assert match_block(BasicBlock(8, 8)).kind == "basic"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert match_block(BasicBlock(8, 8)).kind == "basic"


# ---- blocks that do not ----------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_refuses(name):
    build, reason = CASES[name]
    block = build().eval()
    with pytest.raises(NoMatch) as caught:
        match_block(block)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    verdict = inspect_block(block)
    assert verdict.recipe is None
    assert verdict.reason == str(caught.value)
    assert verdict.candidate, "a user would call this a residual block"


class MyTensor(torch.Tensor):
    pass


def _stop_tracking(block):
    block.bn1.track_running_stats = False


def _short_bias(block):
    block.conv1.bias = nn.Parameter(torch.zeros(1))


def _norm_without_bias(block):
    block.bn1.bias = None


def _other_norm(block):
    block.bn1 = nn.BatchNorm2d(1)


def _unregistered_weight(block):
    weight = block.conv1.weight.detach()
    del block.conv1.weight
    block.conv1.weight = weight


def _unregistered_mean(block):
    mean = block.bn2.running_mean
    del block.bn2.running_mean
    block.bn2.running_mean = mean


def _tensor_subclass(block):
    weight = block.conv1.weight.detach().as_subclass(MyTensor)
    block.conv1.weight = nn.Parameter(weight, requires_grad=False)


def _complex(block):
    block.to(torch.complex64)


def _sparse(block):
    block.conv2.weight = nn.Parameter(block.conv2.weight.detach().to_sparse())


def _mixed_norm(block):
    block.bn1.running_var = block.bn1.running_var.double()


def _wide_norm(block):
    block.bn1.double()


def _narrow(block):
    block.conv2 = nn.Conv2d(4, 8, 3, padding=1)


def _narrow_shortcut(block):
    block.downsample = nn.Conv2d(4, 8, 1)


def _on_two_devices(block):
    block.conv2.to("meta")


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        (_stop_tracking, "bn1 keeps no running statistics"),
        (_short_bias, "conv1.bias has shape (1,) where conv1 says (8,)"),
        (_norm_without_bias, "bn1 has only one of weight and bias"),
        (_other_norm, "bn1 has 1 channels, conv1 8"),
        (_unregistered_weight, "conv1.weight is neither a parameter nor a buffer"),
        (_unregistered_mean, "bn2.running_mean is neither a parameter nor a buffer"),
        (_tensor_subclass, "conv1.weight is a MyTensor"),
        (_complex, "conv1.weight is a torch.strided tensor of torch.complex64"),
        (_sparse, "conv2.weight is a torch.sparse_coo tensor"),
        (_mixed_norm, "bn1 mixes dtypes"),
        (_wide_norm, "mixes float32, float64"),
        (_narrow, "conv1 gives 8 channels, conv2 takes 4"),
        (_narrow_shortcut, "the shortcut takes 4 channels, the main path 8"),
        (_on_two_devices, "lies on several devices (cpu, meta)"),
    ],
)
def test_layers_that_do_not_fit(alter, reason):
    block = BasicBlock(8, 8)
    alter(block)
    with pytest.raises(NoMatch) as caught:
        match_block(block)
    assert reason in str(caught.value)


def test_at_least_25_kinds_of_refusals():
    assert len(CASES) >= 25
    assert len({reason for _, reason in CASES.values()}) >= 25


class Subtracts(Plain):
    def forward(self, x):
        return self.relu(self.main(x) - x)


class Multiplies(Plain):
    def forward(self, x):
        return self.relu(self.main(x) * x)


class Concatenates(Plain):
    def forward(self, x):
        return torch.cat([self.main(x), x], 1)


class ConvolutionBeforeTheFork(Plain):
    """A vision transformer's: one convolution, then additions that skip none."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(9), nn.Linear(9, 9)

    def forward(self, x):
        y = self.conv1(x)
        return y + self.linear(self.norm(y))


class AddsBias(Plain):
    def forward(self, x):
        return self.relu(self.main(x) + 1)


NOT_RESIDUAL = {
    "subtracts": Subtracts,
    "multiplies": Multiplies,
    "concatenates": Concatenates,
    "adds_a_constant": AddsBias,
    "convolution_before_the_fork": ConvolutionBeforeTheFork,
    "no_convolution": lambda: nn.TransformerEncoderLayer(8, 2),
    "linear": lambda: nn.Linear(8, 8),
    "network": lambda: ResNet(BasicBlock, [2, 2, 2, 2], width=8),
}


@pytest.mark.parametrize("name", NOT_RESIDUAL)
def test_not_even_a_candidate(name):
    module = NOT_RESIDUAL[name]()
    with pytest.raises(NoMatch):
        match_block(module)
    assert not inspect_block(module).candidate


def test_the_block_is_the_candidate_not_what_holds_it():
    assert not inspect_block(nn.Sequential(BasicBlock(8, 8))).candidate


class RaisesWithoutText(Plain):
    def forward(self, x):
        if type(x) is Tensor:  # not when it is traced
            raise ValueError
        return self.relu(self.main(x) + x)


def test_an_exception_without_text_is_a_reason_too():
    assert inspect_block(RaisesWithoutText()).reason == "does not run (ValueError)"


def test_refused_in_place_does_not_touch_the_users_module():
    block = CASES["KeepsFeatures"][0]()
    with pytest.raises(NoMatch):
        match_block(block)
    assert block.seen is None
    counter = CASES["CountsCalls"][0]()
    with pytest.raises(NoMatch):
        match_block(counter)
    assert counter.calls == 0
    appender = CASES["AppendsToList"][0]()
    with pytest.raises(NoMatch):
        match_block(appender)
    assert appender.log == {"deep": []}


def test_random_states_survive_a_block_that_draws():
    before = random.getstate()
    with pytest.raises(NoMatch, match="random"):
        match_block(CASES["StochasticDepthByPython"][0]())
    assert random.getstate() == before


def test_hooks_do_not_run_while_matching():
    seen = []
    block = Operands()
    for m in (block, block.conv1, block.shortcut):
        m.register_forward_hook(lambda m, args, out: seen.append(out))
    assert inspect_block(block).candidate
    assert seen == []


def test_weights_are_not_copied_for_tracing():
    block = BasicBlock(8, 8)
    block.mask = torch.ones(8)
    block.downsample = nn.Sequential(nn.Conv2d(8, 8, 1))
    copied = shadow(block)
    assert copied.conv1 is not block.conv1
    assert copied.conv1.weight is block.conv1.weight
    assert copied.bn1.running_mean is block.bn1.running_mean
    assert copied.mask is block.mask
    parent = shadow(block, share_children=True)
    assert parent is not block
    assert parent.conv1 is block.conv1


def test_global_hooks_are_seen():
    block = BasicBlock(8, 8)
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: out)
    try:
        with pytest.raises(NoMatch, match="a global forward hook is registered for all modules"):
            match_block(block)
    finally:
        handle.remove()
    match_block(block)


def test_compiled_block_is_left_alone():
    block = BasicBlock(8, 8)
    block.compile()
    with pytest.raises(NoMatch, match="the block is compiled on its own"):
        match_block(block)


def test_other_threads_run_undisturbed_while_one_matches():
    """torch.fx patches nn.Module.__call__ while it traces; other threads must not notice."""
    net = randomized(BasicBlock(8, 8)).eval()
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        expected = net(x)
    stop = threading.Event()
    failures: list[object] = []

    def serve():
        with torch.no_grad():
            while not stop.is_set():
                try:
                    if not torch.equal(net(x), expected):
                        failures.append("other result")
                except Exception as error:
                    failures.append(error)

    def trace():
        for _ in range(10):
            match_block(BasicBlock(8, 8))

    server, tracers = (
        threading.Thread(target=serve),
        [threading.Thread(target=trace) for _ in range(2)],
    )
    server.start()
    for t in tracers:
        t.start()
    for t in tracers:
        t.join()
    stop.set()
    server.join()
    assert failures == []
    assert nn.Module.__call__ is torch.fx._symbolic_trace._orig_module_call


PROBES = []


class Probing(Plain):
    def forward(self, x):
        for probe in PROBES:
            probe()
        return self.relu(self.main(x) + x)


def test_one_trace_at_a_time():
    """Two traces at once would leave torch.fx's patch of nn.Module.__call__ behind."""
    other = threading.Thread(target=match_block, args=[BasicBlock(8, 8)])
    alive: list[bool] = []

    def probe():
        other.start()
        other.join(0.2)
        alive.append(other.is_alive())

    PROBES.append(probe)
    try:
        record(Probing(), [EVAL], unit_leaf)
    finally:
        PROBES.clear()
    assert alive == [True]
    other.join()
    assert nn.Module.__call__ is torch.fx._symbolic_trace._orig_module_call


# ---- sites -----------------------------------------------------------------------------------


def names(sites):
    return [(s.unit.conv_name, s.unit.bn_name, s.act_name, s.unit.act) for s in sites]


def test_site_of_the_stem():
    net = ResNet(BasicBlock, [1, 1, 1, 1], width=8)
    sites, refused = find_sites(net)
    assert names(sites) == [("conv1", "bn1", "relu", "relu")]
    assert sites[0].unit.conv is net.conv1
    assert sites[0].unit.bn is net.bn1
    assert refused == []


def test_sites_of_a_sequential():
    stem = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.GELU()),
        *(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)),
    )
    sites, refused = find_sites(stem)
    assert names(sites) == [("0", "1", "2", "relu"), ("3", "4", None, "none")]
    assert refused == []


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()


class FunctionalRelu(Net):
    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class TapAfterNorm(Net):
    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.relu(y), y


class ReluTwice(Net):
    def forward(self, x):
        return self.relu(self.bn(self.conv(self.relu(x))))


class ReluIsLeaky(Net):
    def __init__(self):
        super().__init__()
        self.relu = nn.LeakyReLU()

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class AsksForAnAttribute(Net):
    """A tensor has no such attribute: what happens if it had one is of no concern."""

    def forward(self, x):
        y = self.conv(x)
        if hasattr(x, "mask"):
            y = y * x.mask
        return self.relu(self.bn(y))


class EarlyReturnInTraining(Net):
    """The whole is used in both modes: what follows may differ."""

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        return (y, y.mean()) if self.training else y


@pytest.mark.parametrize(
    ("parent", "act"),
    [
        (FunctionalRelu, None),
        (TapAfterNorm, None),
        (ReluTwice, None),
        (ReluIsLeaky, None),
        (AsksForAnAttribute, "relu"),
        (EarlyReturnInTraining, "relu"),
    ],
)
def test_site_and_its_activation(parent, act):
    sites, refused = find_sites(parent())
    assert names(sites) == [("conv", "bn", act, "relu" if act else "none")]
    assert refused == []


class TapAfterConv(Net):
    def forward(self, x):
        y = self.conv(x)
        return self.relu(self.bn(y)), y


class ConvTwice(Net):
    def forward(self, x):
        return self.bn(self.conv(self.conv(x)))


class NormTwice(Net):
    def forward(self, x):
        return self.bn(self.bn(self.conv(x)))


class BiasBetween(Net):
    def forward(self, x):
        y = self.conv(x)
        y += 1
        return self.bn(y)


class SeesDataBetween(Net):
    def forward(self, x):
        y = self.conv(x)
        y.data.mul_(2)
        return self.bn(y)


class RegisteredTwice(Net):
    def __init__(self):
        super().__init__()
        self.alias = self.conv

    def forward(self, x):
        return self.relu(self.bn(self.alias(x)))


class ByKeyword(Net):
    """The slots of a site take a positional argument."""

    def forward(self, x):
        return self.bn(self.conv(input=x))


class NestedConv(Net):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 1))

    def forward(self, x):
        return self.bn(self.inner[0](x))


class NormUnderNoGrad(Net):
    def forward(self, x):
        y = self.conv(x)
        with torch.no_grad():
            return self.bn(y)


@pytest.mark.parametrize(
    "parent",
    [
        TapAfterConv,
        ConvTwice,
        NormTwice,
        BiasBetween,
        SeesDataBetween,
        RegisteredTwice,
        ByKeyword,
        NestedConv,
    ],
)
def test_no_site(parent):
    assert find_sites(parent()) == ([], [])


class DropsNormInTraining(Net):
    def forward(self, x):
        y = self.conv(x)
        return self.relu(y if self.training else self.bn(y))


class Untraceable(Net):
    def forward(self, x):
        return self.bn(self.conv(x)) if x.sum() > 0 else x


class OwnCall(FunctionalRelu):
    def __call__(self, x):
        return super().__call__(x) * 2


def patched():
    net = FunctionalRelu()
    net.forward = lambda x: net.conv(x)
    return net


def hooked():
    net = FunctionalRelu()
    net.bn.register_forward_hook(lambda m, args, out: out * 2)
    return net


@pytest.mark.parametrize(
    ("parent", "refused"),
    [
        (DropsNormInTraining, ("conv", "bn does not follow it in every mode")),
        (NormUnderNoGrad, ("conv", "bn does not follow it in every mode, train() or eval()")),
        (Untraceable, ("", "forward branches on the values or the shape of a tensor")),
        (OwnCall, ("", "its class overrides __call__")),
        (patched, ("", "forward is replaced on the instance")),
        (hooked, ("conv", "bn has a forward hook")),
        (
            lambda: nn.Sequential(nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8)),
            ("0", "the norm after 0 is GroupNorm"),
        ),
        (
            lambda: nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8)),
            ("0", "0 is a Conv1d, not a plain Conv2d"),
        ),
    ],
)
def test_refused_sites(parent, refused):
    sites, found = find_sites(parent())
    assert sites == []
    assert len(found) == 1
    assert found[0][0] == refused[0]
    assert refused[1] in found[0][1]


def test_with_child_is_what_the_refused_cases_build_on():
    """Without its alteration the altered block matches: each refusal is due to that alone."""
    assert match_block(with_child("relu", nn.ReLU())).kind == "basic"
    assert match_block(NoActivation()).kind == "basic"
