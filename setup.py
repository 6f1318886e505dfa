"""Which extensions are built, and why: one printed line, kept in `resnet_fused/_build_info.json`.

Everything static is in pyproject.toml. Environment variables that are honoured here:

    RESNET_FUSED_SKIP_BUILD=1   compile no kernels (then eager PyTorch on a CPU, Triton on a GPU)
    CXX                         the C++ compiler; else g++ or c++ on PATH (the kernels need GCC)
    MAX_JOBS                    how many files are compiled at once; else ninja's choice
    DEBUG=1                     unoptimised, with debug symbols and assertions
    FORCE_CPU=1                 CPU kernels only
    FORCE_CUDA=1                CUDA kernels too, beside whatever torch: to compile, not to load
    CUDA_HOME, TORCH_CUDA_ARCH_LIST   see build_cuda.py
    SANITIZE=address,undefined  or SANITIZE=thread: kernels that are checked as they run, for
                                `make sanitize`
    EMULATE_AVX512=1            AVX-512 kernels in AVX2 instructions, for `make avx512-check`
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))
import build_cuda  # noqa: E402  beside this file, which pip's build does not look at

PACKAGE = "resnet_fused"
# One binary serves every torch from here on (its stable ABI) and every Python (its limited API).
OLDEST_TORCH = (2, 11)
TORCH_REQUIREMENT = "torch>=2.11"
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
OLDEST_PYTHON = "cp310"
GUARD_SOURCE = "csrc/python/guard.cpp"
NO_CUDA = build_cuda.CudaPlan(False, "no plan was made")
SKIP_HINT = "RESNET_FUSED_SKIP_BUILD=1 installs without kernels."


@dataclass(frozen=True)
class Plan:
    """What to do about the kernels: "build" them, "skip" them, or "fail" the installation."""

    action: str
    reason: str
    compiler: str = ""


def make_plan(torch, environ=os.environ, which=shutil.which, target=None):
    """The plan for this machine.

    torch: the version to compile against, None where there is none. target: (system, machine).
    """
    system, machine = target or (platform.system(), platform.machine())
    if build_cuda.is_set(environ, "RESNET_FUSED_SKIP_BUILD"):
        return Plan("skip", "RESNET_FUSED_SKIP_BUILD was set")
    if (system, machine) != ("Linux", "x86_64"):
        return Plan("skip", f"the kernels are for Linux on x86_64, this is {system} on {machine}")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        return Plan("skip", "a free-threaded Python has no stable ABI")
    named = environ.get("CXX", "")
    if named and not which(shlex.split(named)[0]):
        return Plan("fail", f"CXX={named} is not a program that can be run")
    compiler = named or next(filter(which, ("g++", "c++")), "")
    if not compiler:
        return Plan("skip", "no C++ compiler: install g++ (or set CXX), then install this again")
    if torch is None:
        return Plan("fail", f"there is no {TORCH_REQUIREMENT} to compile against, install it first")
    return Plan("build", f"{compiler} and torch {torch} were found", compiler)


def hidden_site_folders():
    """The site-packages that pip's build isolation hides from the interpreter, which it keeps."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    venv = Path(sys.prefix, "pyvenv.cfg")
    shares_base = r"(?im)^include-system-site-packages\s*=\s*true"
    if not venv.exists() or re.search(shares_base, venv.read_text()):
        folders += [*site.getsitepackages([sys.base_prefix]), site.getusersitepackages()]
    return [folder for folder in dict.fromkeys(folders) if folder not in sys.path]


def find_torch():
    """The version of the torch that is installed here; None where it is missing or too old."""
    if importlib.util.find_spec("torch") is None:
        sys.path += hidden_site_folders()
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    return version if tuple(map(int, re.findall(r"\d+", version)[:2])) >= OLDEST_TORCH else None


def cpu_sources(environ=os.environ):
    folders = ["cpu", *(["sanitize"] if sanitizer_flags(environ) else [])]
    files = [path for folder in folders for path in ROOT.glob(f"csrc/{folder}/*.cpp")]
    return sorted(path.relative_to(ROOT).as_posix() for path in files)


