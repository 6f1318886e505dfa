"""gpu-check without a GPU: stages over stand-in commands, records, what a sanitizer says."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

pytest.importorskip("benchmarks", reason="the benchmarks are not in this copy")

from click.testing import CliRunner

from benchmarks.gpu_check import (
    command,
    facts,
    faults,
    left_out,
    record,
    run,
    sanitize,
    smoke,
    stages,
    tuning,
    watched,
)
from benchmarks.gpu_check.record import FAILED, INCOMPLETE, OUT_OF_TIME, PASSED
from benchmarks.gpu_check.run import Stage

ROOT = Path(__file__).resolve().parent.parent
GPU = {"gpu": "NVIDIA H200", "driver": "1.2", "torch": "2.11", "cuda": "13.0"}
GPU |= {"triton": "3.6.0", "nvcc": "13.0.88", "sources": "0123", "commit": "abc"}


def python(code):
    return (sys.executable, "-c", code)


def stage(name, code="", limit_s=20.0, **rest):
    return Stage(name, [python(code)], limit_s, **rest)


def check(folder, todo, current=None, total_s=100.0):
    """What `run` makes of the stages: outcomes by name, and the record."""
    out, scratch = folder / "out", folder / "scratch"
    for path in (out, scratch):
        path.mkdir(exist_ok=True)
    current = record.new(GPU, total_s) if current is None else current
    run.run(todo, current, out, cwd=folder, scratch=scratch)
    return {name: found["outcome"] for name, found in current["stages"].items()}, current


# ---- commands ----------------------------------------------------------------------------------


def test_a_command_ends_with_its_children(tmp_path, monkeypatch):
    """Also with those that do not end when they are asked to."""
    monkeypatch.setattr(command, "GRACE_S", 1.0)
    mark, child = tmp_path / "mark", tmp_path / "child.sh"
    child.write_text(f"trap '' INT TERM\nwhile :; do echo >> {mark}; sleep 0.02; done\n")
    ended = command.run(["sh", "-c", f"sh {child}; true"], tmp_path / "log", 1.5)
    assert ended.code is None
    assert ended.seconds < 20
    lines = mark.read_text()
    time.sleep(0.3)
    assert mark.read_text() == lines


def test_a_command_that_hangs_says_where(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "GRACE_S", 0.5)
    code = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code += "def wait_for_kernel(): time.sleep(60)\nwait_for_kernel()"
    ended = command.run(python(code), tmp_path / "log", 2.0)
    assert ended.code is None
    assert "in wait_for_kernel" in ended.log


def test_what_a_command_printed_is_kept(tmp_path):
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(5)"
    ended = command.run(python(code), tmp_path / "log", 20, env={"PYTHONUNBUFFERED": "1"})
    assert (ended.code, ended.log) == (5, "out\nerr\n")
    missing = command.run(["no-such-program"], tmp_path / "log", 20)
    assert (missing.code, missing.log) == (127, "no-such-program: No such file or directory\n")
    killed = command.run(python("import os; os.kill(os.getpid(), 9)"), tmp_path / "log", 20)
    assert killed.code == -9


# ---- stages ------------------------------------------------------------------------------------


def test_later_stages_run_when_an_earlier_one_fails(tmp_path):
    todo = [
        stage("test", "import time; time.sleep(30)", limit_s=1.0),
        stage("build", "print('so it is'); raise SystemExit(4)"),
        stage("sanitize", "raise SystemExit(3)"),
        stage("bench"),
    ]
    outcomes, current = check(tmp_path, todo)
    assert outcomes["test"] == OUT_OF_TIME
    assert outcomes["build"] == FAILED
    assert current["stages"]["test"]["seconds"] < 20
    assert outcomes["sanitize"] == INCOMPLETE
    assert outcomes["bench"] == PASSED
    assert current["stages"]["build"]["why"] == "exit status 4"
    assert current["stages"]["build"]["tail"].endswith("so it is")
    assert record.exit_code(current, tuple(outcomes)) == 1


def test_time_that_a_stage_leaves_is_there_for_the_next(tmp_path):
    given = {}
    todo = [stage("build", limit_s=40.0), stage("test", limit_s=5.0), stage("bench", limit_s=5.0)]
    current = record.new(GPU, 48.0)
    run.run(todo, current, tmp_path, cwd=tmp_path, scratch=tmp_path, on_stage=given.__setitem__)
    assert given["build"] == 40  # its own, although the total is too little for all
    for name, own in (("test", 40), ("bench", 45)):
        assert own - 25 < given[name] < own + 5, name
    assert given["test"] == pytest.approx(current["stages"]["test"]["limit_s"], abs=0.1)


def test_no_time_is_left(tmp_path):
    outcomes, current = check(tmp_path, [stage("build"), stage("bench")], total_s=0.0)
    assert outcomes == {"build": OUT_OF_TIME, "bench": OUT_OF_TIME}
    assert current["stages"]["bench"]["why"] == "no time was left"


def test_commands_of_a_stage_run_until_one_fails(tmp_path):
    words = [
        python("print('one')"),
        python("print('two'); raise SystemExit(1)"),
        python("print(3)"),
    ]
    outcomes, _ = check(tmp_path, [Stage("build", words, 20.0)])
    assert outcomes == {"build": FAILED}
    printed = (tmp_path / "out" / "build.log").read_text().splitlines()
    assert [line for line in printed if not line.startswith("$")] == ["one", "two"]


def test_a_command_learns_how_long_it_has(tmp_path):
    code = f"import os; print(float(os.environ[{run.SECONDS!r}]) < 20, os.environ['MINE'])"
    _, current = check(tmp_path, [stage("tune", code, env={"MINE": "yes"}, log=False)])
    assert current["stages"]["tune"]["tail"].endswith("True yes")
    assert not (tmp_path / "out" / "tune.log").exists()


def test_the_record_is_whole_after_each_stage(tmp_path):
    """The second stage looks at what the first has left behind."""
    path = str(tmp_path / "out" / "summary.json")
    code = f"import json; print(list(json.load(open({path!r}))['stages']))"
    outcomes, current = check(tmp_path, [stage("build"), stage("test", code)])
    assert outcomes == {"build": PASSED, "test": PASSED}
    assert current["stages"]["test"]["tail"].endswith("['build']")
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == current
    text = (tmp_path / "out" / "summary.md").read_text()
    for word in ("NVIDIA H200", "driver: 1.2", "torch: 2.11", "triton: 3.6.0", "commit: abc"):
        assert word in text
    assert "| test | passed |" in text


def test_long_logs_are_cut(tmp_path):
    check(tmp_path, [stage("test", "print('x' * 300_000); print('the end')")])
    kept = (tmp_path / "out" / "test.log").read_text()
    assert len(kept) <= run.LARGEST_LOG
    assert kept.endswith("the end\n")


def test_resuming_leaves_out_what_passed(tmp_path):
    ran = tmp_path / "ran"
    append = f"open({str(ran)!r}, 'a').write('{{}}')"
    todo = [
        stage("build", append.format("b"), repeat=True),
        stage("test", append.format("t")),
        stage("bench", append.format("n") + "; raise SystemExit(1)"),
    ]
    check(tmp_path, todo)
    again = record.resumed(tmp_path / "out", record.new(GPU, 100.0))
    assert list(again["stages"]) == ["build", "test"]
    outcomes, _ = check(tmp_path, todo, again)
    assert ran.read_text() == "btnbn"
    assert outcomes == {"build": PASSED, "test": PASSED, "bench": FAILED}


@pytest.mark.parametrize("key", record.SAME)
def test_resuming_other_work_starts_anew(tmp_path, key):
    check(tmp_path, [stage("test")])
    fresh = record.new(GPU | {key: "other"}, 100.0)
    assert record.resumed(tmp_path / "out", fresh) == fresh


@pytest.mark.parametrize("text", ["", "{", "[]", '{"facts": {}}', '{"facts": {}, "stages": 3}'])
def test_a_damaged_record_is_none(tmp_path, text):
    (tmp_path / record.JSON).write_text(text)
    fresh = record.new({}, 100.0)
    assert record.resumed(tmp_path, fresh) == fresh


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ((PASSED, PASSED), 0),
        ((PASSED, FAILED), 1),
        ((PASSED, OUT_OF_TIME), 1),
        ((INCOMPLETE, FAILED), 1),
        ((PASSED, INCOMPLETE), 3),
        ((PASSED, None), 3),
    ],
)
def test_exit_codes(outcomes, code):
    found = {str(i): {"outcome": outcome} for i, outcome in enumerate(outcomes) if outcome}
    assert record.exit_code({"stages": found}, ("0", "1")) == code


# ---- the real stages ---------------------------------------------------------------------------


def test_the_stages_fit_into_eight_minutes_and_eight_files(tmp_path):
    from benchmarks.gpu_check.__main__ import main as gpu_check_main

    todo = stages.stages(tmp_path, tmp_path)
    assert tuple(each.name for each in todo) == stages.NAMES
    usual = [each for each in todo if each.name in stages.USUAL]
    assert sum(each.limit_s for each in usual) <= 480
    total = next(p.default for p in gpu_check_main.params if p.name == "total")
    assert total + command.GRACE_S <= 480
    words = [word for each in todo for line in each.commands for word in line]
    files = {f"{each.name}.log" for each in todo if each.log} | {record.JSON, record.MARKDOWN}
    files.discard("slow.log")  # beside whose stage few others run
    files |= {Path(word).name for word in words if Path(word).parent == tmp_path}
    files |= {Path(value).name for each in todo for value in each.env.values()}
    files -= {smoke.FILE, stages._SANITIZED, stages._LEFT_OUT, tmp_path.name}  # of the moment
    assert len(files) <= 8, files
    assert "--no-index" in words  # nothing is fetched


def parsed(command, words):
    """Whether a command of click takes the options; it is not run."""
    return command.make_context("", list(words))


def test_what_the_stages_call_is_there(tmp_path):
    """Every module, and every option of those that are ours."""
    from benchmarks import bench_gpu

    known = {
        "benchmarks.bench_gpu": lambda words: parsed(bench_gpu.main, words),
        "benchmarks.gpu_check.smoke": lambda words: parsed(smoke.main, words),
        "benchmarks.gpu_check.sanitize": lambda words: parsed(sanitize.main, words),
        "benchmarks.gpu_check.tuning": lambda words: parsed(tuning.main, words),
    }
    seen = []
    for each in stages.stages(tmp_path, tmp_path):
        for line in each.commands:
            module, *words = line[line.index("-m") + 1 :]
            if module == "pip":  # looking for its module changes how setuptools finds distutils
                assert importlib.metadata.version(module)
            else:
                assert importlib.util.find_spec(module), module
            if module in known:
                assert known[module](words) is not None
                seen.append(module)
    assert set(seen) == set(known)


def test_files_with_gpu_tests_are_found(tmp_path):
    for name, text in (("test_a", "pytest.mark.gpu"), ("test_b", "slow"), ("c", "mark.gpu")):
        (tmp_path / f"{name}.py").write_text(text)
    assert stages.gpu_tests(tmp_path) == [str(tmp_path / "test_a.py")]
    assert str(ROOT / "tests" / "test_cuda_ops.py") in stages.gpu_tests()


@pytest.fixture
def precompiled(monkeypatch):
    """Runs shares of a net's candidates on the CPU, with stand-ins for them and their calls."""
    from benchmarks.gpu_check import precompile

    case, ran, raised = "resnet18-float32-1", [], {}
    monkeypatch.setattr(
        precompile,
        "worth_measuring",
        lambda call, plans: [f"{plan} {i}" for plan in plans for i in (1, 2)],
    )

    def run_one(call, name):
        ran.append((str(call.shape), name))
        if name in raised:
            raise raised[name]

    monkeypatch.setattr(precompile, "run_once", run_one)

    def run_share(file, share=0, shares=1, start=0):
        return precompile.run_share([case], share, shares, file, start, "cpu", 32)

    run_share.ran, run_share.raised = ran, raised
    run_share.every = [
        (str(call.shape), name) for call, name in precompile.configured(case, "cpu", 32)
    ]
    return run_share


