"""`resnet-fused doctor`: what it finds in made-up surroundings, and its exit code."""

import dataclasses
from pathlib import Path

import pytest
from click.testing import CliRunner

import resnet_fused as rf
from resnet_fused import _build_info, select, tuned
from resnet_fused._tuning_file import Answer
from resnet_fused.cli import main
from resnet_fused.commands import doctor
from resnet_fused.commands.doctor import NOTE, OK, WRONG, Facts, examine
from resnet_fused.measure import machine as machine_module
from resnet_fused.measure.machine import (
    ISAS,
    Machine,
    cpu_model,
    cpu_quota,
    isa_detected,
    machine,
    physical_cores,
    usable_cores,
)

MACHINE = Machine(
    cpu="A CPU",
    cpus=4,
    physical_cores=4,
    cpu_quota=None,
    threads=4,
    load=0.1,
    isa_detected="avx512",
    isa_in_use="avx512",
    gpu=None,
    system="Linux 6.1 x86_64",
    python="3.11.7",
    torch="2.13.0+cpu",
    package="0.1.0",
)
BUILT = _build_info.BuildInfo(
    "built", {"_C": _build_info.ExtensionInfo(True, "all was found")}, "g++ 12", "2.13.0"
)
NOT_BUILT = _build_info.BuildInfo(
    "not built", {"_C": _build_info.ExtensionInfo(False, "no C++ compiler")}
)
TUNING = tuned.Status(Path("/cache/tuning.json"))
GOOD = Facts(
    machine=MACHINE,
    build=BUILT,
    extension_error=None,
    compiler="g++ 12",
    gpu_device=False,
    torch_cuda=None,
    cuda_available=False,
    tuning=TUNING,
    environ={},
)


def facts(**changes):
    """GOOD with changes to it or to its machine."""
    fields = {f.name for f in dataclasses.fields(Machine)}
    of_machine = {k: v for k, v in changes.items() if k in fields}
    others = {k: v for k, v in changes.items() if k not in fields}
    return dataclasses.replace(GOOD, machine=dataclasses.replace(MACHINE, **of_machine), **others)


def test_a_missing_guard_is_told():
    """Without it every call is checked in Python."""
    missing = {"_guard": _build_info.ExtensionInfo(False, "Python.h is missing")}
    for build, status in ((BUILT, NOTE), (NOT_BUILT, OK)):
        parts = build.extensions | missing
        about = facts(build=dataclasses.replace(build, extensions=parts))
        found = [f for f in examine(about) if f.text.startswith("_guard")]
        assert [(f.status, f.text) for f in found] == [
            (status, "_guard was not built: Python.h is missing")
        ]
        assert ("python3-dev" in found[0].mend) == (status == NOTE)


def finding(topic, **changes):
    (found,) = [f for f in examine(facts(**changes)) if f.topic == topic]
    return found


def write(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")


# ---- what is read from the system ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "quota"), [("150000 100000", 1.5), ("max 100000", None), ("200000", 2.0)]
)
def test_quota_of_cgroup_v2(tmp_path, text, quota):
    write(tmp_path, "proc/self/cgroup", "0::/jobs/mine")
    write(tmp_path, "sys/fs/cgroup/jobs/mine/cpu.max", text)
    assert cpu_quota(tmp_path) == quota


def test_the_tightest_level_counts(tmp_path):
    write(tmp_path, "proc/self/cgroup", "0::/jobs/mine")
    write(tmp_path, "sys/fs/cgroup/jobs/mine/cpu.max", "800000 100000")
    write(tmp_path, "sys/fs/cgroup/jobs/cpu.max", "300000 100000")
    assert cpu_quota(tmp_path) == 3.0


def test_quota_seen_from_within_a_container(tmp_path):
    """The group's own path is the host's; only the mount's root shows."""
    write(tmp_path, "proc/self/cgroup", "0::/host/docker/0123")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "250000 100000")
    assert cpu_quota(tmp_path) == 2.5


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
def test_quota_of_cgroup_v1(tmp_path, mount):
    write(tmp_path, "proc/self/cgroup", "9:memory:/box\n4:cpu,cpuacct:/box\n0::/")
    write(tmp_path, f"sys/fs/cgroup/{mount}/box/cpu.cfs_quota_us", "50000")
    write(tmp_path, f"sys/fs/cgroup/{mount}/box/cpu.cfs_period_us", "25000")
    assert cpu_quota(tmp_path) == 2.0
    write(tmp_path, f"sys/fs/cgroup/{mount}/box/cpu.cfs_quota_us", "-1")
    assert cpu_quota(tmp_path) is None


