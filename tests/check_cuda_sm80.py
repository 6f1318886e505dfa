"""Builds _C_cuda beside whatever torch is here, and holds what the compiler made of the kernels of
csrc/cuda/sm80 to sm80_resources.txt.

    python tests/check_cuda_sm80.py            compare; exit status 1 where something differs
    python tests/check_cuda_sm80.py --write    write the file anew

Needs nvcc and g++, no GPU; the machine instructions are counted where cuobjdump is found too (it is
in Triton's package). Not part of `make test`; `make cuda-check` runs it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cuda_kernels import FOLDER, ROOT, build_cuda, compiled, machine_code, plan

TABLE = Path(__file__).with_name("sm80_resources.txt")
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# Products on tensor cores, matrices from shared memory, copies to it, spills.
COUNTED = ("HMMA", "FFMA", "LDSM", "LDGSTS", "LDL", "STL")
_CONV = re.compile(r"conv_kernelI.*?MathE(\d)ELi(\d+)ELb(\d)E")
_SEVERAL = re.compile(r"\d(stem|tail)_kernelI\d+(__half|__nv_bfloat16)Li(\d+)E")
_ELEMENTS = {"__half": "float16", "__nv_bfloat16": "bfloat16"}
_RESOURCES = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
    r"ptxas info\s+: Used (\d+) registers"
)


def tiles() -> list[str]:
    text = (ROOT / "csrc" / "cuda" / "sm80" / "tiles.h").read_text()
    return re.findall(r'\{"(\w+)", \{', text)


def name_of(kind: str, mangled: str) -> str:
    """A kernel's row in the table: its type, tile and shortcut."""
    if found := _CONV.search(mangled):
        return f"{kind} {tiles()[int(found[2])]} {found[3]}"
    if found := _SEVERAL.search(mangled):  # several layers of a net in one
        return f"{found[1]} {_ELEMENTS[found[2]]} {found[3]}"
    # Pointwise kernels: their name, type of element and further template arguments.
    name, element, rest = re.search(
        r"sm80\d+(\w+?)_kernelI(?:\d+(__half|__nv_bfloat16)|f)(\w*)", mangled
    ).groups()
    element = _ELEMENTS.get(element, "float32")
    arguments = "".join(re.findall(r"L[bi](\d+)E", rest)) or 0
    return f"{name} {element} {arguments}"


def rows_of(file: build_cuda.Compiled) -> dict[str, list[int]]:
    """Registers, stack, spilled bytes and counts of each kernel of a file, by architecture."""
    kind = file.source.stem.removeprefix("kernels_")
    rows = {}
    for entry in file.report.split("Compiling entry function '")[1:]:
        mangled, architecture = re.match(r"(\w+)' for '(\w+)'", entry).groups()
        stack, stores, loads, registers = map(int, _RESOURCES.search(entry).groups())
        rows[f"{architecture} {name_of(kind, mangled)}"] = [registers, stack, stores + loads]
    # The architecture stands before the functions of each part.
    for part in machine_code(file).split("arch = ")[1:]:
        architecture = part.split()[0]
        for function in part.split("Function : ")[1:]:
            key = f"{architecture} {name_of(kind, function.split(maxsplit=1)[0])}"
            rows[key] += [len(re.findall(rf"\b{name}\b", function)) for name in COUNTED]
    return rows


def failures_of(rows: dict[str, list[int]]) -> list[str]:
    failures = []
    for key, (_, stack, spilled, *counts) in rows.items():
        if stack or spilled:
            failures.append(f"{key}: {stack} bytes of stack, {spilled} spilled")
        if not counts:
            continue
        found = dict(zip(COUNTED, counts, strict=True))
        if found["LDL"] or found["STL"]:
            failures.append(f"{key}: local memory is used")
        kind, tile = key.split()[1:3]
        tensor = kind in ("bfloat16", "float16", "tf32", "stem", "tail")
        needed = ["HMMA", "LDSM"] if tensor else ["FFMA"] if kind == "float32" else []
        if needed and not tile.startswith("any"):
            needed.append("LDGSTS")
        failures += [f"{key}: no {name} in the machine code" for name in needed if not found[name]]
    return failures


def table(rows: dict[str, list[int]]) -> str:
    lines = ["# architecture type tile shortcut | registers stack spilled | " + " ".join(COUNTED)]
    for key, (registers, stack, spilled, *counts) in sorted(rows.items()):
        text = f"{key} | {registers} {stack} {spilled}"
        lines.append(text + (" | " + " ".join(map(str, counts)) if counts else ""))
    return "\n".join(lines) + "\n"


def link(files: list[build_cuda.Compiled]) -> Path:
    """_C_cuda, compiled against the torch that is here; only one with CUDA can load it."""
    from torch.utils.cpp_extension import include_paths

    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    flags += [TARGET, *build_cuda.host_flags(plan()), f"-I{ROOT / 'csrc'}"]
    flags += [f"-isystem{path}" for path in include_paths()]

    def compile_one(source: str) -> str:
        made = FOLDER / (source.replace("/", "_") + ".o")
        subprocess.run(["g++", *flags, "-c", str(ROOT / source), "-o", str(made)], check=True)
        return str(made)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, build_cuda.host_sources(plan())))
    objects += [str(file.object) for file in files]
    libraries = Path(sysconfig.get_path("purelib"), "torch", "lib")
    library = FOLDER / "_C_cuda.abi3.so"
    command = ["g++", "-shared", *objects, f"-L{libraries}", *build_cuda.link_flags(plan())]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library


def main() -> None:
    files = compiled()
    rows: dict[str, list[int]] = {}
    with ThreadPoolExecutor(2) as pool:
        for part in pool.map(rows_of, [f for f in files if f.source.parent.name == "sm80"]):
            rows.update(part)
    failures = failures_of(rows)
    if "--write" in sys.argv:
        TABLE.write_text(table(rows))
    elif (held := TABLE.read_text()) != table(rows):
        new = set(table(rows).splitlines()) - set(held.splitlines())
        failures += [f"differs from {TABLE.name}: {line}" for line in sorted(new)]
    print(f"{len(rows)} kernels, {len(failures)} failures", *failures, sep="\n")
    print(f"linked {link(files).relative_to(ROOT)}")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
