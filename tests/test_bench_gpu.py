"""benchmarks.bench_gpu without a GPU: arguments, dry runs, records, floors; with one: timing."""

import contextlib
import functools
import json
import time
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from conftest import message

from benchmarks import bench_gpu, gpu_contest, gpu_layers, gpu_show, record
from benchmarks.cases import Case
from benchmarks.common import exact_logits, plain_net, random_images, relative_error
from benchmarks.folded_net import SEPARATE, folded_net, run
from benchmarks.gpu_contest import DTYPES, Setup, tiny_net
from benchmarks.gpu_engines import TITLES, Clock
from benchmarks.layers import distinct_layers
from benchmarks.roofline import Ceilings, ceilings, layer_work, net_floor, net_work
from resnet_fused.measure import engines
from resnet_fused.measure.compare import Result, WrongResult, verified
from resnet_fused.measure.engines import CHANNELS_LAST, FUSED, GRAPHED, RECORDED, Unavailable
from resnet_fused.measure.gpu_timing import EventRunner, GraphRunner, NotCapturable
from resnet_fused.measure.timing import Runner, Samples

CASE = "resnet18-bfloat16-1"
CPU = Clock(torch.device("cpu"))
H200 = Ceilings(790e12 / 2, 4.3e12)
net_of = functools.cache(plain_net)  # its shapes alone are used
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def command(*args):
    words = [str(a) for a in args]
    return CliRunner().invoke(bench_gpu.main, words, catch_exceptions=False)


@pytest.fixture(autouse=True)
def as_it_was(one_thread):
    """cuDNN's setting is put back, too."""
    tries = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = tries


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--only", "eager,tvm"), "must be some of eager, eager-graph, compile, autotune"),
        (("--models", "resnet34"), "must be some of resnet18, resnet50 between commas"),
        (("--dtypes", "float32"), "must be some of bfloat16, float16 between commas"),
        (("--cases", "resnet18-float32-1"), "case must be like resnet18-bfloat16-8, got"),
        (("--cases", "resnet18-bfloat16"), "case must be like resnet18-bfloat16-8, got"),
        (("--resume",), "--resume goes with --json"),
    ],
)
def test_bad_arguments_are_refused_in_a_sentence(args, sentence):
    result = command("--dry-run", *args)
    assert result.exit_code == 2
    assert sentence in message(result)


@without_gpu
def test_without_a_gpu_it_says_so():
    result = command()
    assert result.exit_code == 2
    assert message(result) == "this needs a GPU that torch can use; --dry-run does without"


def test_help_names_every_engine():
    result = command("--help")
    assert result.exit_code == 0
    assert f"some of {', '.join(TITLES)}." in " ".join(result.output.split())


# ---- dry runs ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dry_run_takes_every_engine_and_no_time(tmp_path):
    path, chart = tmp_path / "new" / "record.json", tmp_path / "chart.png"
    args = ["--dry-run", "--cases", CASE, "--json", path]
    with_chart = ["--chart", chart] if _has_matplotlib() else []
    result = command(*args, *with_chart)
    assert result.exit_code == 0, result.output
    entry = json.loads(path.read_text())["cases"][CASE]
    rows = {row["engine"]: row for row in entry["results"]}
    assert list(rows) == list(TITLES.values())
    for name, row in rows.items():
        assert "median_ms" not in row
        if name == "JAX" and row["error"] is None:
            assert row["reason"] == "jax is not installed"
        else:
            assert (row["reason"], 0 < row["error"] < 0.01) == ("dry run", True)
    assert entry["selection"]["force"] == "none"
    assert entry["ceilings"] is entry["floor_ms"] is None
    assert result.output.count("dry run") >= len(rows) - 1
    if with_chart:
        assert chart.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def _has_matplotlib():
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.fixture
def dry(tmp_path):
    """Runs the cheapest two engines dry, with a record at `dry.path`."""

    class Dry:
        path = tmp_path / "record.json"

        def __call__(self, *args, cases=CASE):
            words = ["--dry-run", "--only", "eager,ours", "--cases", cases, "--json", self.path]
            return command(*words, *args)

        def record(self):
            return json.loads(self.path.read_text())

    return Dry()


def test_every_layer_is_checked(dry):
    assert dry(cases="resnet50-float16-8").exit_code == 0
    entry = dry.record()["cases"]["resnet50-float16-8"]
    wanted = [layer.text for layer in distinct_layers(tiny_net("resnet50"), 32)]
    assert [row["layer"] for row in entry["layers"]] == wanted
    for row in entry["layers"]:
        assert row["us"] == row["failed"] == {}
        assert 0 < row["errors"][gpu_layers.OURS] <= 2 * row["errors"][gpu_layers.PYTORCH]