def test_no_control_groups(tmp_path):
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("flags", "isa"),
    [
        ("fpu sse2", "scalar"),
        ("avx2 fma", "scalar"),
        ("avx2 fma f16c", "avx2"),
        ("avx2 fma f16c avx512f avx512bw avx512dq", "avx2"),
        ("avx2 fma f16c avx512f avx512bw avx512dq avx512vl", "avx512"),
        ("avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_bf16", "avx512bf16"),
    ],
)
def test_instruction_set_detected(tmp_path, flags, isa):
    write(tmp_path, "proc/cpuinfo", f"processor\t: 0\nmodel name\t: A CPU\nflags\t\t: {flags}")
    assert isa_detected(tmp_path, features=()) == isa
    assert cpu_model(tmp_path) == "A CPU"


def test_the_extension_knows_the_instruction_sets(tmp_path):
    assert isa_detected(tmp_path, features={"scalar", "avx2", "amx_bf16"}) == "avx2"
    if rf.ops.extension_error is None:
        assert set(rf.ops.CPU_FEATURES) <= {*ISAS, "amx_bf16"}
        assert isa_detected(tmp_path) == isa_detected(features=())


def test_hyper_threads_count_once(tmp_path):
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        write(
            tmp_path,
            f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list",
            siblings,
        )
    assert physical_cores({0, 1, 2, 3}, tmp_path) == 2
    assert physical_cores({0, 1}, tmp_path) == 2
    assert physical_cores({0, 2}, tmp_path) == 1
    assert physical_cores({7, 8}, tmp_path) == 2, "nothing known of them"


@pytest.mark.parametrize(("quota", "usable"), [(None, 4), (2.5, 2), (0.5, 1), (64, 4)])
def test_usable_cores(quota, usable):
    assert usable_cores(facts(cpu_quota=quota).machine) == usable


def test_this_machine():
    m = machine()
    assert m.cpus >= m.physical_cores >= 1
    assert m.threads >= 1
    assert m.package[0].isdigit()
    assert m.record()["torch"] == m.torch


# ---- findings ------------------------------------------------------------------------------------


def test_all_is_well():
    found = examine(GOOD)
    assert {f.status for f in found} == {OK}
    assert not any(f.mend for f in found)
    topics = ["versions", "torch", "build", "extension", "compiler", "instructions", "tuning"]
    assert [f.topic for f in found] == [*topics, "CUDA", "threads", "load"]


def test_old_torch():
    found = finding("torch", torch="2.10.1")
    assert (found.status, found.mend) == (WRONG, "pip install --upgrade 'torch>=2.11'")
    assert finding("torch", torch="2.11.0a0+git1").status == OK
    assert finding("torch", torch="3.0").status == OK


def test_not_built():
    found = finding("build", build=NOT_BUILT, extension_error="no _C", compiler=None)
    assert found.status == WRONG
    assert "no C++ compiler" in found.text
    assert found.mend.startswith("apt install g++ && pip install")
    found = finding("build", build=NOT_BUILT, extension_error="no _C", compiler="g++ 13")
    assert found.mend.startswith("pip install")
    other = finding("build", build=NOT_BUILT, extension_error="no _C", system="Darwin 24 arm64")
    assert (other.status, other.mend) == (NOTE, "")


def test_built_but_not_loaded():
    found = finding("extension", extension_error="undefined symbol: foo", isa_in_use=None)
    assert found.status == WRONG
    assert "undefined symbol: foo" in found.text
    assert "--force-reinstall" in found.mend


def test_extension_switched_off():
    environ = {"RESNET_FUSED_DISABLE_EXT": "1"}
    found = finding("extension", extension_error="it is set", environ=environ)
    assert (found.status, found.mend) == (WRONG, "unset RESNET_FUSED_DISABLE_EXT")


@pytest.mark.parametrize("value", ["0", ""])
def test_a_switch_that_is_off_is_not_what_is_wrong(value):
    environ = {"RESNET_FUSED_DISABLE_EXT": value}
    found = finding("extension", extension_error="undefined symbol: foo", environ=environ)
    assert (found.status, found.mend) == (WRONG, doctor.REBUILD)
    found = finding("CUDA kernels", cuda_available=True, cuda_error="no image", environ=environ)
    assert (found.status, found.mend) == (NOTE, doctor.REBUILD)


def test_no_compiler_is_only_a_note():
    found = finding("compiler", compiler=None)
    assert (found.status, found.mend) == (NOTE, "apt install g++")


