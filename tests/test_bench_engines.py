"""benchmarks.bench_engines: arguments, goals, records, README table, worker processes."""

import dataclasses
import importlib.util
import json

import pytest
import torch
from click.testing import CliRunner
from conftest import message

from benchmarks import accuracy, bench_engines, contest, peers, readme, record, remote
from benchmarks.cases import Case
from benchmarks.contest import Contest, Setup
from benchmarks.goals import GOALS, MOST_USED, PEERS, Goal, Outcome, judge, overall
from benchmarks.peers import BY_KEY, ENTRANTS, Entrant, Job
from benchmarks.remote import Worker
from resnet_fused.measure import engines
from resnet_fused.measure.compare import Result
from resnet_fused.measure.engines import CHANNELS_LAST, COMPILE, FUSED, Unavailable
from resnet_fused.measure.timing import Samples

pytestmark = pytest.mark.usefixtures("one_thread")
PNG = b"\x89PNG\r\n\x1a\n"
FLOAT32, BFLOAT16 = Case("resnet18", "float32", 1), Case("resnet18", "bfloat16", 1)
SETUP = Setup(ENTRANTS, threads=1, size=32, rounds=1, rest_s=0.0)


def run(*args):
    return CliRunner().invoke(bench_engines.main, [str(a) for a in args], catch_exceptions=False)


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--only", "eager,tvm"), "must be some of eager, compile, onnxruntime"),
        (("--only", "ours,ours"), "got 'ours,ours'"),
        (("--models", "vgg16"), "must be some of resnet18, resnet34"),
        (("--dtypes", "float64"), "must be some of float32, bfloat16 between commas"),
        (("--batches", "0"), "must be positive integers between commas, got '0'"),
        (("--cases", "resnet18-float32"), "case must be like resnet18-float32-8, got"),
        (("--cases", "resnet18-float32-0"), "case must be like resnet18-float32-8, got"),
        (("--cases", "resnet18-float16-1"), "case must be like resnet18-float32-8, got"),
        (("--cases", "accuracy,"), "case must be like resnet18-float32-8, got ''"),
        (("--resume",), "--resume goes with --json"),
        (("--rounds", "0"), "0 is not in the range"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(args, sentence):
    result = run(*args)
    assert result.exit_code == 2
    assert sentence in message(result)


def test_case_names():
    for case in (Case("resnet50", "bfloat16", 32), FLOAT32):
        assert Case.parse(str(case)) == case
    assert str(FLOAT32) == "resnet18-float32-1"


@pytest.fixture
def measured(monkeypatch):
    """Cases take no time: everybody needs 10 ms, fused `measured.fused`; lists what was asked."""

    class Made:
        fused = 0.001
        cases: list
        setup: Setup

        def __init__(self, setup, folder, largest_batch):
            Made.setup, Made.largest_batch = setup, largest_batch

        def measure(self, case, on_stage):
            on_stage("made up", 1, 2)
            Made.cases.append(case)
            results = []
            for entrant in self.setup.entrants:
                seconds = Made.fused if entrant.title == FUSED else 0.01
                samples = Samples((seconds,)) if case.dtype in entrant.dtypes else None
                reason = "" if samples else "cannot"
                results.append(Result(entrant.title, case.batch, samples, 1e-7, reason))
            return results, {e.title: "default" for e in self.setup.entrants}

    Made.cases = []
    monkeypatch.setattr(bench_engines, "Contest", Made)
    monkeypatch.setattr(
        bench_engines.accuracy,
        "measure",
        lambda size, on_stage: [accuracy.entry("resnet18", "float32", [(1e-7, 1e-7)])],
    )
    return Made


def test_which_cases_are_measured(measured):
    assert run().exit_code == 0
    assert len(set(measured.cases)) == 12
    assert measured.largest_batch == 32
    measured.cases.clear()
    run("--models", "resnet50", "--dtypes", "bfloat16", "--batches", "3,2", "--only", "ours")
    assert [str(case) for case in measured.cases] == ["resnet50-bfloat16-3", "resnet50-bfloat16-2"]
    assert [e.title for e in measured.setup.entrants] == [FUSED]
    measured.cases.clear()
    run("--check")
    assert measured.cases == list(dict.fromkeys(goal.case for goal in GOALS))
    measured.cases.clear()
    run("--check", "--cases", "accuracy")
    assert measured.cases == []


def test_settings_reach_the_measurement(measured):
    run("--threads", 3, "--seconds", 7, "--rest", 0.5, "--size", 64, "--cases", FLOAT32)
    assert measured.setup == Setup(list(ENTRANTS), 3, 64, 7.0, None, 0.5)


# ---- goals ---------------------------------------------------------------------------------------


def made_cases(case, limit=2e-6, error=1e-7, **milliseconds):
    """A record's cases with one entry, from times by an entrant's key."""
    results = []
    for key, ms in milliseconds.items():
        samples = None if ms is None else Samples((1e-3 * ms,))
        results.append(Result(BY_KEY[key].title, case.batch, samples, error, "" if ms else "no"))
    entry = record.case_entry(case, results, {}) | {"error_limit": limit}
    return {str(case): json.loads(json.dumps(entry))}


ALL = {"eager": 40, "compile": 22, "onnxruntime": 21, "openvino": 20, "ncnn": 15, "mnn": 25}


def test_a_goal_is_over_the_fastest_peer_that_it_names():
    cases = made_cases(FLOAT32, **ALL, ours=10)
    everybody = judge(Goal(FLOAT32, 1.4, 1.7), cases)
    assert (everybody.outcome, everybody.peer) == (Outcome.PASS, "ncnn")
    assert everybody.ratio == pytest.approx(1.5)
    some = judge(Goal(FLOAT32, 1.9, 2.3, MOST_USED), cases)
    assert (some.outcome, some.peer) == (Outcome.PASS, "OpenVINO")
    assert some.ratio == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("ours", "outcome", "remark"),
    [
        (8, Outcome.PASS, "aim reached"),
        (10, Outcome.PASS, ""),
        (11, Outcome.FAIL, "too slow"),
        (20, Outcome.FAIL, "too slow"),
    ],
)
def test_thresholds(ours, outcome, remark):
    verdict = judge(Goal(FLOAT32, 1.4, 1.7), made_cases(FLOAT32, **ALL, ours=ours))
    assert (verdict.outcome, verdict.remark) == (outcome, remark)


