"""What is decided about the CUDA kernels before anything is compiled: build_cuda.py."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


build_cuda = load("build_cuda")
TOOLKIT = build_cuda.Toolkit("/cuda/bin/nvcc", Path("/cuda/include"), Path("/cuda/lib"), (13, 0))


@pytest.fixture(autouse=True)
def toolkit(monkeypatch):
    """There is an nvcc of CUDA 13.0, whatever this machine has."""
    monkeypatch.setattr(build_cuda, "find_toolkit", lambda environ, which: TOOLKIT)


def make_plan(torch: str, here=(), **environ):
    return build_cuda.make_plan(torch, environ, shutil.which, lambda: list(here))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("8.0", ("80",)),
        ("8.0;9.0;10.0+PTX", ("80", "90a", "100", "compute_100")),
        ("7.5 8.6,9.0a+PTX", ("86", "90a", "compute_90a")),
        ("Hopper Ampere", ("90a", "80", "86")),
        ("8.0;8.0", ("80",)),
        ("6.1;7.0+PTX", ()),
    ],
)
def test_architectures(text, names):
    assert build_cuda.architectures(text) == names


@pytest.mark.parametrize("text", ["8", "sm_80", "8.0+ptx", "latest"])
def test_architectures_that_are_none(text):
    with pytest.raises(ValueError, match=re.escape(f'must be like "8.0;9.0+PTX", got "{text}"')):
        build_cuda.architectures(text)


@pytest.mark.parametrize(
    ("torch", "environ", "reason"),
    [
        ("", {}, "torch was built without CUDA (FORCE_CUDA=1 compiles beside it)"),
        ("13.0", {"FORCE_CPU": "1"}, "FORCE_CPU was set"),
        ("", {"FORCE_CPU": "1", "FORCE_CUDA": "1"}, "FORCE_CPU was set"),
        ("13.0", {"SANITIZE": "address"}, "SANITIZE is for the CPU kernels"),
        (
            "12.8",
            {},
            "torch was built for CUDA 12.8, nvcc is of 13.0 (FORCE_CUDA=1 compiles all the same)",
        ),
        (
            "13.0",
            {"TORCH_CUDA_ARCH_LIST": "7.5"},
            "the kernels are for sm_80 and later, asked for was 7.5",
        ),
        (
            "13.0",
            {"TORCH_CUDA_ARCH_LIST": "new"},
            'TORCH_CUDA_ARCH_LIST must be like "8.0;9.0+PTX", got "new"',
        ),
    ],
)
def test_reasons_not_to_build(torch, environ, reason):
    plan = make_plan(torch, **environ)
    assert (plan.build, plan.reason) == (False, reason)


def test_no_toolkit_and_an_old_one(monkeypatch):
    monkeypatch.setattr(build_cuda, "find_toolkit", lambda environ, which: None)
    assert make_plan("13.0").reason == (
        "there is no nvcc: install the CUDA toolkit, or set CUDA_HOME"
    )
    old = build_cuda.Toolkit("nvcc", Path(), Path(), (11, 8))
    monkeypatch.setattr(build_cuda, "find_toolkit", lambda environ, which: old)
    assert make_plan("11.8").reason == "the kernels need CUDA 12.5 or later, nvcc is of 11.8"


@pytest.mark.parametrize(
    ("torch", "here", "environ", "names"),
    [
        ("13.0", ["9.0"], {}, ("90a",)),
        ("13.0", [], {}, ("80", "90a", "100", "compute_100")),
        ("13.0", ["9.0"], {"TORCH_CUDA_ARCH_LIST": "8.0"}, ("80",)),
        ("", [], {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "10.0"}, ("100",)),
        ("12.8", ["8.0"], {"FORCE_CUDA": "1"}, ("80",)),
    ],
)
def test_plans_to_build(torch, here, environ, names):
    plan = make_plan(torch, here, **environ)
    assert plan.build
    assert plan.architectures == names
    assert plan.reason.startswith("nvcc 13.0 was found and ")


def test_sources_and_flags():
    """Hopper's kernels are compiled for it alone, and left out where nobody asked for it."""
    every, other = make_plan("13.0"), make_plan("13.0", ["8.0"])
    for plan, hopper in ((every, True), (other, False)):
        kernels = build_cuda.kernel_sources(plan)
        assert {path.parent.name for path in kernels} == {"sm80", *(["sm90"] * hopper)}
        host = build_cuda.host_sources(plan)
        assert "csrc/cuda/ops.cpp" in host
        assert ("csrc/cuda/sm90/launch.cpp" in host) is hopper
        assert not any("emulate" in path for path in host)
        assert ("-DRESNET_FUSED_WITHOUT_SM90" in build_cuda.host_flags(plan)) is not hopper
        for source in kernels:
            made_for = [f for f in build_cuda.nvcc_flags(plan, source, {}) if "gencode" in f]
            if source.parent.name == "sm90":
                assert made_for == ["-gencode=arch=compute_90a,code=sm_90a"]
            else:
                assert len(made_for) == len(plan.architectures)
    assert "-gencode=arch=compute_100,code=compute_100" in build_cuda.nvcc_flags(
        every, build_cuda.kernel_sources(every)[0], {}
    )
    debug = build_cuda.nvcc_flags(other, build_cuda.kernel_sources(other)[0], {"DEBUG": "1"})
    assert "-DNDEBUG" not in debug