def test_resume_measures_only_what_is_missing(dry, monkeypatch):
    assert dry("--no-layers").exit_code == 0
    before = dry.record()["cases"][CASE]
    asked, measure = [], gpu_contest.measure
    monkeypatch.setattr(
        gpu_contest, "measure", lambda case, *rest: asked.append(str(case)) or measure(case, *rest)
    )
    both = f"{CASE},resnet18-float16-1"
    result = dry("--no-layers", "--resume", cases=both)
    assert result.exit_code == 0
    assert asked == ["resnet18-float16-1"]
    assert list(dry.record()["cases"]) == both.split(",")
    assert dry.record()["cases"][CASE] == before


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("setup", "dry_run", False),
        ("setup", "size", 224),
        ("machine", "gpu", "NVIDIA H200"),
        ("machine", "sources", "0"),
        ("versions", "torch", "2.0.0"),
    ],
)
def test_resume_refuses_other_surroundings(dry, part, key, value):
    assert dry("--no-layers").exit_code == 0
    old = dry.record()
    old[part][key] = value
    record.write(dry.path, old)
    result = dry("--no-layers", "--resume")
    assert result.exit_code == 1
    assert f"was measured with {key} {value}, not " in message(result)


def test_resume_refuses_another_file(dry):
    dry.path.write_text("[]")
    result = dry("--resume")
    assert result.exit_code == 1
    assert "must be a record of bench_gpu" in message(result)


def test_a_case_in_which_ours_is_wrong_fails_and_others_go_on(dry, monkeypatch):
    measure = gpu_contest.measure

    def wrong_for_one(case, *rest):
        if case.dtype == "bfloat16":
            raise WrongResult("fused: relative error of the logits, got 0.5")
        return measure(case, *rest)

    monkeypatch.setattr(gpu_contest, "measure", wrong_for_one)
    result = dry("--no-layers", cases=f"{CASE},resnet18-float16-1")
    assert result.exit_code == 1
    assert dry.record()["failed"] == {CASE: "fused: relative error of the logits, got 0.5"}
    assert list(dry.record()["cases"]) == ["resnet18-float16-1"]
    assert f"{CASE}: failed: fused: relative error" in result.output
    monkeypatch.setattr(gpu_contest, "measure", measure)
    assert dry("--no-layers", "--resume").exit_code == 0
    assert dry.record()["failed"] == {}


def test_a_layer_in_which_ours_is_wrong_fails_alone(dry, monkeypatch):
    measure = gpu_layers.measure

    def wrong_for_one(layer, *rest, **keywords):
        if layer.residual:
            raise WrongResult("got 0.5")
        return measure(layer, *rest, **keywords)

    monkeypatch.setattr(gpu_layers, "measure", wrong_for_one)
    result = dry()
    assert result.exit_code == 1
    entry = dry.record()["cases"][CASE]
    assert entry["failures"] == ["3x3 16>16 8 +res: got 0.5", "3x3 32>32 4 +res: got 0.5"]
    assert len(entry["layers"]) == len(distinct_layers(tiny_net("resnet18"), 32)) - 2


# ---- checks --------------------------------------------------------------------------------------


def engine_that_is_off_by(factor):
    def engine(model, x):
        return Runner(lambda: factor * model(x), torch.inference_mode)

    return engine


@pytest.mark.parametrize("name", [FUSED, RECORDED, GRAPHED])
def test_any_of_ours_must_be_as_close_to_fp64_as_eager(name):
    net, x = tiny_net("resnet18").bfloat16(), random_images(1, size=32).bfloat16()
    table = {CHANNELS_LAST: engine_that_is_off_by(1), name: engine_that_is_off_by(1.1)}
    exact = exact_logits(net, x)
    with pytest.raises(WrongResult, match="must be at most"):
        verified(net, x, exact, table, standard=CHANNELS_LAST)
    table = {CHANNELS_LAST: table[CHANNELS_LAST], "a peer": table[name]}
    _, results = verified(net, x, exact, table, standard=CHANNELS_LAST)
    assert results["a peer"].error == pytest.approx(0.1, rel=0.2)


def test_ours_may_say_that_one_way_is_not_available():
    def engine(model, x):
        raise Unavailable("no CUDA graph: the device is asked")

    net, x = tiny_net("resnet18"), random_images(1, size=32)
    table = {CHANNELS_LAST: engine_that_is_off_by(1), RECORDED: engine}
    runners, results = verified(net, x, exact_logits(net, x), table, standard=CHANNELS_LAST)
    assert list(runners) == [CHANNELS_LAST]
    assert results[RECORDED].reason == "no CUDA graph: the device is asked"


