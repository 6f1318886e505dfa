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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from check_cuda_sm90 import _cuobjdump  # noqa: E402

import build_cuda  # noqa: E402

TABLE = Path(__file__).with_name("sm80_resources.txt")
FOLDER = ROOT / "build" / "cuda-check"
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# Products on tensor cores, matrices from shared memory, copies to it, spills.
COUNTED = ("HMMA", "FFMA", "LDSM", "LDGSTS", "LDL", "STL")
_CONV = re.compile(r"conv_kernelI.*?MathE(\d)ELi(\d+)ELb(\d)E")
_RESOURCES = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
    r"ptxas info\s+: Used (\d+) registers"
)


def tiles() -> list[str]:
    text = (ROOT / "csrc" / "cuda" / "sm80" / "problem.h").read_text()
    return re.findall(r'\{"(\w+)", \{', text)


def name_of(kind: str, mangled: str) -> str:
    """A kernel's row in the table: its type, tile and shortcut."""
    if found := _CONV.search(mangled):
        return f"{kind} {tiles()[int(found[2])]} {found[3]}"
    element = re.search(r"add_relu_kernelI(\w+?)E?E?v", mangled)[1]
    return f"add_relu {element.lstrip('0123456789')} 0"


def rows_of(compiled: build_cuda.Compiled) -> dict[str, list[int]]:
    """Registers, stack, spilled bytes and counts of each kernel of a file, by architecture."""
    kind = compiled.source.stem.removeprefix("kernels_")
    rows = {}
    for entry in compiled.report.split("Compiling entry function '")[1:]:
        mangled, architecture = re.match(r"(\w+)' for '(\w+)'", entry).groups()
        stack, stores, loads, registers = map(int, _RESOURCES.search(entry).groups())
        key = f"{architecture} {name_of(kind, mangled)}"
        rows[key] = [registers, stack, stores + loads]
    if tool := _cuobjdump():
        command = [tool, "-sass", str(compiled.object)]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for part in sass.split("Function : ")[1:]:
            # The architecture stands before the file's first function.
            head = sass[: sass.index(part)]
            architecture = re.findall(r"arch = (sm_\w+)", head)[-1]
            key = f"{architecture} {name_of(kind, part.split()[0])}"
            rows[key] += [len(re.findall(rf"\b{name}\b", part)) for name in COUNTED]
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
        tensor = kind in ("bfloat16", "float16", "tf32")
        needed = ["HMMA", "LDSM"] if tensor else ["FFMA"] if kind == "float32" else []
        if kind != "add_relu" and not tile.startswith("any"):
            needed.append("LDGSTS")
        failures += [f"{key}: no {name} in the machine code" for name in needed if not found[name]]
    return failures


def table(rows: dict[str, list[int]]) -> str:
    lines = ["# architecture type tile shortcut | registers stack spilled | " + " ".join(COUNTED)]
    for key, (registers, stack, spilled, *counts) in sorted(rows.items()):
        text = f"{key} | {registers} {stack} {spilled}"
        lines.append(text + (" | " + " ".join(map(str, counts)) if counts else ""))
    return "\n".join(lines) + "\n"


def compile_host(plan: build_cuda.CudaPlan, include: list[str], folder: Path) -> list[str]:
    """Compiles the C++ side against the torch headers in `include`; object files."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    flags += [TARGET, *build_cuda.host_flags(plan), f"-I{ROOT / 'csrc'}"]
    flags += [f"-isystem{path}" for path in include]

    def compiled(source: str) -> str:
        made = folder / (source.replace("/", "_") + ".o")
        subprocess.run(["g++", *flags, "-c", str(ROOT / source), "-o", str(made)], check=True)
        return str(made)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(compiled, build_cuda.host_sources(plan)))


def missing_symbols(library: Path, torch_libraries: Path) -> list[str]:
    """Symbols that the library takes from nowhere: neither torch nor the C and C++ libraries."""
    given = set()
    for found in torch_libraries.glob("lib*.so*"):
        given |= set(_symbols(found, "--defined-only"))
    wanted = _symbols(library, "--undefined-only")
    return [name for name in wanted if name.startswith(("aoti_", "torch_")) and name not in given]


def _symbols(library: Path, which: str) -> list[str]:
    command = ["nm", "-D", which, "-j", str(library)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return [line.split("@")[0] for line in answer.split()]


def main() -> None:
    from torch.utils.cpp_extension import include_paths

    environ = {**os.environ, "FORCE_CUDA": "1", "FORCE_CPU": ""}
    environ["TORCH_CUDA_ARCH_LIST"] = build_cuda.ALL_ARCHITECTURES
    plan = build_cuda.make_plan("", environ)
    if not plan.build:
        raise SystemExit(plan.reason)
    compiled = build_cuda.compile_kernels(plan, FOLDER, environ)
    rows: dict[str, list[int]] = {}
    for kernel in compiled:
        if kernel.source.parent.name == "sm80":
            rows.update(rows_of(kernel))
    failures = failures_of(rows)
    if "--write" in sys.argv:
        TABLE.write_text(table(rows))
    elif (held := TABLE.read_text()) != table(rows):
        new = set(table(rows).splitlines()) - set(held.splitlines())
        failures += [f"differs from {TABLE.name}: {line}" for line in sorted(new)]

    objects = compile_host(plan, include_paths(), FOLDER / "host")
    if older := os.environ.get("TORCH_2_11_INCLUDE"):
        compile_host(plan, [older], FOLDER / "host_2_11")
    torch_libraries = Path(sysconfig.get_path("purelib"), "torch", "lib")
    library = FOLDER / "_C_cuda.so"
    link = ["g++", "-shared", *objects, *(str(kernel.object) for kernel in compiled)]
    link += [f"-L{torch_libraries}", *build_cuda.link_flags(plan), "-o", str(library)]
    subprocess.run(link, check=True)
    # What only a torch with CUDA has.
    allowed = {"aoti_torch_get_current_cuda_stream"}
    missing = set(missing_symbols(library, torch_libraries)) - allowed
    failures += [f"torch has no {name}" for name in sorted(missing)]
    print(f"{len(rows)} kernels, {len(failures)} failures", *failures, sep="\n")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
