"""Builds the CPU kernels another way and runs the tests that call them.

    run_variant.py [address] [thread] [avx512] [pytest's arguments]

address: AddressSanitizer and UndefinedBehaviorSanitizer over the tests marked `kernels`.
thread: ThreadSanitizer over the tests marked `threads`. Without names: both (`make sanitize`).
avx512: the AVX-512 kernels, under csrc/cpu/emulate/ where the CPU lacks them (`make avx512-check`).

All leave out what is marked `slow`. Each has a copy of the package under build/variants, whose
kernels are its own; the ordinary build stays as it is.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "variants"


@dataclass(frozen=True)
class Variant:
    """How the kernels are built, and which tests run them."""

    title: str
    build: dict[str, str]  # what setup.py reads
    marker: str
    # Python itself is not compiled for a sanitizer, so its runtime is preloaded.
    runtime: str = ""
    environ: dict[str, str] = field(default_factory=dict)
    pytest: tuple[str, ...] = ()


VARIANTS = {
    "address": Variant(
        "address,undefined",
        {"SANITIZE": "address,undefined"},
        "kernels",
        "libasan.so",
        {
            # Python keeps what it allocates; a size beyond all memory is an exception, as without.
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:abort_on_error=1",
            "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
        },
        ("--hypothesis-profile=sanitized",),
    ),
    "thread": Variant(
        "thread",
        {"SANITIZE": "thread"},
        "threads",
        "libtsan.so",
        # Reports do not end the run, they make its exit status 66. Of the libraries that are not
        # compiled for it, it would see memcpy and free but not the OpenMP barriers that order them.
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1"},
        ("--hypothesis-profile=sanitized",),
    ),
    "avx512": Variant(
        "emulated AVX-512",
        {"EMULATE_AVX512": "1"},
        "kernels",
        environ={"RESNET_FUSED_TEST_ISAS": "avx512 avx512bf16"},
        # Those that go through the instruction sets, and guard_pages.py.
        pytest=("-nauto", "--hypothesis-profile=sanitized", "-k=avx512 or touched"),
    ),
}
SANITIZERS = ("address", "thread")


def build(name: str) -> None:
    """Compiles what changed; the compiler's output is shown when it fails."""
    where = ["--build-lib", str(FOLDER / name), "--build-temp", str(FOLDER / f"{name}-objects")]
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build", *where],
        cwd=ROOT,
        env={**os.environ, "FORCE_CPU": "1", **VARIANTS[name].build},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\n{name}: the kernels did not compile, see above.")


def library(name: str) -> str:
    """The path of one of gcc's libraries."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    command = [*compiler, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        sys.exit(f"make sanitize: {compiler[0]} has no {name}; install gcc's sanitizer libraries.")
    return path


def environment(name: str) -> dict[str, str]:
    variant = VARIANTS[name]
    environ = {**os.environ, **variant.environ, "PYTHONPATH": str(FOLDER / name)}
    if variant.runtime:
        # libstdc++ too: a sanitizer that starts before it cannot watch exceptions.
        environ["LD_PRELOAD"] = f"{library(variant.runtime)} {library('libstdc++.so.6')}"
        environ["RESNET_FUSED_SANITIZED"] = name  # test_sanitize.py holds the build against it
    return environ


def marked_files(marker: str) -> list[str]:
    """Those with tests of that marker; conftest.py marks what tests ops."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(f) for f in files if f.match("test_ops_*") or f"mark.{marker}" in f.read_text()]


def run(name: str, arguments: list[str]) -> int:
    """pytest's exit status, or the sanitizer's."""
    variant = VARIANTS[name]
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml")]
    command += ["--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    command += ["--capture=sys"]  # reports are written past Python
    command += [*variant.pytest, "-m", f"{variant.marker} and not slow"]
    command += [*arguments, *marked_files(variant.marker)]
    # Started in the copy's folder, pytest and all that the tests start import the copy.
    done = subprocess.run(command, cwd=FOLDER / name, env=environment(name), check=False)
    return done.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("variants", nargs="*", choices=[*VARIANTS, []], metavar="variant")
    chosen, arguments = parser.parse_known_args()
    failed = []
    for name in chosen.variants or SANITIZERS:
        start = time.monotonic()
        title = VARIANTS[name].title
        print(f"== {title}: compiling the kernels", flush=True)
        build(name)
        status = run(name, arguments)
        if status != 0:
            failed.append(f"{name} (exit status {status})")
        print(f"== {title}: {time.monotonic() - start:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}, see above.")


if __name__ == "__main__":
    main()
