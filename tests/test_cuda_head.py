"""global_avg_pool_linear_cuda: its kernel under emulation, its fake, and the op on a GPU."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as F
from emulated_sm80 import DTYPES, TYPES
from emulated_sm90 import CSRC, ROOT, build_library, why_not

import resnet_fused  # noqa: F401  registers the op
from resnet_fused.ops import _cuda

OP = torch.ops.resnet_fused.global_avg_pool_linear_cuda
GPU = torch.device("cuda", 0)
KINDS = ("bfloat16", "float16", "float32")
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}


class Sizes(ctypes.Structure):
    """HeadProblem of csrc/cuda/sm80/head.h."""

    _fields_ = [(n, ctypes.c_int64) for n in ("images", "pixels", "channels", "classes")]


class Head(ctypes.Structure):
    """csrc/cuda/sm80/head.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "pooled", "y")),
        *((n, ctypes.c_int) for n in ("pixels", "channels", "classes", "block_classes")),
    ]


def drawn(kind: str, images: int, pixels: int, channels: int, classes: int) -> list[torch.Tensor]:
    """x of (images, pixels, channels), weight, bias."""
    draw = torch.Generator().manual_seed(channels + classes)
    x = torch.randn(images, pixels, channels, generator=draw) + 1
    weight, bias = (torch.randn(*s, generator=draw) for s in ((classes, channels), (classes,)))
    return [t.to(DTYPES[kind]) for t in (x, weight * channels**-0.5, bias)]


def check(kind, pooled, y, x, weight, bias):
    """The mean rounded once; its products to what float32 sums and one more rounding give."""
    mean = x.double().mean(1)
    assert torch.equal(pooled.isnan(), mean.isnan())
    over = (pooled.double() - mean).abs() - 1.01 * UNIT[kind] * mean.abs()
    assert (over.nan_to_num() < 2e-6).all()
    exact = F.linear(pooled.double(), weight.double(), None if bias is None else bias.double())
    assert torch.equal(y.isnan(), exact.isnan())
    sums = pooled.double().abs() @ weight.double().abs().t()
    allowed = 1.01 * UNIT[kind] * exact.abs() + 2.0**-20 * sums + 1e-7
    assert ((y.double() - exact).abs() - allowed).nan_to_num().max() <= 0


# ---- emulated ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    if why_not():
        pytest.skip(why_not())
    folder = ROOT / "build" / "emulated"
    return build_library(folder, "head", CSRC, ["emulate/run_head"], ["sm80/head"])


def emulated(library, kind, x, weight, bias, order=0):
    images, pixels, channels = x.shape
    sizes = Sizes(images, pixels, channels, len(weight))
    pooled, y = x.new_full((images, channels), -1.0), x.new_full((images, len(weight)), -1.0)
    pointers = [None if t is None else t.data_ptr() for t in (x, weight, bias, pooled, y)]
    why = ctypes.create_string_buffer(800)
    given = (ctypes.byref(sizes), ctypes.byref(Head(*pointers)))
    library.head_run(*given, TYPES.index(kind), order, why, 800)
    assert not why.value
    return pooled, y


