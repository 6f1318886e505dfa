"""Compiles launches for a GPU that is not there, and reads what the kernels take of it.

The same signature and the same facts on divisibility that a launch on such a GPU would have, so
that registers, spills and shared memory are those of the real kernel.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .conv import conv_kernel, reduce_kernel
from .plan import Launch, Launches
from .problem import Problem

_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@dataclass(frozen=True)
class Compiled:
    """registers: of a thread. spilled: bytes of a thread's registers in memory. shared: bytes of a
    block's shared memory. sass: the instructions."""

    registers: int
    spilled: int
    shared: int
    sass: str


def compile_conv(
    problem: Problem, launches: Launches, capability: tuple[int, int]
) -> list[Compiled]:
    """The kernels that are launched, the convolution first."""
    image, wide = _POINTERS[problem.dtype], "*fp32"
    residual = image if problem.residual else None
    shortcut = (image, image, wide, wide) if problem.shortcut else (None,) * 4
    if launches.reduce is None:
        tensors = [image, image, wide, wide, residual, *shortcut, image]
        return [compile_launch(conv_kernel, launches.conv, tensors, capability)]
    tensors = [image, image, wide, wide, None, *shortcut, wide]
    reduced = [wide, wide, wide, residual, *shortcut[2:], image]
    return [
        compile_launch(conv_kernel, launches.conv, tensors, capability),
        compile_launch(reduce_kernel, launches.reduce, reduced, capability),
    ]


def compile_launch(
    kernel: Any, launch: Launch, tensors: Sequence[str | None], capability: tuple[int, int]
) -> Compiled:
    """tensors: the types of the pointers, "*bf16"; None for those that are not given."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    values = [*tensors, *launch.scalars.values()]
    for i, (name, value) in enumerate(zip(kernel.arg_names, values, strict=False)):
        if value is None or value == 1:  # as a launch specialises them
            signature[name], constants[(i,)] = "constexpr", value
            continue
        signature[name] = value if isinstance(value, str) else "i32"
        if isinstance(value, str) or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    for name, value in launch.constants.items():
        signature[name], constants[(kernel.arg_names.index(name),)] = "constexpr", value
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    made = triton.compile(source, target=target, options=options)
    return _read(made.asm["cubin"], made.metadata.shared)


def _read(cubin: bytes, shared: int) -> Compiled:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def ask(tool: str, *options: str) -> str:
            command = [str(tools / tool), *options, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = ask("cuobjdump", "--dump-resource-usage")
        sass = ask("nvdisasm", "-c")
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(found["REG"], found["STACK"] + found["LOCAL"], shared, sass)
