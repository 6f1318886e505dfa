"""How the CUDA kernels are compiled, for setup.py and for `make cuda-check`.

nvcc is called from here, because torch's CUDAExtension refuses beside a torch without CUDA, where
the kernels can be compiled all the same. Environment variables that are honoured:

    CUDA_HOME             the toolkit; else the one whose nvcc is on PATH
    TORCH_CUDA_ARCH_LIST  what to compile for, like "8.0;9.0;10.0+PTX"; else the GPUs that are here;
                          else 8.0, 9.0 and 10.0 with PTX for what comes later
    MAX_JOBS              how many files are compiled at once; else as many as there are processors
    DEBUG=1               line numbers and assertions
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
CUDA = ROOT / "csrc" / "cuda"
OLDEST_CAPABILITY = (8, 0)
OLDEST_CUDA = (12, 5)  # its runtime was the first to have cudaGetDriverEntryPointByVersion
ALL_ARCHITECTURES = "8.0;9.0;10.0+PTX"
_NAMED = {"Ampere": "8.0;8.6", "Ada": "8.9", "Hopper": "9.0", "Blackwell": "10.0;12.0"}


@dataclass(frozen=True)
class Toolkit:
    nvcc: str
    include: Path
    libraries: Path
    version: tuple[int, int]


@dataclass(frozen=True)
class CudaPlan:
    """Whether _C_cuda is built, why or why not, and with what."""

    build: bool
    reason: str
    toolkit: Toolkit | None = None
    architectures: tuple[str, ...] = ()  # like "80", "90a", "100", "compute_100"

    @property
    def has_sm90(self) -> bool:
        return "90a" in self.architectures


def is_set(environ, name):
    return environ.get(name, "0") not in ("", "0")


def find_toolkit(environ=os.environ, which=shutil.which):
    """The CUDA toolkit, or None. An nvcc on PATH may be a wrapper: it says itself where it is."""
    home = environ.get("CUDA_HOME", "")
    nvcc = which(str(Path(home, "bin", "nvcc"))) if home else which("nvcc")
    if not nvcc:
        return None
    answer = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    )
    top = re.search(r"^#\$ TOP=(.*)$", answer.stderr, re.MULTILINE)
    major = re.search(r"-D__CUDACC_VER_MAJOR__=(\d+)", answer.stderr)
    minor = re.search(r"-D__CUDACC_VER_MINOR__=(\d+)", answer.stderr)
    if not (top and major and minor):
        return None
    root = Path(top[1].strip()).resolve()
    folders = [root / "targets" / "x86_64-linux", root]
    include = next(
        (f / "include" for f in folders if (f / "include/cuda_runtime.h").is_file()), None
    )
    libraries = next(
        (f / lib for f in folders for lib in ("lib", "lib64") if _has_runtime(f / lib)), None
    )
    if include is None or libraries is None:
        return None
    return Toolkit(nvcc, include, libraries, (int(major[1]), int(minor[1])))


def _has_runtime(folder):
    return (folder / "libcudart_static.a").is_file()


def torch_cuda(folder):
    """The CUDA version that the torch in `folder` was built for, "" where for none."""
    try:
        text = Path(folder, "version.py").read_text()
    except OSError:
        return ""
    found = re.search(r"^cuda\b.*?=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return found[1] if found else ""


def capabilities_here():
    """The compute capabilities of the GPUs of this machine, like ["9.0"]."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.findall(r"^\d+\.\d+$", answer.stdout, re.MULTILINE) if not answer.returncode else []
    return sorted(set(found))


def architectures(text):
    """nvcc's names for a TORCH_CUDA_ARCH_LIST, leaving out what is older than sm_80.

    9.0 becomes sm_90a, which Hopper's own instructions need.
    """
    names = []
    for word in re.split(r"[;,\s]+", text.strip()):
        for part in _NAMED.get(word, word).split(";"):
            found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", part)
            if not found:
                raise ValueError(f'TORCH_CUDA_ARCH_LIST must be like "8.0;9.0+PTX", got "{text}"')
            major, minor, suffix, ptx = found.groups()
            if (int(major), int(minor)) < OLDEST_CAPABILITY:
                continue
            if (major, minor) == ("9", "0"):
                suffix = "a"
            names.append(f"{major}{minor}{suffix}")
            if ptx:
                names.append(f"compute_{major}{minor}{suffix}")
    return tuple(dict.fromkeys(names))


