"""Compiles the sm_90a kernels and holds what the compiler made of them to sm90_resources.txt.

    python tests/check_cuda_sm90.py            compare; exit status 1 where something differs
    python tests/check_cuda_sm90.py --write    write the file anew

Needs nvcc; the machine instructions are counted where cuobjdump is found too (it is in Triton's
package). Not part of `make test`; `make cuda-check` runs it.
"""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda_kernels import ROOT, build_cuda, compiled, machine_code

TABLE = Path(__file__).with_name("sm90_resources.txt")
# An instance in the kernel's mangled name: tile, shortcut, split-K; or of tap-shift: N, whether
# two warpgroups share a tile, shortcut; or of the stem's: tile.
_INSTANCE = r"(conv|tap_shift|stem)_kernelI\d*__(\w+?)Li(\d+)E(?:Lb(\d)ELb(\d)E)?"
_DTYPES = {"half": "float16", "nv_bfloat16": "bfloat16"}
# Products, copies to shared memory and from there, spills, loads on the non-coherent path.
_COUNTED = ("HGMMA", "UTMALDG", "UTMASTG", "LDL", "STL", "CONSTANT")


def _names(header: str, pattern: str) -> list[str]:
    return re.findall(pattern, (ROOT / "csrc" / "cuda" / "sm90" / header).read_text())


def _instance(text: str) -> tuple[str, str, int, int]:
    """Type, tile, shortcut and split-K of the kernel that the text is about."""
    kernel, dtype, *numbers = re.search(_INSTANCE, text).groups()
    number, first, second = (int(n or 0) for n in numbers)
    if kernel == "conv":
        tile = _names("tiles.h", r'\{"(\w+)", \{')[number], first, second
    elif kernel == "stem":
        tile = "stem-" + _names("stem.h", r"(?m)^    \{(\d+), \d+\},")[number], 0, 0
    else:
        tile = f"tap-shift-{128 if first else 64}x{number}", second, 0
    return _DTYPES[dtype], *tile


def rows_of(file: build_cuda.Compiled) -> dict[tuple, list]:
    """Rows of (type, tile, shortcut, split): registers, stack bytes, spilled bytes, counts."""
    if warning := re.search(r"^.*(?:warning|C75\d\d).*$", file.report, re.MULTILINE):
        raise SystemExit(f"the compiler warns: {warning[0]}")
    rows = {}
    for entry in file.report.split("Compiling entry function")[1:]:
        stack, stores, loads = map(
            int,
            re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry
            ).groups(),
        )
        registers = int(re.search(r"Used (\d+) registers", entry)[1])
        rows[_instance(entry)] = [registers, stack, stores + loads]
    for function in machine_code(file).split("Function : ")[1:]:
        counts = [len(re.findall(rf"\b{name}\b", function)) for name in _COUNTED]
        rows[_instance(function)] += counts
    return rows


def table(rows: dict[tuple, list]) -> str:
    lines = ["# type tile shortcut split | registers stack spilled | " + " ".join(_COUNTED)]
    for key, (registers, stack, spilled, *counts) in rows.items():
        text = " ".join(map(str, key)) + f" | {registers} {stack} {spilled}"
        lines.append(text + (" | " + " ".join(map(str, counts)) if counts else ""))
    return "\n".join(lines) + "\n"


def main() -> None:
    with ThreadPoolExecutor(2) as pool:
        parts = list(pool.map(rows_of, compiled("sm90")))
    rows = dict(sorted({key: row for part in parts for key, row in part.items()}.items()))
    failures = []
    for key, (_, stack, spilled, *counts) in rows.items():
        count = dict(zip(_COUNTED, counts, strict=False))
        if stack or spilled:
            failures.append(f"{key}: {stack} bytes of stack, {spilled} spilled")
        is_stem, in_registers = key[1].startswith("stem"), key[1].startswith("p64x")
        if count and not (count["HGMMA"] and (count["UTMALDG"] or is_stem)):
            failures.append(f"{key}: no wgmma or no TMA in the machine code")
        if count and bool(count["UTMASTG"]) == (is_stem or in_registers):
            failures.append(f"{key}: {count['UTMASTG']} stores by TMA")
        if count and (count["LDL"] or count["STL"]):
            failures.append(f"{key}: local memory is used")
        if count and count["CONSTANT"]:
            failures.append(f"{key}: a non-coherent load of what the kernel before may still write")
    if "--write" in sys.argv:
        TABLE.write_text(table(rows))
    elif (held := TABLE.read_text()) != table(rows):
        new, old = set(table(rows).splitlines()), set(held.splitlines())
        failures += [f"not in {TABLE.name}: {line}" for line in sorted(new - old)]
        failures += [f"in {TABLE.name} alone: {line}" for line in sorted(old - new)]
    print(f"{len(rows)} kernels, {len(failures)} failures", *failures, sep="\n")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