def sanitizer_flags(environ=os.environ):
    """What compiling and linking have in common; empty for an ordinary build."""
    names = environ.get("SANITIZE", "")
    return [f"-fsanitize={names}", "-fno-sanitize-recover=all"] if names else []


def compile_flags(environ=os.environ):
    """Our own flags; they follow the interpreter's, which may hold -O2, -g, -fwrapv or not."""
    flags = ["-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra", TORCH_TARGET]
    if sanitizer_flags(environ):
        # gcc 12 takes deliberately undefined operands inside its own intrinsics for a mistake.
        flags += ["-O1", "-g1", "-fno-wrapv", "-fno-omit-frame-pointer", "-Wno-uninitialized"]
        flags += ["-D_GLIBCXX_ASSERTIONS", "-include", "sanitize/intrinsics.h"]
        return [*flags, *sanitizer_flags(environ)]
    if build_cuda.is_set(environ, "EMULATE_AVX512"):
        return [*flags, "-O1", "-g0", "-Wno-psabi", "-include", "cpu/emulate/avx512.h"]
    if build_cuda.is_set(environ, "DEBUG"):
        return [*flags, "-O0", "-g", "-UNDEBUG"]
    return [*flags, "-O3", "-g0", "-fno-wrapv"]


def make_cuda_plan(environ=os.environ):
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent if spec and spec.origin else ROOT
    return build_cuda.make_plan(build_cuda.torch_cuda(folder), environ)


def kernels(plan, cuda):
    """The extensions and the command that compiles them; needs torch."""
    os.environ["CXX"] = plan.compiler  # for the link too, whichever compiler built Python
    if importlib.util.find_spec("ninja") and not shutil.which("ninja"):
        # The programs of an environment that is not activated are not on PATH.
        os.environ["PATH"] += os.pathsep + importlib.import_module("ninja").BIN_DIR

    from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

    class BuildKernels(BuildExtension):
        def run(self):
            if self.editable_mode:  # a folder that stays: an edit compiles only what it touches
                self.build_temp = str(ROOT / "build" / "editable")
            try:
                for extension in self.extensions:
                    if extension.name == f"{PACKAGE}._C_cuda":
                        made = build_cuda.compile_kernels(cuda, Path(self.build_temp, "cuda"))
                        extension.extra_objects = [str(kernel.object) for kernel in made]
                super().run()
            except Exception as error:
                sys.exit(f"{error}\n{PACKAGE}: the kernels did not compile, see above. {SKIP_HINT}")

    # torch's headers are named again as system headers, which are compiled without warnings.
    flags = [*compile_flags(), *(f"-isystem{path}" for path in include_paths())]
    kernels = CppExtension(
        f"{PACKAGE}._C",
        cpu_sources(),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=flags,
        extra_link_args=sanitizer_flags(),
        py_limited_api=True,
    )
    extensions = [kernels, *guard_extension()]
    if cuda.build:
        extensions.append(
            CppExtension(
                f"{PACKAGE}._C_cuda",
                build_cuda.host_sources(cuda),
                include_dirs=[str(ROOT / "csrc")],
                extra_compile_args=[*flags, *build_cuda.host_flags(cuda)],
                extra_link_args=build_cuda.link_flags(cuda),
                py_limited_api=True,
            )
        )
    return extensions, BuildKernels


def guard_extension():
    """What checks Python objects quickly; it knows nothing of torch, but needs Python's headers."""
    if not has_python_headers():
        return []
    return [
        Extension(
            f"{PACKAGE}._guard",
            [GUARD_SOURCE],
            language="c++",
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args=compile_flags(),
            extra_link_args=sanitizer_flags(),
            py_limited_api=True,
        )
    ]


def has_python_headers():
    return Path(sysconfig.get_path("include"), "Python.h").is_file()