def test_cuda_of_torch(tmp_path):
    assert build_cuda.torch_cuda(tmp_path) == ""
    for line, found in (
        ("cuda: Optional[str] = '13.0'\n", "13.0"),
        ("cuda: Optional[str] = None\n", ""),
        ("cuda = '12.8'\nhip = None\n", "12.8"),
    ):
        (tmp_path / "version.py").write_text("debug = False\n" + line)
        assert build_cuda.torch_cuda(tmp_path) == found


def test_the_toolkit_says_where_it_is(tmp_path, monkeypatch):
    monkeypatch.undo()
    root = tmp_path / "cuda"
    for folder in ("bin", "include", "lib64"):
        (root / folder).mkdir(parents=True)
    (root / "include" / "cuda_runtime.h").touch()
    (root / "lib64" / "libcudart_static.a").touch()
    nvcc = tmp_path / "nvcc"  # a wrapper: its own place says nothing
    nvcc.write_text(
        f"#!/bin/sh\necho '#$ TOP={root}/bin/..' >&2\n"
        "echo '-D__CUDACC_VER_MAJOR__=12 -D__CUDACC_VER_MINOR__=8' >&2\n"
    )
    nvcc.chmod(0o755)
    found = build_cuda.find_toolkit({}, lambda name: str(nvcc))
    assert found == build_cuda.Toolkit(str(nvcc), root / "include", root / "lib64", (12, 8))
    (root / "lib64" / "libcudart_static.a").unlink()
    assert build_cuda.find_toolkit({}, lambda name: str(nvcc)) is None
    assert build_cuda.find_toolkit({}, lambda name: None) is None


def test_record_of_what_was_built():
    """_build_info.json names the kernels' sources and flags, or why there are none."""
    setup_text = (ROOT / "setup.py").read_text()
    assert 'if __name__ == "__main__":' in setup_text
    setup = load("setup")
    plan = setup.Plan("build", "all was found", "g++")
    for cuda, built in ((make_plan("13.0"), True), (make_plan(""), False)):
        record = setup.build_info(plan, "2.11.0", cuda)
        json.dumps(record)
        entry = record["extensions"]["_C_cuda"]
        assert (entry["built"], entry["reason"]) == (built, cuda.reason)
        assert ("csrc/cuda/sm80/kernels_tf32.cu" in entry["sources"]) is built
        assert ("_C and _C_cuda" in record["summary"]) is built


def test_registers_and_spills_are_held():
    """The table that `make cuda-check` holds: every kernel that may be chosen, without spills."""
    lines = (ROOT / "tests" / "sm80_resources.txt").read_text().splitlines()[1:]
    rows = [line.split(" | ") for line in lines]
    for architecture in ("sm_80", "sm_90a", "sm_100"):
        mine = {name for name, *_ in rows if name.startswith(architecture + " ")}
        tiles = re.findall(
            r'\{"(\w+)", \{', (ROOT / "csrc" / "cuda" / "sm80" / "tiles.h").read_text()
        )
        for kind in ("bfloat16", "float16", "tf32", "float32"):
            for tile in tiles:
                for shortcut in (0, 1):
                    large = tile == "128x128" or (kind == "float32" and tile == "128x64")
                    there = not large or (tile == "128x128" and kind != "float32" and not shortcut)
                    assert (f"{architecture} {kind} {tile} {shortcut}" in mine) is there
    for name, resources, *counts in rows:
        registers, stack, spilled = map(int, resources.split())
        assert registers <= 255, name
        assert (stack, spilled) == (0, 0), name
        assert counts, name
