"""conv_bn_act_cuda and add_relu_cuda: fakes and refusals anywhere, kernels on a GPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from resnet_fused import _extension, _gpu_kernels, backends
from resnet_fused.conv_shape import ConvShape
from resnet_fused.ops import _cuda

OPS = torch.ops.resnet_fused
GPU = torch.device("cuda", 0)


def nhwc(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(memory_format=torch.channels_last)


def arguments(device, dtype=torch.bfloat16, c=16, k=24, groups=1, kernel=3, batch=2):
    draw = torch.Generator().manual_seed(0)

    def normal(*shape, of=1.0):
        return (torch.randn(*shape, generator=draw) * of).to(device)

    x = nhwc(normal(batch, c, 9, 7)).to(dtype)
    fan_in = c // groups * kernel * kernel
    weight = nhwc(normal(k, c // groups, kernel, kernel, of=fan_in**-0.5)).to(dtype)
    return x, weight, normal(k), normal(k)


# ---- without a GPU -----------------------------------------------------------------------------


def test_why_the_kernels_are_not_there():
    error = _gpu_kernels.cuda_error(GPU)
    if torch.version.cuda is None:
        assert error in (
            "the CUDA C++ kernels are not built (resnet-fused doctor says why)",
            "torch was built without CUDA",
        )
    elif not torch.cuda.is_available():
        assert error is not None


def test_kernels_of_another_version(monkeypatch):
    """Built before prepare_cuda came, say: a sentence, not an error at the import."""
    stale = SimpleNamespace(origin=torch._C.__file__)
    monkeypatch.setattr(_extension.importlib.util, "find_spec", lambda name: stale)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv("RESNET_FUSED_DISABLE_EXT", raising=False)
    sentence = "the CUDA C++ kernels are of another version: build them again"
    assert _gpu_kernels._load().error == sentence


@pytest.fixture
def no_image(monkeypatch):
    """As if the kernels were loaded, a GPU of capability 10.0 were here, and they not for it."""
    asked = []

    def image_error(index):
        asked.append(index)
        return "" if index == 1 else "no kernel image is available for execution on the device"

    monkeypatch.setattr(_gpu_kernels, "extension_error", None)
    monkeypatch.setattr(_gpu_kernels, "_image_error", image_error)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    _gpu_kernels._error_on.cache_clear()
    yield asked
    _gpu_kernels._error_on.cache_clear()


def test_kernels_that_were_compiled_for_other_gpus(no_image):
    """Asked once for each device, and a sentence instead of an error at each launch."""
    sentence = (
        "the CUDA C++ kernels were compiled for other GPUs than sm_100 (no kernel image is "
        "available for execution on the device): build them with TORCH_CUDA_ARCH_LIST=10.0"
    )
    for _ in range(2):
        assert _gpu_kernels.cuda_error(GPU) == sentence
        assert _gpu_kernels.cuda_error(torch.device("cuda", 1)) is None
    assert no_image == [0, 1]
    assert backends.missing("cuda", "cuda") == sentence
    assert backends.missing("cuda", "cuda", 1) == ""
    assert backends.missing("torch", "cuda") == ""


def test_no_plan_of_kernels_that_were_compiled_for_other_gpus(no_image, monkeypatch):
    monkeypatch.setattr(_gpu_kernels, "triton_error", lambda device: "Triton is not installed")
    plans = ("cuda", "triton", "torch")
    shape = ConvShape("cuda", torch.bfloat16, 64, 64, (3, 3), (56, 56))
    assert [plan for plan in plans if backends.can_compute(plan, shape)] == ["torch"]
    shape = replace(shape, index=1)
    assert [plan for plan in plans if backends.can_compute(plan, shape)] == ["cuda", "torch"]


def test_configurations_are_those_that_are_loaded():
    found = _cuda.configurations()
    assert bool(found) is (_gpu_kernels.extension_error is None)
    assert all(c.name.split()[0] in ("sm80", "sm90") and c.shared_bytes < 2**18 for c in found)


def test_uses_tf32_follows_torch():
    flag = torch.backends.cudnn.conv.fp32_precision
    try:
        for value, expected in (("tf32", True), ("ieee", False)):
            torch.backends.cudnn.conv.fp32_precision = value
            assert OPS.uses_tf32() is expected
    finally:
        torch.backends.cudnn.conv.fp32_precision = flag


@pytest.mark.parametrize("batched", [True, False])
def test_fake_output(batched):
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, weight, scale, shift = arguments("cpu")
    x = x if batched else x[0]
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        given = [mode.from_tensor(t) for t in (x, weight, scale, shift)]
        y = OPS.conv_bn_act_cuda(*given, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
        assert y.shape == ((2, 24, 5, 4) if batched else (24, 5, 4))
        assert y.dtype == torch.bfloat16
        assert y.stride()[-3:] == (1, 4 * 24, 24)
        assert OPS.add_relu_cuda(y, y).stride() == y.stride()


def test_fake_refuses_in_a_sentence():
    x, weight, scale, shift = arguments("meta")
    with pytest.raises(
        ValueError, match=r"conv_bn_act_cuda: packed must have shape \(24, 16, 1, 1\)"
    ):
        OPS.conv_bn_act_cuda(x, weight, scale, shift, kernel_size=(1, 1))
    with pytest.raises(ValueError, match="add_relu_cuda: b must have shape"):
        OPS.add_relu_cuda(x, x[:1])


def stem_arguments(device, dtype=torch.bfloat16, c=3, k=16, batch=2, size=(37, 34)):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(batch, c, *size, generator=draw).to(device, dtype)
    weight = torch.randn(k, c, 7, 7, generator=draw) * (c * 49) ** -0.5
    vectors = (torch.randn(k, generator=draw).to(device) for _ in "st")
    return nhwc(x), nhwc(weight.to(device, dtype)), *vectors


STEM = {"kernel_size": (7, 7), "stride": (2, 2), "padding": (3, 3)}


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(("size", "pooled"), [((37, 34), (10, 9)), ((1, 2), (1, 1))])
def test_pooled_fake_output(batched, size, pooled):
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, *operands = stem_arguments("cpu", size=size)
    x = x.contiguous() if batched else x[0]
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        y = OPS.conv_bn_act_pool_cuda(*(mode.from_tensor(t) for t in (x, *operands)), **STEM)
    assert y.shape == ((2, 16, *pooled) if batched else (16, *pooled))
    assert y.dtype == torch.bfloat16
    assert y.stride()[-3:] == (1, pooled[1] * 16, 16)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dtype": torch.float32}, "x must be bfloat16 or float16, got float32"),
        ({"dtype": torch.float64}, "x must be float32, bfloat16 or float16, got float64"),
        ({"c": 4}, r"packed must have shape \(16, 4, 7, 7\), got \(16, 3, 7, 7\)"),
        ({"act": "gelu"}, "act must be"),
        ({"kernel_size": (5, 7)}, r"packed must have shape \(16, 3, 5, 7\)"),
        ({"size": (0, 3), "padding": (0, 0)}, "x must be at least as large as the kernel"),
    ],
)
def test_pooled_fake_refuses_in_a_sentence(change, sentence):
    made = {name: change.pop(name) for name in ("dtype", "c", "size") if name in change}
    x, _, scale, shift = stem_arguments("meta", **made)
    weight = stem_arguments("meta", made.get("dtype", torch.bfloat16))[1]
    with pytest.raises((ValueError, TypeError), match=f"conv_bn_act_pool_cuda: {sentence}"):
        OPS.conv_bn_act_pool_cuda(x, weight, scale, shift, **STEM | change)


def test_pooled_op_is_forward_only():
    x, *operands = stem_arguments("meta")
    with pytest.raises(RuntimeError, match="conv_bn_act_pool_cuda: is forward only"):
        OPS.conv_bn_act_pool_cuda(x.requires_grad_(), *operands, **STEM)


def tail_arguments(device, dtype=torch.bfloat16, c=16, between=24, k=40, batch=2):
    x, *first = arguments(device, dtype, c, between, batch=batch)
    _, *last = arguments(device, dtype, between, k, kernel=1)
    return x, *first, *last


def tail_residual(operands, height=9, width=7):
    x, k = operands[0], operands[5].shape[0]
    draw = torch.Generator().manual_seed(2)
    residual = torch.randn(x.shape[0], k, height, width, generator=draw)
    return nhwc(residual.to(x.device, x.dtype))


TAIL = {"kernel_size": (3, 3), "padding": (1, 1)}


@pytest.mark.parametrize("batched", [True, False])
def test_tail_fake_output(batched):
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, *operands = tail_arguments("cpu")
    x = x.contiguous() if batched else x[0]
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        given = [mode.from_tensor(t) for t in (x, *operands)]
        y = OPS.bottleneck_tail_cuda(*given, **TAIL, stride=(2, 1))
        again = OPS.bottleneck_tail_cuda(*given, y, **TAIL, stride=(2, 1))
    assert y.shape == ((2, 40, 5, 7) if batched else (40, 5, 7))
    assert y.dtype == torch.bfloat16
    assert y.stride()[-3:] == again.stride()[-3:] == (1, 7 * 40, 40)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("x", torch.ones(2, 16, 9, 7), "x must be bfloat16 or float16, got float32"),
        (
            "packed",
            torch.ones(24, 16, 1, 3).bfloat16(),
            r"packed must have shape \(24, 16, 3, 3\), got",
        ),
        (
            "last_packed",
            torch.ones(40, 16, 1, 1).bfloat16(),
            r"last_packed must have shape \(40, 24, 1, 1\)",
        ),
        ("last_packed", torch.ones(40, 24, 1, 1).half(), "last_packed must be bfloat16, got"),
        ("last_scale", torch.ones(1, 40), "last_scale must be 1-D, one value per output channel"),
        ("last_scale", torch.ones(40).double(), "last_scale must be float32, got float64"),
        ("last_shift", torch.ones(24), r"last_shift must have shape \(40,\), got \(24,\)"),
        (
            "residual",
            torch.ones(2, 40, 9, 8).bfloat16(),
            r"residual must have shape \(2, 40, 9, 7\), got",
        ),
        ("residual", torch.ones(2, 40, 9, 7).half(), "residual must be bfloat16, got float16"),
        ("act", "gelu", "act must be"),
        ("last_act", "gelu", "last_act must be"),
        ("dilation", (6, 1), "x must be at least as large as the kernel"),
    ],
)
def test_tail_fake_refuses_in_a_sentence(name, value, sentence):
    names = ("x", "packed", "scale", "shift", "last_packed", "last_scale", "last_shift")
    operands = tail_arguments("meta")
    given = dict(zip(names, operands, strict=True)) | TAIL
    if name == "residual":
        given["residual"] = tail_residual(operands)
    if name == "x":
        given["packed"] = given["packed"].float()
    if isinstance(value, torch.Tensor):
        value = value.to("meta")
    with pytest.raises((ValueError, TypeError), match=f"bottleneck_tail_cuda: {sentence}"):
        OPS.bottleneck_tail_cuda(**given | {name: value})


def test_tail_op_is_forward_only():
    x, *operands = tail_arguments("meta")
    with pytest.raises(RuntimeError, match="bottleneck_tail_cuda: is forward only"):
        OPS.bottleneck_tail_cuda(x.requires_grad_(), *operands, **TAIL)


# ---- on a GPU ----------------------------------------------------------------------------------

needs_kernels = pytest.mark.skipif(
    _gpu_kernels.cuda_error(GPU) is not None, reason=str(_gpu_kernels.cuda_error(GPU))
)


def expected(x, weight, scale, shift, extra=None, act="relu", **conv):
    y = F.conv2d(x.double(), weight.double(), **conv)
    y = y * scale.double().view(-1, 1, 1) + shift.double().view(-1, 1, 1)
    y = y if extra is None else y + extra.double()
    return torch.where(y < 0, 0.0, y) if act == "relu" else y


def close(y, oracle, product=0.0):
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}[y.dtype]
    error = (y.double() - oracle).abs()
    assert bool((error <= 1.01 * unit * oracle.abs() + 2e-5 + 8 * product).all()), error.max()


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("c", "k", "groups"), [(16, 24, 1), (64, 64, 1), (3, 5, 1), (12, 12, 12)])
@pytest.mark.parametrize("config", ["", "sm80 any64x64 split 2", "sm80 64x32 split 3"])
def test_conv_on_a_gpu(dtype, c, k, groups, config):
    if "any" not in config and config and (c % 8 or groups > 1):
        pytest.skip("needs whole chunks of channels")
    x, weight, scale, shift = arguments(GPU, dtype, c, k, groups)
    conv = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": groups}
    oracle = expected(x, weight, scale, shift, **conv)
    y = OPS.conv_bn_act_cuda(x, weight, scale, shift, kernel_size=(3, 3), config=config, **conv)
    tf32 = dtype == torch.float32 and OPS.uses_tf32()
    close(y, oracle, 2.0**-10 if tf32 else 0.0)
    again = OPS.conv_bn_act_cuda(x, weight, scale, shift, kernel_size=(3, 3), config=config, **conv)
    assert torch.equal(y, again)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_configurations_worth_measuring_on_a_gpu(dtype):
    """Each serves, none twice, and other text is a sentence."""
    x, weight, scale, shift = arguments(GPU, dtype, 64, 64)
    sizes = _cuda.Sizes(
        *(tuple(x.shape), 64, (3, 3), (1, 1), (1, 1), (1, 1), 1, (), (1, 1)),
        *(_cuda.kind_of(dtype), 0),
    )
    names = _cuda.ranked(sizes)
    assert len(set(names)) == len(names) > 2
    oracle = expected(x, weight, scale, shift, padding=1)
    for name in names:
        assert OPS.conv_bn_act_cuda_refusal(*sizes, name) == ""
        y = OPS.conv_bn_act_cuda(
            x, weight, scale, shift, kernel_size=(3, 3), padding=(1, 1), config=name
        )
        close(y, oracle, 2.0**-10 if sizes.kind == "tf32" else 0.0)
    assert "config must be empty or like" in OPS.conv_bn_act_cuda_refusal(*sizes, "sm80")
    ragged = sizes._replace(x=(2, 12, 9, 7), kind="bfloat16")
    assert "multiples of 8" in OPS.conv_bn_act_cuda_refusal(*ragged, "sm80 64x64 split 1")


@pytest.mark.gpu
@needs_kernels
def test_shortcut_residual_and_capture_on_a_gpu():
    x, weight, scale, shift = arguments(GPU, torch.bfloat16, 64, 64)
    x2, weight2, scale2, shift2 = arguments(GPU, torch.bfloat16, 32, 64, kernel=1)
    scale2[:4] = torch.tensor([0.0, 1e-6, -1e-6, -1.0], device=GPU)
    branch = expected(x2, weight2, scale2, shift2, act="none")
    oracle = expected(x, weight, scale, shift, branch, padding=1)
    operands = (x, weight, scale, shift, None, x2, weight2, scale2, shift2)
    keywords = {"kernel_size": (3, 3), "padding": (1, 1)}
    close(OPS.conv_bn_act_cuda(*operands, **keywords), oracle)
    residual = nhwc(torch.randn_like(branch)).to(x.dtype)
    y = OPS.conv_bn_act_cuda(x, weight, scale, shift, residual, **keywords)
    close(y, expected(x, weight, scale, shift, residual, padding=1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = OPS.conv_bn_act_cuda(*operands, **keywords, config="sm80 64x64 split 4")
    for _ in range(3):
        captured.fill_(float("nan"))
        graph.replay()
        close(captured, oracle)


def skip_where_not_served(config):
    if config.startswith("sm90") and torch.cuda.get_device_capability(GPU) != (9, 0):
        pytest.skip("not a Hopper GPU")


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("config", ["sm80 64x32 split 6", "sm90 p64x64 split 4"])
def test_split_launches_of_streams_and_graphs_on_a_gpu(config):
    """Each finds its tickets at zero, whatever runs beside it."""
    skip_where_not_served(config)
    x, weight, scale, shift = arguments(GPU, torch.bfloat16, 64, 64)
    keywords = {"kernel_size": (3, 3), "padding": (1, 1), "config": config}
    oracle = expected(x, weight, scale, shift, padding=1)
    y = OPS.conv_bn_act_cuda(x, weight, scale, shift, **keywords)
    close(y, oracle)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [OPS.conv_bn_act_cuda(x, weight, scale, shift, **keywords) for _ in range(3)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    results = []
    for _ in range(30):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(OPS.conv_bn_act_cuda(x, weight, scale, shift, **keywords))
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(result, y) for result in (*results, *captured))


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("config", ["sm80 64x64 split 1", "sm90 p64x64 split 1"])
@pytest.mark.parametrize("in_graph", [False, True])
def test_weights_that_the_kernel_before_wrote_on_a_gpu(config, in_graph):
    """A launch that overlaps the end of a copy into its weights does not read the old ones."""
    skip_where_not_served(config)
    x, weight, scale, shift = arguments(GPU, torch.bfloat16, 64, 64)
    keywords = {"kernel_size": (3, 3), "padding": (1, 1), "config": config}
    both = (weight, -weight)
    right = [OPS.conv_bn_act_cuda(x, w, scale, shift, **keywords) for w in both]
    held = torch.empty_like(weight)
    results = []

    def run():
        for i in range(40):
            held.copy_(both[i % 2])
            for _ in range(2):
                results.append(OPS.conv_bn_act_cuda(x, held, scale, shift, **keywords))

    if in_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
    else:
        run()
    torch.cuda.synchronize()
    for i, y in enumerate(results):
        assert torch.equal(y, right[i // 2 % 2])


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 7, 1003, 4096 * 1024 + 3])
def test_add_relu_on_a_gpu(dtype, count):
    a, b = (torch.randn(count + 1, device=GPU).to(dtype) for _ in range(2))
    a[count // 2] = float("nan")
    for left, right in ((a[:-1], b[:-1]), (a[1:], b[:-1])):
        y = OPS.add_relu_cuda(left, right)
        assert torch.equal(y.nan_to_num(7.0), torch.relu(left + right).nan_to_num(7.0))


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 24])
@pytest.mark.parametrize("c", [1, 3, 4])
@pytest.mark.parametrize("act", ["relu", "none"])
def test_conv_and_pool_on_a_gpu(dtype, batch, c, act):
    """Rows that are copied 16 bytes, words and elements at a time; odd sizes; a graph."""
    for width in (96, 98, 97):
        operands = stem_arguments(GPU, dtype, c, 72, batch, (75, width))
        x, weight, scale, shift = operands
        assert OPS.conv_bn_act_pool_refusal(list(x.shape), 72, *STEM.values()) == ""
        conv = {name: STEM[name] for name in ("stride", "padding")}
        oracle = F.max_pool2d(expected(x, weight, scale, shift, act=act, **conv), 3, 2, 1)
        y = OPS.conv_bn_act_pool_cuda(*operands, **STEM, act=act)
        close(y, oracle)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y[:1], OPS.conv_bn_act_pool_cuda(x[:1], *operands[1:], **STEM, act=act))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = OPS.conv_bn_act_pool_cuda(*operands, **STEM, act=act)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, y)


@pytest.mark.gpu
@needs_kernels
def test_conv_and_pool_refuses_in_a_sentence_on_a_gpu():
    x, weight, scale, shift = stem_arguments(GPU)
    with pytest.raises(RuntimeError, match="needs an even stride or number of channels, got"):
        OPS.conv_bn_act_pool_cuda(x, weight, scale, shift, **STEM | {"stride": (2, 1)})
    with pytest.raises(RuntimeError, match="x must be bfloat16 or float16, got float32"):
        OPS.conv_bn_act_pool_cuda(x.float(), weight.float(), scale, shift, **STEM)


@pytest.mark.gpu
@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("between", "k"), [(64, 256), (40, 264), (128, 72)])
@pytest.mark.parametrize(("act", "last_act"), [("relu", "relu"), ("none", "none")])
def test_tail_on_a_gpu(dtype, between, k, act, last_act):
    """Against float64 with the map between rounded; batches of one and of many blocks; a graph."""
    for batch in (1, 70):
        operands = tail_arguments(GPU, dtype, 64, between, k, batch)
        x, residual, conv = operands[0], tail_residual(operands), {"padding": (1, 1)}
        assert OPS.bottleneck_tail_refusal(list(x.shape), between, k, *[[3, 3], [1, 1]] * 2) == ""
        middle = expected(*operands[:4], act=act, **conv).to(dtype)
        # What rounding the map between the other way may change: a unit of each of its values.
        unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
        spread = F.conv2d(middle.double().abs() * unit, operands[4].double().abs())
        spread = spread * operands[5].double().abs().view(-1, 1, 1)
        for other in (residual, None):
            y = OPS.bottleneck_tail_cuda(*operands, other, **TAIL, act=act, last_act=last_act)
            close(y, expected(middle, *operands[4:], other, last_act), 0.1 * spread)
            assert y.is_contiguous(memory_format=torch.channels_last)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = OPS.bottleneck_tail_cuda(*operands, **TAIL, act=act, last_act=last_act)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, y)


@pytest.mark.gpu
@needs_kernels
def test_tail_refuses_in_a_sentence_on_a_gpu():
    with pytest.raises(RuntimeError, match="has at most 128 channels between them, got 136"):
        OPS.bottleneck_tail_cuda(*tail_arguments(GPU, between=136), **TAIL)
    with pytest.raises(RuntimeError, match="needs channels in multiples of 8, got 12"):
        OPS.bottleneck_tail_cuda(*tail_arguments(GPU, c=12), **TAIL)
    x, *operands = tail_arguments(GPU)
    with pytest.raises(RuntimeError, match=r"last_shift must have shape \(40,\), got \(24,\)"):
        OPS.bottleneck_tail_cuda(x, *operands[:5], operands[1], **TAIL)
    with pytest.raises(RuntimeError, match="last_act must be"):
        OPS.bottleneck_tail_cuda(x, *operands, **TAIL, last_act="gelu")
