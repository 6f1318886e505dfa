"""The schemas of all ops, and the C++ extension that implements them on the CPU."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from .. import _environment

NAMESPACE = "resnet_fused"
library = torch.library.Library(NAMESPACE, "DEF")

_CONV_KEYWORDS = (
    'int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1, str act="relu"'
)
_LISTS = (
    "int[] kernel_sizes, int[] strides, int[] paddings, int[] dilations, int[] groups, str[] acts"
)
_BLOCK_KEYWORDS = f"{_LISTS}, str[] plans, bool has_shortcut"
_GPU_CONV = (
    "(Tensor x, Tensor packed, Tensor scale, Tensor shift, Tensor? residual=None, "
    "Tensor? shortcut_x=None, Tensor? shortcut_packed=None, Tensor? shortcut_scale=None, "
    f"Tensor? shortcut_shift=None, *, int[2] kernel_size, {_CONV_KEYWORDS}, "
    'int[2] shortcut_stride=1, str config="") -> Tensor'
)
_SCHEMAS = (
    f"conv_bn_act(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual=None, *, "
    f"{_CONV_KEYWORDS}) -> Tensor",
    "add_relu(Tensor a, Tensor b) -> Tensor",
    "pack_conv(Tensor weight, int groups=1, *, str plan) -> Tensor",
    f"conv_bn_act_packed(Tensor x, Tensor packed, Tensor scale, Tensor shift, "
    f"Tensor? residual=None, *, int[2] kernel_size, {_CONV_KEYWORDS}, str plan, "
    f"bool pool=False) -> Tensor",
    f"conv_bn_act_kept(Tensor x, Tensor weight, Tensor scale, Tensor shift, "
    f"Tensor? residual=None, *, {_CONV_KEYWORDS}, str plan, bool pool=False) -> Tensor",
    f"conv_bn_act_triton{_GPU_CONV}",
    f"conv_bn_act_cuda{_GPU_CONV}",
    "conv_bn_act_pool_cuda(Tensor x, Tensor packed, Tensor scale, Tensor shift, *, "
    'int[2] kernel_size, int[2] stride=1, int[2] padding=0, str act="relu") -> Tensor',
    "bottleneck_tail_cuda(Tensor x, Tensor packed, Tensor scale, Tensor shift, "
    "Tensor last_packed, Tensor last_scale, Tensor last_shift, Tensor? residual=None, *, "
    "int[2] kernel_size, int[2] stride=1, int[2] padding=0, int[2] dilation=1, "
    'str act="relu", str last_act="relu") -> Tensor',
    "add_relu_triton(Tensor a, Tensor b) -> Tensor",
    "add_relu_cuda(Tensor a, Tensor b) -> Tensor",
    "scale_shift_act_cuda(Tensor x, Tensor scale, Tensor shift, Tensor? residual=None, *, "
    'str act="relu") -> Tensor',
    "residual_block(Tensor x, Tensor[] packed, Tensor[] scales, Tensor[] shifts, *, "
    f"{_BLOCK_KEYWORDS}) -> Tensor",
    "prepare(Tensor x, Tensor[] packed, Tensor[] scales, Tensor[] shifts, Tensor[] watched, *, "
    f"{_BLOCK_KEYWORDS}, bool adds, bool pool) -> int",
    "run_prepared(Tensor x, Tensor[] watched, int prepared) -> Tensor?",
    "prepare_cuda(Tensor x, Tensor[] packed, Tensor[] scales, Tensor[] shifts, *, "
    f"{_LISTS}, str[] configs, bool has_shortcut, bool joined, bool adds, bool pool) -> int",
    "run_prepared_cuda(Tensor x, int prepared) -> Tensor",
    "global_avg_pool(Tensor x) -> Tensor",
    "linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    "content_sample(Tensor[] tensors) -> Tensor",
    "content_equal(Tensor[] tensors, Tensor sample) -> bool",
    "content_hash(Tensor[] tensors) -> int",
    "cpu_isa() -> str",
    "set_cpu_isa(str isa) -> ()",
    "cpu_features() -> str",
    "drop_output_memory() -> ()",
    'multiply_peak(float seconds, str dtype="float32") -> float',
    "read_words(Tensor[] tensors) -> int",
    "set_block_budget(int bytes) -> ()",
)
for _schema in _SCHEMAS:
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

_ops = torch.ops.resnet_fused


_binary = ""  # the extension's file


def _load_extension() -> str | None:
    """Registers the C++ kernels; returns why it could not, or None."""
    global _binary
    if _environment.is_set(_environment.DISABLE_EXT):
        return f"{_environment.DISABLE_EXT} is set"
    try:
        found = importlib.util.find_spec("resnet_fused._C")
    except ImportError as error:
        return str(error)
    if found is None or found.origin is None:
        return "resnet_fused._C was not built (resnet-fused doctor says why)"
    try:
        torch.ops.load_library(found.origin)  # loaded, not imported: it needs nothing of Python
    except OSError as error:
        return str(error)
    _binary = found.origin
    return None


extension_error: str | None = _load_extension()
"""None where the C++ kernels are loaded, else why they are not."""


def _load_release() -> Callable[[int], None]:
    if extension_error is not None:
        return lambda prepared: None
    release = ctypes.CDLL(_binary).resnet_fused_release_prepared
    release.argtypes, release.restype = [ctypes.c_int64], None
    return release


release_prepared: Callable[[int], None] = _load_release()
"""Frees what the op `prepare` returned; no op, so that a finalizer may call it at any moment."""


def constant_in_graphs(function: Callable) -> Callable:
    """Lets torch.compile call `function`, which takes nothing, once and keep the result.

    torch.compiler.assume_constant_result does the same, and imports torch._dynamo for it: 1.5 s.
    """
    function._dynamo_marked_constant = True
    return function


@constant_in_graphs
def cpu_isa() -> str:
    """The instruction set whose kernels run on the CPU, "none" without the extension."""
    return _ops.cpu_isa() if extension_error is None else "none"


@functools.cache
def kernels_id() -> str:
    """Eight digits that change with the compiled kernels, "none" without them."""
    if extension_error is not None:
        return "none"
    try:
        return f"{zlib.crc32(Path(_binary).read_bytes()):08x}"
    except OSError:  # replaced since it was loaded
        return "unknown"


CPU_FEATURES = frozenset(_ops.cpu_features().split() if extension_error is None else ())
"""What CPUID reports of the features that the choice looks at; empty without the extension."""
