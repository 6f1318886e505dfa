"""The commands demo, bench and tune, through click's runner and once as a program."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from conftest import message, needs_extension

import resnet_fused as rf
from resnet_fused import tuned
from resnet_fused._tuning_file import Answer
from resnet_fused.cli import main
from resnet_fused.commands import bench as bench_module
from resnet_fused.commands import demo as demo_module
from resnet_fused.commands import demo_speed
from resnet_fused.commands import tune as tune_module
from resnet_fused.measure import candidates
from resnet_fused.measure.compare import Result, WrongResult
from resnet_fused.measure.engines import CHANNELS_LAST, COMPILE, EAGER, FUSED, OURS
from resnet_fused.measure.timing import Samples

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK_BENCH = ["bench", "--size", "32", "--rounds", "2", "--no-compile"]
PNG = b"\x89PNG\r\n\x1a\n"


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args], catch_exceptions=False)


@pytest.fixture
def short_demo(monkeypatch):
    """Fewer digits, a net as it comes from its builder instead of a trained one, no timing."""
    monkeypatch.setattr(demo_module, "TINY", (64, 24))
    net = rf.models.resnet18(10, 1, block=rf.reference.Residual).eval()
    monkeypatch.setattr(demo_module, "_train", lambda *args: net)
    monkeypatch.setattr(demo_speed, "compare", all_fast)


def made_up(batch, **milliseconds):
    """Results for too_slow, from times by engine: cl, fused, ours."""
    names = {"cl": CHANNELS_LAST, "fused": FUSED, "ours": OURS}
    return [
        Result(names[short], batch, Samples((1e-3 * ms,)), 1e-7)
        for short, ms in milliseconds.items()
    ]


def all_fast(net, x, exact, engines, **kwargs):
    return made_up(len(x), cl=10, fused=8, ours=9)


# ---- the program ---------------------------------------------------------------------------------


def test_as_a_program():
    command = [sys.executable, "-m", "resnet_fused", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("resnet-fused, version ")


def test_help_names_all_commands():
    output = run("--help").output
    assert all(f"  {name} " in output for name in ("demo", "bench", "tune", "doctor"))


@pytest.mark.parametrize("command", ["bench", "demo", "tune"])
def test_a_bad_force_is_one_sentence(command, monkeypatch):
    monkeypatch.setattr(rf.select, "_forced", "fast")
    result = run(command)
    assert result.exit_code == 1
    words = ", ".join(rf.select.FORCES)
    assert message(result) == f"RESNET_FUSED_FORCE must be one of {words}, got 'fast'."


def test_a_bad_instruction_set_is_one_sentence():
    command = [sys.executable, "-m", "resnet_fused", "tune"]
    environ = {**os.environ, "RESNET_FUSED_ISA": "garbage"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=environ
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: RESNET_FUSED_ISA must be scalar, avx2, avx512 or")


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["bench", "--seconds", "nan"], "'--seconds': must be finite, got nan"),
        (["tune", "--seconds", "inf"], "'--seconds': must be finite, got inf"),
        (["bench", "--json", "/etc/passwd/y.json"], "'--json': /etc/passwd is no folder"),
        (["bench", "--chart", "/etc/passwd/y.png"], "'--chart': /etc/passwd is no folder"),
        (["demo", "--output", "/etc/passwd/y.png"], "'--output': /etc/passwd is no folder"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(args, sentence):
    result = run(*args)
    assert result.exit_code == 2
    assert f"Invalid value for {sentence}" in message(result)


# ---- bench ---------------------------------------------------------------------------------------


def test_bench_json(tmp_path):
    torch.set_num_threads(2)
    path = tmp_path / "new" / "bench.json"
    result = run(*QUICK_BENCH, "--batch", "1,2", "--threads", 1, "--ours", "--json", path)
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == 2, "--threads is for this run only"

    document = json.loads(path.read_text())
    assert document["net"] == {"model": "resnet18", "dtype": "float32", "size": 32}
    assert document["machine"]["threads"] == 1
    assert document["machine"]["torch"] == torch.__version__
    rows = document["results"]
    expected = [(b, e) for b in (1, 2) for e in (EAGER, CHANNELS_LAST, FUSED, OURS)]
    assert [(row["batch"], row["engine"]) for row in rows] == expected
    for batch in (1, 2):
        group = {row["engine"]: row for row in rows if row["batch"] == batch}
        best = min(group[EAGER]["median_ms"], group[CHANNELS_LAST]["median_ms"])
        for row in group.values():
            assert row["rounds"] == 2
            assert 0 < row["q1_ms"] <= row["median_ms"] <= row["q3_ms"]
            assert row["images_per_second"] == pytest.approx(1e3 * batch / row["median_ms"])
            assert row["ratio_to_best_peer"] == pytest.approx(best / row["median_ms"])
            assert 0 < row["error"] <= 2e-6


def test_bench_table_and_chart(tmp_path):
    path = tmp_path / "chart.png"
    result = run(*QUICK_BENCH, "--batch", "1", "--chart", path)
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(PNG)
    assert all(name in result.output for name in (EAGER, CHANNELS_LAST, FUSED, "images/s"))
    assert OURS not in result.output
    assert COMPILE not in result.output


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bench_16_bit(dtype, tmp_path):
    path = tmp_path / "bench.json"
    result = run(*QUICK_BENCH, "--batch", "1", "--dtype", dtype, "--json", path)
    assert result.exit_code == 0, result.output
    errors = [row["error"] for row in json.loads(path.read_text())["results"] if row["error"]]
    assert max(errors) > 1e-4, "computed in 16 bit indeed"


def test_bench_says_that_selection_is_forced():
    with rf.select.forced("torch"):
        result = run(*QUICK_BENCH, "--batch", "1")
    assert "selection forced to torch" in result.output


def test_bench_says_that_selection_is_tuned(tuning_file):
    tuned.learn({"a convolution": Answer(1, "torch", {"torch": 1.0})})
    assert "selection tuned" in run(*QUICK_BENCH, "--batch", "1").output


@pytest.mark.parametrize("text", ["0", "1,-2", "1;2", "", "1.5", "1,,2"])
def test_bench_refuses_bad_batches(text):
    result = run("bench", "--batch", text)
    assert result.exit_code == 2
    assert f"must be positive integers between commas, got '{text}'" in message(result)


def test_bench_shows_why_a_peer_cannot_run(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(torch, "compile", broken)
    result = run("bench", "--size", "32", "--rounds", "1", "--batch", "1")
    assert result.exit_code == 0, result.output
    (row,) = [line for line in result.output.splitlines() if COMPILE in line]
    assert "no working C++ compiler" in row


def test_bench_refuses_wrong_results(monkeypatch):
    fuse = rf.fuse

    def fuse_wrongly(model, **kwargs):
        fused = fuse(model, **kwargs)
        with torch.no_grad():
            fused[-1].bias += 0.01
        return fused

    monkeypatch.setattr(rf, "fuse", fuse_wrongly)
    result = run(*QUICK_BENCH, "--batch", "1")
    assert result.exit_code == 1
    assert message(result).startswith("batch 1: fused: relative error of the logits against fp64")
    assert "images/s" not in result.output, "no table of wrong results"


def test_bench_verdict():
    def verdict(*results):
        return bench_module._verdict(list(results))

    fused = Result(FUSED, 4, Samples((0.002,)), 1e-7)
    assert "batch 4: fused is 2.00x as fast as eager" in verdict(
        Result(EAGER, 4, Samples((0.004,)), 1e-7), fused
    )
    assert "a loss, torch.compile is 2.00x as fast as fused" in verdict(
        Result(EAGER, 4, Samples((0.004,)), 1e-7),
        Result(COMPILE, 4, Samples((0.001,)), 1e-7),
        fused,
    )
    assert "no peer" in verdict(Result(EAGER, 4, reason="broken"), fused)


# ---- tune ----------------------------------------------------------------------------------------


def made_up_times(runners, *, on_round, **kwargs):
    for runner in runners.values():
        runner.run()
    on_round(1, 1)
    return {plan: Samples((1e-3 * (5 if plan == "torch" else 9),) * 5) for plan in runners}


@needs_extension
def test_tune(tuning_file, monkeypatch):
    monkeypatch.setattr(candidates, "interleave", made_up_times)
    torch.set_num_threads(2)
    args = ("--size", 32, "--batch", 2, "--dtype", "bfloat16", "--threads", 1)
    result = run("tune", *args)
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == 2
    assert "resnet18, bfloat16, 32x32, threads: 1, milliseconds" in result.output
    assert f"kept in {tuning_file}" in result.output
    document = json.loads(tuning_file.read_text())
    ((machine, answers),) = document["machines"].items()
    assert ", threads: 1, " in machine
    assert len(answers) == 11
    for shape, answer in answers.items():
        assert shape.endswith(" bfloat16 cpu")
        assert answer["batch"] == 2
        assert answer["plan"] == "torch"
        assert answer["ms"]["torch"] == 5.0


@needs_extension
def test_tune_says_what_makes_its_answer_doubtful_or_useless(tuning_file, monkeypatch):
    monkeypatch.setattr(candidates, "interleave", made_up_times)
    busy = dataclasses.replace(tune_module.machine(), load=9.0)
    monkeypatch.setattr(tune_module, "machine", lambda: busy)
    with rf.select.forced("direct"):
        result = run("tune", "--size", 32)
    assert result.exit_code == 0, result.output
    assert "9.0 running processes in the last minute: tune again when idle" in result.output
    assert "RESNET_FUSED_FORCE is set, so it decides" in result.output


@needs_extension
def test_tune_fails_where_a_plan_is_wrong(tuning_file, monkeypatch):
    right = candidates._run
    monkeypatch.setattr(candidates, "_run", lambda *args: 2 * right(*args))
    result = run("tune", "--size", 32)
    assert result.exit_code == 1
    assert message(result).startswith("tune: direct on 7x7 3->64 to 16x16 stride 2x2 float32 cpu")
    assert not tuning_file.exists()


# ---- demo ----------------------------------------------------------------------------------------


def test_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module, "TINY", (64, 24))
    path = tmp_path / "pictures" / "demo.png"
    random_state = torch.random.get_rng_state()
    result = run("demo", "--quick", "--epochs", 1, "--no-compile", "--output", path)
    assert result.exit_code == 0, result.output
    assert torch.equal(random_state, torch.random.get_rng_state())
    assert path.read_bytes().startswith(PNG)
    assert "yes  24 of 24 predictions are the same after rf.fuse(net)." in result.output
    assert "yes  24 of 24 predictions are the same after fused.state_dict()" in result.output
    assert all(name in result.output for name in (EAGER, CHANNELS_LAST, FUSED, OURS))
    assert result.output.count("conv_bn") == 2, "both reports show the stem"


def test_demo_fails_when_predictions_disagree(tmp_path, short_demo, monkeypatch):
    fuse = rf.fuse

    def fuse_wrongly(model, **kwargs):
        fused = fuse(model, **kwargs)
        with torch.no_grad():
            fused[-1].bias.copy_(torch.arange(10.0) * 100)
        return fused

    monkeypatch.setattr(rf, "fuse", fuse_wrongly)
    path = tmp_path / "demo.png"
    result = run("demo", "--quick", "--epochs", 1, "--no-compile", "--output", path)
    assert result.exit_code == 1
    assert message(result).startswith("The fused net predicts another digit for ")
    assert "no   " in result.output


def test_demo_fails_when_the_checkpoint_does_not_come_back(tmp_path, short_demo, monkeypatch):
    def other_net(fused):
        net = rf.models.resnet18(10, 1, block=rf.reference.Residual).eval()
        with torch.no_grad():
            net[-1].bias.copy_(torch.arange(10.0) * 100)
        return net

    monkeypatch.setattr(demo_module, "_plain_copy", other_net)
    path = tmp_path / "demo.png"
    result = run("demo", "--quick", "--epochs", 1, "--no-compile", "--output", path)
    assert result.exit_code == 1
    assert message(result) == "A plain net with the fused net's state_dict predicts other digits."


def test_demo_fails_without_the_accuracy(tmp_path, short_demo, monkeypatch):
    """A net that was not trained is nowhere near 97%."""
    load = demo_module.data.load_digits
    monkeypatch.setattr(demo_module.data, "load_digits", lambda seed: load(seed).subset(64, 24))
    path = tmp_path / "demo.png"
    result = run("demo", "--epochs", 1, "--no-compile", "--output", path)
    assert result.exit_code == 1
    assert "where 97% are wanted: give it more --epochs." in message(result)
    assert path.exists(), "the picture shows what happened"


def test_demo_fails_when_fused_is_slower(tmp_path, short_demo, monkeypatch):
    looks = []

    def slow(net, x, exact, engines, **kwargs):
        looks.append(kwargs["budget_s"])
        return made_up(len(x), cl=10, fused=9, ours=11)

    judged = demo_speed.Scale(size=32, budget_s=1.0, warmup_s=0.0, judged=True)
    monkeypatch.setattr(demo_speed, "compare", slow)
    monkeypatch.setattr(demo_speed, "QUICK", judged)
    result = run("demo", "--quick", "--epochs", 1, "--output", tmp_path / "demo.png")
    assert result.exit_code == 1
    assert message(result).startswith(
        f"'{OURS}' must be faster than '{CHANNELS_LAST}' at batch 1, got 0.91x"
    )
    assert looks == [1, 1, 3, 1], "the slow one was given a second, longer look"


def test_demo_fails_when_the_large_net_is_wrong(tmp_path, short_demo, monkeypatch):
    def wrong(net, x, exact, engines, **kwargs):
        raise WrongResult("fused: relative error must be small, got 1")

    monkeypatch.setattr(demo_speed, "compare", wrong)
    result = run("demo", "--quick", "--epochs", 1, "--output", tmp_path / "demo.png")
    assert result.exit_code == 1
    assert message(result).endswith("batch 1: fused: relative error must be small, got 1.")


def test_what_is_too_slow():
    assert demo_speed.too_slow(made_up(1, cl=10, fused=9, ours=9.5)) == []
    assert demo_speed.too_slow(made_up(8, cl=10, fused=9, ours=20)) == []
    for batch in (1, 8):
        (sentence,) = demo_speed.too_slow(made_up(batch, cl=10, fused=10, ours=9))
        assert sentence.startswith(
            f"'fused' must be faster than '{CHANNELS_LAST}' at batch {batch}"
        )
    assert len(demo_speed.too_slow(made_up(1, cl=10, fused=11, ours=11))) == 2
    assert demo_speed.too_slow(made_up(1, fused=1, ours=1)) == [
        f"{CHANNELS_LAST} could not be timed."
    ]


@pytest.mark.parametrize(
    ("module", "package", "args"),
    [
        ("sklearn", "scikit-learn", ["demo", "--quick"]),
        ("matplotlib", "matplotlib", ["demo", "--quick"]),
        ("matplotlib", "matplotlib", ["bench", "--chart", "chart.png"]),
    ],
)
def test_missing_extra_is_one_sentence(module, package, args, monkeypatch, tmp_path):
    for name in [n for n in sys.modules if n.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.chdir(tmp_path)
    result = run(*args)
    assert result.exit_code == 1
    text = message(result)
    assert f"needs {package}, which is not installed: pip install 'resnet-fused[demo]'" in text
    assert not list(tmp_path.iterdir())


def test_digits_are_split_evenly_and_by_seed():
    digits = demo_module.data.load_digits(0)
    assert (len(digits.train_y), len(digits.test_y)) == (1437, 360)
    assert digits.test_x.shape == (360, 1, 32, 32)
    share = torch.bincount(digits.test_y) / torch.bincount(digits.train_y)
    assert 0.23 < float(share.min()) <= float(share.max()) < 0.27
    again, other = demo_module.data.load_digits(0), demo_module.data.load_digits(1)
    assert torch.equal(digits.test_x, again.test_x)
    assert not torch.equal(digits.test_y, other.test_y)
    x = demo_module.data.to_pixels(digits.test_x)
    assert float(x.min()) >= -1e-6
    assert float(x.max()) <= 1 + 1e-6


def test_training_is_reproducible_and_ends_in_eval_mode():
    digits = demo_module.data.load_digits(0).subset(64, 8)

    def train():
        torch.manual_seed(0)
        net = rf.models.resnet18(10, 1, block=rf.reference.Residual)
        return demo_module.data.train(net, digits, 1, 0, lambda *_: None)

    a, b = train(), train()
    assert not a.training
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