def test_instruction_set_below_the_processors():
    held = finding("instructions", isa_in_use="avx2", environ={"RESNET_FUSED_ISA": "avx2"})
    assert (held.status, held.mend) == (NOTE, "unset RESNET_FUSED_ISA")
    assert finding("instructions", isa_in_use="avx2").status == WRONG
    assert finding("instructions", isa_in_use="avx2", isa_detected="avx2").status == OK
    assert finding("instructions", isa_detected="avx512bf16").status == WRONG
    assert finding("instructions", isa_in_use="avx512bf16").status == OK
    assert finding("instructions", isa_in_use="of a later version").status == OK
    bad = finding("instructions", isa_in_use=None, environ={"RESNET_FUSED_ISA": "neon"})
    assert (bad.status, bad.mend) == (WRONG, "unset RESNET_FUSED_ISA")
    assert finding("instructions", isa_in_use=None, extension_error="none").status == NOTE


FREE = {"RESNET_FUSED_FORCE": "none", "RESNET_FUSED_EXACT_NONFINITE": "0"}


def test_forced_selection():
    assert not [f for f in examine(GOOD) if f.topic == "selection"]
    assert not [f for f in examine(facts(environ=FREE)) if f.topic == "selection"]
    for variable, value in (("RESNET_FUSED_FORCE", "torch"), ("RESNET_FUSED_EXACT_NONFINITE", "1")):
        found = finding("selection", environ=FREE | {variable: value})
        assert (found.status, found.mend) == (NOTE, f"unset {variable}")


def test_a_bad_force_is_wrong():
    found = finding("selection", environ={"RESNET_FUSED_FORCE": "fast"})
    assert (found.status, found.mend) == (WRONG, "unset RESNET_FUSED_FORCE")
    assert found.text == (
        f"RESNET_FUSED_FORCE must be one of {', '.join(select.FORCES)}, got 'fast'"
    )


@pytest.mark.parametrize(
    ("changes", "status", "text", "mend"),
    [
        ({}, OK, "/cache/tuning.json is not there yet: convolutions are chosen by rule", ""),
        (
            {"exists": True},
            OK,
            "/cache/tuning.json has no entries: convolutions are chosen by rule",
            "",
        ),
        (
            {"exists": True, "here": 11},
            OK,
            "/cache/tuning.json is valid, entries: 11 for this machine",
            "",
        ),
        (
            {"exists": True, "here": 11, "elsewhere": 2},
            OK,
            "/cache/tuning.json is valid, entries: 11 for this machine, "
            "2 for other threads, versions or machines",
            "",
        ),
        (
            {"exists": True, "elsewhere": 2},
            NOTE,
            "/cache/tuning.json is valid, entries: none for this machine, "
            "2 for other threads, versions or machines",
            "resnet-fused tune",
        ),
        (
            {"exists": True, "problem": "is damaged: it is not JSON"},
            NOTE,
            "/cache/tuning.json is damaged: it is not JSON: it counts as absent",
            "mv /cache/tuning.json /cache/tuning.json.bak",
        ),
        (
            {"writable": False},
            NOTE,
            "/cache/tuning.json cannot be written: "
            "what `resnet-fused tune` measures would not be kept",
            "export RESNET_FUSED_TUNE_FILE=FILE",
        ),
        ({"path": None}, OK, "kept in no file: no home folder is known", ""),
    ],
)
def test_tuning(changes, status, text, mend):
    found = finding("tuning", tuning=dataclasses.replace(TUNING, **changes))
    assert (found.status, found.text, found.mend) == (status, text, mend)


def test_tuning_switched_off():
    environ = {"RESNET_FUSED_TUNE_FILE": "none"}
    found = finding("tuning", tuning=tuned.Status(None), environ=environ)
    assert (found.status, found.text) == (OK, "kept in no file: RESNET_FUSED_TUNE_FILE=none")


def test_status_of_the_tuning_file(tuning_file, tmp_path):
    assert tuned.status() == tuned.Status(tuning_file)
    tuned.learn({"a convolution": Answer(1, "torch", {"torch": 1.0})})
    assert tuned.status() == tuned.Status(tuning_file, exists=True, here=1)
    text = tuning_file.read_text()
    tuning_file.write_text(text.replace("threads: ", "threads: 9"))
    assert tuned.status() == tuned.Status(tuning_file, exists=True, elsewhere=1)
    tuning_file.write_text(text[:-9])
    assert tuned.status() == tuned.Status(
        tuning_file, exists=True, problem="is damaged: it is not JSON"
    )
    below = {"RESNET_FUSED_TUNE_FILE": str(tuning_file / "below")}
    assert not tuned.status(below).writable
    assert tuned.status({"RESNET_FUSED_TUNE_FILE": "none"}) == tuned.Status(None)