def test_layers_of_ours_must_be_as_close_to_fp64_as_pytorch(monkeypatch):
    layer = distinct_layers(tiny_net("resnet18"), 32)[1]
    measured = gpu_layers.measure(layer, 2, torch.bfloat16, CPU, l2_bytes=0, rounds=1)
    assert measured.seconds == {}
    pack = gpu_layers.packing.pack

    def pack_wrong(unit, dtype, choice):
        packed = pack(unit, dtype, choice)
        return lambda x, residual: packed(x, residual) * 1.05

    monkeypatch.setattr(gpu_layers.packing, "pack", pack_wrong)
    with pytest.raises(WrongResult, match="relative error against fp64 must be at most"):
        gpu_layers.measure(layer, 2, torch.bfloat16, CPU, l2_bytes=0, rounds=1)


def test_configurations_are_ways_of_which_a_wrong_one_fails_alone(monkeypatch):
    """With the CPU's kernels in the place of those of the plan "cuda"."""
    from resnet_fused import select

    layer = distinct_layers(tiny_net("resnet18"), 32)[2]
    assert layer.residual
    names, asked = ["sm90 p64x64 split 1", "sm80 64x64 split 4"], []

    def ranked(sizes):
        asked.append(sizes)
        return names

    def op(x, weight, scale, shift, residual, *, config, **given):
        given |= {"plan": "torch", "pool": False}
        y = torch.ops.resnet_fused.conv_bn_act_packed(x, weight, scale, shift, residual, **given)
        return y if config == names[0] else 1.05 * y

    monkeypatch.setattr(gpu_layers._cuda, "ranked", ranked)
    monkeypatch.setattr(gpu_layers._gpu, "conv_op", lambda plan: op)
    how = {"l2_bytes": 0, "rounds": 1, "configurations": True}
    with select.forced("torch"):
        row = gpu_layers.measure(layer, 2, torch.bfloat16, CPU, **how)
        assert row.configurations == ()  # another plan's
        choose = select.choose
        monkeypatch.setattr(
            gpu_layers.select, "choose", lambda shape: replace(choose(shape), plan="cuda")
        )
        pack = gpu_layers.packing.pack
        monkeypatch.setattr(
            gpu_layers.packing,
            "pack",
            lambda u, d, choice: pack(u, d, replace(choice, plan="torch")),
        )
        row = gpu_layers.measure(layer, 2, torch.bfloat16, CPU, **how)
    assert row.configurations == tuple(names)
    assert list(row.failed) == [names[1]]
    assert row.errors[names[0]] == row.errors[gpu_layers.OURS]
    assert asked[0].x == (2, 16, 8, 8)
    assert (asked[0].out_channels, asked[0].kind) == (16, "bfloat16")


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_folded_net_is_the_net(name):
    net, x = tiny_net(name), random_images(2, size=32)
    with torch.inference_mode():
        assert relative_error(run(folded_net(net), x, SEPARATE), exact_logits(net, x)) < 2e-6


# ---- floors --------------------------------------------------------------------------------------


def test_a_layer_counts_each_tensor_once():
    layers = {layer.text: layer for layer in distinct_layers(net_of("resnet18"), 224)}
    work = layer_work(layers["3x3 64>64 56 +res"], 2)
    pixels = 2 * 56 * 56
    assert work.multiplications == pixels * 64 * 64 * 9
    assert work.elements == 3 * pixels * 64 + 64 * 64 * 9
    strided = layer_work(layers["1x1/2 64>128 56"], 2, joined=True)
    assert strided.elements == 2 * 28 * 28 * 64 + 64 * 128  # a quarter of x; no output


@pytest.mark.parametrize(("name", "multiplications"), [("resnet18", 1.814e9), ("resnet50", 4.1e9)])
def test_a_net_has_the_known_number_of_multiplications(name, multiplications):
    steps = net_work(net_of(name), 224, 1)
    assert sum(s.multiplications for s in steps) == pytest.approx(multiplications, rel=0.01)


def test_floors_of_resnet18_on_an_h200():
    steps = {batch: net_work(net_of("resnet18"), 224, batch) for batch in (1, 128)}
    floors = {batch: 1e6 * net_floor(steps[batch], 2, H200) for batch in steps}
    assert floors == pytest.approx({1: 8.8, 128: 677}, rel=0.02)  # derived elsewhere, microseconds
    twice = Ceilings(2 * H200.multiply_adds, 2 * H200.copy_bytes)
    assert 1e6 * net_floor(steps[128], 2, twice) == pytest.approx(floors[128] / 2)