def test_a_missing_peer_leaves_a_pass_unproved_but_not_a_failure():
    goal = Goal(FLOAT32, 1.4, 1.7)
    for absent in (ALL | {"ncnn": None}, {k: v for k, v in ALL.items() if k != "ncnn"}):
        verdict = judge(goal, made_cases(FLOAT32, **absent, ours=10))
        assert (verdict.outcome, verdict.remark) == (Outcome.INCOMPLETE, "without ncnn")
        assert verdict.ratio == pytest.approx(2.0)
        assert judge(goal, made_cases(FLOAT32, **absent, ours=19)).outcome is Outcome.FAIL
    only_ours = judge(goal, made_cases(FLOAT32, ours=10))
    assert only_ours.outcome is Outcome.INCOMPLETE
    assert only_ours.ratio is None


def test_a_peer_that_cannot_have_the_precision_is_not_missing():
    goal = Goal(BFLOAT16, 1.4, 1.7)
    verdict = judge(goal, made_cases(BFLOAT16, **(ALL | {"onnxruntime": None}), ours=10))
    assert verdict.outcome is Outcome.PASS


def test_fast_and_wrong_fails():
    goal = Goal(FLOAT32, 1.4, 1.7)
    for error in (3e-6, float("inf"), float("nan")):
        verdict = judge(goal, made_cases(FLOAT32, error=error, **ALL, ours=1))
        assert verdict.outcome is Outcome.FAIL
        assert verdict.remark.endswith("allowed 2.0e-06")
    unlimited = made_cases(FLOAT32, limit=None, error=3e-6, **ALL, ours=1)
    assert judge(goal, unlimited).outcome is Outcome.PASS


def test_what_was_not_measured_is_not_judged():
    for cases in ({}, made_cases(FLOAT32, **ALL), made_cases(FLOAT32, **ALL, ours=None)):
        verdict = judge(GOALS[0], cases)
        assert (verdict.outcome, verdict.remark) == (Outcome.INCOMPLETE, "not measured")


