"""conv_bn_act and add_relu through the Triton kernels: from checked tensors to launches.

A launch through `kernel[grid](...)` looks at every argument anew, which takes longer than a small
convolution. So the compiled kernel of each launch is kept and launched directly, as long as all
pointers are multiples of 16, which is compiled in.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .._tf32 import uses_tf32
from .add_relu import add_relu_kernel
from .config import candidates, choose, clocks, fits, parse
from .conv import conv_kernel, reduce_kernel
from .device import INTERPRETED, Device, device_of
from .plan import Launch, plan
from .problem import Problem, Shortcut

_is_interpreted = not hasattr(conv_kernel, "device_caches")


def problem_of(
    x: Tensor,
    weight_shape: tuple[int, int, int, int],
    out_size: tuple[int, int],
    *,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    act: str,
    residual: bool,
    shortcut_x: Tensor | None,
    shortcut_stride: tuple[int, int],
) -> Problem:
    """A convolution of x, 4-D; float32 is multiplied as torch's flags for convolutions say."""
    shortcut = None
    if shortcut_x is not None:
        size = (shortcut_x.shape[2], shortcut_x.shape[3])
        shortcut = Shortcut(shortcut_x.shape[1], size, shortcut_stride)
    return Problem(
        dtype=x.dtype,
        batch=x.shape[0],
        in_channels=x.shape[1],
        in_size=(x.shape[2], x.shape[3]),
        out_channels=weight_shape[0],
        out_size=out_size,
        kernel=weight_shape[2:],
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        act=act,
        residual=residual,
        shortcut=shortcut,
        precision="tf32" if uses_tf32() else "ieee",
    )


def _facts_of(device: torch.device) -> Device:
    """What is known of a GPU; of what stands for one in the interpreter."""
    return device_of(device.index) if device.type == "cuda" else INTERPRETED


class Conv:
    """A convolution that is ready to be launched again and again.

    Its tile is chosen, its grids and constants are worked out. config: text of one; "": what was
    measured here, else the rule's. Raises ValueError for a text that is none.
    """

    def __init__(self, problem: Problem, device: torch.device, config: str = "") -> None:
        self.problem, self.device = problem, device
        cut = parse(config) if config else choose(problem, _facts_of(device))
        self._launches = plan(problem, cut, _is_interpreted)
        self._size = (problem.batch, *problem.out_size, problem.out_channels)

    def __call__(self, operands: Sequence[Tensor | None]) -> Tensor:
        """The output, (N, K, P, Q), (N, P, Q, K) in memory.

        operands: x, weight, scale, shift, residual, and the shortcut's x, weight, scale and shift,
        all dense; None what the problem does not have.
        """
        y = torch.empty(self._size, dtype=self.problem.dtype, device=self.device)
        launches = self._launches
        with _on(y):
            if launches.parts is None:
                _launch(conv_kernel, launches.conv, [*operands, y])
            else:
                x, weight, scale, shift, residual, *shortcut = operands
                # From the caching allocator: the stream's until the kernels have run.
                parts = torch.empty(launches.parts, dtype=torch.float32, device=self.device)
                _launch(
                    conv_kernel, launches.conv, [x, weight, scale, shift, None, *shortcut, parts]
                )
                given = [parts, scale, shift, residual, *shortcut[2:], y]
                _launch(reduce_kernel, launches.reduce, given)
        return y.permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=4096)
def conv(problem: Problem, device: torch.device, config: str) -> Conv:
    """Conv(problem, device, config), made once."""
    return Conv(problem, device, config)


def ranked(problem: Problem, device: torch.device) -> list[str]:
    """Texts of the configurations that fit, those with the least estimated time first."""
    facts = _facts_of(device)
    able = candidates(problem, facts)
    return [str(c) for c in sorted(able, key=lambda config: clocks(problem, config, facts))]


def is_able(problem: Problem, device: torch.device, config: str) -> bool:
    """Whether a text is one of a configuration that fits the problem."""
    try:
        return fits(parse(config), problem, _facts_of(device))
    except ValueError:
        return False


_ADD_BLOCK = 4096


def add_relu(a: Tensor, b: Tensor, y: Tensor) -> None:
    """y = relu(a + b), all in the same order in memory, without gaps."""
    count = y.numel()
    launch = _add_launch(-(-count // _ADD_BLOCK), count)
    with _on(y):
        _launch(add_relu_kernel, launch, [a, b, y])


@functools.lru_cache(maxsize=1024)
def _add_launch(programs: int, count: int) -> Launch:
    return Launch(
        (programs, 1, 1),
        {"count": count},
        {"BLOCK": _ADD_BLOCK, "INTERPRETED": _is_interpreted},
        warps=8,
        stages=1,
    )


def _on(y: Tensor) -> AbstractContextManager:
    """On y's GPU, whichever is the current one."""
    if not y.is_cuda or y.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(y.device)


_compiled: dict[tuple[Any, ...], Any] = {}
_MOST_COMPILED = 4096


def _launch(kernel: Any, launch: Launch, tensors: Sequence[Tensor | None]) -> None:
    """On the current stream of the current device."""
    arguments = [*tensors, *launch.values]
    if _is_interpreted:
        kernel[launch.grid](*arguments)
        return
    aligned = all(t is None or t.data_ptr() % 16 == 0 for t in tensors)
    # Which tensors there are and their dtypes follow from the launch, but for the first one's.
    key = (id(launch), tensors[0].dtype, torch.cuda.current_device())
    found = _compiled.get(key) if aligned else None
    if found is not None and found[0] is launch:
        found[1][launch.grid](*arguments)
        return
    made = kernel[launch.grid](*arguments, num_warps=launch.warps, num_stages=launch.stages)
    if aligned:
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        _compiled[key] = (launch, made)


__all__ = ["Conv", "Problem", "add_relu", "conv", "is_able", "problem_of", "ranked"]
