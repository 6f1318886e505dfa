"""The build: what setup.py decides, what it records, and what the extension asks of its host."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import resnet_fused as rf
from resnet_fused import _build_info

ROOT = Path(__file__).resolve().parent.parent


def run_python(code, **environ):
    """Runs `code` in a new interpreter in this environment and returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def setup_py():
    """setup.py as a module: its decisions without a build."""
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("setup_of_resnet_fused", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def extension(setup_py):
    """The built extension's file; where none could be built, the tests of it are skipped."""
    info = _build_info.read()
    if not info.built:
        wanted = setup_py.make_plan(torch.__version__).action == "build"
        if wanted and "SKIP_BUILD" not in info.summary:
            pytest.fail(f"kernels can be built here, but: {info.summary}")
        pytest.skip(info.summary)
    spec = importlib.util.find_spec("resnet_fused._C")
    assert spec is not None, "built, says the record, but there is no resnet_fused._C"
    return Path(spec.origin)


def tool_output(*command):
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ---- with and without the extension ------------------------------------------------------------

COMPUTE = """
import sys
if {hide}:
    class Hide:
        def find_spec(self, name, path=None, target=None):
            if name == "resnet_fused._C":
                raise ModuleNotFoundError(name)
    sys.meta_path.insert(0, Hide())
import torch, torch.nn.functional as F
import resnet_fused as rf
torch.manual_seed(0)
x, w = torch.randn(2, 5, 7, 6), torch.randn(4, 5, 3, 3)
scale, shift = torch.rand(4) + 0.5, torch.randn(4)
ours = rf.ops.conv_bn_act(x, w, scale, shift, padding=1)
eager = F.relu(F.conv2d(x, w, padding=1) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1))
torch.testing.assert_close(ours, eager)
print(rf.ops.extension_error is None, rf.ops.extension_error)
"""


@pytest.mark.parametrize(
    ("hide", "disable", "reason"),
    [(False, "1", "RESNET_FUSED_DISABLE_EXT"), (True, "0", "resnet_fused._C")],
    ids=["disabled", "absent"],
)
def test_works_without_the_extension(hide, disable, reason):
    printed = run_python(COMPUTE.format(hide=hide), RESNET_FUSED_DISABLE_EXT=disable)
    loaded, _, error = printed.partition(" ")
    assert loaded == "False"
    assert reason in error


def test_loads_the_extension(extension):
    printed = run_python(COMPUTE.format(hide=False), RESNET_FUSED_DISABLE_EXT="0")
    assert printed == "True None"


# ---- the binary --------------------------------------------------------------------------------


def test_extension_is_tagged_abi3(extension):
    assert extension.name == "_C.abi3.so"


def test_undefined_symbols_are_stable(extension):
    """Only torch's stable C functions and the C and C++ runtimes; nothing of Python."""
    table = tool_output("nm", "-D", "--undefined-only", str(extension))
    symbols = {line.split()[-1] for line in table.splitlines()}
    assert any(name.startswith("aoti_torch_") for name in symbols)
    runtime = re.compile(
        r".+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$"  # versioned: libc, libm, libstdc++, libgcc
        r"|_ZN?K?S[tsaio]|_ZT[VIS]N?S[tsaio]"  # namespace std
        r"|_ITM_\w+|__gmon_start__"
    )
    stable = re.compile(r"(aoti_torch|torch)_[a-z]\w*$")
    foreign = {s for s in symbols if not runtime.match(s) and not stable.match(s)}
    assert not foreign
    # A std template over one of torch's C++ types would pass the patterns above.
    inner = re.compile(r"N?\d*(3c10|2at|5torch|6caffe2)(?=[A-Z\d])")
    assert not {s for s in symbols if s.startswith("_Z") and inner.search(s)}


def test_no_openmp_runtime(extension):
    """One thread pool serves the process: torch's."""
    table = tool_output("nm", "-D", "--undefined-only", str(extension))
    assert not re.search(r"\b(GOMP_|omp_|__kmpc_)", table)
    needed = tool_output("readelf", "-d", str(extension))
    assert "libtorch_cpu" in needed
    assert not re.search(r"NEEDED.*(libgomp|libomp|libiomp)", needed)


def test_exports_what_ctypes_calls_and_nothing_else_of_its_own(extension):
    table = tool_output("nm", "-D", "--defined-only", str(extension))
    symbols = {line.split()[-1] for line in table.splitlines()}
    ours = {name for name in symbols if "resnet_fused" in name}
    assert ours == {"resnet_fused_release_prepared"}


def test_baseline_code_runs_on_any_x86_64(extension):
    """AVX instructions only in functions of an ISA's own namespace, where CPUID leads to them.

    An inline function of a header that was compiled under a target pragma would show here: the
    linker may keep that copy for everybody.
    """
    listing = tool_output("objdump", "-d", "--no-show-raw-insn", str(extension))
    function, vector = "", {}
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line.split("<", 1)[1][:-2]
        elif re.search(r"\tv[a-z]|%[yz]mm", line):
            vector[function] = vector.get(function, 0) + 1
    assert vector, "no vector code was found at all"
    outside = {name: n for name, n in vector.items() if not re.search(r"\d(avx2|avx512)", name)}
    assert not outside


# ---- the record --------------------------------------------------------------------------------


def test_record_says_what_was_built(extension, setup_py):
    info = _build_info.read()
    kernels = info.extensions["_C"]
    assert info.built
    assert kernels.built
    assert list(kernels.sources) == setup_py.cpu_sources()
    assert setup_py.TORCH_TARGET in kernels.flags
    assert re.search(r"\d+\.\d+", info.compiler)
    assert info.compiler in info.summary
    assert f"torch {info.torch}" in info.summary


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"extensions": {"_C": {}}}', "\x00"])
def test_missing_or_damaged_record_is_an_answer(tmp_path, content):
    path = tmp_path / "_build_info.json"
    if content is not None:
        path.write_text(content)
    info = _build_info.read(path)
    assert not info.built
    assert "pip install" in info.summary
    assert "\n" not in info.summary