def test_every_candidate_is_compiled_by_one_process(precompiled, tmp_path):
    """On the CPU, whose plans have no configurations."""
    done = [precompiled(tmp_path / "file", i, 2) for i in range(2)]
    assert max(done) - min(done) <= 1
    assert sum(done) == len(precompiled.ran) == len(set(precompiled.ran))
    assert set(precompiled.ran) == set(precompiled.every)
    assert "torch 1" in {name for _, name in precompiled.ran}


def test_candidates_go_on_after_any_exception(precompiled, tmp_path, monkeypatch):
    class OutOfResources(Exception):  # as Triton's, which is no RuntimeError
        pass

    precompiled.raised["torch 1"] = OutOfResources("out of resource: shared memory\nHint")
    precompiled(tmp_path / "file")
    assert precompiled.ran == precompiled.every
    rows = left_out.read(tmp_path / "file")
    refused = [where for where, name in precompiled.every if name == "torch 1"]
    assert [row["convolution"] for row in rows] == refused
    assert rows[0] | {"convolution": ""} == {
        "convolution": "",
        "candidate": "torch 1",
        "why": "OutOfResources: out of resource: shared memory",
        "fatal": False,
    }
    monkeypatch.setattr(faults, "broken", lambda: "CUDA error: launch failure")
    with pytest.raises(SystemExit) as broken:
        precompiled(tmp_path / "other", start=3)
    assert broken.value.code == faults.BROKEN
    (row,) = left_out.read(tmp_path / "other")
    assert (row["convolution"], row["candidate"]) == precompiled.every[3]
    assert (row["why"], row["fatal"]) == ("CUDA error: launch failure", True)


