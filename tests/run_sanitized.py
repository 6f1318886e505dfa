"""Builds the kernels for gcc's sanitizers and runs the tests that call them, for `make sanitize`.

    run_sanitized.py [address] [thread] [pytest's arguments]

address: AddressSanitizer and UndefinedBehaviorSanitizer over the tests marked `kernels`.
thread: ThreadSanitizer over the tests marked `threads`. Both leave out what is marked `slow`.

Each has a copy of the package under build/sanitize, whose kernels are its own; the ordinary build
stays as it is. Python itself is not compiled for a sanitizer, so its runtime is preloaded.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}
MARKERS = {"address": "kernels", "thread": "threads"}
OPTIONS = {
    "address": {
        # Python keeps what it allocates; a size beyond all memory is an exception, as without.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
    },
    # Reports do not end the run, they make its exit status 66. Of the libraries that are not
    # compiled for it, it would see memcpy and free but not the OpenMP barriers that order them.
    "thread": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1"},
}


def package_folder(sanitizer: str) -> Path:
    return ROOT / "build" / "sanitize" / sanitizer


def build(sanitizer: str) -> None:
    """Compiles what changed; the compiler's output is shown when it fails."""
    folder = package_folder(sanitizer)
    where = ["--build-lib", str(folder), "--build-temp", f"{folder}-objects"]
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build", *where],
        cwd=ROOT,
        env={**os.environ, "SANITIZE": SANITIZERS[sanitizer]},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\nmake sanitize: the kernels did not compile, see above.")


def library(name: str) -> str:
    """The path of one of gcc's libraries."""
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    command = [*compiler, f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute():
        sys.exit(f"make sanitize: {compiler[0]} has no {name}; install gcc's sanitizer libraries.")
    return path


def environment(sanitizer: str) -> dict[str, str]:
    # libstdc++ too: a sanitizer that starts before it cannot watch exceptions.
    preload = [library(RUNTIMES[sanitizer]), library("libstdc++.so.6")]
    return {
        **os.environ,
        **OPTIONS[sanitizer],
        "LD_PRELOAD": " ".join(preload),
        "PYTHONPATH": str(package_folder(sanitizer)),
        "RESNET_FUSED_SANITIZED": sanitizer,  # test_sanitize.py holds the build against it
    }


def marked_files(marker: str) -> list[str]:
    """Those with tests of that marker; conftest.py marks what tests ops."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(f) for f in files if f.match("test_ops_*") or f"mark.{marker}" in f.read_text()]


def run(sanitizer: str, arguments: list[str]) -> int:
    """pytest's exit status, or the sanitizer's."""
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml")]
    command += ["--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    command += ["--capture=sys"]  # reports are written past Python
    command += ["--hypothesis-profile=sanitized", "-m", f"{MARKERS[sanitizer]} and not slow"]
    command += [*arguments, *marked_files(MARKERS[sanitizer])]
    # Started in the copy's folder, pytest and all that the tests start import the copy.
    folder = package_folder(sanitizer)
    return subprocess.run(command, cwd=folder, env=environment(sanitizer), check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("sanitizers", nargs="*", choices=[*SANITIZERS, []], metavar="sanitizer")
    chosen, arguments = parser.parse_known_args()
    failed = []
    for sanitizer in chosen.sanitizers or SANITIZERS:
        start = time.monotonic()
        print(f"== {SANITIZERS[sanitizer]}: compiling the kernels", flush=True)
        build(sanitizer)
        status = run(sanitizer, arguments)
        if status != 0:
            failed.append(f"{sanitizer} (exit status {status})")
        print(f"== {SANITIZERS[sanitizer]}: {time.monotonic() - start:.0f} s", flush=True)
    if failed:
        sys.exit(f"make sanitize: failed under {', '.join(failed)}, see above.")


if __name__ == "__main__":
    main()