def build_info(plan, torch, cuda=NO_CUDA):
    """The content of `_build_info.json`: what was built, or why it was not."""
    built = plan.action == "build"
    compiler = ""
    if built:
        command = [*shlex.split(plan.compiler), "--version"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        compiler = answer.partition("\n")[0]
    flags = compile_flags() if built else []
    with_guard = built and has_python_headers()
    no_headers = "Python.h is missing (python3-dev), so every call checks its module in Python"
    with_cuda = built and cuda.build
    cuda_flags = []
    if with_cuda:
        source = build_cuda.kernel_sources(cuda)[0]
        cuda_flags = [*build_cuda.nvcc_flags(cuda, source), *build_cuda.host_flags(cuda)]
    extensions = {
        "_C": {
            "built": built,
            "reason": plan.reason,
            "sources": cpu_sources() if built else [],
            "flags": flags,
        },
        "_guard": {
            "built": with_guard,
            "reason": no_headers if built and not with_guard else plan.reason,
            "sources": [GUARD_SOURCE] if with_guard else [],
            "flags": flags if with_guard else [],
        },
        "_C_cuda": {
            "built": with_cuda,
            "reason": cuda.reason if built else plan.reason,
            "sources": [
                *(path.relative_to(ROOT).as_posix() for path in build_cuda.kernel_sources(cuda)),
                *build_cuda.host_sources(cuda),
            ]
            if with_cuda
            else [],
            "flags": cuda_flags,
        },
    }
    files = len(extensions["_C"]["sources"])
    names = "_C and _C_cuda" if with_cuda else "_C"
    files += len(extensions["_C_cuda"]["sources"])
    result = f"built {names} from {files} files with {compiler} against torch {torch}"
    return {
        "summary": f"{PACKAGE}: {result if built else f'kernels not built: {plan.reason}'}",
        "extensions": extensions,
        "compiler": compiler,
        "torch": torch or "",
        "python": platform.python_version(),
        "platform": sysconfig.get_platform(),
    }


class Build(build):
    """setuptools' build, with one more step at its end."""

    sub_commands = (*build.sub_commands, ("record_build", None))


class RecordBuild(Command):
    """Writes down and prints what was built; comes last, so the record is true."""

    user_options = ()
    # main() sets all three.
    plan, torch = Plan("skip", "no plan was made"), None
    cuda = NO_CUDA

    def initialize_options(self):
        self.build_lib, self.editable_mode = None, False

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        if self.plan.action == "fail":
            sys.exit(f"{PACKAGE}: {self.plan.reason}. {SKIP_HINT}")
        package = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib, PACKAGE)
        if self.editable_mode and self.plan.action == "skip":
            for stale in (*package.glob("_C.*so"), *package.glob("_guard.*so")):
                stale.unlink()
        if self.editable_mode and not (self.plan.action == "build" and self.cuda.build):
            for stale in package.glob("_C_cuda.*so"):
                stale.unlink()
        info = build_info(self.plan, self.torch, self.cuda)
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")
        print(info["summary"])

    def get_source_files(self):
        return []

    def get_outputs(self):
        return [str(Path(self.build_lib, PACKAGE, "_build_info.json"))]

    def get_output_mapping(self):
        source = str(Path(PACKAGE, "_build_info.json"))
        return dict.fromkeys(self.get_outputs(), source) if self.editable_mode else {}


def main():
    RecordBuild.torch = find_torch()
    RecordBuild.plan = plan = make_plan(RecordBuild.torch)
    RecordBuild.cuda = cuda = make_cuda_plan()
    arguments = {"cmdclass": {"build": Build, "record_build": RecordBuild}}
    if plan.action == "build":
        arguments["ext_modules"], arguments["cmdclass"]["build_ext"] = kernels(plan, cuda)
        arguments["options"] = {"bdist_wheel": {"py_limited_api": OLDEST_PYTHON}}
    elif plan.action == "fail" and RecordBuild.torch is None:
        # pip installs it into its build environment, then runs this file again.
        arguments["setup_requires"] = [TORCH_REQUIREMENT]
    setup(**arguments)


if __name__ == "__main__":
    main()