def test_ceilings_are_work_over_time():
    class Clocked:
        def __init__(self, call):
            call()

        def time(self, calls):
            return 2e-3

    found = ceilings(torch.float32, torch.device("cpu"), Clocked, matrix=8, copy_bytes=4096)
    assert found == Ceilings(512 / 2e-3, 8192 / 2e-3)


def test_operands_in_turn_exceed_l2_twice():
    x, residual = torch.zeros(1000), torch.zeros(1000)
    sets = gpu_layers.in_turn(x, residual, l2_bytes=20_000)  # 8000 bytes a set
    assert len(sets) == 5
    assert len({t.data_ptr() for operands in sets for t in operands}) == 10
    assert len(gpu_layers.in_turn(x, None, l2_bytes=0)) == 2
    assert len(gpu_layers.in_turn(x, None, l2_bytes=1 << 40)) == gpu_layers.MOST_INPUTS


# ---- tables --------------------------------------------------------------------------------------


def entry_with(ours, peer, floor_ms=0.5):
    def samples(ms):
        return Samples((1e-3 * ms,) * 5)

    results = [
        Result(CHANNELS_LAST, 8, samples(4.0), 1e-3),
        Result("compile", 8, samples(peer), 1e-3),
        Result(FUSED, 8, samples(3.0), 1e-3),
        Result(RECORDED, 8, samples(ours), 1e-3),
    ]
    entry = record.case_entry(Case("resnet18", "bfloat16", 8), results, {})
    chosen = {"force": "none", "tuned": 0}
    return entry | {"floor_ms": floor_ms, "selection": chosen, "layers": [], "failures": []}


def shown(entry):
    from rich.console import Console

    out = Console(width=110)
    with out.capture() as captured:
        out.print(gpu_show.net_table("resnet18", [entry]))
    return captured.get()


def test_the_table_has_ratio_and_share_of_the_floor():
    row = next(line for line in shown(entry_with(1.0, 2.0)).splitlines() if RECORDED in line)
    assert [cell.strip() for cell in row.split("│")[3:-1]] == [
        *("1.00", "1.00-1.00", "8000", "2.00x", "50%", "1.0e-03")
    ]


def test_wins_and_losses_are_said():
    cases = {"won": entry_with(1.0, 2.0), "lost": entry_with(2.0, 1.0)}
    assert gpu_show.verdicts({"cases": cases}) == [
        f"[green]won: {RECORDED} is 2.00x as fast as compile[/green]",
        f"[red]lost: a loss, compile is 2.00x as fast as {RECORDED}[/red]",
    ]


def test_rows_of_layers_have_shares_and_ratios():
    layer = distinct_layers(net_of("resnet18"), 224)[1]
    seconds = {gpu_layers.OURS: 1e-4, gpu_layers.PYTORCH: 2e-4}
    row = gpu_layers.Row(layer, 32, torch.bfloat16, "triton", "", 2, {}, {}, seconds)
    entry = row.record(H200)
    multiplications = 32 * 56 * 56 * 64 * 64 * 9
    assert entry["tflops"] == pytest.approx(2e-12 * multiplications / 1e-4)
    assert entry["share_of_matmul"] == pytest.approx(entry["tflops"] / 790)
    assert (entry["ratio_to_pytorch"], entry["ratio_to_cudnn"]) == (2.0, None)
    assert entry["share_of_floor"] == pytest.approx(entry["floor_us"] / 100)
    assert "configurations_us" not in entry
    seconds |= {"a split 1": 3e-4, "b split 1": 1e-4}
    row = replace(row, seconds=seconds, configurations=("a split 1", "b split 1", "wrong"))
    entry = row.record(H200)
    assert entry["us"] == pytest.approx({gpu_layers.OURS: 100.0, gpu_layers.PYTORCH: 200.0})
    assert list(entry["configurations_us"].items()) == [
        ("b split 1", pytest.approx(100.0)),
        ("a split 1", pytest.approx(300.0)),
    ]


# ---- timing --------------------------------------------------------------------------------------