def test_cuda():
    assert finding("CUDA").text == "no NVIDIA GPU here"
    assert finding("CUDA", gpu_device=True).status == NOTE
    assert finding("CUDA", gpu_device=True, torch_cuda="13.0").status == WRONG
    good = finding(
        "CUDA", gpu_device=True, torch_cuda="13.0", cuda_available=True, gpu="NVIDIA H100"
    )
    assert good.status == OK
    assert "NVIDIA H100" in good.text


def test_cuda_kernels():
    """They are missed only where there is a GPU."""
    assert not [f for f in examine(facts(cuda_error="not built")) if f.topic == "CUDA kernels"]
    assert finding("CUDA kernels", cuda_available=True).status == OK
    missed = finding("CUDA kernels", cuda_available=True, cuda_error="no nvcc")
    assert (missed.status, missed.mend != "") == (NOTE, True)
    assert missed.text == "the CUDA C++ kernels do not run here: no nvcc"


@pytest.mark.parametrize(
    ("changes", "status", "count"),
    [
        ({"threads": 4}, OK, None),
        ({"threads": 5}, WRONG, 4),  # more than processors
        ({"threads": 4, "cpu_quota": 2.0}, WRONG, 2),
        ({"threads": 2, "cpu_quota": 2.0}, OK, None),
        ({"threads": 2, "cpu_quota": 1.5}, WRONG, 1),
        ({"threads": 1, "cpu_quota": 0.5}, OK, None),  # fewer than one thread there cannot be
        ({"threads": 4, "physical_cores": 2}, NOTE, 2),  # hyper-threads
        ({"threads": 2}, NOTE, 4),  # cores lie idle
    ],
)
def test_threads_against_quota(changes, status, count):
    found = finding("threads", **changes)
    assert found.status == status
    assert found.mend == (f"export OMP_NUM_THREADS={count}" if count else "")


def test_the_variable_that_set_the_threads_is_named():
    found = finding("threads", threads=9, environ={"OMP_NUM_THREADS": "9"})
    assert "OMP_NUM_THREADS=9" in found.text


def test_busy_machine():
    assert finding("load", load=0.2).status == OK
    assert finding("load", load=3.0).status == NOTE
    assert finding("load", load=1.5, cpu_quota=2.0).status == NOTE


def test_find_compiler():
    assert doctor.find_compiler({"CXX": "no-such-compiler -O2", "PATH": ""}) == (
        doctor.find_compiler({})
    )


# ---- the command ---------------------------------------------------------------------------------


def test_exit_code_when_fine(monkeypatch):
    monkeypatch.setattr(doctor, "gather", lambda: GOOD)
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "wrong" not in result.output


def test_notes_do_not_fail(monkeypatch):
    monkeypatch.setattr(doctor, "gather", lambda: facts(load=9.0, compiler=None))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0
    assert "apt install g++" in result.output


def test_exit_code_and_commands_when_wrong(monkeypatch):
    bad = facts(threads=16, torch="2.3.0")
    monkeypatch.setattr(doctor, "gather", lambda: bad)
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    lines = [line.strip() for line in result.output.splitlines()]
    assert "export OMP_NUM_THREADS=4" in lines, "alone on its line, ready to be copied"
    assert "pip install --upgrade 'torch>=2.11'" in lines
    assert "Error: 2 things are wrong; the commands above mend that." in lines


def test_the_command_tells_of_a_bad_force(monkeypatch):
    monkeypatch.setattr(select, "_forced", "fast")
    monkeypatch.setenv("RESNET_FUSED_FORCE", "fast")
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "RESNET_FUSED_FORCE must be one of none, ours, " in result.output
    assert "unset RESNET_FUSED_FORCE" in result.output


def test_gather_reads_this_machine(tmp_path, monkeypatch):
    """A quota below torch's threads, in files made up for the test, becomes a finding."""
    write(tmp_path, "proc/self/cgroup", "0::/")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "50000 100000")
    monkeypatch.setattr(machine_module.torch, "get_num_threads", lambda: 3)
    gathered = doctor.gather(tmp_path, {})
    assert gathered.machine.cpu_quota == 0.5
    (threads,) = [f for f in examine(gathered) if f.topic == "threads"]
    assert (threads.status, threads.mend) == (WRONG, "export OMP_NUM_THREADS=1")