SHAPES = [  # images, pixels, channels, classes
    (1, 49, 512, 1000),
    (2, 49, 2048, 20),  # a group of threads a pixel and a half
    (1, 49, 64, 10),
    (3, 6, 40, 33),  # threads that no group has
    (2, 1, 8, 1),
    (1, 120, 200, 17),  # more pixels than are loaded at a time
    (1, 3, 4104, 5),  # more vectors than threads
    (40, 4, 16, 70),  # several rows a warp
    (9, 5, 528, 300),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element(library, kind, shape):
    x, weight, bias = drawn(kind, *shape)
    for order, terms in ((0, bias), (1, None)):
        pooled, y = emulated(library, kind, x, weight, terms, order)
        check(kind, pooled, y, x, weight, terms)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_warps_changes_no_bit(library, kind):
    operands = drawn(kind, 2, 9, 136, 50)
    pooled, y = emulated(library, kind, *operands)
    for order in (1, 2):
        other = emulated(library, kind, *operands, order)
        assert torch.equal(other[0], pooled)
        assert torch.equal(other[1], y)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_with_their_image(library, value):
    x, weight, bias = drawn("float16", 3, 5, 24, 40)
    x[1, 2, 7] = value
    pooled, y = emulated(library, "float16", x, weight, bias)
    assert (~pooled.isfinite()).nonzero().tolist() == [[1, 7]]
    assert y.isfinite().all(1).tolist() == [True, False, True]
    assert not y[1].isfinite().any()
    weight[4, 3] = value
    y = emulated(library, "float16", *drawn("float16", 3, 5, 24, 40)[:1], weight, bias)[1]
    assert (~y.isfinite()).nonzero().tolist() == [[0, 4], [1, 4], [2, 4]]


def test_sums_are_kept_in_float32(library):
    x = torch.ones(1, 4096, 8, dtype=torch.bfloat16)
    x[0, 0] = 256  # in bfloat16, 256 + 1 is 256
    weight = torch.ones(1, 8, dtype=torch.bfloat16)
    pooled, _ = emulated(library, "bfloat16", x, weight, None)
    assert torch.equal(pooled, torch.tensor((256 + 4095) / 4096).bfloat16().expand(1, 8))


def refused(library, shape, kind="bfloat16"):
    text = ctypes.create_string_buffer(800)
    library.head_refuses_of(ctypes.byref(Sizes(*shape)), TYPES.index(kind), text, 800)
    return text.value.decode()


def test_refusals(library):
    assert not refused(library, (1, 49, 512, 1000))
    assert not refused(library, (1, 49, 2048, 1000))
    assert not refused(library, (16, 49, 512, 1000))
    for sizes, kind, sentence in (
        ((1, 49, 508, 10), "bfloat16", "needs channels in multiples of 8, got 508"),
        ((1, 49, 510, 10), "float32", "needs channels in multiples of 4, got 510"),
        ((0, 49, 512, 10), "bfloat16", "takes 1 to 32768 images"),
        ((1, 49, 512, 40000), "bfloat16", "takes 1 to 32768 images"),
        ((1, 4, 16384, 10), "bfloat16", "no shared memory for 16384 channels"),
        ((64, 49, 512, 1000), "bfloat16", "PyTorch's are as fast"),
        ((1, 49, 2048, 1000), "float32", "PyTorch's are as fast"),
        ((1, 1024, 2048, 10), "bfloat16", "PyTorch's are as fast"),  # one block reads a large map
        ((32768, 32768, 512, 32768), "bfloat16", "PyTorch's are as fast"),
    ):
        assert sentence in refused(library, sizes, kind)


def test_blocks(library):
    """About 64 of them in all, of whole warps' rows."""
    blocks = [library.head_blocks_of(ctypes.byref(Sizes(n, 49, 512, 1000))) for n in (1, 2, 4, 16)]
    assert blocks == [63, 32, 16, 4]
    assert library.head_blocks_of(ctypes.byref(Sizes(1, 49, 512, 10))) == 1


# ---- the op ------------------------------------------------------------------------------------


def test_fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        x, weight, bias = (
            mode.from_tensor(torch.ones(*shape).half()) for shape in ((2, 16, 3, 3), (5, 16), (5,))
        )
        for terms in (bias, None):
            pooled, y = OP(x, weight, terms)
            assert (pooled.shape, pooled.stride()) == ((2, 16, 1, 1), (16, 1, 16, 16))
            assert (y.shape, y.stride()) == ((2, 5), (5, 1))
            assert pooled.dtype == y.dtype == torch.float16


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.ones(3, 4, 4)}, r"x must be 4-D \(N, C, H, W\), got shape \(3, 4, 4\)"),
        ({"x": torch.ones(1, 8, 3, 3).double()}, "x must be float32, bfloat16 or float16, got"),
        ({"weight": torch.ones(5, 4)}, "weight must be 2-D .* with the 8 channels of x, got shape"),
        ({"weight": torch.ones(5, 8).half()}, "weight must be float32, got float16"),
        ({"bias": torch.ones(4)}, r"bias must have shape \(5,\), got \(4,\)"),
        ({"bias": torch.ones(5).half()}, "bias must be float32, got float16"),
    ],
)
def test_fake_refuses_in_a_sentence(change, sentence):
    given = {"x": torch.ones(1, 8, 3, 3), "weight": torch.ones(5, 8), "bias": torch.ones(5)}
    given = {name: tensor.to("meta") for name, tensor in (given | change).items()}
    with pytest.raises((ValueError, TypeError), match=f"global_avg_pool_linear_cuda: {sentence}"):
        OP(*given.values())