def test_what_costs_two_processes_is_tried_no_more(precompiled, tmp_path):
    for where in ("here", "there"):
        left_out.add(tmp_path / "file", where, "torch 2", "hung", fatal=True)
    left_out.add(tmp_path / "file", precompiled.every[0][0], precompiled.every[0][1], "wrong")
    precompiled(tmp_path / "file")
    assert precompiled.ran == [each for each in precompiled.every[1:] if each[1] != "torch 2"]


# Pieces of work of which some end their process.
PIECES = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from benchmarks.gpu_check import faults, left_out
start, file = int(sys.argv[-3]), Path(sys.argv[-1])
for i in range(start, 6):
    faults.announce(f"{{i}} conv {{i}}: cuda")
    if i == 1:
        faults.end_in(0.5)
        time.sleep(60)
    if i == 2:
        os.abort()
    if i == 4:
        left_out.add(file, "conv 4", "cuda", "CUDA error", fatal=True)
        sys.exit(faults.BROKEN)
    print(f"did {{i}}", flush=True)
"""


def test_work_goes_on_in_another_process(tmp_path):
    pieces, file = tmp_path / "pieces.py", tmp_path / "left"
    pieces.write_text(PIECES.format(root=str(ROOT)))
    words = (sys.executable, str(pieces))
    in_time, printed = tuning.run_through(words, file, tmp_path / "log", time.monotonic() + 60)
    assert in_time
    assert re.findall(r"did (\d)", printed) == ["0", "3", "5"]
    why = {row["convolution"]: row["why"] for row in left_out.read(file)}
    assert list(why) == ["conv 1", "conv 2", "conv 4"]
    assert why["conv 1"].startswith("hung in <module> (pieces.py:")
    assert why["conv 2"].startswith("exit status -6")
    assert why["conv 4"] == "CUDA error"
    words = python("import time; print('> 0 conv: cuda', flush=True); time.sleep(60)")
    cut = tuning.run_through(words, tmp_path / "none", tmp_path / "log", time.monotonic() + 1)
    assert cut == (False, cut[1])
    assert left_out.read(tmp_path / "none") == []
    words = python("raise SystemExit('no torch')")  # before any piece: once is enough
    assert tuning.run_through(words, tmp_path / "early", tmp_path / "log", time.monotonic() + 60)[0]
    (row,) = left_out.read(tmp_path / "early")
    assert row["why"] == "exit status 1, no torch"


def test_a_wrong_candidate_costs_no_other_answer(tmp_path, monkeypatch, tuning_file):
    """On the CPU, with times that are made up."""
    from benchmarks.gpu_check import tune_net
    from resnet_fused import tuned
    from resnet_fused.measure import plans
    from resnet_fused.measure.candidates import Measured, WrongCandidate

    def measure(call, names, standard, **rest):
        if "direct" in names and call.shape.kernel == (3, 3):
            raise WrongCandidate("direct", "tune: direct is wrong")
        ms = {name: 1.0 + (name != "torch") for name in names}
        return Measured("torch", ms, dict.fromkeys(names, 0.0), 1.0)

    monkeypatch.setattr(plans, "measure", measure)
    file = tmp_path / "left"
    words = ["--left-out", str(file), "--device", "cpu", "--size", "32", "resnet18-float32-1"]
    result = CliRunner().invoke(tune_net.main, words)
    assert result.exit_code == 0, result.output
    rows = left_out.read(file)
    assert {row["candidate"] for row in rows} == {"direct"}
    answers = tuned.answers()
    assert len(answers) == 11 == result.output.count("\n> ") + result.output.startswith("> ")
    without = {where for where, answer in answers.items() if answer.ms["direct"] is None}
    assert without == {row["convolution"] for row in rows}
    assert {where.startswith("3x3") for where in without} == {True}
    assert tuning_file.exists()


def test_tuning_from_end_to_end(tmp_path, monkeypatch):
    """With stand-ins for both of its commands; what is left out is a failure that is told."""
    note = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path\n"
    note += "from benchmarks.gpu_check import left_out\n"
    note += "if '0/' in sys.argv[2]: left_out.add(Path(sys.argv[-1]), 'conv', 'cuda', 'hung')\n"
    monkeypatch.setattr(tuning, "PRECOMPILE", python(note))
    monkeypatch.setattr(tuning, "TUNE_NET", python("import sys; print('tunes', sys.argv[1])"))
    file = tmp_path / stages._LEFT_OUT
    result = CliRunner().invoke(tuning.main, ["--left-out", str(file), "a", "b"])
    assert result.exit_code == 1, result.output
    assert result.output.endswith("tunes a\n\ntunes b\n\nleft out: conv cuda: hung\n")
    verdict = stages.tuned(ended(1), tmp_path)
    assert (verdict.outcome, verdict.why) == (FAILED, "1 left out: cuda")
    assert verdict.details == {"conv cuda": "hung"}
    monkeypatch.setattr(tuning, "PRECOMPILE", python(""))
    result = CliRunner().invoke(tuning.main, ["--left-out", str(file), "a"])
    assert result.exit_code == 0, result.output
    assert stages.tuned(ended(0), tmp_path).outcome == PASSED
    assert stages.tuned(ended(2), tmp_path).outcome == FAILED


def ended(code, log=""):
    return command.Ended(code, 1.0, log)


def test_what_was_built(tmp_path):
    fine = ended(0, 'torch 2.11\n{"cpu": "", "cuda": "", "triton": ""}\n')
    assert stages.built(fine, tmp_path).outcome == PASSED
    bad = stages.built(ended(1, '{"cpu": "", "cuda": "not built", "triton": ""}'), tmp_path)
    assert (bad.outcome, bad.why) == (FAILED, "cuda: not built")
    assert stages.built(ended(1, "Traceback"), tmp_path).outcome == FAILED


def test_built_says_what_is_missing():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check.built"],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    verdict = stages.built(ended(done.returncode, done.stdout), ROOT)
    assert verdict.outcome == FAILED
    assert verdict.details["cuda"]
    assert verdict.details["triton"] in ("there is no GPU", "Triton is not installed")


# ---- smoke ---------------------------------------------------------------------------------------

HUNG_LOG = """> conv a
  off by 0.001, 0.004 allowed