def test_overall():
    good, bad, half = Outcome.PASS, Outcome.FAIL, Outcome.INCOMPLETE
    assert overall([good, good]) is good
    assert overall([good, half]) is half
    assert overall([half, bad, good]) is bad
    assert overall([]) is half


def test_goals_are_about_entrants():
    assert set(MOST_USED) < set(PEERS)
    assert FUSED not in PEERS
    for goal in GOALS:
        assert set(goal.over) <= set(PEERS)
        assert 1 < goal.at_least < goal.aim


@pytest.mark.parametrize(
    ("fused", "args", "code", "text"),
    [
        (0.001, (), 0, "every goal is reached"),
        (0.009, (), 1, "a goal is missed"),
        (0.001, ("--only", "eager,ours"), 3, "not all could be measured in full"),
        (0.009, ("--only", "eager,ours"), 1, "a goal is missed"),
        (0.001, ("--cases", "resnet18-float32-8"), 0, "every goal is reached"),
        (0.009, ("--cases", "accuracy"), 0, "every goal is reached"),
        (0.001, ("--cases", "resnet34-float32-8"), 3, "not all could be measured in full"),
    ],
)
def test_exit_codes(measured, fused, args, code, text):
    measured.fused = fused
    result = run("--check", *args)
    assert result.exit_code == code
    assert text in result.output


def test_verdicts_are_printed(measured):
    measured.fused = 0.0057
    output = run("--check").output
    assert "torch.compile," in output, "the goal over three of the peers"
    assert "1.75" in output
    assert "aim reached" in output
    assert "fail, too slow" in output


# ---- accuracy ------------------------------------------------------------------------------------


def test_float32_accuracy_takes_the_seed_nearest_to_failing():
    row = accuracy.entry("resnet18", "float32", [(5e-7, 2e-7), (3e-6, 1e-6), (3e-6, 2e-6)])
    assert (row["error"], row["limit"], row["ok"]) == (3e-6, 2e-6, False)
    assert accuracy.entry("resnet18", "float32", [(1.9e-6, 1e-7)])["ok"]
    assert accuracy.entry("resnet18", "float32", [(3e-6, 2e-6)])["ok"]


def test_bfloat16_accuracy_takes_medians():
    pairs = [(3.1e-3, 3e-3), (9e-3, 3e-3), (3.2e-3, 8e-3)]
    row = accuracy.entry("resnet18", accuracy.CAST, pairs)
    assert (row["error"], row["eager_error"], row["ok"]) == (3.2e-3, 3e-3, True)
    assert not accuracy.entry("resnet18", accuracy.CAST, [(3.4e-3, 3e-3)])["ok"]
    assert not accuracy.entry("resnet18", accuracy.CAST, [(3.9e-3, 9e-3)])["ok"]


def test_accuracy_of_nets(monkeypatch):
    monkeypatch.setattr(accuracy, "SEEDS", range(1))
    monkeypatch.setattr(accuracy, "ROWS", [row for row in accuracy.ROWS if row[0] == "resnet18"])
    rows = accuracy.measure(32, lambda *_: None)
    assert [row["precision"] for row in rows] == ["float32", accuracy.CAST, accuracy.AUTOCAST]
    assert 0 < rows[0]["error"] < 2e-6
    for row in rows[1:]:
        assert 1e-4 < row["error"] < 1e-1, "computed in 16 bits indeed"
        assert 1e-4 < row["eager_error"] < 1e-1


# ---- records -------------------------------------------------------------------------------------


def test_a_case_comes_back_from_its_record():
    results = [
        Result(CHANNELS_LAST, 2, Samples((3.0, 1.0, 2.0, 5.0, 4.0)), 1.5e-6),
        Result(COMPILE, 2, reason="no compiler"),
    ]
    entry = json.loads(json.dumps(record.case_entry(FLOAT32, results, {CHANNELS_LAST: "s"})))
    assert entry["error_limit"] == 3e-6
    eager, compiled = record.results_of(entry)
    assert eager.samples.median == pytest.approx(3.0)
    assert eager.samples.quartiles == pytest.approx((2.0, 4.0))
    assert (eager.engine, eager.batch, eager.error) == (CHANNELS_LAST, 2, 1.5e-6)
    assert (compiled.samples, compiled.reason) == (None, "no compiler")