def test_refuses_gradients():
    x, weight = torch.ones(1, 8, 3, 3, requires_grad=True), torch.ones(5, 8)
    with pytest.raises(RuntimeError, match="global_avg_pool_linear_cuda: is forward only"):
        OP(x, weight)


on_a_gpu = pytest.mark.skipif(_cuda.cuda_error(GPU) is not None, reason=str(_cuda.cuda_error(GPU)))


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES[:4], (4, 49, 512, 1000), (16, 49, 512, 1000)], ids=str)
def test_on_a_gpu(kind, shape):
    if _cuda.head_refusal((shape[0], shape[2], shape[1], 1), shape[3], DTYPES[kind].itemsize):
        pytest.skip("PyTorch's are as fast")
    x, weight, bias = drawn(kind, *shape)
    image = x.transpose(1, 2)[..., None].to(GPU)  # channels_last
    for laid in (image, image.contiguous()):
        for terms in (bias, None):
            on_device = None if terms is None else terms.to(GPU)
            pooled, y = OP(laid, weight.to(GPU), on_device)
            check(kind, pooled.flatten(1).cpu(), y.cpu(), x, weight, terms)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_behind_a_convolution_in_a_graph(kind):
    """Where its launch may overlap the kernel before it."""
    torch.manual_seed(0)
    conv = torch.randn(512, 512, 3, 3, device=GPU).mul_(0.02).to(DTYPES[kind])
    conv = conv.contiguous(memory_format=torch.channels_last)
    scale, shift = torch.ones(512, device=GPU), torch.zeros(512, device=GPU)
    _, weight, bias = (t.to(GPU) for t in drawn(kind, 1, 1, 512, 1000))
    x = torch.randn(1, 512, 7, 7, device=GPU).to(DTYPES[kind])
    x = x.contiguous(memory_format=torch.channels_last)

    def run():
        y = torch.ops.resnet_fused.conv_bn_act_cuda(
            x, conv, scale, shift, kernel_size=(3, 3), padding=(1, 1)
        )
        return y, *OP(y, weight, bias)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    for _ in range(20):
        x.copy_(torch.randn(x.shape, device=GPU))
        for _ in range(3):
            graph.replay()
        image, pooled, y = (t.cpu() for t in outputs)
        check(
            kind, pooled.flatten(1), y, image.flatten(2).transpose(1, 2), weight.cpu(), bias.cpu()
        )


@pytest.mark.gpu
@on_a_gpu
def test_refuses_on_a_gpu():
    x, weight = torch.ones(1, 8, 3, 3, device=GPU), torch.ones(5, 8, device=GPU)
    for operands, sentence in (
        ((x[0], weight), "x must be 4-D"),
        ((x, weight.half()), "weight must be float32, got float16"),
        ((x, weight.cpu()), "weight must be on cuda:0"),
        ((x, weight[:, :4]), "weight must be 2-D"),
        ((x, weight, weight[0]), r"bias must have shape \(5,\)"),
        ((x[:, :6], weight[:, :6]), "its kernel needs channels in multiples of 4, got 6"),
    ):
        with pytest.raises(RuntimeError, match=f"global_avg_pool_linear_cuda: {sentence}"):
            OP(*operands)
