"""Compiles the Triton kernels for GPUs that are not here, and holds what they take of a
multiprocessor to triton_resources.txt.

    python tests/check_triton.py            compare; exit status 1 where something differs
    python tests/check_triton.py --write    write the file anew

A row for every kind of launch that the rule may choose on an architecture: tile, dtype, and what
changes the code (a shared tile, a flat reduction, ragged channels, a residual, a shortcut). Needs
Triton, no GPU, and 10 minutes of two cores. test_triton_ahead.py reads the table and compiles some
of its rows again; `make cuda-check` compiles all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_triton_plans import PROBLEMS  # noqa: E402

from resnet_fused.triton_kernels import config as configs  # noqa: E402
from resnet_fused.triton_kernels.device import KNOWN, Device  # noqa: E402
from resnet_fused.triton_kernels.plan import plan  # noqa: E402
from resnet_fused.triton_kernels.problem import Problem  # noqa: E402

TABLE = Path(__file__).with_name("triton_resources.txt")
DEVICES = [KNOWN[name] for name in ("NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA B200")]
# Products: on tensor cores from registers, from shared memory (Hopper), from tensor memory
# (Blackwell), without them. Copies to shared memory; registers to local memory and back.
COUNTED = {
    "HMMA": "HMMA",
    "HGMMA": "HGMMA",
    "UTCMMA": "UTCHMMA",
    "FFMA": "FFMA",
    "LDGSTS": "LDGSTS",
    "LDL": "LDL",
    "STL": "STL",
}
_HEAD = f"""\
# What tests/check_triton.py read off the Triton kernels, compiled by Triton 3.6.0.
# launch: registers, bytes spilled a thread, bytes of shared memory, {", ".join(COUNTED)}
"""


@dataclass(frozen=True)
class Row:
    """A kind of launch, and one convolution that is launched so."""

    kind: str
    problem: Problem
    config: configs.Config
    device: Device


def kind_of(problem: Problem, config: configs.Config, device: Device) -> str:
    dtype = str(problem.dtype).removeprefix("torch.")
    if dtype == "float32":
        dtype = problem.precision
    words = [device.arch, dtype, str(replace(config, split=1)).replace(" ", "-")]
    facts = {
        "shared": config.split > 1,
        "flat": problem.is_flat(config.depth),
        "ragged": problem.is_ragged,
        "groups": problem.groups > 1,
        "residual": problem.residual and config.split == 1,
        "shortcut": problem.shortcut is not None,
    }
    return " ".join([*words, "+".join(name for name, is_so in facts.items() if is_so) or "plain"])


def rows(problems: Iterable[Problem] = tuple(PROBLEMS)) -> Iterator[Row]:
    """Every kind that the rule may choose, with the largest batch that it is chosen for."""
    found = {}
    for device in DEVICES:
        for problem in problems:
            config = configs.choose(problem, device)
            kind = kind_of(problem, config, device)
            if kind not in found or found[kind].problem.batch < problem.batch:
                found[kind] = Row(kind, problem, config, device)
    return iter(found.values())


def measure(row: Row) -> list[int]:
    """Registers, spilled and shared bytes, counts of instructions of the convolution's kernel.

    The second kernel of a shared tile is counted by its spills only.
    """
    from resnet_fused.triton_kernels.ahead import compile_conv

    launches = plan(row.problem, row.config)
    first, *second = compile_conv(row.problem, launches, row.device.capability)
    spilled = first.spilled + sum(other.spilled for other in second)
    counts = [_count(first.sass, word) for word in COUNTED.values()]
    return [first.registers, spilled, first.shared, *counts]


def _count(sass: str, word: str) -> int:
    return sum(f" {word}" in line for line in sass.splitlines())


def read() -> dict[str, list[int]]:
    lines = [line for line in TABLE.read_text().splitlines() if not line.startswith("#")]
    table = dict(line.split(": ") for line in lines)
    return {kind: [int(number) for number in numbers.split()] for kind, numbers in table.items()}


def main() -> int:
    wanted = list(rows())
    made = {}
    with ProcessPoolExecutor() as pool:
        for row, numbers in zip(wanted, pool.map(measure, wanted), strict=True):
            made[row.kind] = numbers
            print(f"{row.kind}: {' '.join(map(str, numbers))}", flush=True)
    if "--write" in sys.argv[1:]:
        lines = [f"{kind}: {' '.join(map(str, made[kind]))}\n" for kind in sorted(made)]
        TABLE.write_text(_HEAD + "".join(lines))
        return 0
    held = read()
    differ = sorted(kind for kind in held.keys() | made.keys() if held.get(kind) != made.get(kind))
    for kind in differ:
        print(f"{kind}: {held.get(kind)} in {TABLE.name}, now {made.get(kind)}")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