def test_limits_without_eager():
    assert record.case_entry(FLOAT32, [], {})["error_limit"] == 2e-6
    assert record.case_entry(BFLOAT16, [], {})["error_limit"] is None


def test_the_record_says_what_was_measured_on_what(measured, tmp_path):
    path = tmp_path / "new" / "r.json"
    assert run("--check", "--json", path).exit_code == 0
    written = json.loads(path.read_text())
    assert written["setup"] == {"threads": 1, "size": 224, "seconds": 20, "rounds": None} | {
        "rest_s": contest.REST_S
    }
    assert written["versions"]["torch"] == torch.__version__
    assert written["versions"].keys() >= {"onnxruntime", "openvino", "ncnn", "pnnx", "MNN"}
    assert written["machine"]["cpu"]
    assert [g["case"] for g in written["goals"]] == [str(goal.case) for goal in GOALS]
    assert [g["at_least"] for g in written["goals"]] == [goal.at_least for goal in GOALS]
    assert written["cases"].keys() == {str(goal.case) for goal in GOALS}
    assert written["accuracy"][0]["ok"] is True
    assert list(path.parent.iterdir()) == [path], "no temporary file is left"


def test_resume_measures_what_is_missing(measured, tmp_path):
    path = tmp_path / "r.json"
    run("--cases", "resnet18-float32-1", "--json", path)
    first = json.loads(path.read_text())
    measured.cases.clear()
    names = ["resnet18-float32-1", "resnet18-float32-2", "accuracy"]
    result = run("--cases", ",".join(names), "--json", path, "--resume")
    assert result.exit_code == 0
    assert [case.batch for case in measured.cases] == [2]
    both = json.loads(path.read_text())
    assert both["cases"].keys() == set(names[:2])
    assert both["cases"][names[0]] == first["cases"][names[0]]
    assert both["accuracy"]
    measured.cases.clear()
    run("--cases", "resnet18-float32-1", "--json", path)
    assert len(measured.cases) == 1, "without --resume all is measured anew"


def test_resume_refuses_another_set_up(measured, tmp_path):
    path = tmp_path / "r.json"
    run("--cases", FLOAT32, "--json", path)
    result = run("--cases", FLOAT32, "--json", path, "--resume", "--threads", 2)
    assert result.exit_code == 1
    assert message(result) == f"--resume: {path} was measured with threads 1, not 2"
    old = json.loads(path.read_text())
    new = json.loads(path.read_text())
    assert record.difference(old, new) == ""
    new["versions"]["MNN"] = "1"
    assert record.difference(new, old) == f"MNN 1, not {old['versions']['MNN']}"
    new["machine"]["cpu"] = "another"
    assert record.difference(new, old).startswith("cpu another, not ")


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_resume_refuses_other_files(measured, tmp_path, text):
    path = tmp_path / "r.json"
    path.write_text(text)
    result = run("--cases", FLOAT32, "--json", path, "--resume")
    assert result.exit_code == 1
    assert str(path) in message(result)
    assert path.read_text() == text


# ---- README --------------------------------------------------------------------------------------


@pytest.fixture
def written(measured, tmp_path):
    path = tmp_path / "r.json"
    run("--models", "resnet18", "--batches", "8,1", "--json", path)
    return path


def test_readme_table(written):
    result = CliRunner().invoke(readme.main, [str(written)])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    heads = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    assert heads == ["", "batch", *(e.title for e in ENTRANTS), "best peer / fused"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:6]]
    assert [row[:2] for row in rows] == [
        ["ResNet-18 float32", "1"],
        ["", "8"],
        ["ResNet-18 bfloat16", "1"],
        ["", "8"],
    ]
    assert rows[0][2:] == ["10.0"] * 6 + ["**1.00**", "10.00"]
    assert rows[2][4] == "-", "what could not run"
    assert torch.__version__ in lines[-1]


