"""What the numbers were measured on: processor, cores that may be used, threads, versions, build.

`root` arguments are for the tests, which fake /proc and /sys below a folder.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .. import ops
from .._cpuinfo import ROOT, cpu_model, cpuinfo

# Those of csrc/cpu, narrowest first, by what Linux calls the flags that each needs (isa.cpp).
_AVX2 = {"avx2", "fma", "f16c"}
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_FLAGS = {
    "scalar": set(),
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512bf16": _AVX512 | {"avx512_bf16"},
}
ISAS = tuple(_FLAGS)
BUSY = 0.5  # share of the usable cores


@dataclass(frozen=True)
class Machine:
    """One measurement's surroundings; `record()` is what goes into JSON."""

    cpu: str
    cpus: int  # logical processors this process may run on
    physical_cores: int  # distinct cores among them
    cpu_quota: float | None  # processors' worth of time granted; None without a limit
    threads: int  # torch's intra-op threads
    load: float  # running processes, average over the last minute
    isa_detected: str  # one of ISAS
    isa_in_use: str | None  # None where the kernels cannot run
    gpu: str | None
    system: str
    python: str
    torch: str
    package: str

    def record(self) -> dict[str, object]:
        return asdict(self)

    def has_kernels(self) -> bool:
        """Whether this package has CPU kernels for such a machine."""
        return self.system.startswith("Linux") and self.system.endswith("x86_64")

    def is_busy(self) -> bool:
        """Whether others keep so many cores busy that timings suffer."""
        return self.load > BUSY * usable_cores(self)

    def describe(self) -> str:
        """One line for the foot of a table or picture."""
        return (
            f"{self.cpu}, {self.cpus} processors, threads: {self.threads}, "
            f"kernels {self.isa_in_use or 'not in use'}, torch {self.torch}, "
            f"resnet-fused {self.package}"
        )


def machine(root: Path = ROOT) -> Machine:
    return Machine(
        cpu=cpu_model(root),
        cpus=len(affinity()),
        physical_cores=physical_cores(affinity(), root),
        cpu_quota=cpu_quota(root),
        threads=torch.get_num_threads(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        isa_detected=isa_detected(root),
        isa_in_use=isa_in_use(),
        gpu=torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        package=package_version(),
    )


def affinity() -> set[int]:
    """Numbers of the logical processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def physical_cores(cpus: set[int], root: Path = ROOT) -> int:
    """Distinct cores among `cpus`: hyper-threads of one core count once."""
    cores = set()
    for cpu in cpus:
        siblings = _read(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings or str(cpu))
    return len(cores)


def cpu_quota(root: Path = ROOT) -> float | None:
    """Processors' worth of time that control groups (version 1 or 2) grant: the tightest."""
    limits = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            limits += [_quota_v2(folder) for folder in _levels(root / "sys/fs/cgroup", path)]
        elif "cpu" in controllers.split(","):
            for mount in (controllers, "cpu", "cpu,cpuacct"):
                limits += [
                    _quota_v1(folder) for folder in _levels(root / "sys/fs/cgroup" / mount, path)
                ]
    finite = [limit for limit in limits if limit is not None]
    return min(finite) if finite else None


def usable_cores(m: Machine) -> int:
    """Threads worth having: whole processors within affinity and quota, one a physical core."""
    quota = math.inf if m.cpu_quota is None else max(1, math.floor(m.cpu_quota + 1e-6))
    return int(min(m.physical_cores, quota))


def isa_detected(root: Path = ROOT, features: Collection[str] = ops.CPU_FEATURES) -> str:
    """The widest instruction set that the processor offers and this package has kernels for.

    features: what the extension found; without it /proc/cpuinfo tells.
    """
    if not features:
        flags = set((cpuinfo("flags", root) or "").split())
        features = {isa for isa, needed in _FLAGS.items() if needed <= flags}
    return max(ISAS, key=lambda isa: (isa in features, ISAS.index(isa)))


def isa_in_use() -> str | None:
    """The instruction set the C++ kernels run with; None where they cannot run."""
    try:
        isa = ops.cpu_isa()
    except RuntimeError:  # RESNET_FUSED_ISA asks for what is not there
        return None
    return None if isa == "none" else isa


def package_version() -> str:
    try:
        return importlib.metadata.version("resnet-fused")
    except importlib.metadata.PackageNotFoundError:
        return getattr(sys.modules.get("resnet_fused"), "__version__", "not installed")


def _quota_v2(folder: Path) -> float | None:
    words = (_read(folder / "cpu.max") or "max").split()
    return (
        None if words[0] == "max" else int(words[0]) / int(words[1] if len(words) > 1 else 100000)
    )


def _quota_v1(folder: Path) -> float | None:
    quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    if quota is None or period is None or int(quota) <= 0:
        return None
    return int(quota) / int(period)


def _levels(mount: Path, path: str) -> list[Path]:
    """The group's folder and all above it; within a container only the mount may be visible."""
    below = Path(path.lstrip("/"))
    return [mount / part for part in (below, *below.parents)]


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
