"""What serves repeated calls: it does while nothing has changed, and gives way when anything has.

Edits of parameters are test_cache's: its modules are warm, so a Ready serves them before each edit.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from conftest import assert_same, needs_extension, randomize
from torch import nn

import resnet_fused as rf
from resnet_fused import _fused, guard, packing, select, tuned

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    needs_extension,
    pytest.mark.skipif(guard.watch([]) is None, reason="guards were not compiled"),
]

_ops = torch.ops.resnet_fused


def block():
    return rf.FusedResidual(16, 24, use_1x1conv=True, strides=2)


def conv_bn():
    return rf.FusedConvBN(nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24))


def site():
    layers = nn.Conv2d(16, 24, 7, 2, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    return rf.fuse(nn.Sequential(*layers))


@pytest.fixture(params=[block, conv_bn, site])
def module(request):
    torch.manual_seed(0)
    return randomize(request.param()).eval()


X = torch.randn(2, 16, 15, 13, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def checked(monkeypatch):
    """The calls that a FusedModule had to check itself, as (module, x)."""
    calls = []
    forward = _fused.FusedModule._forward

    def counted(self, x):
        calls.append((self, x))
        return forward(self, x)

    monkeypatch.setattr(_fused.FusedModule, "_forward", counted)
    return calls


def run(module, x=X):
    with torch.no_grad():
        return module(x)


def test_serves_from_the_second_call_on(module, checked):
    first = run(module)
    assert len(checked) == 1
    for _ in range(3):
        assert_same(run(module), first)
    assert len(checked) == 1
    twin = copy.deepcopy(module)
    assert_same(run(twin), first)
    assert len(checked) == 2, "the copy has none yet"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_serves_under_both_modes(module, mode, checked):
    for _ in range(3):
        with mode():
            y = module(X)
    assert len(checked) == 1
    assert y.is_inference() is (mode is torch.inference_mode)


def test_shapes_take_turns(module, checked):
    shapes = [(2, 16, 15, 13), (1, 16, 15, 13), (2, 16, 9, 8), (16, 15, 13)]
    inputs = [torch.randn(shape) for shape in shapes]
    with select.forced("direct"):  # of one layout, whatever the size
        wanted = [run(module, x) for x in inputs]
        assert len(checked) == len(shapes)
        for _ in range(2):
            for x, want in zip(inputs, wanted, strict=True):
                assert_same(run(module, x), want)
    assert len(checked) == len(shapes)


def test_shapes_without_end_are_forgotten(module):
    for size in range(8, 60):
        run(module, torch.randn(1, 16, size, 8))
    fused = next(m for m in module.modules() if isinstance(m, _fused.FusedModule))
    assert 0 < len(fused._cache.packing.ready) <= 16


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.flip(3).flip(3),
        lambda x: x.repeat(1, 1, 2, 1)[:, :, ::2],
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    ],
)
def test_serves_every_layout(module, layout, checked):
    want = run(module)
    got = run(module, layout(X))
    torch.testing.assert_close(got, run(module, layout(X).clone()), rtol=0, atol=0)
    assert got.shape == want.shape
    assert len(checked) == 1


# ---- what it gives way to ------------------------------------------------------------------------


def hook_a_child(module):
    child = next(m for m in module.modules() if isinstance(m, nn.BatchNorm2d))
    return child.register_forward_hook(lambda m, args, y: y + 1)


def hook_all(module):
    return nn.modules.module.register_module_forward_hook(lambda m, args, y: None)


def is_site(module):
    """Whose first layer computes its own part by itself when anything has changed."""
    return isinstance(module, nn.Sequential)


def test_hooks_on_a_child(module, checked):
    if not any(isinstance(m, nn.BatchNorm2d) for m in module.modules()):
        pytest.skip("a site's BN is a slot: its hooks are test_conv_bn's")
    before = run(module)
    handle = hook_a_child(module)
    after = run(module)
    assert len(checked) == 2 or is_site(module)
    assert not torch.allclose(before, after)
    handle.remove()
    assert_same(run(module), before)


def test_hooks_on_all_modules(module, checked):
    before = run(module)
    handle = hook_all(module)
    try:
        torch.testing.assert_close(run(module), before, rtol=1e-4, atol=1e-4)
        assert len(checked) == 2 or is_site(module)
    finally:
        handle.remove()
    assert_same(run(module), before)


def other_class(block):
    class Louder(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    block.conv1.__class__ = Louder


def one_parameter_more(block):
    block.conv1.register_parameter("other", nn.Parameter(torch.ones(1)))


def attribute_of_the_original(block):
    block.width = 2


def flag_alone(block):
    block.training = True  # not by train(), and not its BNs'


@pytest.mark.parametrize(
    "change", [other_class, one_parameter_more, attribute_of_the_original, flag_alone]
)
def test_what_sends_a_block_to_eager(change, checked):
    module = randomize(block()).eval()
    module.original().width = 1
    run(module)
    change(module)
    with torch.no_grad():
        want = module.original()(X)
    assert_same(run(module), want)
    assert len(checked) == 2


def replaced_norm(net):
    net[1] = randomize(nn.BatchNorm2d(24), seed=1).eval()


def hooked_norm(net):
    net[1].register_forward_hook(lambda m, args, y: y + 1)


def hooked_relu(net):
    net[2].register_forward_pre_hook(lambda m, args: (args[0] + 1,))


def other_pool(net):
    net[3].stride = 3


def norm_in_training(net):
    net[1].train()


def hooked_original(net):
    net[1].original().register_forward_hook(lambda m, args, y: y + 1)


def other_kind_of_slot(net):
    class Louder(type(net[2])):
        def forward(self, x):
            return super().forward(x) * 2

    net[2].__class__ = Louder


@pytest.mark.parametrize(
    "change",
    [
        replaced_norm,
        hooked_norm,
        hooked_relu,
        other_pool,
        norm_in_training,
        hooked_original,
        other_kind_of_slot,
    ],
)
def test_what_breaks_a_site(change):
    net = randomize(site()).eval()
    run(net)
    before = run(net)
    cold = copy.deepcopy(net)
    for each in (net, cold):
        change(each)
    want = run(cold)  # checks everything; test_conv_bn holds that to the plain layers
    got = run(net)
    assert got.shape == want.shape
    assert got.shape != before.shape or not torch.allclose(got, before)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_writes_that_no_sample_sees(module):
    run(module)
    for parameter in module.parameters():
        for index in torch.randint(0, parameter.numel(), (10,)).tolist():
            with torch.no_grad():
                parameter.view(-1)[index] += 1
            assert_same(run(module), run(copy.deepcopy(module)))


def test_gradients(module, checked):
    want = run(module)
    y = module(X)
    assert len(checked) == 2
    assert y.requires_grad
    y.sum().backward()
    assert next(module.parameters()).grad is not None
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)


def test_training(module, checked):
    run(module)
    module.train()
    statistics = [b.clone() for b in module.buffers()]
    run(module)
    changed = [not torch.equal(a, b) for a, b in zip(statistics, module.buffers(), strict=True)]
    assert all(changed), "batch statistics were not used"
    module.eval()
    assert_same(run(module), run(copy.deepcopy(module)))


def test_autocast(module, checked):
    run(module)
    with torch.autocast("cpu", torch.bfloat16):
        y = run(module)
    assert y.dtype == torch.bfloat16
    assert run(module).dtype == torch.float32


def test_another_dtype_is_refused_as_before(module):
    run(module)
    with pytest.raises(TypeError, match="x must be float32, as the weights are, got float64"):
        run(module, X.double())


def test_another_number_of_channels_is_refused_as_before(module):
    run(module)
    with pytest.raises(ValueError, match="x must have 16 channels, got shape"):
        run(module, X[:, :8])


@pytest.mark.parametrize("x", [None, 5, "x", [1.0]])
def test_no_tensor_is_refused_as_before(module, x):
    run(module)
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got"):
        run(module, x)


def test_meta_tensors(module):
    want = run(module)
    assert run(copy.deepcopy(module).to("meta"), X.to("meta")).shape == want.shape


def test_function_transforms(module, checked):
    want = run(module)
    with torch.no_grad():
        got = torch.func.vmap(module)(torch.stack([X, X * 2]))
    torch.testing.assert_close(got[0], want, rtol=1e-4, atol=1e-4)


def test_modes_that_trace_or_redirect_ops(module, checked):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    want = run(module)
    with Record():
        assert_same(run(module), want)
    assert len(checked) == 2
    assert not any("run_prepared" in name for name in seen)
    assert any("resnet_fused" in name for name in seen)


def test_function_modes(module, checked):
    from torch.overrides import TorchFunctionMode

    seen = []

    class Record(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    want = run(module)
    with Record():
        assert_same(run(module), want)
    assert len(checked) == 2
    assert not any("run_prepared" in name for name in seen)


def test_tracing(module):
    run(module)
    with torch.no_grad():
        traced = torch.jit.trace(module, X, check_trace=False)
    torch.testing.assert_close(run(traced), run(module), rtol=1e-4, atol=1e-4)
    assert "run_prepared" not in str(traced.inlined_graph)
    graph = torch.export.export(module, (X,)).graph
    assert not any("run_prepared" in str(node.target) for node in graph.nodes)


def test_compiled_graphs_have_no_handles(module):
    want = run(module)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(module, backend=backend, fullgraph=True)
    torch.testing.assert_close(run(compiled), want, rtol=1e-4, atol=1e-4)
    assert graphs
    assert not any("run_prepared" in str(n.target) for g in graphs for n in g.graph.nodes)


@pytest.mark.parametrize("force", ["direct", "torch", "ours"])
def test_forced_plans(module, force, checked):
    want = run(module)
    with select.forced(force):
        run(module)
        assert len(checked) == 2
        run(module)
    assert_same(run(module), want)


def test_learned_answers(module, checked, monkeypatch, tmp_path):
    monkeypatch.setenv("RESNET_FUSED_TUNING_FILE", str(tmp_path / "tuning.json"))
    monkeypatch.setattr(tuned, "_table", dict(tuned._table))
    run(module)
    tuned.learn({})
    run(module)
    assert len(checked) == 2


def test_exact_nonfinite(module, checked):
    run(module)
    fused = next(m for m in module.modules() if isinstance(m, _fused.FusedModule))
    fused.exact_nonfinite = True
    run(module)
    assert len(checked) == 2
    plans = [unit.choice.plan for unit in fused._cache.held()]
    assert not any(plan.startswith("winograd") or plan == "stem" for plan in plans)


@pytest.mark.parametrize("name", ["stride", "padding", "dilation", "padding_mode"])
def test_settings_of_a_convolution(name, checked):
    module = randomize(conv_bn()).eval()
    run(module)
    setattr(module.conv, name, {"padding_mode": "circular"}.get(name, (2, 2)))
    with torch.no_grad():
        want = module.original()(X)
    torch.testing.assert_close(run(module), want, rtol=1e-4, atol=1e-4)
    assert len(checked) == 2


def test_watchers_see_calls_that_choose(module, monkeypatch):
    run(module)
    seen = []
    monkeypatch.setattr(_fused, "watchers", [lambda *call: seen.append(call)])
    rf.refresh(module)
    run(module)
    assert seen


def test_an_edit_while_nothing_tells_of_it(module, checked):
    """Where no version and no identity says so, the samples do."""
    run(module)
    weight = next(p for p in module.parameters() if p.dim() == 4)
    weight.data.mul_(2)
    fused = next(m for m in module.modules() if isinstance(m, _fused.FusedModule))
    ready = fused._cache.ready(X.shape)
    with torch.no_grad():
        assert not ready._holds()
        assert ready(X) is None
    assert_same(run(module), run(copy.deepcopy(module)))


def test_other_strides_at_the_same_address(checked):
    module = randomize(rf.FusedConvBN(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))).eval()
    run(module)
    version = module.conv.weight._version
    module.conv.weight.data = module.conv.weight.data.transpose(0, 1)
    assert module.conv.weight._version == version
    with torch.no_grad():
        want = module.original()(X)
    torch.testing.assert_close(run(module), want, rtol=1e-4, atol=1e-4)


@pytest.mark.threads
def test_threads_while_everything_is_dropped_and_made_anew(module):
    want = run(module)
    wrong, done = [], threading.Event()

    def work():
        while not done.is_set():
            if not torch.equal(run(module), want):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(60):
        (rf.refresh, nn.Module.eval)[turn % 2](module)
        run(module)
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- memory --------------------------------------------------------------------------------------


def packed_of(module):
    fused = next(m for m in module.modules() if isinstance(m, _fused.FusedModule))
    return weakref.ref(fused._cache.held()[0].weight), fused


def test_packed_weights_live_no_longer_than_they_are_held(module):
    run(module), run(module)
    packed, fused = packed_of(module)
    ready = weakref.ref(fused._cache.ready(X.shape))
    rf.refresh(module)
    gc.collect()
    assert packed() is None
    assert ready() is None
    assert fused._cache.packing is None


@pytest.mark.parametrize("build", [block, conv_bn, site])
def test_modules_are_freed(build):
    module = randomize(build()).eval()
    run(module), run(module)
    packed, fused = packed_of(module)
    held = [packed, weakref.ref(fused), weakref.ref(next(module.parameters()))]
    del module, fused
    with torch.device("cpu"), torch.autocast("cpu"):  # finalizers run under any mode
        gc.collect()
    assert [ref() for ref in held] == [None] * 3


def test_pickles_have_nothing_of_it(module):
    cold = len(pickle.dumps(module))
    run(module), run(module)
    assert len(pickle.dumps(module)) < cold + 100  # a guard's None


def test_copies_by_dict_have_a_cache_of_their_own(module):
    """As parametrized modules are copied, without __getstate__."""
    run(module), run(module)
    fused = next(m for m in module.modules() if isinstance(m, _fused.FusedModule))
    twin = copy.deepcopy(fused._cache)
    assert fused._cache.packing is not None
    assert twin.packing is None
    del twin
    gc.collect()
    assert_same(run(module), run(copy.deepcopy(module)))


# ---- the ops -------------------------------------------------------------------------------------


def prepared(x=X):
    weight = torch.randn(24, x.shape[-3], 1, 1)
    unit = packing.PackedUnit(
        _ops.pack_conv(weight, 1, plan="direct"),
        torch.ones(24),
        torch.zeros(24),
        {
            "kernel_size": (1, 1),
            "stride": (1, 1),
            "padding": (0, 0),
            "dilation": (1, 1),
            "groups": 1,
            "act": "none",
            "plan": "direct",
        },
        select.Choice("direct", ""),
    )
    arguments = packing.at_once([unit])
    one = {"has_shortcut": False, "adds": False, "pool": False}
    keywords = arguments.keywords | one
    return _ops.prepare(x, *arguments.tensors, **keywords), weight


def release(handle):
    rf._extension.release_prepared(handle)


def test_run_prepared_computes():
    handle, weight = prepared()
    want = torch.nn.functional.conv2d(X, weight)
    torch.testing.assert_close(_ops.run_prepared(X, handle, []), want, rtol=1e-5, atol=1e-5)
    release(handle)


def refused(x, handle):
    with pytest.raises(RuntimeError) as caught:
        _ops.run_prepared(x, handle, [])
    return str(caught.value)


@pytest.mark.parametrize("x", [X[:1], X[:, :8], X.double(), X[0], X[..., :5]])
def test_run_prepared_refuses_other_inputs(x):
    handle, _ = prepared()
    want = (
        "run_prepared: x must have the shape and dtype that were prepared, "
        f"got shape {tuple(x.shape)} and {str(x.dtype).removeprefix('torch.')}"
    )
    assert refused(x, handle) == want
    release(handle)


def test_run_prepared_refuses_handles_that_are_none():
    handle, _ = prepared()
    release(handle)
    release(handle)  # not twice, and no harm
    for none in (handle, 0, -1, 2**62):
        assert refused(X, none) == (
            f"run_prepared: prepared must be what prepare returned, not yet released, got {none}"
        )


def test_prepare_refuses_what_does_not_go_together():
    tensors = [[torch.zeros(1, 1, 32)] * 2, [torch.ones(1)] * 2, [torch.ones(1)] * 2]
    lists = {
        "kernel_sizes": [1] * 4,
        "strides": [1] * 4,
        "paddings": [0] * 4,
        "dilations": [1] * 4,
        "groups": [1] * 2,
        "acts": ["relu"] * 2,
        "plans": ["direct"] * 2,
        "has_shortcut": False,
    }
    x = torch.zeros(1, 1, 3, 3)
    for keywords, want in (
        (
            {"adds": False, "pool": False},
            "prepare: packed must have one convolution where nothing is added, got 2",
        ),
        (
            {"adds": True, "pool": True},
            "prepare: pool must be False where something is added, got True",
        ),
    ):
        with pytest.raises(RuntimeError) as caught:
            _ops.prepare(x, *tensors, **lists, **keywords)
        assert str(caught.value) == want


def test_outputs_outlive_the_handle():
    handle, weight = prepared()
    y = _ops.run_prepared(X, handle, [])
    release(handle)
    torch.testing.assert_close(y, torch.nn.functional.conv2d(X, weight), rtol=1e-5, atol=1e-5)
