"""Compiles every host source against the headers of the oldest torch that is served, and holds the
built extensions to what its libraries export: a part of `make cuda-check`.

The stable ABI keeps binaries working on later versions, not sources compiling on earlier ones:
headers of 2.13 have names that those of 2.11 lack. The wheel (530 MB) is asked of pip once; headers
and exported names are kept in build/. Where it cannot be had, that is said, and nothing is checked.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import build_cuda  # noqa: E402

OLDEST = "2.11.0"
KEPT = ROOT / "build" / f"torch-{OLDEST}"
_LIBRARIES = ("libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so")
_PREFIXES = ("aoti_torch_", "torch_")  # torch's own among the undefined symbols


def fetch() -> str:
    """Leaves headers and exported names in KEPT; returns why it could not, or ""."""
    if (KEPT / "exports").is_file():
        return ""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-cache-dir",
        ]
        command += ["--disable-pip-version-check", "--dest", folder, f"torch=={OLDEST}"]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no wheel came"
        with zipfile.ZipFile(wheels[0]) as wheel:
            headers = [name for name in wheel.namelist() if name.startswith("torch/include/")]
            wheel.extractall(KEPT, headers)
            names = set()
            for library in set(_LIBRARIES) & {Path(n).name for n in wheel.namelist()}:
                wheel.extract(f"torch/lib/{library}", folder)
                names |= symbols(Path(folder, "torch", "lib", library), "--defined-only")
        (KEPT / "exports").write_text("\n".join(sorted(names)))
    return ""


def symbols(binary: Path, which: str) -> set[str]:
    """Names among a binary's dynamic symbols that are torch's C functions."""
    command = ["nm", "-D", which, str(binary)]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].partition("@")[0] for line in table.splitlines() if line.strip()}
    return {name for name in names if name.startswith(_PREFIXES)}


def sources() -> list[Path]:
    """C++ files that see torch's headers: those of the CPU that say so, and all of CUDA's host."""
    folders = [build_cuda.CUDA, *(build_cuda.CUDA / name for name in ("sm80", "sm90"))]
    cpu = (ROOT / "csrc" / "cpu").glob("*.cpp")
    hints = ("torch", "tensors.h", "op_string.h", "parallel.h", "team.h", "conv_jobs.h")
    seen = [path for path in cpu if any(hint in path.read_text() for hint in hints)]
    return sorted([*seen, *(path for folder in folders for path in folder.glob("*.cpp"))])


def compile_one(source: Path, toolkit: build_cuda.Toolkit) -> str:
    """The compiler's complaint, or ""."""
    include = KEPT / "torch" / "include"
    command = ["g++", "-std=c++17", "-fsyntax-only", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += ["-DUSE_CUDA", f"-I{ROOT / 'csrc'}", f"-isystem{include}"]
    command += [f"-isystem{include / 'torch/csrc/api/include'}", f"-isystem{toolkit.include}"]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("binaries", nargs="*", type=Path, help="extensions, as they were built")
    binaries = parser.parse_args().binaries
    toolkit = build_cuda.find_toolkit()
    if toolkit is None or not shutil.which("g++"):
        sys.exit("there is no nvcc or no g++")
    if why := fetch():
        print(f"torch {OLDEST} could not be had, nothing was checked: {why}")
        return
    files = sources()
    with ThreadPoolExecutor(2) as pool:
        complaints = list(pool.map(lambda source: compile_one(source, toolkit), files))
    failed = [
        f.relative_to(ROOT) for f, complaint in zip(files, complaints, strict=True) if complaint
    ]
    for complaint in filter(None, complaints):
        print(complaint)
    exports = set((KEPT / "exports").read_text().split())
    missing = {b.name: sorted(symbols(b, "--undefined-only") - exports) for b in binaries}
    for name, names in missing.items():
        print(
            f"{name}: " + (f"torch {OLDEST} lacks {', '.join(names)}" if names else "all is there")
        )
    print(f"{len(files) - len(failed)} of {len(files)} files compile against torch {OLDEST}")
    sys.exit(bool(failed or any(missing.values())))


if __name__ == "__main__":
    main()