def test_readme_shows_losses(measured, tmp_path):
    measured.fused = 0.02
    run("--cases", FLOAT32, "--json", tmp_path / "r.json")
    text = readme.markdown([record.read(tmp_path / "r.json")])
    assert text.splitlines()[2].endswith("| **10.0** | 20.0 | 0.50 |")


def test_readme_is_written_between_its_markers(written, tmp_path):
    document = tmp_path / "README.md"
    document.write_text(f"before\n\n{readme.BEGIN}\nold\n{readme.END}\n\nafter\n")
    for _ in range(2):
        result = CliRunner().invoke(readme.main, [str(written), "--write", str(document)])
        assert result.exit_code == 0, result.output
        text = document.read_text()
        assert text.startswith(f"before\n\n{readme.BEGIN}\n| | batch |")
        assert text.endswith(f"\n{readme.END}\n\nafter\n")
        assert "old" not in text
    document.write_text("nothing")
    result = CliRunner().invoke(readme.main, [str(written), "--write", str(document)])
    assert result.exit_code == 1
    assert "must have the lines <!-- engines" in message(result)
    assert document.read_text() == "nothing"


# ---- worker processes ----------------------------------------------------------------------------

FAKE = """
import os, time
import numpy
from benchmarks.peers import Loaded

def convert(net, job):
    job.file(".fake").write_text(type(net).__name__)

def load(job):
    {load}
    calls = []
    def call():
        calls.append(0)
        {call}
    return Loaded(call, lambda y: numpy.zeros((job.batch, 1000), numpy.float32), "fake settings")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake(load, call): an entrant in whose process those statements run."""

    def make(load="pass", call="pass", **fields):
        name = f"fake_engine_{len(list(tmp_path.glob('fake*.py')))}"
        (tmp_path / f"{name}.py").write_text(FAKE.format(load=load, call=call))
        return dataclasses.replace(Entrant("fake", "Fake", name, ("torch",)), **fields)

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return make


def measure(tmp_path, *entrants, case=FLOAT32):
    """Results by title, and settings."""
    setup = dataclasses.replace(SETUP, entrants=entrants)
    stages = []
    contest = Contest(setup, tmp_path, case.batch)
    results, settings = contest.measure(case, lambda *stage: stages.append(stage))
    assert [r.engine for r in results] == [e.title for e in entrants]
    assert stages
    return {r.engine: r for r in results}, settings


def test_a_worker_runs_calls_and_ends(fake, tmp_path):
    entrant = fake(call="time.sleep(0.01)")
    with Worker(entrant, 1, tmp_path / "log") as worker:
        logits, settings = worker.load(Job("fake", "resnet18", "float32", 2, 32, 1, tmp_path))
        assert (logits.shape, settings) == ((2, 1000), "fake settings")
        assert 0.01 <= worker.time(3) < 5
        process = worker._process
        assert process.poll() is None
    assert process.poll() == 0