> conv b
Timeout (0:00:15)!
Thread 0x1 (most recent call first):
  File "/a/threading.py", line 9 in wait
Thread 0x2 (most recent call first):
  File "/b/_ops.py", line 7 in __call__
  File "/b/ops_once.py", line 8 in run
"""


@pytest.mark.parametrize(
    ("code", "log", "outcome", "why"),
    [
        (0, "> conv a\n  off by 0\n1 calls, 0 wrong\n", smoke.OK, "1 calls, 0 wrong"),
        (1, "0 calls, 0 wrong\n", smoke.ABSENT, ""),
        (1, "> conv a\n! conv a: off by 1\n1 calls, 1 wrong\n", smoke.WRONG, "conv a: off by 1"),
        (
            faults.BROKEN,
            "> conv a\n! conv a: CUDA error\n2 calls, 1 wrong\n",
            smoke.FAULT,
            "in conv a: conv a: CUDA error",
        ),
        (-11, "> conv a\n", smoke.FAULT, "in conv a: exit status -11, > conv a"),
        (1, "ImportError: no", smoke.FAULT, "in no call: exit status 1, ImportError: no"),
        (1, HUNG_LOG, smoke.HUNG, "in conv b: __call__ (_ops.py:7) < run (ops_once.py:8)"),
        (None, "> conv a\n", smoke.UNFINISHED, "in conv a"),
        (None, "", smoke.UNFINISHED, "in no call"),
    ],
)
def test_what_became_of_a_family(code, log, outcome, why):
    found = smoke.judge(ended(code, log))
    assert (found.outcome, found.why) == (outcome, why)


# In place of families.py.
FAMILIES = """
import os, sys, time
sys.path.insert(0, {root!r})
from benchmarks.gpu_check import faults
name = sys.argv[1]
faults.announce(f"call of {{name}}")
if "sm90" in name:
    print("0 calls, 0 wrong")
    sys.exit(1)
