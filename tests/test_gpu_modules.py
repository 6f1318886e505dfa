"""Fused modules on a GPU: the same results and modes as on the CPU, and what only a GPU has.

Without a GPU, what needs none runs in Triton's interpreter, see test_gpu_ops.py.
"""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from conftest import randomize
from gpu_cases import MODES, multiplied, small_net
from torch import nn

import resnet_fused as rf
from resnet_fused import backends, guard, select
from resnet_fused._fused import FusedModule
from resnet_fused.ops import _cuda

pytestmark = pytest.mark.gpu

# Relative errors of a net of ten convolutions, by derivation: four roundings of operands and
# results each (2^-11 of TF32 and float16, 2^-8 of bfloat16), at random signs, with room.
ERRORS = {"ieee": 4e-6, "tf32": 4e-3, "bfloat16": 3e-2, "float16": 4e-3}


@pytest.fixture
def forced(gpu_plan):
    """Every convolution on one of our plans, in eager calls, graphs and exports."""
    with select.forced(gpu_plan):
        yield gpu_plan


def images(seed=0, size=(2, 3, 20, 15)):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def close(got, want, mode="ieee"):
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    assert got.shape == want.shape
    assert (got - want).norm() <= ERRORS[mode] * want.norm()


def on(net, device, dtype=torch.float32):
    return copy.deepcopy(net).to(device, dtype)


@pytest.fixture(autouse=True)
def full_float32():
    with multiplied("ieee"):
        yield


@pytest.fixture
def net():
    return small_net()


@pytest.fixture
def double(net):
    """What the net computes in float64 on the CPU."""

    def run(x):
        with torch.no_grad():
            return on(net, "cpu", torch.float64)(x.detach().cpu().double())

    return run


# ---- results -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_results_and_backends(mode, net, double, device, forced):
    with multiplied(mode) as dtype, torch.no_grad():
        fused = rf.fuse(on(net, device, dtype))
        x = images().to(device, dtype)
        got = fused(x)
        rows = rf.report(fused)
    assert got.dtype == dtype
    assert {row.backend for row in rows} == {forced}
    assert all(row.fused for row in rows)
    close(got, double(images().to(dtype)), mode)


