"""`resnet-fused doctor`: whether this machine runs the kernels fast, and what mends it if not."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
from rich.markup import escape

from .. import _build_info, _gpu_kernels, ops, select, tuned
from .._environment import DISABLE_EXT, EXACT_NONFINITE, FORCE, ISA, TUNE_FILE, is_set
from ..measure.machine import ISAS, ROOT, Machine, machine, usable_cores
from ..measure.peak import multiply_peak
from .console import console

OK, NOTE, WRONG = "ok", "note", "wrong"
LOOKS = {OK: "[green]ok   [/green]", NOTE: "[yellow]note [/yellow]", WRONG: "[red]wrong[/red]"}
OLDEST_TORCH = (2, 11)
REBUILD = "pip install --force-reinstall --no-deps -e ."
LIMITS = {FORCE: "none", EXACT_NONFINITE: "0"}  # free choice


@dataclass(frozen=True)
class Finding:
    """One thing looked at. Anything but ok carries the command that mends it, if there is one."""

    status: str
    topic: str
    text: str
    mend: str = ""


@dataclass(frozen=True)
class Facts:
    """All that the findings follow from, so that a test can make them up."""

    machine: Machine
    build: _build_info.BuildInfo
    extension_error: str | None
    compiler: str | None  # first line of the compiler's --version, None without one
    gpu_device: bool  # an NVIDIA device node exists
    torch_cuda: str | None  # CUDA version torch was built for
    cuda_available: bool
    tuning: tuned.Status
    environ: Mapping[str, str] = field(default_factory=dict)
    peaks: Mapping[str, float] = field(default_factory=dict)  # dtype -> multiply-adds a second
    cuda_error: str | None = None  # why the CUDA C++ kernels do not serve the GPU


def gather(root: Path = ROOT, environ: Mapping[str, str] = os.environ) -> Facts:
    return Facts(
        machine=machine(root),
        build=_build_info.read(),
        extension_error=ops.extension_error,
        compiler=find_compiler(environ),
        gpu_device=(root / "dev/nvidia0").exists(),
        torch_cuda=torch.version.cuda,
        cuda_available=torch.cuda.is_available(),
        tuning=tuned.status(environ),
        environ=environ,
        peaks=measured_peaks(),
        cuda_error=_cuda_error(),
    )


def _cuda_error() -> str | None:
    if _gpu_kernels.extension_error is not None or not torch.cuda.is_available():
        return _gpu_kernels.extension_error
    index = torch.cuda.current_device()
    if torch.cuda.get_device_capability(index) < _gpu_kernels.OLDEST_CAPABILITY:
        return None  # nothing would mend that
    return _gpu_kernels.cuda_error(torch.device("cuda", index))


@click.command()
def doctor() -> None:
    """Check versions, build, instruction set, CUDA and threads; exit 1 when something is wrong.

    Each finding that is not fine comes with the command that mends it.
    """
    out = console()
    findings = examine(gather())
    width = max(len(f.topic) for f in findings)
    for f in findings:
        lines = [f"{LOOKS[f.status]} {f.topic:{width}}  {escape(f.text)}"]
        if f.mend:
            lines.append(f"{'':{width + 8}}[bold]{escape(f.mend)}[/bold]")
        out.print("\n".join(lines), highlight=False, soft_wrap=True)
    wrong = sum(f.status == WRONG for f in findings)
    if wrong:
        things = "1 thing is" if wrong == 1 else f"{wrong} things are"
        raise click.ClickException(f"{things} wrong; the commands above mend that.")


def examine(facts: Facts) -> list[Finding]:
    """All findings, in the order in which they are printed."""
    return [finding for check in CHECKS for finding in check(facts)]


def find_compiler(environ: Mapping[str, str]) -> str | None:
    """First line of `--version` of CXX, g++, c++ or clang++, whichever is there first."""
    for command in (environ.get("CXX", ""), "g++", "c++", "clang++"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            answer = subprocess.run(
                [words[0], "--version"], capture_output=True, text=True, check=False
            )
            return (answer.stdout.splitlines() or [command])[0]
    return None


def measured_peaks() -> dict[str, float]:
    """Multiply-adds a second that this machine can do, for each dtype whose products it has."""
    peaks = {name: multiply_peak(getattr(torch, name)) for name in ("float32", "bfloat16")}
    return {name: peak for name, peak in peaks.items() if peak is not None}


def _versions(facts: Facts) -> Iterator[Finding]:
    m = facts.machine
    yield Finding(OK, "versions", f"resnet-fused {m.package}, Python {m.python}, {m.system}")
    oldest = ".".join(map(str, OLDEST_TORCH))
    if _version(m.torch) < OLDEST_TORCH:
        mend = f"pip install --upgrade 'torch>={oldest}'"
        yield Finding(WRONG, "torch", f"{m.torch} is older than {oldest}", mend)
    else:
        yield Finding(OK, "torch", m.torch)


def _build(facts: Facts) -> Iterator[Finding]:
    build = facts.build
    for name, extension in build.extensions.items():
        if extension.built:
            by = f" by {build.compiler} for torch {build.torch}" if build.compiler else ""
            yield Finding(OK, "build", f"{name} was built{by}: {extension.reason}")
        elif name == "_C" and not facts.machine.has_kernels():
            yield Finding(NOTE, "build", f"{name} was not built: {extension.reason}")
        elif name == "_C" and facts.extension_error is None:
            yield Finding(NOTE, "build", f"{name} works, but: {extension.reason}")
        elif name == "_C":
            mend = REBUILD if facts.compiler else f"apt install g++ && {REBUILD}"
            yield Finding(WRONG, "build", f"{name} was not built: {extension.reason}", mend)
        elif name == "_guard" and build.built:
            # Then each call is checked in Python, chains and `graph` are off.
            mend = f"apt install python3-dev && {REBUILD}"
            yield Finding(NOTE, "build", f"{name} was not built: {extension.reason}", mend)
        else:
            yield Finding(OK, "build", f"{name} was not built: {extension.reason}")


def _extension(facts: Facts) -> Iterator[Finding]:
    if facts.extension_error is None:
        yield Finding(OK, "extension", "the C++ kernels are loaded")
    elif is_set(DISABLE_EXT, facts.environ):
        text = f"not loaded: {facts.extension_error}"
        yield Finding(WRONG, "extension", text, f"unset {DISABLE_EXT}")
    elif facts.build.built:
        yield Finding(WRONG, "extension", f"built but not loaded: {facts.extension_error}", REBUILD)
    else:
        text = "not loaded, so on the CPU fused modules run through eager PyTorch"
        yield Finding(NOTE, "extension", text)


def _compiler(facts: Facts) -> Iterator[Finding]:
    if facts.compiler:
        yield Finding(OK, "compiler", facts.compiler)
    else:
        text = "none found; torch.compile on CPU and building this package need one"
        yield Finding(NOTE, "compiler", text, "apt install g++")


def _isa(facts: Facts) -> Iterator[Finding]:
    m = facts.machine
    asked = facts.environ.get(ISA)
    if m.isa_in_use is None and facts.extension_error is None and asked:
        text = f"{ISA}={asked} is not an instruction set of {m.cpu} ({m.isa_detected})"
        yield Finding(WRONG, "instructions", text, f"unset {ISA}")
    elif m.isa_in_use is None:
        yield Finding(NOTE, "instructions", f"{m.isa_detected} detected on {m.cpu}, none in use")
    elif _rank(m.isa_in_use) >= _rank(m.isa_detected):
        text = f"{m.isa_detected} detected on {m.cpu}, {m.isa_in_use} in use"
        yield Finding(OK, "instructions", text)
    elif asked:
        text = f"{ISA} holds the kernels to {m.isa_in_use}, {m.cpu} has {m.isa_detected}"
        yield Finding(NOTE, "instructions", text, f"unset {ISA}")
    else:
        text = f"{m.isa_in_use} in use, {m.cpu} has {m.isa_detected}"
        yield Finding(WRONG, "instructions", text, REBUILD)


def _arithmetic(facts: Facts) -> Iterator[Finding]:
    if facts.peaks:
        speeds = ", ".join(f"{2e-9 * peak:.0f} in {name}" for name, peak in facts.peaks.items())
        text = f"measured now on {facts.machine.threads} threads, in registers: GFLOP/s {speeds}"
        yield Finding(OK, "arithmetic", text)


def _selection(facts: Facts) -> Iterator[Finding]:
    for variable, default in LIMITS.items():
        value = facts.environ.get(variable) or default
        if variable == FORCE and value not in select.FORCES:
            text = f"{variable} must be one of {', '.join(select.FORCES)}, got {value!r}"
            yield Finding(WRONG, "selection", text, f"unset {variable}")
        elif value != default:
            text = f"{variable}={value} prevents the choice of the fastest kernel"
            yield Finding(NOTE, "selection", text, f"unset {variable}")


def _tuning(facts: Facts) -> Iterator[Finding]:
    """A file that is no use only costs speed: notes."""
    t = facts.tuning
    others = f"{t.elsewhere} for other threads, versions or machines" if t.elsewhere else ""
    if t.path is None:
        text = "kept in no file: no home folder is known"
        if facts.environ.get(TUNE_FILE):
            text = f"kept in no file: {TUNE_FILE}={facts.environ[TUNE_FILE]}"
        yield Finding(OK, "tuning", text)
    elif t.problem:
        mend = f"mv {shlex.quote(str(t.path))} {shlex.quote(f'{t.path}.bak')}"
        yield Finding(NOTE, "tuning", f"{t.path} {t.problem}: it counts as absent", mend)
    elif not t.writable:
        text = f"{t.path} cannot be written: what `resnet-fused tune` measures would not be kept"
        yield Finding(NOTE, "tuning", text, f"export {TUNE_FILE}=FILE")
    elif t.here:
        text = f"{t.path} is valid, entries: {t.here} for this machine"
        yield Finding(OK, "tuning", f"{text}, {others}" if others else text)
    elif others:
        text = f"{t.path} is valid, entries: none for this machine, {others}"
        yield Finding(NOTE, "tuning", text, "resnet-fused tune")
    else:
        state = "has no entries" if t.exists else "is not there yet"
        yield Finding(OK, "tuning", f"{t.path} {state}: convolutions are chosen by rule")


def _cuda(facts: Facts) -> Iterator[Finding]:
    if facts.cuda_available:
        yield Finding(OK, "CUDA", f"{facts.machine.gpu}, torch built for CUDA {facts.torch_cuda}")
    elif not facts.gpu_device:
        yield Finding(OK, "CUDA", "no NVIDIA GPU here")
    elif facts.torch_cuda is None:
        text = f"there is an NVIDIA GPU, but torch {facts.machine.torch} is built for CPU only"
        mend = "pip uninstall torch && pip install torch  # a CUDA build"
        yield Finding(NOTE, "CUDA", text, mend)
    else:
        text = f"there is an NVIDIA GPU, but torch (CUDA {facts.torch_cuda}) cannot use it"
        yield Finding(WRONG, "CUDA", text, "nvidia-smi  # shows whether the driver works")


def _cuda_kernels(facts: Facts) -> Iterator[Finding]:
    """Triton and PyTorch serve a GPU without them; without a GPU they are not missed."""
    if not facts.cuda_available or is_set(DISABLE_EXT, facts.environ):
        return
    if facts.cuda_error is None:
        yield Finding(OK, "CUDA kernels", "the CUDA C++ kernels are loaded")
    else:
        text = f"the CUDA C++ kernels do not run here: {facts.cuda_error}"
        yield Finding(NOTE, "CUDA kernels", text, REBUILD)


def _threads(facts: Facts) -> Iterator[Finding]:
    """More threads than processors granted is the costliest mistake: they wait for each other."""
    m = facts.machine
    best = usable_cores(m)
    granted = m.cpus if m.cpu_quota is None else min(m.cpus, m.cpu_quota)
    quota = "no quota" if m.cpu_quota is None else f"a quota of {m.cpu_quota:g}"
    about = (
        f"torch uses {m.threads} threads; {m.cpus} processors ({m.physical_cores} cores), {quota}"
    )
    variable = facts.environ.get("OMP_NUM_THREADS")
    if variable:
        about += f", OMP_NUM_THREADS={variable}"
    if m.threads > max(1.0, granted):
        yield Finding(
            WRONG, "threads", f"{about}: too many, they wait for each other", _set_threads(best)
        )
    elif m.threads > best:
        yield Finding(
            NOTE,
            "threads",
            f"{about}: more than cores, {best} is usually faster",
            _set_threads(best),
        )
    elif m.threads < best:
        yield Finding(NOTE, "threads", f"{about}: {best} could be used", _set_threads(best))
    else:
        yield Finding(OK, "threads", about)


def _load(facts: Facts) -> Iterator[Finding]:
    m = facts.machine
    text = f"{m.load:.1f} running processes in the last minute"
    if m.is_busy():
        mend = "ps -eo pcpu,pid,args --sort=-pcpu | head  # who they are"
        yield Finding(NOTE, "load", f"{text}: measured times will vary", mend)
    else:
        yield Finding(OK, "load", text)


CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _versions, _build, _extension, _compiler, _isa, _arithmetic, _selection, _tuning, _cuda,
    _cuda_kernels, _threads, _load,
)  # fmt: skip


def _set_threads(count: int) -> str:
    return f"export OMP_NUM_THREADS={count}"


def _rank(isa: str) -> int:
    """Position among the instruction sets; a name this file does not know counts as the widest."""
    return ISAS.index(isa) if isa in ISAS else len(ISAS)


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)