@pytest.mark.parametrize(
    ("load", "call", "reason"),
    [
        ("raise OSError('no such luck')", "pass", "OSError: no such luck"),
        ("import no_such_module", "pass", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("print('last', flush=True); os._exit(3)", "pass", "ended with exit code 3, last"),
        ("os.abort()", "pass", "died: Aborted"),
        ("pass", "if len(calls) > 2: os.kill(os.getpid(), 9)", "died: Killed"),
    ],
)
def test_a_peer_that_fails_is_a_row_with_its_reason(fake, tmp_path, load, call, reason):
    broken = fake(load, call)
    good = fake(key="good", title="Good")
    results, settings = measure(tmp_path, broken, good)
    assert results["Fake"].samples is None
    assert results["Fake"].reason.startswith(reason)
    assert len(results["Good"].samples.seconds) == 1
    assert settings["Good"] == "fake settings"


def test_a_peer_that_does_not_answer(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE_S", 0.5)
    results, _ = measure(tmp_path, fake("time.sleep(60)"))
    assert results["Fake"].reason == "gave no answer within 0 s"


def test_the_fused_net_may_not_fail(fake, tmp_path):
    for entrant in (fake("raise OSError('bug')"), fake(call="if len(calls) > 2: os.abort()")):
        with pytest.raises(Unavailable, match=r"bug|died: Aborted"):
            measure(tmp_path, dataclasses.replace(entrant, title=FUSED))


def test_a_missing_package_is_named(fake, tmp_path):
    entrant = fake(packages=("no-such-engine",), converts=("no-such-converter",))
    results, _ = measure(tmp_path, entrant)
    assert results["Fake"].reason == (
        "needs no-such-engine, no-such-converter, not installed: pip install -e '.[bench]'"
    )


def test_a_precision_that_an_engine_lacks(fake, tmp_path):
    results, _ = measure(tmp_path, fake(dtypes=("float32",)), case=BFLOAT16)
    assert results["Fake"].reason == "computes no bfloat16 on a CPU"


def test_conversion_runs_once_a_net(fake, tmp_path):
    entrant = fake(converts=("torch",))
    contest = Contest(dataclasses.replace(SETUP, entrants=[entrant]), tmp_path, 2)
    for batch in (1, 2):
        results, _ = contest.measure(Case("resnet18", "float32", batch), lambda *_: None)
        assert results[0].samples
        assert (tmp_path / "resnet18.fake").read_text() == "Sequential"
        (tmp_path / "resnet18.fake").write_text("Sequential")
    assert len(list(tmp_path.glob("*-convert.log"))) == 1


def test_a_failed_conversion_is_the_reason(tmp_path, fake):
    entrant = fake(converts=("torch",))
    source = tmp_path / f"{entrant.module}.py"
    source.write_text(source.read_text().replace("job.file", "job.no_file"))
    contest = Contest(dataclasses.replace(SETUP, entrants=[entrant]), tmp_path, 1)
    for _ in range(2):
        results, _ = contest.measure(FLOAT32, lambda *_: None)
        assert results[0].reason.startswith("conversion: AttributeError")


# ---- the engines themselves ----------------------------------------------------------------------


def test_entrants_have_modules_and_titles():
    titles = {name: title for name, (title, _) in torch_names().items()}
    for entrant in ENTRANTS:
        assert importlib.util.find_spec(entrant.module, peers.__name__), entrant
        if entrant.key in titles:
            assert entrant.title == titles[entrant.key]
    assert len(BY_KEY) == len(peers.BY_TITLE) == len(ENTRANTS)


def torch_names():
    from benchmarks.peers import torch_engines

    assert {name for name, _ in torch_engines.ENGINES.values()} <= engines.engines().keys()
    return torch_engines.ENGINES


def test_a_real_run_with_engines_of_torch(tmp_path):
    json_path, chart = tmp_path / "r.json", tmp_path / "chart.png"
    args = ("--only", "eager,ours", "--size", 32, "--rounds", 2, "--threads", 1, "--rest", 0)
    cases = "resnet18-float32-2,resnet18-bfloat16-1"
    result = run(*args, "--cases", cases, "--json", json_path, "--chart", chart)
    assert result.exit_code == 0, result.output
    assert chart.read_bytes().startswith(PNG)
    written = json.loads(json_path.read_text())
    assert list(written["cases"]) == cases.split(",")
    single, half = (written["cases"][name]["results"] for name in cases.split(","))
    for row in single + half:
        assert row["rounds"] == 2
        assert 0 < row["q1_ms"] <= row["median_ms"] <= row["q3_ms"]
    assert all(0 < row["error"] < 2e-6 for row in single)
    assert all(row["error"] > 1e-4 for row in half), "computed in 16 bits indeed"
    assert "best peer" in result.output
    assert [row["engine"] for row in single] == [CHANNELS_LAST, FUSED]


@pytest.mark.slow
@pytest.mark.parametrize("key", [e.key for e in ENTRANTS if e.converts])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_installed_peer_computes_the_net(tmp_path, key, dtype):
    entrant = BY_KEY[key]
    if entrant.missing():
        pytest.skip(f"{', '.join(entrant.missing())} not installed")
    if dtype not in entrant.dtypes:
        pytest.skip(f"{entrant.title} has no {dtype}")
    results, settings = measure(tmp_path, entrant, case=Case("resnet18", dtype, 2))
    assert results[entrant.title].reason == ""
    assert 0 < results[entrant.title].error < (5e-5 if dtype == "float32" else 2e-2)
    assert settings[entrant.title]