def test_fusing_and_moving_in_either_order(net, device, forced):
    """fuse(model).cuda() is fuse(model.cuda()), also after it has run elsewhere."""
    x = images()
    with torch.no_grad():
        here = rf.fuse(net)
        with select.forced("none"):
            here(x)
        first, second = here.to(device), rf.fuse(on(net, device))
        results = [fused(x.to(device)) for fused in (first, second, copy.deepcopy(second))]
        reports = [rf.report(fused) for fused in (first, second)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert str(reports[0]) == str(reports[1])


def test_and_back_to_the_cpu(net, gpu, forced):
    fused = rf.fuse(net)
    with torch.no_grad():
        with select.forced("none"):
            want = fused(images())
        close(fused.to(gpu)(images().to(gpu)), want)
        with select.forced("none"):
            assert torch.equal(fused.cpu()(images()), want)


@pytest.mark.compiles
@pytest.mark.parametrize("size", [(2, 3, 32, 25), (5, 3, 17, 40), (1, 3, 64, 64), (3, 20, 15)])
def test_sizes_and_layouts(size, net, double, device, forced):
    """Of one module in turn, channels_last and not; one image without its batch."""
    fused = rf.fuse(net).to(device)
    blocks = fused[:-3] if len(size) == 3 else fused
    plain = on(net, "cpu", torch.float64)
    plain = plain[:-3] if len(size) == 3 else plain
    with torch.no_grad():
        for seed in range(2):
            x = images(seed, size)
            want = plain(x.double().view(-1, *x.shape[-3:]))  # a plain BatchNorm2d needs a batch
            want = want if x.dim() == 4 else want[0]
            for like in (x, x.flip(-1).contiguous().flip(-1), x.transpose(-1, -2).contiguous().mT):
                close(blocks(like.to(device)), want)
            if x.dim() == 4:
                close(blocks(x.to(device, memory_format=torch.channels_last)), want)
                assert blocks(x[:0].to(device)).shape[0] == 0


def test_what_is_chosen_by_rule(gpu):
    """Nothing is forced or measured: 16 bits are ours, float64 and full float32 PyTorch's."""
    able = [plan for plan in ("cuda", "triton") if not backends.missing(plan, "cuda", gpu.index)]
    if not able:
        pytest.skip("neither plan can run")
    first, last = able[0], able[-1]
    net = randomize(nn.Sequential(rf.reference.Residual(64, 64), rf.reference.Residual(64, 64)))
    x = torch.randn(2, 64, 14, 14, device=gpu)
    for mode, dtype, expected in (
        ("tf32", torch.bfloat16, first),
        ("tf32", torch.float16, first),
        ("tf32", torch.float32, last),  # Triton has wgmma for TF32, csrc/cuda has not
        ("ieee", torch.float32, "torch"),
        ("ieee", torch.float64, "torch"),
    ):
        with multiplied(mode), torch.no_grad():
            fused = rf.fuse(on(net, gpu, dtype).eval())
            close(fused(x.to(dtype)), on(net, "cpu", torch.float64).eval()(x.cpu().double()),
                  "bfloat16" if dtype == torch.bfloat16 else "float16")  # fmt: skip
            rows = rf.report(fused)
        assert {row.backend for row in rows} == {expected}, (mode, dtype)
        assert all(row.reason for row in rows)
        if dtype == torch.float64:
            assert "float64 runs on PyTorch's convolution" in rows[0].reason


def test_the_flag_for_tf32_is_followed_from_call_to_call(net, double, gpu, forced):
    fused = rf.fuse(net).to(gpu)
    errors = []
    with torch.no_grad():
        for mode in ("ieee", "tf32", "ieee", "tf32"):
            with multiplied(mode):
                got = fused(images().to(gpu)).cpu().double()
            want = double(images())
            errors.append(float((got - want).norm() / want.norm()))
    assert max(errors[::2]) <= ERRORS["ieee"] < min(errors[1::2])
    assert max(errors) <= ERRORS["tf32"]


# ---- modes -------------------------------------------------------------------------------------


def test_training_is_the_original(net, device, forced):
    """Same loss, gradients and statistics; then eval sees the new weights."""
    fused = rf.fuse(net).to(device).train()
    plain = on(net, device).train()
    x = images().to(device)
    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        for model in (fused, plain):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            for _ in range(2):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
    finally:
        torch.backends.cudnn.deterministic = deterministic
    for (name, ours), theirs in zip(
        fused.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    with torch.no_grad():
        fused.eval()
        got = fused(x)
        close(got, on(fused, "cpu", torch.float64)(x.cpu().double()))


def test_training_between_calls_is_seen(net, device, forced):
    fused = rf.fuse(net).to(device)
    x = images().to(device)
    with torch.no_grad():
        before = fused(x)
    fused.train()(images(1).to(device))  # moves the statistics
    with torch.no_grad():
        after = fused.eval()(x)
        assert not torch.equal(before, after)
        close(after, rf.unfuse(fused).to("cpu", torch.float64)(x.cpu().double()))


def test_gradients_in_eval(net, device, forced):
    fused = rf.fuse(net).to(device)
    exact = on(net, "cpu", torch.float64)
    x, there = images().double().requires_grad_(), images().to(device).requires_grad_()
    y, want = fused(there), exact(x)
    close(y, want)
    y.square().sum().backward()
    want.square().sum().backward()
    assert {row.backend for row in rf.report(fused)} == {forced}
    for ours, theirs in zip((there, *fused.parameters()), (x, *exact.parameters()), strict=True):
        difference = (ours.grad.cpu().double() - theirs.grad).norm()
        assert difference <= 1e-4 * theirs.grad.norm() + 1e-6


@pytest.mark.compiles
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, net, double, device, forced):
    """Convolutions in 16 bits, the weights stay float32; gone outside."""
    fused = rf.fuse(net).to(device)
    x = images().to(device)
    mode = str(dtype).removeprefix("torch.")
    with torch.no_grad():
        for _ in range(2):
            with torch.autocast(device.type, dtype=dtype):
                got = fused[:-3](x)
                assert got.dtype == dtype
                close(fused(x), double(x), mode)
            outside = fused(x)
            assert outside.dtype == torch.float32
            close(outside, double(x))
    with torch.autocast(device.type, dtype=dtype):
        y = fused(x)
        y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in fused.parameters())


def test_inference_mode(net, double, device, forced):
    fused = rf.fuse(net).to(device)
    for _ in range(2):
        with torch.inference_mode():
            got = fused(images().to(device))
            assert got.is_inference()
        close(got, double(images()))


