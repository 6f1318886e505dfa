"""Bad input: one sentence that names the argument, what was expected and what came.

rf.ops raises ValueError or TypeError, torch.ops raises RuntimeError with the same sentence, whoever
computes; the fakes, which compilation runs, raise what rf.ops raises.
"""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from conftest import needs_extension
from torch._subclasses.fake_tensor import FakeTensorMode
from winograd_algorithms import algorithm

import resnet_fused as rf
from resnet_fused import select
from resnet_fused.check import CPU_PLANS, PLAN_TRAITS, PLANS

_ops = torch.ops.resnet_fused
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def ones(*shape, dtype=F32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


def good():
    """Arguments of conv_bn_act that are right: 6 channels in 2 groups to 4, 8 x 7 pixels."""
    return {
        "x": ones(2, 6, 8, 7),
        "weight": ones(4, 3, 3, 3),
        "scale": ones(4),
        "shift": ones(4),
        "residual": ones(2, 4, 8, 7),
        "stride": 1,
        "padding": 1,
        "dilation": 1,
        "groups": 2,
        "act": "relu",
    }


FLOATS = "float32, bfloat16, float16 or float64"
SMALL = "x must be at least as large as the kernel: the padded input is"
PAIR = "an int or a pair of ints"

# (what is wrong, as changes of good(); the exception; the sentence behind the op's name)
CONV = [
    # not tensors, not float tensors, not strided ones
    ({"x": ones(2, 6, 8, 7, dtype=torch.int64)}, TypeError, f"x must be {FLOATS}, got int64"),
    ({"x": ones(2, 6, 8, 7, dtype=torch.bool)}, TypeError, f"x must be {FLOATS}, got bool"),
    (
        {"x": ones(2, 6, 8, 7, dtype=torch.complex64)},
        TypeError,
        f"x must be {FLOATS}, got complex64",
    ),
    (
        {"x": ones(2, 6, 8, 7).to_sparse()},
        TypeError,
        "x must be a strided tensor, got layout torch.sparse_coo",
    ),
    (
        {"scale": ones(4).to_sparse()},
        TypeError,
        "scale must be a strided tensor, got layout torch.sparse_coo",
    ),
    (
        {"residual": ones(2, 4, 8, 7).to_sparse()},
        TypeError,
        "residual must be a strided tensor, got layout torch.sparse_coo",
    ),
    (
        {"weight": ones(4, 3, 3, 3, dtype=torch.int8)},
        TypeError,
        f"weight must be {FLOATS}, got int8",
    ),
    # dtypes that do not go together
    ({"weight": ones(4, 3, 3, 3, dtype=BF16)}, TypeError, "weight must be float32, got bfloat16"),
    ({"weight": ones(4, 3, 3, 3, dtype=F64)}, TypeError, "weight must be float32, got float64"),
    ({"x": ones(2, 6, 8, 7, dtype=BF16)}, TypeError, "weight must be bfloat16, got float32"),
    ({"scale": ones(4, dtype=F64)}, TypeError, "scale must be float32, got float64"),
    ({"shift": ones(4, dtype=BF16)}, TypeError, "shift must be float32, got bfloat16"),
    ({"shift": ones(4, dtype=torch.int32)}, TypeError, "shift must be float32, got int32"),
    (
        {"x": ones(2, 6, 8, 7, dtype=F64), "weight": ones(4, 3, 3, 3, dtype=F64)},
        TypeError,
        "scale must be float64, got float32",
    ),
    (
        {"residual": ones(2, 4, 8, 7, dtype=F64)},
        TypeError,
        "residual must be float32, got float64",
    ),
    # devices
    (
        {"weight": ones(4, 3, 3, 3, device="meta")},
        ValueError,
        "weight must be on cpu, where x is, got meta",
    ),
    ({"scale": ones(4, device="meta")}, ValueError, "scale must be on cpu, where x is, got meta"),
    ({"shift": ones(4, device="meta")}, ValueError, "shift must be on cpu, where x is, got meta"),
    (
        {"residual": ones(2, 4, 8, 7, device="meta")},
        ValueError,
        "residual must be on cpu, where x is, got meta",
    ),
    # shapes
    (
        {"x": ones(6, 8)},
        ValueError,
        "x must be 3-D (C, H, W) or 4-D (N, C, H, W), got shape (6, 8)",
    ),
    (
        {"x": ones(1, 2, 6, 8, 7)},
        ValueError,
        "x must be 3-D (C, H, W) or 4-D (N, C, H, W), got shape (1, 2, 6, 8, 7)",
    ),
    (
        {"weight": ones(4, 3, 3)},
        ValueError,
        "weight must be 4-D (out_channels, in_channels / groups, kernel_h, kernel_w), "
        "got shape (4, 3, 3)",
    ),
    (
        {"weight": ones(4, 5, 3, 3)},
        ValueError,
        "weight must have shape (4, 3, 3, 3), got (4, 5, 3, 3)",
    ),
    ({"weight": ones(0, 3, 3, 3)}, ValueError, "weight must not be empty, got shape (0, 3, 3, 3)"),
    ({"weight": ones(4, 3, 0, 3)}, ValueError, "weight must not be empty, got shape (4, 3, 0, 3)"),
    (
        {"x": ones(2, 9, 8, 7)},
        ValueError,
        "groups must divide the 9 input and 4 output channels, got 2",
    ),
    ({"x": ones(2, 8, 8, 7)}, ValueError, "weight must have shape (4, 4, 3, 3), got (4, 3, 3, 3)"),
    ({"scale": ones(5)}, ValueError, "scale must have shape (4,), got (5,)"),
    ({"scale": ones(1)}, ValueError, "scale must have shape (4,), got (1,)"),
    ({"scale": ones(4, 1, 1)}, ValueError, "scale must have shape (4,), got (4, 1, 1)"),
    ({"shift": ones(3)}, ValueError, "shift must have shape (4,), got (3,)"),
    ({"shift": ones()}, ValueError, "shift must have shape (4,), got ()"),
    (
        {"residual": ones(2, 4, 8, 8)},
        ValueError,
        "residual must have shape (2, 4, 8, 7), got (2, 4, 8, 8)",
    ),
    (
        {"residual": ones(1, 4, 1, 1)},
        ValueError,
        "residual must have shape (2, 4, 8, 7), got (1, 4, 1, 1)",
    ),
    (
        {"residual": ones(4, 8, 7)},
        ValueError,
        "residual must have shape (2, 4, 8, 7), got (4, 8, 7)",
    ),
    ({"x": ones(6, 8, 7)}, ValueError, "residual must have shape (4, 8, 7), got (2, 4, 8, 7)"),
    (
        {"x": ones(2, 6, 2, 9), "padding": (0, 1)},
        ValueError,
        f"{SMALL} 2 x 11, the kernel spans 3 x 3",
    ),
    (
        {"x": ones(2, 6, 8, 0), "padding": (1, 0)},
        ValueError,
        f"{SMALL} 10 x 0, the kernel spans 3 x 3",
    ),
    (
        {"dilation": (1, 5)},
        ValueError,
        f"{SMALL} 10 x 9, the kernel spans 3 x 11",
    ),
    # numbers
    ({"stride": (0, 0)}, ValueError, "stride must be at least 1, got (0, 0)"),
    ({"stride": (1, 0)}, ValueError, "stride must be at least 1, got (1, 0)"),
    ({"stride": (-2, 1)}, ValueError, "stride must be at least 1, got (-2, 1)"),
    ({"stride": (1, 2, 3)}, ValueError, f"stride must be {PAIR}, got (1, 2, 3)"),
    ({"stride": (1, 2**31)}, ValueError, f"stride must be at most {2**31 - 1}, got (1, {2**31})"),
    ({"padding": (-1, -1)}, ValueError, "padding must be at least 0, got (-1, -1)"),
    ({"padding": (0, -3)}, ValueError, "padding must be at least 0, got (0, -3)"),
    ({"padding": (1, 1, 1, 1)}, ValueError, f"padding must be {PAIR}, got (1, 1, 1, 1)"),
    (
        {"padding": (2**62, 0)},
        ValueError,
        f"padding must be at most {2**31 - 1}, got ({2**62}, 0)",
    ),
    ({"dilation": (0, 1)}, ValueError, "dilation must be at least 1, got (0, 1)"),
    ({"dilation": ()}, ValueError, f"dilation must be {PAIR}, got ()"),
    ({"groups": 0}, ValueError, "groups must be at least 1, got 0"),
    ({"groups": -2}, ValueError, "groups must be at least 1, got -2"),
    ({"groups": 4}, ValueError, "groups must divide the 6 input and 4 output channels, got 4"),
    ({"groups": 3}, ValueError, "weight must have shape (4, 2, 3, 3), got (4, 3, 3, 3)"),
    ({"groups": 1}, ValueError, "weight must have shape (4, 6, 3, 3), got (4, 3, 3, 3)"),
    ({"act": "gelu"}, ValueError, 'act must be "relu" or "none", got "gelu"'),
    ({"act": "ReLU"}, ValueError, 'act must be "relu" or "none", got "ReLU"'),
    ({"act": ""}, ValueError, 'act must be "relu" or "none", got ""'),
]

# What the dispatcher of torch.ops refuses in words of its own.
CONV_TYPES = [
    ({"x": None}, TypeError, "x must be a torch.Tensor, got NoneType"),
    ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
    ({"weight": 3}, TypeError, "weight must be a torch.Tensor, got int"),
    ({"scale": None}, TypeError, "scale must be a torch.Tensor, got NoneType"),
    ({"shift": 0.5}, TypeError, "shift must be a torch.Tensor, got float"),
    ({"residual": "x"}, TypeError, "residual must be a torch.Tensor, got str"),
    ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
    ({"stride": 1.5}, TypeError, f"stride must be {PAIR}, got float"),
    ({"stride": True}, TypeError, f"stride must be {PAIR}, got bool"),
    ({"stride": (1, 2.0)}, TypeError, f"stride must be {PAIR}, got (1, 2.0)"),
    ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
    ({"padding": "same"}, TypeError, f"padding must be {PAIR}, got str"),
    ({"padding": None}, TypeError, f"padding must be {PAIR}, got NoneType"),
    ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
    ({"groups": 2.0}, TypeError, "groups must be an int, got float"),
    ({"groups": "2"}, TypeError, "groups must be an int, got str"),
    ({"groups": (2, 2)}, TypeError, "groups must be an int, got tuple"),
    ({"act": None}, ValueError, 'act must be "relu" or "none", got None'),
    ({"act": torch.relu}, ValueError, f'act must be "relu" or "none", got {torch.relu!r}'),
]


def raised(error, call):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    return str(caught.value)


def _direct(error, *values):
    """What torch.ops raises: with a tensor on meta among the operands the fake answers."""
    return error if any(getattr(v, "is_meta", False) for v in values) else RuntimeError


def name_of(row):
    if not isinstance(row, dict):
        return ""
    return "-".join(
        f"{key}={tuple(v.shape) if isinstance(v, torch.Tensor) else getattr(v, '__name__', v)}"
        for key, v in row.items()
    )


@pytest.mark.parametrize(("bad", "error", "sentence"), CONV + CONV_TYPES, ids=name_of)
def test_conv_bn_act(bad, error, sentence):
    assert raised(error, lambda: rf.ops.conv_bn_act(**good() | bad)) == f"conv_bn_act: {sentence}"


@pytest.mark.parametrize("force", ["ours", "torch"])
@pytest.mark.parametrize("needs_gradients", [False, True])
@pytest.mark.parametrize(("bad", "error", "sentence"), CONV, ids=name_of)
def test_conv_bn_act_directly(bad, error, sentence, needs_gradients, force):
    arguments = good() | bad
    arguments["scale"].requires_grad_(needs_gradients and arguments["scale"].is_floating_point())
    with select.forced(force):
        got = raised(_direct(error, *bad.values()), lambda: _ops.conv_bn_act(**arguments))
    assert got == f"conv_bn_act: {sentence}"


@pytest.mark.parametrize(
    ("bad", "error", "sentence"),
    [row for row in CONV if not any(getattr(v, "is_sparse", False) for v in row[0].values())],
    ids=name_of,
)
def test_conv_bn_act_of_fakes(bad, error, sentence):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        arguments = {
            key: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
            for key, v in (good() | bad).items()
        }
        got = raised(error, lambda: rf.ops.conv_bn_act(**arguments))
        assert got == f"conv_bn_act: {sentence}"
        got = raised(error, lambda: _ops.conv_bn_act(**arguments))
        assert got == f"conv_bn_act: {sentence}"


def test_good_arguments_are_good():
    assert rf.ops.conv_bn_act(**good()).shape == (2, 4, 8, 7)
    assert _ops.conv_bn_act(**good()).shape == (2, 4, 8, 7)


def test_the_example_of_the_design():
    x, weight, ones64 = ones(1, 64, 8, 8), ones(64, 32, 3, 3), ones(64)
    got = raised(ValueError, lambda: rf.ops.conv_bn_act(x, weight, ones64, ones64))
    assert got == "conv_bn_act: weight must have shape (64, 64, 3, 3), got (64, 32, 3, 3)"


# ---- add_relu -----------------------------------------------------------------------------------

ADD = [
    (ones(3, dtype=torch.int64), ones(3), TypeError, f"a must be {FLOATS}, got int64"),
    (ones(3), ones(4), ValueError, "b must have shape (3,), got (4,)"),
    (ones(3), ones(1), ValueError, "b must have shape (3,), got (1,)"),
    (ones(2, 3), ones(3), ValueError, "b must have shape (2, 3), got (3,)"),
    (ones(3), ones(3, dtype=F64), TypeError, "b must be float32, got float64"),
    (ones(3, dtype=BF16), ones(3), TypeError, "b must be bfloat16, got float32"),
    (ones(3), ones(3, device="meta"), ValueError, "b must be on cpu, where a is, got meta"),
    (
        ones(3).to_sparse(),
        ones(3),
        TypeError,
        "a must be a strided tensor, got layout torch.sparse_coo",
    ),
]
ADD_TYPES = [
    (None, ones(3), TypeError, "a must be a torch.Tensor, got NoneType"),
    (ones(3), 1.0, TypeError, "b must be a torch.Tensor, got float"),
]


@pytest.mark.parametrize(("a", "b", "error", "sentence"), ADD + ADD_TYPES)
def test_add_relu(a, b, error, sentence):
    assert raised(error, lambda: rf.ops.add_relu(a, b)) == f"add_relu: {sentence}"


@pytest.mark.parametrize(("a", "b", "error", "sentence"), ADD)
def test_add_relu_directly(a, b, error, sentence):
    got = raised(_direct(error, a, b), lambda: _ops.add_relu(a, b))
    assert got == f"add_relu: {sentence}"


# ---- pack_conv ----------------------------------------------------------------------------------

PLAN_CHOICES = " or ".join(f'"{plan}"' for plan in CPU_PLANS)


def name_of_dtype(dtype):
    return str(dtype).removeprefix("torch.")


def wrong_dtypes(plan):
    """Dtypes that the plan does not take, and the sentence."""
    names = [name_of_dtype(dtype) for dtype in PLAN_TRAITS[plan].dtypes]
    takes = " or ".join([", ".join(names[:-1])] * bool(names[:-1]) + names[-1:])
    for dtype in (F32, BF16, torch.float16, F64):
        if dtype not in PLAN_TRAITS[plan].dtypes:
            yield dtype, f'plan "{plan}" takes {takes}, got {name_of_dtype(dtype)}'


def wrong_weights(plan):
    """Kernels and groups that the plan does not take, and the sentence."""
    traits = PLAN_TRAITS[plan]
    side = traits.kernel
    takes = f"kernels of {side} rows" if traits.any_columns else f"{side} x {side} kernels"
    wrong = [((1, side), 1), ((side - 1, side), 1), ((side, side), 2)]
    if not traits.any_columns:
        wrong.append(((side, side - 1), 1))
    for kernel, groups in wrong:
        got = f"{kernel[0]} x {kernel[1]} in {groups}"
        yield kernel, groups, f'plan "{plan}" takes {takes} in one group, got {got}'


def wrong_steps(plan):
    """Strides and dilations that the plan does not take, and the sentence."""
    traits = PLAN_TRAITS[plan]
    right = traits.stride
    other = 3 - right
    takes = f"stride {right} along the rows" if traits.any_columns else f"stride {right}"
    wrong = [((other, other), (1, 1)), ((other, right), (1, 1))]
    wrong += [((right, right), (1, 2)), ((right, right), (2, 1))]
    if not traits.any_columns:
        wrong.append(((right, other), (1, 1)))
    for stride, dilation in wrong:
        got = f"stride {stride} and dilation {dilation}"
        yield stride, dilation, f'plan "{plan}" takes {takes} and dilation 1, got {got}'


PARTICULAR = [plan for plan in CPU_PLANS if PLAN_TRAITS[plan].kernel]  # take one kernel only
PACK = [
    (
        {"weight": ones(4, 3, 3)},
        ValueError,
        "weight must be 4-D (out_channels, in_channels / groups, kernel_h, kernel_w), "
        "got shape (4, 3, 3)",
    ),
    ({"weight": ones(4, 0, 3, 3)}, ValueError, "weight must not be empty, got shape (4, 0, 3, 3)"),
    (
        {"weight": ones(4, 3, 3, 3, dtype=torch.uint8)},
        TypeError,
        f"weight must be {FLOATS}, got uint8",
    ),
    ({"groups": 0}, ValueError, "groups must be at least 1, got 0"),
    ({"groups": 3}, ValueError, "groups must divide the 4 output channels of weight, got 3"),
    ({"plan": "best"}, ValueError, f'plan must be {PLAN_CHOICES}, got "best"'),
    *(
        ({"weight": ones(4, 3, 3, 3, dtype=dtype), "plan": plan}, TypeError, sentence)
        for plan in CPU_PLANS
        for dtype, sentence in wrong_dtypes(plan)
    ),
    *(
        (
            {
                "weight": ones(4, 3, *kernel, dtype=PLAN_TRAITS[plan].dtypes[0]),
                "groups": groups,
                "plan": plan,
            },
            ValueError,
            sentence,
        )
        for plan in PARTICULAR
        for kernel, groups, sentence in wrong_weights(plan)
    ),
]
PACK_TYPES = [
    ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
    ({"groups": None}, TypeError, "groups must be an int, got NoneType"),
    ({"plan": None}, ValueError, f"plan must be {PLAN_CHOICES}, got None"),
]


def pack_arguments(bad):
    return {"weight": ones(4, 3, 3, 3), "groups": 1, "plan": "direct"} | bad


@pytest.mark.parametrize(("bad", "error", "sentence"), PACK + PACK_TYPES, ids=name_of)
def test_pack_conv(bad, error, sentence):
    got = raised(error, lambda: rf.ops.pack_conv(**pack_arguments(bad)))
    assert got == f"pack_conv: {sentence}"


@pytest.mark.parametrize(("bad", "error", "sentence"), PACK, ids=name_of)
def test_pack_conv_directly(bad, error, sentence):
    got = raised(RuntimeError, lambda: _ops.pack_conv(**pack_arguments(bad)))
    assert got == f"pack_conv: {sentence}"


# ---- conv_bn_act_packed -------------------------------------------------------------------------


def good_packed(plan):
    """Arguments of conv_bn_act_packed that are right: 6 channels to 40, 8 x 7 pixels or half."""
    dtype, stride = PLAN_TRAITS[plan].dtypes[0], PLAN_TRAITS[plan].stride
    side = PLAN_TRAITS[plan].kernel or 3
    pairs = plan.endswith("_bf16")
    words = 3 if pairs else 6
    if plan == "torch":
        packed = (40, 6, 3, 3)
    elif plan == "stem":
        packed = (2, 13, 7 * 6, 32)
    elif plan.endswith("_raw"):
        packed = (2, words, 9, 32)
    elif algorithm(plan):
        packed = (2, algorithm(plan).products ** 2, words, 32)
    else:
        packed = (2, 9 * words, 32)
    return {
        "x": ones(2, 6, 8, 7, dtype=dtype),
        "packed": ones(*packed, *[2] * pairs, dtype=dtype),
        "scale": ones(40),
        "shift": ones(40),
        "residual": ones(2, 40, 8 // stride, -(-7 // stride), dtype=dtype),
        "kernel_size": (side, side),
        "stride": (stride, stride),
        "padding": (side // 2, side // 2),
        "dilation": (1, 1),
        "groups": 1,
        "act": "relu",
        "plan": plan,
    }


VECTOR = "1-D, one value per output channel"
PACKED = [
    ({"x": ones(2, 6, 8, 7, dtype=torch.int64)}, f"x must be {FLOATS}, got int64"),
    ({"x": ones(8, 7)}, "x must be 3-D (C, H, W) or 4-D (N, C, H, W), got shape (8, 7)"),
    ({"scale": ones(40, dtype=F64)}, "scale must be float32, got float64"),
    ({"shift": ones(39)}, "shift must have shape (40,), got (39,)"),
    ({"shift": ones(40, dtype=BF16)}, "shift must be float32, got bfloat16"),
    ({"scale": ones(40, 1)}, f"scale must be {VECTOR}, got shape (40, 1)"),
    ({"scale": ones(0), "shift": ones(0)}, f"scale must be {VECTOR}, got shape (0,)"),
    ({"residual": ones(2, 40, 7, 8)}, "residual must have shape (2, 40, 8, 7), got (2, 40, 7, 8)"),
    ({"residual": ones(2, 40, 8, 7, dtype=BF16)}, "residual must be float32, got bfloat16"),
    ({"kernel_size": (0, 3)}, "kernel_size must be at least 1, got (0, 3)"),
    ({"kernel_size": (3, 3, 3)}, f"kernel_size must be {PAIR}, got (3, 3, 3)"),
    (
        {"kernel_size": (2**31, 3)},
        f"kernel_size must be at most {2**31 - 1}, got ({2**31}, 3)",
    ),
    ({"stride": (0, 1)}, "stride must be at least 1, got (0, 1)"),
    ({"dilation": (1, 2**63 - 1)}, f"dilation must be at most {2**31 - 1}, got (1, {2**63 - 1})"),
    ({"padding": (0, -1)}, "padding must be at least 0, got (0, -1)"),
    ({"dilation": (0, 0)}, "dilation must be at least 1, got (0, 0)"),
    ({"groups": 0}, "groups must be at least 1, got 0"),
    ({"groups": 4}, "groups must divide the 6 input and 40 output channels, got 4"),
    ({"act": "tanh"}, 'act must be "relu" or "none", got "tanh"'),
    ({"plan": "best"}, f'plan must be {PLAN_CHOICES}, got "best"'),
    (
        {"x": ones(2, 6, 1, 7), "padding": (0, 1)},
        f"{SMALL} 1 x 9, the kernel spans 3 x 3",
    ),
]
PACKED_DIRECT = [
    ({"packed": ones(2, 54, 31)}, "packed must have shape (2, 54, 32), got (2, 54, 31)"),
    ({"packed": ones(40, 6, 3, 3)}, "packed must have shape (2, 54, 32), got (40, 6, 3, 3)"),
    ({"packed": ones(2, 54, 32, dtype=BF16)}, "packed must be float32, got bfloat16"),
    ({"x": ones(2, 5, 8, 7)}, "packed must have shape (2, 45, 32), got (2, 54, 32)"),
    ({"kernel_size": (1, 1)}, "packed must have shape (2, 6, 32), got (2, 54, 32)"),
    ({"groups": 2}, "packed must have shape (2, 27, 32), got (2, 54, 32)"),
]


def particular_rows(plan):
    """What a plan of one kernel refuses, and packed weights that are almost right."""
    right = good_packed(plan)["packed"]
    shape = tuple(right.shape)
    for wrong in ((1, *shape[1:]), (2, shape[1] - 1, *shape[2:]), shape[:2], (*shape, 1)):
        sentence = f"packed must have shape {shape}, got {wrong}"
        yield {"packed": ones(*wrong, dtype=right.dtype)}, sentence
    other = torch.float16
    sentence = f"packed must be {name_of_dtype(right.dtype)}, got float16"
    yield {"packed": right.to(other)}, sentence
    for kernel, groups, sentence in wrong_weights(plan):
        yield {"kernel_size": kernel, "groups": groups}, sentence
    for stride, dilation, sentence in wrong_steps(plan):
        yield {"stride": stride, "dilation": dilation}, sentence


def dtype_rows(plan):
    for dtype, sentence in wrong_dtypes(plan):
        wide = F64 if dtype == F64 else F32
        vectors = {"scale": ones(40, dtype=wide), "shift": ones(40, dtype=wide)}
        yield {"x": ones(2, 6, 8, 7, dtype=dtype), "residual": None} | vectors, sentence


PACKED_TORCH = [
    ({"packed": ones(40, 6, 3, 2)}, "packed must have shape (40, 6, 3, 3), got (40, 6, 3, 2)"),
    ({"packed": ones(40, 6, 3, 3, dtype=F64)}, "packed must be float32, got float64"),
]
PACKED_ROWS = [("torch", *row) for row in PACKED + PACKED_TORCH]
PACKED_ROWS += [("direct", *row) for row in PACKED + PACKED_DIRECT]
PACKED_ROWS += [(plan, *row) for plan in PARTICULAR for row in particular_rows(plan)]
PACKED_ROWS += [(plan, *row) for plan in CPU_PLANS for row in dtype_rows(plan)]


@pytest.mark.parametrize(("plan", "bad", "sentence"), PACKED_ROWS, ids=name_of)
def test_conv_bn_act_packed(plan, bad, sentence):
    """The kernels' own checks, or the fallback's, and the fake's: never a crash, one sentence."""
    arguments = good_packed(plan) | bad
    got = raised(RuntimeError, lambda: _ops.conv_bn_act_packed(**arguments))
    assert got == f"conv_bn_act_packed: {sentence}"
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = {
            key: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
            for key, v in arguments.items()
        }
        with pytest.raises((ValueError, TypeError)) as caught:
            _ops.conv_bn_act_packed(**fakes)
    assert str(caught.value) == f"conv_bn_act_packed: {sentence}"


@needs_extension
def test_packed_must_be_contiguous():
    arguments = good_packed("direct")
    arguments["packed"] = ones(2, 32, 54).transpose(1, 2)
    got = raised(RuntimeError, lambda: _ops.conv_bn_act_packed(**arguments))
    assert got == "conv_bn_act_packed: packed must be contiguous, as pack_conv returned it"


@pytest.mark.parametrize("name", ["packed", "scale", "shift", "residual"])
def test_packed_on_another_device(name):
    arguments = good_packed("torch")
    arguments[name] = arguments[name].to("meta")
    with pytest.raises((RuntimeError, ValueError)) as caught:
        _ops.conv_bn_act_packed(**arguments)
    want = f"conv_bn_act_packed: {name} must be on cpu, where x is, got meta"
    assert str(caught.value) == want


@needs_extension
@pytest.mark.parametrize(
    ("op", "arguments", "sentence"),
    [
        ("add_relu", (ones(3), ones(3, device="meta")), "b must be on cpu, where a is, got meta"),
        (
            "linear",
            (ones(1, 3), ones(4, 3, device="meta")),
            "weight must be on cpu, where x is, got meta",
        ),
    ],
)
def test_kernels_say_which_device_came(op, arguments, sentence):
    """As Python does before them: the dispatcher would not have called these kernels."""
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    kernel = getattr(_ops, op).default.redispatch
    assert raised(RuntimeError, lambda: kernel(cpu, *arguments)) == f"{op}: {sentence}"


# ---- sizes beyond all memory --------------------------------------------------------------------

LARGEST = 2**31 - 1
HUGE = 2**62


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("size", [LARGEST, 2**31, 2**40, HUGE])
def test_absurd_sizes_do_not_crash(name, size):
    """An exception at worst: no crash, no endless loop, no wrong shape."""
    for plan in ("torch", "direct"):
        for both in ((size, 1), (1, size), (size, size)):
            packed = good_packed(plan) | {name: both, "residual": None}
            plain = good() | {name: both, "residual": None}
            for call, arguments in (
                (_ops.conv_bn_act_packed, packed),
                (_ops.conv_bn_act, plain),
                (rf.ops.conv_bn_act, plain),
            ):
                with suppress(RuntimeError, ValueError, MemoryError):
                    y = call(**arguments)
                    assert name == "stride"
                    assert min(y.shape[2:]) == 1


@needs_extension
def test_sizes_that_cannot_be_counted():
    """Products of sizes that are fine one by one must not overflow into a size that fits."""
    arguments = good_packed("direct") | {"residual": None, "padding": (LARGEST, LARGEST)}
    arguments["x"] = ones(2, 6, 2, 2)
    got = raised(RuntimeError, lambda: _ops.conv_bn_act_packed(**arguments))
    output = (2, 40, 2 * LARGEST, 2 * LARGEST)
    many = "must have fewer than 2**63 elements, got shape"
    assert got == f"conv_bn_act_packed: the output {many} {output}"
    arguments["kernel_size"] = (LARGEST, LARGEST)
    got = raised(RuntimeError, lambda: _ops.conv_bn_act_packed(**arguments))
    assert got == f"conv_bn_act_packed: weight {many} (40, 6, {LARGEST}, {LARGEST})"


@needs_extension
def test_a_sample_must_be_as_it_was_returned():
    weight = ones(8, 4)
    sample = _ops.content_sample([weight])
    assert _ops.content_equal([weight], sample)
    spread = torch.zeros(1, dtype=torch.uint8).expand(len(sample))
    got = raised(RuntimeError, lambda: _ops.content_equal([weight], spread))
    assert got == "content_equal: sample must be contiguous, as content_sample returned it"


# ---- settings -----------------------------------------------------------------------------------


def test_forcing_an_unknown_plan():
    def force():
        with select.forced("fastest"):
            pass

    choices = ", ".join(["none", "ours", *PLANS])
    assert raised(ValueError, force) == f"forced: plan must be one of {choices}, got 'fastest'"
    assert select.force() == "none"


@needs_extension
def test_choosing_an_unknown_instruction_set():
    before = rf.ops.cpu_isa()
    got = raised(RuntimeError, lambda: _ops.set_cpu_isa("sse9"))
    assert got == 'set_cpu_isa: isa must be scalar, avx2, avx512 or avx512bf16, got "sse9"'
    assert rf.ops.cpu_isa() == before
