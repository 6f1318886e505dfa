"""scale_shift_act_cuda: its kernel under emulation, its fake, and the op on a GPU."""

from __future__ import annotations

import ctypes

import pytest
import torch
from emulated_sm80 import DTYPES, TYPES
from emulated_sm90 import CSRC, ROOT, build_library, why_not

import resnet_fused  # noqa: F401  registers the op
from resnet_fused._gpu_kernels import cuda_error

OP = torch.ops.resnet_fused.scale_shift_act_cuda
GPU = torch.device("cuda", 0)
KINDS = ("bfloat16", "float16", "float32")


class ScaleShift(ctypes.Structure):
    """csrc/cuda/sm80/scale_shift.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "residual", "scale", "shift", "y")),
        ("count", ctypes.c_int64),
        ("channels", ctypes.c_int),
        ("relu", ctypes.c_bool),
        ("aligned", ctypes.c_bool),
    ]


def drawn(kind: str, pixels: int, channels: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(channels)
    x, residual = (torch.randn(pixels, channels, generator=draw).to(DTYPES[kind]) for _ in "xr")
    scale, shift = (torch.randn(channels, generator=draw) for _ in "st")
    x[0, 0] = float("nan")
    return [x, residual, scale, shift]


def expected(x, residual, scale, shift, relu):
    y = x.double() * scale.double() + shift.double()
    y = y if residual is None else y + residual.double()
    return torch.where(y < 0, 0.0, y) if relu else y


def close(y: torch.Tensor, oracle: torch.Tensor) -> bool:
    unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-23}[y.dtype]
    assert torch.equal(y.isnan(), oracle.isnan())
    error = (y.double() - oracle).abs().nan_to_num()
    return bool((error <= 1.01 * unit * oracle.abs().nan_to_num() + 2e-6).all())


# ---- emulated ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    if why_not():
        pytest.skip(why_not())
    return build_library(
        ROOT / "build" / "emulated",
        "pointwise",
        CSRC,
        ["emulate/run_pointwise"],
        ["sm80/pointwise"],
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("pixels", "channels", "skip"),
    [
        (70, 64, 0),  # a thread keeps its channels
        (90, 24, 0),  # they change from step to step
        (33, 2048 + 8, 0),  # rows longer than a step
        (50, 13, 0),  # rows of no whole vectors
        (40, 16, 1),  # unaligned tensors
        (1, 8, 0),
    ],
)
def test_every_element(library, kind, pixels, channels, skip):
    x, residual, scale, shift = drawn(kind, pixels, channels)
    for other, relu, blocks in ((residual, True, 2), (None, True, 1), (residual, False, 3)):
        y, why = torch.full_like(x, -1.0), ctypes.create_string_buffer(800)
        tensors = [None if t is None else t.data_ptr() for t in (x, other, scale, shift, y)]
        call = ScaleShift(*tensors, x.numel(), channels, relu, False)
        library.scale_shift_run(ctypes.byref(call), TYPES.index(kind), skip, blocks, why, 800)
        assert not why.value
        assert close(y, expected(x, other, scale, shift, relu))


def test_blocks(library):
    """All elements and no idle block; at most one wave."""
    blocks = library.pointwise_blocks_of
    blocks.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    assert [blocks(n, 8, 132) for n in (1, 2048, 2049, 4096)] == [1, 1, 2, 2]
    assert blocks(2**33, 8, 132) == 8 * 132


# ---- the op ------------------------------------------------------------------------------------


def image(kind: str, *shape: int, device="cpu") -> torch.Tensor:
    return torch.randn(*shape, device=device).to(DTYPES[kind])


@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (5, 4, 3)])
def test_fake_is_channels_last(shape):
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, vector = image("bfloat16", *shape), torch.ones(5)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        x, vector = mode.from_tensor(x), mode.from_tensor(vector)
        y = OP(x, vector, vector, x)
    assert y.shape == shape
    assert y.dtype == torch.bfloat16
    assert y.stride()[-3:] == (1, 15, 5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.ones(3, 4)}, r"x must be 3-D \(C, H, W\) or 4-D"),
        ({"x": torch.ones(1, 2, 3, 3).double()}, "x must be float32, bfloat16 or float16, got"),
        ({"scale": torch.ones(3)}, r"scale must have shape \(2,\), got \(3,\)"),
        ({"residual": torch.ones(1, 2, 3, 4)}, r"residual must have shape \(1, 2, 3, 3\)"),
        ({"residual": torch.ones(1, 2, 3, 3).half()}, "residual must be float32, got float16"),
        ({"act": "gelu"}, "act must be"),
    ],
)
def test_fake_refuses_in_a_sentence(change, sentence):
    given = {
        "x": torch.ones(1, 2, 3, 3),
        "scale": torch.ones(2),
        "shift": torch.ones(2),
        "residual": None,
        "act": "relu",
        **change,
    }
    given = {name: t.to("meta") if isinstance(t, torch.Tensor) else t for name, t in given.items()}
    with pytest.raises((ValueError, TypeError), match=f"scale_shift_act_cuda: {sentence}"):
        OP(*(given[name] for name in ("x", "scale", "shift", "residual")), act=given["act"])


@pytest.mark.gpu
@pytest.mark.skipif(cuda_error(GPU) is not None, reason=str(cuda_error(GPU)))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [64, 24, 13])
@pytest.mark.parametrize("channels_last", [True, False])
def test_on_a_gpu(kind, channels, channels_last):
    x, residual = (image(kind, 3, channels, 9, 7, device=GPU) for _ in "xr")
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    scale, shift = (torch.randn(channels, device=GPU) for _ in "st")
    for other, act in ((residual, "relu"), (None, "relu"), (residual, "none")):
        y = OP(x, scale, shift, other, act=act)
        assert y.is_contiguous(memory_format=torch.channels_last)
        vectors = (scale.view(-1, 1, 1), shift.view(-1, 1, 1))
        assert close(y, expected(x, other, *vectors, act == "relu"))