def test_the_same_bits_every_time(net, device, forced):
    fused = rf.fuse(net).to(device)
    x = images().to(device)
    with torch.no_grad():
        first = fused(x)
        for _ in range(2 if device.type == "cpu" else 20):
            assert torch.equal(fused(x), first)


# ---- compilers ---------------------------------------------------------------------------------


@pytest.fixture
def fresh_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_graphs")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph(backend, net, double, device, forced, request):
    if backend == "inductor":
        request.getfixturevalue("gpu")
    fused = rf.fuse(net).to(device)
    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    with torch.no_grad():
        for seed in range(2):
            x = images(seed)
            close(compiled(x.to(device)), double(x))
        with torch.no_grad():
            first = next(m for m in fused.modules() if isinstance(m, nn.Conv2d))
            first.weight.mul_(2)
        close(compiled(x.to(device)), on(fused, "cpu", torch.float64)(x.double()))


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_graphs")
@pytest.mark.parametrize("mode", ["max-autotune-no-cudagraphs", "reduce-overhead"])
def test_compile_modes(mode, net, double, gpu, forced):
    """With CUDA graphs of inductor, too: replays see the new input."""
    compiled = torch.compile(rf.fuse(net).to(gpu), fullgraph=True, mode=mode)
    with torch.no_grad():
        for seed in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            close(compiled(images(seed).to(gpu)), double(images(seed)))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, net, double, device, forced):
    fused = rf.fuse(net).to(device)
    program = torch.export.export(fused, (images().to(device),), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert any(target.startswith("resnet_fused.conv_bn_act") for target in targets), targets
    with torch.no_grad():
        for seed in range(2):
            close(program.module()(images(seed).to(device)), double(images(seed)))


# ---- repeated calls ----------------------------------------------------------------------------

BLOCKS = {
    "identity": lambda: rf.FusedResidual(16, 16),
    "joined": lambda: rf.FusedResidual(16, 32, use_1x1conv=True, strides=2),
    "bottleneck": lambda: rf.FusedBottleneck(16, 4),
    "bottleneck_joined": lambda: rf.FusedBottleneck(16, 8, use_1x1conv=True, strides=2),
}


@pytest.mark.parametrize("build", BLOCKS.values(), ids=BLOCKS)
def test_repeated_calls_are_launches_only(build, device, forced, monkeypatch):
    """The second call looks at facts, not at modules; a change starts from the beginning."""
    if guard.watch([]) is None:
        pytest.skip("_guard was not built")
    block = randomize(build()).eval().to(device)
    x = torch.randn(2, 16, 9, 7).to(device, memory_format=torch.channels_last)
    calls = []
    plain = FusedModule._forward
    monkeypatch.setattr(FusedModule, "_forward", lambda m, x: (calls.append(1), plain(m, x))[1])

    def exact(x):
        plain = copy.deepcopy(block).original().to("cpu", torch.float64)
        return plain(x.cpu().double())

    with torch.no_grad():
        close(block(x), exact(x))
        del calls[:]
        again = block(x + 1)
        assert not calls
        close(again, exact(x + 1))
        block._units[0].conv.weight.mul_(2)
        changed = block(x)
        assert calls
        close(changed, exact(x))


@pytest.mark.compiles
@pytest.mark.parametrize(("build", "kernels"), [("identity", 2), ("joined", 2), ("bottleneck", 3)])
def test_kernels_of_a_repeated_call(build, kernels, gpu, forced):
    """One a convolution, none for a joined shortcut; second ones only where tiles are shared."""
    block = randomize(BLOCKS[build]()).eval().to(gpu, torch.bfloat16)
    x = torch.randn(32, 16, 64, 64, device=gpu, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        block(x)
        block(x)
        torch.cuda.synchronize(gpu)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            block(x)
            torch.cuda.synchronize(gpu)
    on_gpu = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    if not on_gpu:
        pytest.skip("the profiler sees no kernels here")
    others = [name for name in on_gpu if not any(w in name for w in ("conv", "reduce", "memset"))]
    assert not others
    assert sum("conv" in name.lower() for name in on_gpu) == kernels, on_gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_bottleneck_whose_tail_is_one_kernel(dtype, gpu, forced, monkeypatch):
    """Large enough for it, in the op of a first call and in the launches of a repeated one; also
    where two kernels with wgmma would be taken."""
    monkeypatch.setattr(_cuda, "has_wgmma", lambda device: False)
    block = randomize(rf.FusedBottleneck(64, 16)).eval()
    plain = copy.deepcopy(block).original().double()
    images = torch.randn(32, 64, 48, 41, generator=torch.Generator().manual_seed(4)).to(dtype)
    x = images.to(gpu, memory_format=torch.channels_last)
    block = block.to(gpu, dtype)
    with torch.no_grad():
        want = plain(images.double())
        for _ in range(3):
            close(block(x), want, str(dtype).removeprefix("torch."))
            assert block(x).is_contiguous(memory_format=torch.channels_last)


def test_no_synchronisation(net, gpu, forced):
    fused = rf.fuse(net).to(gpu)
    x = images().to(gpu)
    with torch.no_grad():
        fused(x)
        fused(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            fused(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- streams, threads, devices -----------------------------------------------------------------


def test_several_streams(net, gpu, forced):
    """Calls that overlap on streams of their own give what they give one by one."""
    fused = rf.fuse(net).to(gpu)
    inputs = [images(seed).to(gpu) for seed in range(4)]
    streams = [torch.cuda.Stream(gpu) for _ in inputs]
    results = [[] for _ in inputs]
    with torch.no_grad():
        wants = [fused(x) for x in inputs]
        torch.cuda.synchronize(gpu)
        for _ in range(10):
            for stream, x, got in zip(streams, inputs, results, strict=True):
                with torch.cuda.stream(stream):
                    got.append(fused(x))
        torch.cuda.synchronize(gpu)
    for want, got in zip(wants, results, strict=True):
        assert all(torch.equal(y, want) for y in got)


def in_threads(work, count=2):
    """work(i) in threads that start together; an exception of one is raised here."""
    barrier, errors = threading.Barrier(count), []

    def run(i):
        try:
            barrier.wait()
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("shared", [True, False])
def test_two_threads_with_their_own_streams(shared, net, gpu, forced):
    """One module for both from its first call on, or one for each."""
    fused = rf.fuse(net).to(gpu)
    modules = [fused, fused if shared else copy.deepcopy(fused)]
    inputs = [images(seed).to(gpu) for seed in range(2)]
    with torch.no_grad():
        wants = [copy.deepcopy(fused)(x) for x in inputs]
    torch.cuda.synchronize(gpu)

    def work(i):
        stream = torch.cuda.Stream(gpu)
        with torch.no_grad(), torch.cuda.stream(stream):
            results = [modules[i](inputs[i]) for _ in range(30)]
        stream.synchronize()
        assert all(torch.equal(y, wants[i]) for y in results)

    in_threads(work)


def test_packing_again_while_another_stream_reads(net, gpu, forced):
    """What was packed is not given away before the work that reads it has run."""
    fused = rf.fuse(net).to(gpu)
    x = images().to(gpu)
    with torch.no_grad():
        want = fused(x)
        stream = torch.cuda.Stream(gpu)
        torch.cuda.synchronize(gpu)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # a tenth of a second
            got = fused(x)
        sizes = [
            (t.shape, t.dtype)
            for module in fused.modules()
            if hasattr(module, "drop_packed")
            for unit in module._cache.held()
            for t in unit.operands
        ]
        rf.refresh(fused)
        for shape, dtype in sizes:
            torch.full(shape, float("nan"), dtype=dtype, device=gpu)
        torch.cuda.synchronize(gpu)
    assert torch.equal(got, want)


def test_second_device(net, double, gpu, forced):
    """On cuda:1 while cuda:0 is current, and moved from one to the other."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    fused = rf.fuse(net).to("cuda:1")
    with torch.no_grad(), torch.cuda.device(0):
        for index in (1, 0, 1):
            fused.to(f"cuda:{index}")
            for _ in range(2):
                got = fused(images().to(f"cuda:{index}"))
                assert got.device.index == index
                close(got, double(images()))
        for index in (0, 1):  # the second must not be recorded on the first one's device
            fused.to(f"cuda:{index}")
            graphed = rf.graph(fused, images().to(f"cuda:{index}"))
            assert graphed.reason is None
            close(graphed(images(1).to(f"cuda:{index}")), double(images(1)))
        assert torch.cuda.current_device() == 0


# ---- CUDA graphs -------------------------------------------------------------------------------


def test_capture_by_hand(net, gpu, forced):
    """A fused model in a graph of its user's: replays compute from what the input holds then."""
    fused = rf.fuse(net).to(gpu)
    held = images().to(gpu)
    with torch.no_grad():
        stream = torch.cuda.Stream(gpu)
        stream.wait_stream(torch.cuda.current_stream(gpu))
        with torch.cuda.stream(stream):
            for _ in range(3):
                fused(held)
        torch.cuda.current_stream(gpu).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = fused(held)
        for seed in range(4):
            held.copy_(images(seed))
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, fused(images(seed).to(gpu)))


@pytest.fixture
def graphed(net, gpu, forced):
    if guard.watch([]) is None:
        pytest.skip("_guard was not built")
    result = rf.graph(rf.fuse(net).to(gpu), images().to(gpu))
    assert result.reason is None
    return result


def test_graph_replays(graphed, gpu, double):
    """The bits of the model's own call; outputs are the caller's."""
    with torch.no_grad():
        kept = []
        for seed in range(4):
            x = images(seed).to(gpu)
            for like in (x, x.to(memory_format=torch.channels_last)):
                y = graphed(like)
                assert graphed.reason is None
                assert torch.equal(y, graphed.model(like))
            close(y, double(images(seed)))
            kept.append((y, y.clone()))
    assert all(torch.equal(y, copied) for y, copied in kept)


def test_graph_of_a_changed_model(graphed, gpu):
    x = images().to(gpu)
    with torch.no_grad():
        before, recording = graphed(x), graphed._recorded
        assert graphed._recorded is recording
        conv = next(m for m in graphed.model.modules() if isinstance(m, nn.Conv2d))
        for change in (
            lambda: conv.weight.mul_(2),
            lambda: setattr(conv, "weight", nn.Parameter(conv.weight * 2)),
            lambda: graphed.load_state_dict({k: v / 2 for k, v in graphed.state_dict().items()}),
        ):
            change()
            after = graphed(x)
            assert graphed.reason is None
            assert graphed._recorded is not recording
            assert torch.equal(after, copy.deepcopy(graphed.model)(x))
            assert not torch.equal(after, before)
            before, recording = after, graphed._recorded


def test_graph_steps_aside(graphed, gpu, double):
    x = images().to(gpu)
    with torch.no_grad():
        close(graphed(x[:1]), double(images()[:1]))
        assert graphed.reason.startswith("the input is float32 (1, 3, 20, 15) on cuda:0, not ")
        graphed(x)
        assert graphed.reason is None
        held = torch.cuda.CUDAGraph()
        with torch.cuda.graph(held):
            y = graphed(x)
        assert graphed.reason == "another graph is being recorded"
        held.replay()
        close(y, double(images()))
    graphed(x).sum().backward()
    assert graphed.reason == "gradients are asked for"


def test_graph_of_what_looks_at_values(gpu):
    """A synchronisation cannot be recorded: the model runs as it is, and the GPU goes on."""

    class Looks(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum().item() > 0 else x

    if guard.watch([]) is None:
        pytest.skip("_guard was not built")
    x = torch.ones(3, device=gpu)
    graphed = rf.graph(Looks().eval(), x)
    assert graphed.reason.startswith("it cannot be recorded")
    assert torch.cuda.current_stream(gpu) == torch.cuda.default_stream(gpu)
    assert torch.equal(graphed(x), 2 * x)
    assert torch.equal(graphed(-x), -x)


def test_graph_on_several_streams_and_threads(graphed, gpu):
    """One set of buffers: replays wait for each other, whatever stream they come on."""
    inputs = [images(seed).to(gpu) for seed in range(4)]
    with torch.no_grad():
        wants = [graphed.model(x) for x in inputs]
    torch.cuda.synchronize(gpu)

    def work(i):
        stream = torch.cuda.Stream(gpu)
        with torch.no_grad(), torch.cuda.stream(stream):
            results = [graphed(inputs[i]) for _ in range(30)]
        stream.synchronize()
        assert all(torch.equal(y, wants[i]) for y in results)

    in_threads(work, len(inputs))
    assert graphed.reason is None


@pytest.mark.compiles
def test_graph_in_inference_mode_and_autocast(graphed, gpu, double):
    x = images().to(gpu)
    with torch.inference_mode():
        y = graphed(x)
        assert graphed.reason is None
        assert y.is_inference()
    close(y, double(images()))
    with torch.no_grad():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            close(graphed(x), double(images()), "bfloat16")
            assert graphed.reason is None
        close(graphed(x), double(images()))
        assert graphed.reason is None
