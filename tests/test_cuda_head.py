"""global_avg_pool and linear for GPUs: their kernels under emulation, and the ops on a GPU."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as F
from emulated_sm80 import DTYPES, TYPES
from emulated_sm90 import CSRC, ROOT, build_library, why_not
from torch import Tensor

import resnet_fused  # noqa: F401  registers the ops
from resnet_fused._gpu_kernels import cuda_error

_ops = torch.ops.resnet_fused
GPU = torch.device("cuda", 0)
KINDS = ("bfloat16", "float16", "float32")
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}


class Pool(ctypes.Structure):
    """csrc/cuda/sm80/head.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        *((name, ctypes.c_int) for name in ("pixels", "channels")),
    ]


class Linear(ctypes.Structure):
    """csrc/cuda/sm80/head.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weight", "bias", "y")),
        *((name, ctypes.c_int) for name in ("images", "inputs", "outputs")),
    ]


def maps(kind: str, images: int, pixels: int, channels: int) -> Tensor:
    draw = torch.Generator().manual_seed(channels + pixels)
    return (torch.randn(images, pixels, channels, generator=draw) + 1).to(DTYPES[kind])


def layer(kind: str, images: int, inputs: int, outputs: int) -> list[Tensor]:
    """x, weight, bias."""
    draw = torch.Generator().manual_seed(inputs + outputs)
    shapes = ((images, inputs), (outputs, inputs), (outputs,))
    x, weight, bias = (torch.randn(*shape, generator=draw) for shape in shapes)
    return [t.to(DTYPES[kind]) for t in (x, weight * max(inputs, 1) ** -0.5, bias)]


def check_pool(kind: str, y: Tensor, x: Tensor) -> None:
    """The mean, rounded once."""
    mean = x.double().mean(1)
    assert torch.equal(y.isnan(), mean.isnan())
    over = (y.double() - mean).abs() - 1.01 * UNIT[kind] * mean.abs()
    assert (over.nan_to_num() < 2e-6).all()


def check_linear(kind: str, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """What float32 sums and one rounding give."""
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert torch.equal(y.isnan(), exact.isnan())
    sums = x.double().abs() @ weight.double().abs().t()
    allowed = 1.01 * UNIT[kind] * exact.abs() + 2.0**-20 * sums + 1e-7
    assert ((y.double() - exact).abs() - allowed).nan_to_num().max() <= 0


# ---- emulated ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    if why_not():
        pytest.skip(why_not())
    return build_library(ROOT / "build" / "emulated", "head", CSRC, ["emulate/run_head"], [])


def pool(library, kind, x, order=0):
    images, pixels, channels = x.shape
    y = x.new_full((images, channels), float("nan"))
    why = ctypes.create_string_buffer(800)
    call = Pool(x.data_ptr(), y.data_ptr(), pixels, channels)
    library.pool_run(ctypes.byref(call), images, TYPES.index(kind), order, why, 800)
    assert not why.value
    return y


def linear(library, kind, x, weight, bias, order=0):
    y = x.new_full((len(x), len(weight)), float("nan"))
    pointers = [None if t is None else t.data_ptr() for t in (x, weight, bias, y)]
    why = ctypes.create_string_buffer(800)
    call = Linear(*pointers, *x.shape, len(weight))
    library.linear_run(ctypes.byref(call), TYPES.index(kind), order, why, 800)
    assert not why.value
    return y


POOLS = [  # images, pixels, channels
    (1, 49, 512),
    (2, 49, 2048),
    (3, 6, 40),  # lanes beyond the last channel, warps without a pixel
    (2, 1, 8),
    (1, 300, 200),  # more pixels than are loaded at a time
    (5, 33, 72),
]
LINEARS = [  # images, inputs, outputs
    (1, 512, 1000),
    (1, 2048, 20),
    (1, 4136, 9),  # more inputs than are loaded at a time, outputs that leave warps idle
    (2, 8, 1),
    (3, 40, 33),
    (4, 1032, 7),
    (8, 512, 50),
    (9, 2056, 5),  # an image more than whole groups
    (1, 0, 3),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", POOLS, ids=str)
def test_every_mean(library, kind, shape):
    x = maps(kind, *shape)
    y = pool(library, kind, x)
    check_pool(kind, y, x)
    for order in (1, 2):
        assert torch.equal(pool(library, kind, x, order), y), "the order of warps"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", LINEARS, ids=str)
def test_every_output(library, kind, shape):
    x, weight, bias = layer(kind, *shape)
    for order, terms in ((0, bias), (1, None)):
        y = linear(library, kind, x, weight, terms, order)
        check_linear(kind, y, x, weight, terms)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_with_their_image(library, value):
    x = maps("float16", 3, 5, 24)
    x[1, 2, 7] = value
    mean = pool(library, "float16", x)
    assert (~mean.isfinite()).nonzero().tolist() == [[1, 7]]
    _, weight, bias = layer("float16", 3, 24, 40)
    y = linear(library, "float16", mean, weight, bias)
    assert y.isfinite().all(1).tolist() == [True, False, True]
    assert not y[1].isfinite().any()
    weight[4, 3] = value
    y = linear(library, "float16", mean.nan_to_num(0, 0, 0), weight, bias)
    assert (~y.isfinite()).nonzero().tolist() == [[0, 4], [1, 4], [2, 4]]


def test_sums_are_kept_in_float32(library):
    x = torch.ones(1, 4096, 8, dtype=torch.bfloat16)
    x[0, 0] = 256  # in bfloat16, 256 + 1 is 256
    mean = pool(library, "bfloat16", x)
    assert torch.equal(mean, torch.tensor((256 + 4095) / 4096).bfloat16().expand(1, 8))
    row = x[:, :, 0].contiguous()
    y = linear(library, "bfloat16", row, torch.ones_like(row), None)
    assert y.item() == torch.tensor(4351.0).bfloat16().item()


# ---- the ops on a GPU --------------------------------------------------------------------------

on_a_gpu = pytest.mark.skipif(cuda_error(GPU) is not None, reason=str(cuda_error(GPU)))


def image_of(x: Tensor) -> Tensor:
    """(N, C, pixels, 1) on the GPU, channels_last."""
    return x.to(GPU).transpose(1, 2)[..., None]


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*POOLS, (128, 49, 2048)], ids=str)
def test_means_on_a_gpu(kind, shape):
    x = maps(kind, *shape)
    image = image_of(x)
    unaligned = torch.empty(image.numel() + 1, dtype=image.dtype, device=GPU)[1:]
    unaligned = unaligned.as_strided(image.shape, image.stride(), 1).copy_(image)
    with torch.inference_mode():
        for laid in (image, image.contiguous(), unaligned):
            y = _ops.global_avg_pool(laid)
            assert y.shape == (*image.shape[:2], 1, 1)
            assert y.is_contiguous(memory_format=torch.channels_last)
            check_pool(kind, y.flatten(1).cpu(), x)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*LINEARS, (8, 2048, 1000), (0, 8, 3), (3, 8, 0)], ids=str)
def test_products_on_a_gpu(kind, shape):
    x, weight, bias = layer(kind, *shape)
    moved = [t.to(GPU) for t in (x, weight, bias)]
    with torch.inference_mode():
        for terms in (bias, None):
            given = [*moved[:2], None if terms is None else moved[2]]
            y = _ops.linear(*given).cpu()
            assert y.shape == (len(x), len(weight))
            if y.numel():
                check_linear(kind, y, x, weight, terms)
            spread = [*(t.t().contiguous().t() for t in given[:2]), given[2]]
            assert torch.equal(_ops.linear(*spread).cpu(), y)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
def test_behind_a_convolution_in_a_graph(kind, images):
    """Where each launch may overlap the kernel before it."""
    torch.manual_seed(0)
    conv = torch.randn(512, 512, 3, 3, device=GPU).mul_(0.02).to(DTYPES[kind])
    conv = conv.contiguous(memory_format=torch.channels_last)
    scale, shift = torch.ones(512, device=GPU), torch.zeros(512, device=GPU)
    _, weight, bias = (t.to(GPU) for t in layer(kind, 1, 512, 1000))
    x = torch.randn(images, 512, 7, 7, device=GPU).to(DTYPES[kind])
    x = x.contiguous(memory_format=torch.channels_last)

    def run():
        y = _ops.conv_bn_act_cuda(x, conv, scale, shift, kernel_size=(3, 3), padding=(1, 1))
        mean = _ops.global_avg_pool(y)
        return y, mean, _ops.linear(mean.flatten(1), weight, bias)

    with torch.inference_mode():
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        for _ in range(20):
            x.copy_(torch.randn(x.shape, device=GPU))
            for _ in range(3):
                graph.replay()
            image, mean, y = (t.cpu() for t in outputs)
            check_pool(kind, mean.flatten(1), image.flatten(2).transpose(1, 2))
            check_linear(kind, y, mean.flatten(1), weight.cpu(), bias.cpu())


@pytest.mark.gpu
@on_a_gpu
def test_refuses_on_a_gpu():
    x4 = torch.ones(1, 8, 3, 3, device=GPU)
    x, weight = torch.ones(1, 8, device=GPU), torch.ones(5, 8, device=GPU)
    pool, linear = _ops.global_avg_pool, _ops.linear
    for op, operands, sentence in (
        (pool, (x4[0],), "x must be 4-D"),
        (pool, (x4[..., :0],), "x must have pixels"),
        (pool, (x4.double(),), "x must be float32, bfloat16 or float16, got float64"),
        (pool, (x4[:, :6],), "the kernel needs channels in multiples of 4, got 6"),
        (pool, (x4[:, :4].half(),), "the kernel needs channels in multiples of 8, got 4"),
        (linear, (x4, weight), "x must be 2-D"),
        (linear, (x, weight.half()), "weight must be float32, got float16"),
        (linear, (x, weight.cpu()), "weight must be on cuda:0, where x is, got cpu"),
        (linear, (x, weight[:, :4]), "weight must be 2-D"),
        (linear, (x, weight, weight[0]), r"bias must have shape \(5,\)"),
        (linear, (x[:, :6], weight[:, :6]), "the kernel needs inputs in multiples of 4, got 6"),
        (linear, (x.requires_grad_(), weight), "is forward only"),
    ):
        name = "global_avg_pool" if op is pool else "linear"
        with pytest.raises(RuntimeError, match=f"{name}: {sentence}"):
            op(*operands)