@pytest.mark.parametrize("action", ["build", "skip"])
def test_record_round_trip(setup_py, tmp_path, action):
    plan = setup_py.Plan(action, "because", "g++" if shutil.which("g++") else sys.executable)
    path = tmp_path / "_build_info.json"
    path.write_text(json.dumps(setup_py.build_info(plan, "2.11.0")))
    info = _build_info.read(path)
    assert info.built is (action == "build")
    assert info.extensions["_C"].reason == "because"
    assert bool(info.extensions["_C"].sources) is info.built
    assert ("because" in info.summary) is not info.built


# ---- the decisions -----------------------------------------------------------------------------

LINUX = ("Linux", "x86_64")


@pytest.fixture
def plan(setup_py):
    """make_plan() for a machine that has `programs` on PATH."""

    def make(torch="2.13.0", programs=("g++", "c++"), target=LINUX, **environ):
        which = {name: f"/usr/bin/{name}" for name in programs}.get
        return setup_py.make_plan(torch, environ, which, target)

    return make


def test_builds_where_everything_is_there(plan):
    assert plan().action == "build"
    assert plan().compiler == "g++"
    assert plan(programs=["c++"]).compiler == "c++"
    assert plan(programs=["ccache", "g++"], CXX="ccache g++").compiler == "ccache g++"
    assert plan(RESNET_FUSED_SKIP_BUILD="0").action == "build"


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ({"programs": ()}, "no C++ compiler"),
        ({"programs": (), "torch": None}, "no C++ compiler"),
        ({"target": ("Darwin", "arm64")}, "Darwin on arm64"),
        ({"target": ("Linux", "aarch64")}, "Linux on aarch64"),
        ({"RESNET_FUSED_SKIP_BUILD": "1"}, "RESNET_FUSED_SKIP_BUILD"),
        ({"RESNET_FUSED_SKIP_BUILD": "1", "CXX": "nonesuch"}, "RESNET_FUSED_SKIP_BUILD"),
    ],
)
def test_installs_without_kernels_and_says_why(plan, machine, reason):
    result = plan(**machine)
    assert result.action == "skip"
    assert reason in result.reason


@pytest.mark.parametrize(
    ("machine", "reason"),
    [({"CXX": "nonesuch -m64"}, "CXX=nonesuch"), ({"torch": None}, "torch>=2.11")],
)
def test_fails_where_the_user_meant_to_build(plan, machine, reason):
    result = plan(**machine)
    assert result.action == "fail"
    assert reason in result.reason


@pytest.mark.parametrize(
    ("installed", "used"),
    [("2.10.2", False), ("1.13.1", False), ("2.11.0a0+git1", True), ("2.9", False), ("3.0", True)],
)
def test_torch_must_be_new_enough(setup_py, monkeypatch, installed, used):
    monkeypatch.setattr(setup_py.importlib.metadata, "version", lambda name: installed)
    assert setup_py.find_torch() == (installed if used else None)


def test_torch_is_found_under_build_isolation():
    """pip keeps the interpreter but hides its site-packages: they are found again, last in line."""
    printed = run_python(
        "import setuptools, sys, importlib.util as u\n"
        "sys.path[:] = [p for p in sys.path if not p.endswith('-packages')]\n"
        "assert u.find_spec('torch') is None\n"
        "import setup\n"
        "first = list(sys.path)\n"
        "print(setup.find_torch())\n"
        "assert sys.path[:len(first)] == first\n"
        "assert u.find_spec('torch') is not None\n"
    )
    assert printed == importlib.metadata.version("torch")


def test_debug_flags(setup_py):
    assert "-O3" in setup_py.compile_flags({})
    assert "-O3" in setup_py.compile_flags({"DEBUG": "0"})
    debug = setup_py.compile_flags({"DEBUG": "1"})
    assert "-O0" in debug
    assert "-O3" not in debug


def test_no_flag_ties_the_binary_to_this_machine(setup_py):
    flags = " ".join(setup_py.compile_flags({}))
    assert not re.search(r"-march|-mtune|-mavx|-fopenmp|-ffast-math", flags)


# ---- the project's files agree -----------------------------------------------------------------


def test_linters_have_one_version():
    pins = r'"(ruff|clang-format)==([\d.]+)"'
    wanted = dict(re.findall(pins, (ROOT / "pyproject.toml").read_text()))
    found = re.findall(pins, (ROOT / ".pre-commit-config.yaml").read_text())
    assert set(wanted) == {"ruff", "clang-format"}
    assert set(found) == set(wanted.items())


def test_package_version_is_the_projects():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{rf.__version__}"\n' in text