if "stem" in name:
    faults.end_in(0.5)
    time.sleep(60)
if "tail" in name:
    os.abort()
print("1 calls, 0 wrong")
"""


def test_families_from_end_to_end(tmp_path, monkeypatch):
    families = tmp_path / "families.py"
    families.write_text(FAMILIES.format(root=str(ROOT)))
    monkeypatch.setattr(smoke, "CALLS", (sys.executable, str(families)))
    result = CliRunner().invoke(smoke.main, ["--json", str(tmp_path / smoke.FILE)])
    assert result.exit_code == 1, result.output
    verdict = stages.smoked(ended(1), tmp_path)
    assert verdict.outcome == FAILED
    assert re.match(r"\d+ ok; absent: .*sm90.*; fault: cuda tail; hung: cuda stem$", verdict.why)
    assert verdict.details["cuda stem"]["why"].startswith(
        "in call of cuda stem: <module> (families"
    )
    assert "in call of cuda tail: exit status -6" in verdict.details["cuda tail"]["why"]
    assert smoke.exit_code({"a": smoke.Found(smoke.ABSENT, "", 0)}) == 1
    assert stages.smoked(ended(1), tmp_path / "none").outcome == FAILED
    late = {}
    smoke.look(["cuda stem"], 0, lambda name, found, log: late.update({name: found.outcome}))
    assert late == {"cuda stem": smoke.UNFINISHED}


def named_item(name, slow=False):
    return types.SimpleNamespace(
        nodeid=f"tests/test_cuda_ops.py::{name}",
        get_closest_marker=lambda mark: mark if slow and mark == "slow" else None,
    )


def in_order(folder, items):
    watched.Watch(folder, 9, False).pytest_collection_modifyitems(items)
    return [item.nodeid.partition("::")[2] for item in items]


def test_slow_tests_come_behind_others_and_tritons_among_them(tmp_path):
    names = [f"test_{i}[{plan}]" for plan in ("triton", "cuda") for i in range(20)]
    items = [named_item(name, slow) for slow in (True, False) for name in names]
    found = in_order(tmp_path, list(items))
    for half in (found[:40], found[40:]):
        assert half[:20] == names[20:]
        assert sorted(half[20:]) == sorted(names[:20])
        assert half[20:] != names[:20]
    assert found == in_order(tmp_path, list(items))  # as pytest-xdist's workers must agree


def test_tests_of_families_that_cost_a_process_come_last(tmp_path):
    outcomes = {"sm90 stride 1": smoke.HUNG, "cuda stem": smoke.OK, "triton conv": smoke.WRONG}
    found = {name: {"outcome": outcome} for name, outcome in outcomes.items()}
    assert smoke.suspects(tmp_path) == set()
    (tmp_path / smoke.FILE).write_text(json.dumps(found))
    assert smoke.suspects(tmp_path) == {"sm90", "cuda"}
    tests = ["test_sm90[1]", "test_conv[triton]", "test_conv[cuda]", "test_graph"]
    named = in_order(tmp_path, [named_item(name) for name in tests])
    assert named == ["test_graph", "test_conv[triton]", "test_sm90[1]", "test_conv[cuda]"]


def test_every_kind_of_kernel_is_a_family():
    import emulated_sm80
    import emulated_sm90

    from benchmarks.gpu_check import families

    found = families.families()
    assert {name.split()[0] for name in found} == {"cuda", "sm90", "triton"}
    names = [check.name for checks in found.values() for check in checks]
    for tile in re.findall(r"sm[89]0 (\S+) split", "\n".join(names)):
        assert tile in (*emulated_sm80.TILES, *emulated_sm90.TILES, "tap-shift")
    for word in ("/2 ", "tap-shift", "stem", "tail", "add_relu", "k16", "k32", "split 8"):
        assert any(word in name for name in names), word


@pytest.mark.parametrize("late", [False, True])
def test_weights_that_were_read_too_early_show(monkeypatch, late):
    """With PyTorch in the kernel's place, which computes with the weights of the call before."""
    from benchmarks.gpu_check import ops_once

    seen = []

    def launch(call, x, weight, scale, shift, *rest):
        seen.append(weight.clone())
        o = ops_once.Operands(x, seen[-1 - (late and len(seen) > 1)], scale, shift, None, ())
        return ops_once.exact(call, o).to(call.dtype)

    monkeypatch.setattr(ops_once, "launch", launch)
    call = ops_once.Call("cuda", "", ops_once.torch.bfloat16)
    off, allowed = ops_once.rewritten(call, times=4).run(ops_once.torch.device("cpu"))
    assert len(seen) == 4
    assert (off > allowed) is late


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_family_runs_in_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "RESNET_FUSED_DISABLE_EXT": "1"}
    words = ["-m", "benchmarks.gpu_check.families", "triton add_relu", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[0] == "> triton, add_relu"
    assert done.stdout.endswith("1 calls, 0 wrong\n"), done.stdout + done.stderr


def test_calls_end_with_the_first_fault(monkeypatch, capsys):
    """Later ones would fail for its sake."""
    from benchmarks.gpu_check import ops_once

    def call(name, answer):
        def run_once(device):
            if isinstance(answer, Exception):
                raise answer
            return answer, 0.5

        return ops_once.Check(name, run_once)

    todo = [call("good", 0.1), call("off", 0.9), call("refused", TypeError("no")), call("last", 0)]
    assert ops_once.run_all(todo, None) == 1
    printed = capsys.readouterr().out
    assert printed.endswith(
        "! off: off by 0.9, 0.5 allowed\n! refused: TypeError: no\n4 calls, 2 wrong\n"
    )
    assert faults.last_announced(printed) == "last"
    monkeypatch.setattr(faults, "broken", lambda: "CUDA error")
    assert ops_once.run_all(todo, None) == faults.BROKEN
    assert faults.last_announced(capsys.readouterr().out) == "refused"


# ---- watched tests -----------------------------------------------------------------------------

# In torch's place: it starts in no time.
FAKE_CUDA = """
import os, signal, sys, time, types, pytest
cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=lambda: None)
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
def fault():
    raise RuntimeError("CUDA error: an illegal memory access was encountered\\nand advice")
"""
HANG = "def test_hang(): signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}); time.sleep(60)"
TESTS = {
    "ok": "def test_ok(): pass",
    "skip": "def test_skip(): pytest.skip('no')",
    "wrong": "def test_wrong(): assert 1 == 2, 'off by one'",
    "hang": HANG,
    "fault": "def test_fault(): cuda.synchronize = fault; fault()",
    "late": "def test_late(): cuda.synchronize = fault",  # the launch itself went well
    "slow": "@pytest.mark.slow\ndef test_slow(): time.sleep(2.5)",
    "segfault": "def test_segfault(): os.kill(os.getpid(), signal.SIGSEGV)",
    "behind": "def test_behind(): pass",
    "error": "@pytest.fixture\ndef broken(): fault()\ndef test_error(broken): pass",
}


def watched_tests(folder, names, *options, limit_s=60.0, seconds=2):
    """The verdict of the stage `test` on some of TESTS, and the record's entry."""
    (folder / "scratch").mkdir()
    (folder / "test_made.py").write_text("\n".join([FAKE_CUDA, *(TESTS[name] for name in names)]))
    watch = ("-p", "benchmarks.gpu_check.watched", "--watched", str(folder / "scratch"))
    words = (*(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"), *watch)
    words += ("--watched-seconds", str(seconds), "--rootdir", str(folder), *options, "test_made.py")
    env = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}  # to start at once
    _, current = check(folder, [Stage("test", [words], limit_s, stages.tested, env)])
    found = current["stages"]["test"]
    return found, {
        outcome: {test.partition("::test_")[2]: why for test, why in tests.items()}
        for outcome, tests in found["details"].items()
        if outcome != "count"
    }


def test_tests_that_hang_or_break_their_process_are_named(tmp_path):
    """And those behind them run, in other processes."""
    pytest.importorskip("xdist")
    workers = ("-p", "xdist", "--numprocesses", "2", "--max-worker-restart", "9")
    found, bad = watched_tests(tmp_path, TESTS, *workers)
    assert found["outcome"] == FAILED
    assert found["why"] == "3 passed, 1 skipped, 1 failed, 1 error, 3 crashed, 1 hung"
    assert list(bad) == ["hung", "crashed", "error", "failed"]
    assert bad["hung"]["hang"].startswith("test_hang (test_made.py:")
    illegal = "CUDA error: an illegal memory access was encountered"
    assert bad["crashed"]["fault"] == bad["crashed"]["late"] == illegal
    assert bad["crashed"]["segfault"] == "Fatal Python error: Segmentation fault"
    assert bad["error"] == {"error": f"RuntimeError: {illegal}"}
    assert bad["failed"]["wrong"].startswith("AssertionError: off by one")


@pytest.mark.parametrize(
    ("last", "outcome", "why"),
    [
        ("hang", "hung", "test_hang (test_made.py:"),
        ("segfault", "crashed", "Fatal Python error: Segmentation fault"),
        ("late", "crashed", "CUDA error: an illegal memory access"),
    ],
)
def test_in_one_process_the_tests_end_there(tmp_path, last, outcome, why):
    """Where pytest-xdist is missing."""
    found, bad = watched_tests(tmp_path, ["ok", "wrong", last, "behind"])
    assert found["outcome"] == FAILED
    assert bad[outcome][last].startswith(why)
    assert set(bad["failed"]) == {"wrong"}
    count = {name: n for name, n in found["details"]["count"].items() if n}
    assert count == {"passed": 1, "failed": 1, outcome: 1, "not run": 1}


def test_tests_that_run_out_of_time_tell_what_they_found(tmp_path, monkeypatch):
    """Also where pytest itself is killed."""
    monkeypatch.setattr(command, "GRACE_S", 0.5)
    found, bad = watched_tests(tmp_path, ["ok", "wrong", "hang", "behind"], limit_s=5.0, seconds=60)
    assert found["outcome"] == OUT_OF_TIME
    assert found["why"].endswith("1 passed, 0 skipped, 1 unfinished, 1 failed, 1 not run")
    assert bad["unfinished"]["hang"].startswith("test_hang (test_made.py:")
    assert bad["failed"]["wrong"].startswith("AssertionError: off by one")


@pytest.mark.parametrize(
    ("lines", "code", "outcome"),
    [
        (["passed", "skipped"], 0, PASSED),
        (["skipped"], 0, FAILED),  # nothing was shown
        ([], 5, FAILED),
        (["passed", "failed"], 1, FAILED),
        (["passed", "error"], 1, FAILED),
        (["passed"], 3, FAILED),  # pytest itself broke
    ],
)
def test_what_the_tests_showed(tmp_path, lines, code, outcome):
    rows = [{"test": f"test_{i}", "outcome": each} for i, each in enumerate(lines)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / watched.LOG).write_text(text + '{"test": "cut o')
    assert stages.tested(ended(code), tmp_path).outcome == outcome


def test_tests_without_a_report_have_failed(tmp_path):
    assert stages.tested(ended(0), tmp_path).outcome == FAILED
    assert stages.sanitized(ended(0), tmp_path).outcome == FAILED


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    from benchmarks.gpu_check.__main__ import main

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result = CliRunner().invoke(main, ["--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "gpu-check needs an NVIDIA GPU, but torch" in result.output
    assert not list((tmp_path / "out").iterdir())
    wrong = CliRunner().invoke(main, ["--stages", "build,fly"])
    assert wrong.exit_code == 2
    assert "must be some of build, smoke, test, sanitize, tune, bench" in wrong.output


def test_the_command_from_end_to_end(tmp_path, monkeypatch):
    """With the facts of a GPU and stand-in stages."""
    module = importlib.import_module("benchmarks.gpu_check.__main__")
    monkeypatch.setattr(module, "look", lambda scratch: GPU)
    todo = [stage("build"), stage("test", "raise SystemExit(1)"), stage("bench")]
    monkeypatch.setattr(module, "stages", lambda out, scratch: todo)
    result = CliRunner().invoke(module.main, ["--stages", "build,test", "--out", str(tmp_path)])
    assert result.exit_code == 1, result.output
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"build.log", "test.log", record.JSON, record.MARKDOWN}
    todo[1] = stage("test")
    again = CliRunner().invoke(
        module.main, ["--stages", "build,test", "--out", str(tmp_path), "--resume"]
    )
    assert again.exit_code == 0, again.output
    assert "NVIDIA H200" in again.output


def test_sources_change_with_any_file(tmp_path):
    (tmp_path / "csrc").mkdir()
    kernel = tmp_path / "csrc" / "conv.cu"
    kernel.write_text("one")
    before = facts.sources(tmp_path)
    assert before == facts.sources(tmp_path)
    kernel.write_text("two")
    assert facts.sources(tmp_path) != before


def test_the_commit(tmp_path, monkeypatch):
    """A copy without git is told by a variable."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert facts.commit(tmp_path) == "unknown"
    monkeypatch.setenv(facts.COMMIT, "0123abc")
    assert facts.commit(tmp_path) == "0123abc"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init"], ["commit", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    head = facts.commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", head)
    (tmp_path / "new").touch()
    subprocess.run([*git, "add", "new"], check=True)
    assert facts.commit(tmp_path) == f"{head} and changes"


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_the_targets():
    """make passes on what it is given, and makes no .venv."""
    for target, words, expected in (
        (
            "gpu-check",
            "STAGES=build,test OUT=a",
            "-m benchmarks.gpu_check --stages build,test --out a",
        ),
        ("gpu-bench", "CASES=resnet18-float16-8 OUT=a", "--resume --cases resnet18-float16-8"),
    ):
        done = subprocess.run(
            ["make", "-n", target, "PYTHON=python-there", *words.split()],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert expected in done.stdout
        assert ".venv" not in done.stdout
        assert "python-there" in done.stdout


def test_where_the_sanitizer_is(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert sanitize.find_sanitizer() is None
    program = tmp_path / "cuda" / "bin" / sanitize.SANITIZER
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    assert sanitize.find_sanitizer() == str(program)


# ---- sanitizers --------------------------------------------------------------------------------

CALLS = "16 calls, 0 wrong\n"
FINE = f"========= COMPUTE-SANITIZER\n{CALLS}========= ERROR SUMMARY: 0 errors\n"
FINE_RACES = f"{CALLS}========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
SEEN = ended(sanitize.STATUS, "========= ERROR SUMMARY: 32 errors\n")
REFUSAL = "========= Device not supported. Please refer to the documentation.\n"


@pytest.mark.parametrize(
    ("code", "log", "planted", "outcome"),
    [
        (0, FINE, SEEN, sanitize.CLEAN),
        (0, FINE_RACES, SEEN, sanitize.CLEAN),
        (0, FINE, ended(0, FINE), sanitize.UNPROVED),  # it is blind here
        (0, FINE, ended(None, ""), sanitize.UNPROVED),
        (0, FINE, None, sanitize.UNPROVED),
        (sanitize.STATUS, FINE.replace("0 errors", "3 errors"), SEEN, sanitize.ERRORS),
        (sanitize.STATUS, FINE_RACES.replace("Y: 0", "Y: 1"), SEEN, sanitize.ERRORS),
        (None, "========= ERROR SUMMARY: 1 error\n", SEEN, sanitize.ERRORS),
        (1, FINE.replace(", 0 wrong", ", 2 wrong"), SEEN, sanitize.ERRORS),
        (0, FINE.replace(CALLS, ""), SEEN, sanitize.ERRORS),  # it watched nothing
        (1, REFUSAL, SEEN, sanitize.UNAVAILABLE),
        (1, f"{REFUSAL}========= ERROR SUMMARY: 1 error\n", SEEN, sanitize.UNAVAILABLE),
        (0, CALLS, SEEN, sanitize.UNAVAILABLE),  # no word of the tool's
        (127, "compute-sanitizer: No such file", SEEN, sanitize.UNAVAILABLE),
        (None, CALLS, SEEN, sanitize.OUT_OF_TIME),
    ],
)
def test_what_a_sanitizer_showed(code, log, planted, outcome):
    assert sanitize.judge(ended(code, log), planted).outcome == outcome


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ((sanitize.CLEAN, sanitize.CLEAN), 0),
        ((sanitize.CLEAN, sanitize.UNAVAILABLE), 3),
        ((sanitize.UNPROVED,), 3),
        ((sanitize.OUT_OF_TIME, sanitize.ERRORS), 1),
    ],
)
def test_exit_codes_of_sanitizers(outcomes, code):
    assert sanitize.exit_code({str(i): sanitize.Found(o) for i, o in enumerate(outcomes)}) == code


def test_a_missing_sanitizer_is_unavailable_not_clean(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    path = tmp_path / stages._SANITIZED
    result = CliRunner().invoke(sanitize.main, ["--json", str(path)])
    assert result.exit_code == 3
    verdict = stages.sanitized(ended(3), tmp_path)
    assert verdict.outcome == INCOMPLETE
    assert verdict.why.count("unavailable") == len(sanitize.TOOLS)


# In compute-sanitizer's place: reports what the planted program is for, runs the calls as they are.
STAND_IN = f"""#!{sys.executable}
import subprocess, sys
tool, command = sys.argv[2], sys.argv[{5 + len(sanitize.OPTIONS)}:]
if command[-1] in {sanitize.TOOLS}:
    faults = int(tool != "initcheck")  # blind for one kind
    sys.exit(print("========= ERROR SUMMARY:", faults, "errors"))
subprocess.run(command, check=True)
print("========= ERROR SUMMARY: 0 errors")
"""


def test_sanitizers_from_end_to_end(tmp_path, monkeypatch):
    """With a stand-in for the tool, for nvcc and for the calls."""
    tool, calls = tmp_path / "compute-sanitizer", tmp_path / "calls.py"
    tool.write_text(STAND_IN)
    tool.chmod(0o755)
    calls.write_text(f"print({CALLS.strip()!r})")
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: str(tool))
    monkeypatch.setattr(sanitize, "CALLS", (sys.executable, str(calls)))
    monkeypatch.setattr(sanitize, "compile_planted", lambda folder, limit_s: folder / "planted")
    path = tmp_path / stages._SANITIZED
    result = CliRunner().invoke(sanitize.main, ["--json", str(path)])
    assert result.exit_code == 3, result.output
    outcomes = {name: found["outcome"] for name, found in json.loads(path.read_text()).items()}
    assert outcomes == dict.fromkeys(sanitize.TOOLS, sanitize.CLEAN) | {
        "initcheck": sanitize.UNPROVED
    }


def test_the_planted_faults_compile(tmp_path):
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("there is no nvcc")
    assert sanitize.compile_planted(tmp_path, 60) is not None
    assert sanitize.compile_planted(tmp_path, 60, compiler="false") is None


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_calls_run_in_the_interpreter():
    """The first of them: op rows and tiles are swept elsewhere."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "RESNET_FUSED_DISABLE_EXT": "1"}
    words = ["-m", "benchmarks.gpu_check.ops_once", "--device", "cpu", "--most", "2"]
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("2 calls, 0 wrong\n"), done.stdout + done.stderr


def test_a_wrong_answer_is_seen():
    from benchmarks.gpu_check import ops_once

    call = ops_once.Call("triton", "", ops_once.torch.float32, extra="shortcut")
    o = ops_once.operands(call)
    want = ops_once.exact(call, o)
    assert want.shape == (2, 64, 9, 9)
    assert ops_once.error(want.float(), want) <= ops_once.ALLOWED[ops_once.torch.float32]
    off = want.float()
    off[1, 63, 8, 8] += 0.1
    assert ops_once.error(off, want) > ops_once.TF32_ALLOWED
    off[0, 0, 0, 0] = float("nan")
    assert ops_once.error(off, want) == float("inf")


def test_every_compiled_tile_is_called(monkeypatch):
    from benchmarks.gpu_check import ops_once
    from resnet_fused.ops import _cuda

    names = ("sm80 64x64", "sm80 any64x64", "sm90 p64x32", "sm90 p128x64k16")
    compiled = tuple(_cuda.Configuration(name, 128, 1 << 15) for name in names)
    monkeypatch.setattr(_cuda, "configurations", lambda: compiled)
    for here, called in (
        (("cuda",), names[:2]),
        (("cuda", "sm90"), (*names, "sm90 tap-shift")),
        ((), ()),
    ):
        monkeypatch.setattr(ops_once, "works_here", lambda kernels, device, h=here: kernels in h)
        configs = {call.config for call in ops_once.calls(ops_once.torch.device("cpu"))}
        assert {config.partition(" split")[0] for config in configs - {""}} == set(called)