def make_plan(cuda_of_torch, environ=os.environ, which=shutil.which, here=capabilities_here):
    """What to do about _C_cuda. cuda_of_torch: the CUDA version torch was built for, or ""."""
    if is_set(environ, "FORCE_CPU"):
        return CudaPlan(False, "FORCE_CPU was set")
    if environ.get("SANITIZE"):
        return CudaPlan(False, "SANITIZE is for the CPU kernels")
    forced = is_set(environ, "FORCE_CUDA")
    if not cuda_of_torch and not forced:
        return CudaPlan(False, "torch was built without CUDA (FORCE_CUDA=1 compiles beside it)")
    toolkit = find_toolkit(environ, which)
    if toolkit is None:
        return CudaPlan(False, "there is no nvcc: install the CUDA toolkit, or set CUDA_HOME")
    version = ".".join(map(str, toolkit.version))
    if toolkit.version < OLDEST_CUDA:
        oldest = ".".join(map(str, OLDEST_CUDA))
        return CudaPlan(False, f"the kernels need CUDA {oldest} or later, nvcc is of {version}")
    major = cuda_of_torch.split(".")[0]
    if major and int(major) != toolkit.version[0] and not forced:
        reason = f"torch was built for CUDA {cuda_of_torch}, nvcc is of {version}"
        return CudaPlan(False, f"{reason} (FORCE_CUDA=1 compiles all the same)")
    try:
        listed = environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(here()) or ALL_ARCHITECTURES
        names = architectures(listed)
    except ValueError as error:
        return CudaPlan(False, str(error))
    if not names:
        return CudaPlan(False, f"the kernels are for sm_80 and later, asked for was {listed}")
    why = "FORCE_CUDA was set" if forced else f"torch was built for CUDA {cuda_of_torch}"
    return CudaPlan(True, f"nvcc {version} was found and {why}", toolkit, names)


def kernel_sources(plan):
    folders = ["sm80", *(["sm90"] if plan.has_sm90 else [])]
    return sorted(path for folder in folders for path in (CUDA / folder).glob("*.cu"))


def host_sources(plan):
    """The C++ files, relative to the root, as setuptools wants them."""
    folders = [".", "sm80", *(["sm90"] if plan.has_sm90 else [])]
    files = sorted(path for folder in folders for path in (CUDA / folder).glob("*.cpp"))
    return [path.relative_to(ROOT).as_posix() for path in files]


def host_flags(plan):
    """Besides setup.py's own."""
    flags = ["-DUSE_CUDA", f"-isystem{plan.toolkit.include}"]
    return flags if plan.has_sm90 else [*flags, "-DRESNET_FUSED_WITHOUT_SM90"]


def link_flags(plan):
    """The runtime is linked in. torch_cuda is found through libtorch, which must stay needed."""
    runtime = ["-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return [f"-L{plan.toolkit.libraries}", *runtime, "-Wl,--no-as-needed", "-ltorch"]


def nvcc_flags(plan, source, environ=os.environ):
    names = plan.architectures if source.parent.name != "sm90" else ("90a",)
    flags = ["-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"]
    flags += ["-g", "-lineinfo"] if is_set(environ, "DEBUG") else ["-O3", "-DNDEBUG"]
    for name in names:
        virtual = name if name.startswith("compute_") else f"compute_{name}"
        real = name if name.startswith("compute_") else f"sm_{name}"
        flags.append(f"-gencode=arch={virtual},code={real}")
    return flags


@dataclass(frozen=True)
class Compiled:
    source: Path
    object: Path
    report: str  # the compiler's own, with registers and spills


def compile_kernels(plan, folder, environ=os.environ):
    """Object files of the kernels; what did not change is not compiled again."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = int(environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(max(jobs, 1)) as pool:
        sources = kernel_sources(plan)
        return list(pool.map(lambda source: _compile(plan, source, folder, environ), sources))


def _compile(plan, source, folder, environ):
    flags = nvcc_flags(plan, source, environ)
    digest = hashlib.sha256(repr((plan.toolkit.version, flags)).encode())
    folders = dict.fromkeys([CUDA, CUDA / "sm80", source.parent])  # sm90 includes of sm80
    headers = [path for folder in folders for path in folder.glob("*.*h")]
    for path in [*sorted(headers), source]:
        digest.update(path.read_bytes())
    made = folder / f"{source.parent.name}_{source.stem}_{digest.hexdigest()[:16]}.o"
    report = made.with_suffix(".txt")
    if not (made.exists() and report.exists()):
        fresh = made.with_suffix(f".{os.getpid()}.o")
        command = [plan.toolkit.nvcc, *flags, f"-I{ROOT / 'csrc'}", "-c", str(source)]
        done = subprocess.run([*command, "-o", str(fresh)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed on {source.name}:\n{done.stderr}")
        report.write_text(done.stderr)
        fresh.rename(made)
    return Compiled(source, made, report.read_text())
