"""gpu_check without a GPU: time limits, stages that fail, what is written when."""

from __future__ import annotations

import json
import sys

import pytest
from click.testing import CliRunner

from benchmarks import gpu_check, stages
from benchmarks.stages import Stage


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


PASS, FAIL = python("print('fine')"), python("print('bad'); raise SystemExit(3)")
HANG = python("import subprocess, sys\nprint('begun', flush=True)\nsubprocess.run(['sleep', '60'])")


def test_later_stages_run_when_an_earlier_one_fails(tmp_path):
    chosen = {"build": Stage((FAIL,), 20), "test": Stage((PASS,), 20)}
    assert gpu_check.check(chosen, tmp_path) == 1
    record = json.loads((tmp_path / "check.json").read_text())
    assert record["stages"]["build"]["status"] == "failed"
    assert record["stages"]["build"]["reason"] == "python: exit status 3".replace(
        "python", stages._name(FAIL)
    )
    assert record["stages"]["test"]["status"] == "passed"
    assert "bad" in (tmp_path / "build.log").read_text()
    assert gpu_check.check({"test": chosen["test"]}, tmp_path) == 0


def test_a_stage_ends_at_its_limit_with_all_that_it_started(tmp_path):
    chosen = {"test": Stage((HANG, PASS), 1.5), "tune": Stage((PASS,), 20)}
    assert gpu_check.check(chosen, tmp_path) == 1
    record = json.loads((tmp_path / "check.json").read_text())["stages"]
    assert record["test"]["status"] == "timed out"
    assert record["test"]["seconds"] < 15
    assert "was ended at the stage's limit; no time was left" in record["test"]["reason"]
    assert record["tune"]["status"] == "passed"
    assert "begun" in (tmp_path / "test.log").read_text()


def test_what_the_machine_refuses_is_never_clean(tmp_path):
    refused = python("print('ERROR: Device not supported'); raise SystemExit(1)")
    stage = Stage((PASS, refused), 20, refusals=gpu_check.REFUSALS)
    assert stages.run(stage, tmp_path / "a.log", tmp_path).status == "unavailable"
    stage = Stage((["/no/such/compute-sanitizer", "--tool", "memcheck"],), 20)
    outcome = stages.run(stage, tmp_path / "b.log", tmp_path)
    assert outcome.status == "unavailable"
    assert outcome.reason == "memcheck cannot be run: No such file or directory"
    both = Stage((refused, FAIL), 20, refusals=gpu_check.REFUSALS)
    assert stages.run(both, tmp_path / "c.log", tmp_path).status == "failed"
    assert gpu_check.check({"sanitize": stage}, tmp_path) == 1


def test_the_end_of_a_long_log_is_kept(tmp_path):
    long = python("print('x' * 500_000 + 'end')")
    stages.run(Stage((long,), 20), tmp_path / "a.log", tmp_path)
    text = (tmp_path / "a.log").read_text()
    assert len(text) == stages.MOST_LOG_BYTES
    assert text.endswith("end\n")


def test_the_default_stages_take_at_most_8_minutes_and_8_files(tmp_path):
    known = gpu_check.stages(tmp_path)
    assert list(known) == ["build", "test", "sanitize", "tune", "bench"]
    assert sum(stage.limit_s for stage in known.values()) <= 480
    records = {"check.json", "tuning.json", "bench.json"}
    assert len(records | {f"{name}.log" for name in known}) == 8
    commands = [" ".join(command) for stage in known.values() for command in stage.commands]
    assert "--no-index" in commands[0]
    assert "--no-deps" in commands[0]
    for tool in gpu_check.SANITIZERS:
        assert any(f"--tool {tool}" in command for command in commands)


def test_the_machine_is_named(tmp_path):
    gpu_check.check({"test": Stage((PASS,), 20)}, tmp_path)
    machine = json.loads((tmp_path / "check.json").read_text())["machine"]
    for name in ("gpu", "driver", "torch", "triton", "commit", "when"):
        assert name in machine
    assert machine["torch"]


def test_unknown_stages_are_refused(tmp_path):
    result = CliRunner().invoke(gpu_check.main, ["--stages", "build,fly", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "must be among build, test, sanitize, tune, bench, got fly" in result.output


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["compute-sanitizer", "--tool", "racecheck", "python", "-m", "x"], "racecheck"),
        (["python", "-m", "pytest", "tests"], "pytest"),
        (["/usr/bin/make"], "make"),
    ],
)
def test_names(command, name):
    assert stages._name(command) == name