class FakeGpu:
    """A clock that calls advance; a graph that repeats what it recorded."""

    def __init__(self, monkeypatch):
        self.now, self.recording, self.refuses = 0.0, None, False
        gpu = self

        class Stream:
            def wait_stream(self, other):
                pass

        self.stream = self.default = Stream()

        class Graph:
            def replay(self):
                gpu.now += self.recorded

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return 1e3 * (other.at - self.at)

        @contextlib.contextmanager
        def graph(into, stream, capture_error_mode):
            gpu.recording, before, gpu.stream = 0.0, gpu.stream, stream
            try:
                yield
                if gpu.refuses:  # torch does not put the stream back then
                    raise RuntimeError("CUDA error: operation not permitted\nmore lines")
                into.recorded = gpu.recording
            finally:
                gpu.recording = None
            gpu.stream = before

        fakes = {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "Event": Event,
            "graph": graph,
            "stream": lambda stream: contextlib.nullcontext(),
            "device": lambda device: contextlib.nullcontext(),
            "current_stream": lambda: gpu.stream,
            "set_stream": lambda stream: setattr(gpu, "stream", stream),
            "synchronize": lambda: None,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def call(self, seconds):
        if self.recording is None:
            self.now += seconds + 1e-3  # the launch
        else:
            self.recording += seconds
        return "output"


@pytest.fixture
def gpu(monkeypatch):
    return FakeGpu(monkeypatch)


@pytest.mark.parametrize("calls", [1, 4, 10, 14, 1000])
def test_a_graph_runner_tells_seconds_of_one_call(gpu, calls):
    runner = GraphRunner(lambda: gpu.call(2e-5), torch.device("cuda"), calls=10)
    before = gpu.now
    assert runner.time(calls) == pytest.approx(2e-5)
    assert gpu.now - before == pytest.approx(2e-4 * max(1, round(calls / 10)))
    assert runner.run() == "output"


def test_an_event_runner_counts_launches_too(gpu):
    runner = EventRunner(lambda: gpu.call(2e-5), torch.device("cuda"))
    assert runner.time(3) == pytest.approx(1.02e-3)


def test_the_context_is_entered_around_recording(gpu):
    modes = []
    runner = GraphRunner(
        lambda: modes.append(torch.is_inference_mode_enabled()),
        torch.device("cuda"),
        calls=2,
        context=torch.inference_mode,
    )
    assert set(modes) == {True}
    runner.time(1)
    assert not torch.is_inference_mode_enabled()


def test_what_cannot_be_recorded_is_said_in_a_line(gpu):
    gpu.refuses = True
    with pytest.raises(NotCapturable) as caught:
        GraphRunner(lambda: None, torch.device("cuda"))
    assert str(caught.value) == "no CUDA graph: CUDA error: operation not permitted"
    assert gpu.stream is gpu.default


def test_a_graph_has_at_least_one_call():
    with pytest.raises(ValueError, match="calls must be at least 1, got 0"):
        GraphRunner(lambda: None, torch.device("cuda"), calls=0)


# ---- with a GPU ----------------------------------------------------------------------------------


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", [EventRunner, functools.partial(GraphRunner, calls=4)])
def test_seconds_of_one_call_on_a_gpu(kind):
    """Between what a kernel of so many clocks takes at least and what the host saw go by, which
    hold however many processes share the GPU; as many calls as were asked for."""
    clocks, calls = 3_000_000, 40
    count = torch.zeros((), dtype=torch.int64, device="cuda")

    def call():
        torch.cuda._sleep(clocks)
        count.add_(1)

    runner = kind(call, count.device)
    torch.cuda.synchronize()
    before, begin = count.item(), time.perf_counter()
    seconds = runner.time(calls)
    host = time.perf_counter() - begin
    assert count.item() - before == calls
    assert clocks / 3e9 < seconds <= 1.05 * host / calls  # no GPU has a clock of 3 GHz


@pytest.mark.gpu
@needs_gpu
def test_recording_what_waits_for_the_gpu_is_refused():
    a = torch.ones(8, device="cuda")
    with pytest.raises(NotCapturable, match="no CUDA graph"):
        GraphRunner(lambda: a.sum().item(), a.device)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.slow
def test_a_case_is_measured_on_a_gpu():
    words = tuple(word for word in TITLES if word not in ("compile", "autotune", "freezing"))
    setup = Setup(words, size=64, rounds=2, seconds=0.1)
    entry = gpu_contest.measure(Case.parse("resnet18-float16-2", DTYPES), setup, lambda *a: None)
    assert entry["failures"] == []
    timed = {row["engine"] for row in entry["results"] if "median_ms" in row}
    assert timed >= {CHANNELS_LAST, "eager + CUDA graph", *engines.OWN} - {engines.OURS}
    assert all(row["us"][gpu_layers.OURS] > 0 for row in entry["layers"])
    assert 0 < entry["floor_ms"] < min(r["median_ms"] for r in entry["results"] if r["error"])
