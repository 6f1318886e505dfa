"""The layer benchmark: which layers it finds, what it counts, what it holds them to."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner
from conftest import needs_extension
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import resnet_fused as rf
from benchmarks import bench_layers, layer_cases
from benchmarks.accounting import (
    arithmetic,
    direct_multiplications,
    is_winograd,
    multiplications,
    rows,
)
from benchmarks.in_net import profile
from benchmarks.layer_cases import COLD, WARM, Measured, copies_beyond_l3, l3_bytes, measure
from benchmarks.layer_chart import save_roofline
from benchmarks.layer_check import MOST_BELOW, derived_reasons, judge, target
from benchmarks.layers import Layer, all_layers, distinct_layers, layers_of
from benchmarks.onednn import is_available, prepacked
from resnet_fused import check
from resnet_fused.measure.networks import plain_net, random_images

pytestmark = pytest.mark.usefixtures("one_thread")


def layer(
    in_channels=64,
    out_channels=96,
    size=14,
    kernel=3,
    stride=1,
    *,
    groups=1,
    residual=False,
    stage=1,
    act="relu",
):
    return Layer(
        in_channels=in_channels,
        out_channels=out_channels,
        in_size=(size, size),
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding=(kernel // 2, kernel // 2),
        dilation=(1, 1),
        groups=groups,
        act=act,
        residual=residual,
        stage=stage,
        name="a.conv",
    )


def measured(**changes):
    """A made-up measurement: 1 GMAC/s peak and a time of which nothing else takes a part."""
    m = Measured(
        layer=layer(),
        batch=8,
        dtype=torch.float32,
        weights=WARM,
        threads=2,
        plan="direct",
        why="because",
        seconds=1.0,
        peer_seconds=2.0,
        peak=1e9,
        read_seconds=1e-3,
        move_seconds=1e-6,
        call_seconds=1e-6,
        weight_bytes=1000,
        map_bytes=10000,
        output_bytes=4000,
        page_faults=0,
        error=1e-7,
        peer_error=2e-7,
    )
    return dataclasses.replace(m, **changes)


def at_share(share, **changes):
    """The same with the time that makes it reach this share of the peak."""
    m = measured(**changes)
    return dataclasses.replace(m, seconds=m.multiplications / m.peak / share)


# ---- which layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["resnet18", "resnet50"])
def test_layers_cover_the_whole_net(net):
    model = plain_net(net)
    layers = layers_of(net)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert sum(found.count for found in layers) == len(convs)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.to("meta")(torch.empty(2, 3, 224, 224, device="meta"))
    flops = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert flops == 2 * sum(found.count * direct_multiplications(found, 2) for found in layers)


def test_layers_of_resnet18():
    layers = layers_of("resnet18")
    assert layers[0].text == "7x7/2 3>64 224"
    assert [found.stage for found in layers] == sorted(found.stage for found in layers)
    assert {found.stage for found in layers} == set(range(5))
    # every block ends in an addition, and the shortcut's result has no activation of its own
    assert sum(found.count for found in layers if found.residual) == 8
    assert sum(found.count for found in layers if found.act == "none") == 3
    assert len(set(layers)) == len(layers)


def test_sizes_are_those_of_the_calls():
    model = plain_net("resnet18")
    sizes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda _, args, y, name=name: sizes.update(
                    {name: (tuple(args[0].shape[-2:]), tuple(y.shape[-2:]))}
                )
            )
    with torch.no_grad():
        model(random_images(1, size=72))
    found = {one.name: (one.in_size, one.out_size) for one in all_layers(plain_net("resnet18"), 72)}
    assert found == sizes
    assert list(found) == list(sizes)


def test_layers_of_any_net_that_fuses():
    class Net(nn.Sequential):
        pass

    net = Net(
        nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), groups=2),
        nn.BatchNorm2d(6),
        rf.reference.Residual(6, 6),
        rf.reference.Residual(6, 6),
    ).eval()
    first, conv1, conv2 = distinct_layers(net, 20)
    assert (first.kernel, first.stride, first.groups, first.act) == ((3, 5), (2, 1), 2, "none")
    assert (first.in_size, first.out_size) == ((20, 20), (10, 20))
    assert (conv1.residual, conv2.residual) == (False, True)
    assert (conv1.count, conv2.count) == (2, 2)
    assert first.text == "3x5/2 4>6 20 g2"


def test_unit_is_that_layer():
    found = layer(8, 12, 9, 3, 2, groups=2, act="none")
    unit, again = found.unit(), found.unit()
    assert torch.equal(unit.conv.weight, again.conv.weight)
    assert not torch.equal(unit.conv.weight, found.unit(seed=1).conv.weight)
    y = unit.bn(unit.conv(torch.randn(2, 8, 9, 9)))
    assert y.shape == (2, 12, *found.out_size)
    assert unit.act == "none"


# ---- how much work -------------------------------------------------------------------------------

S1, S2 = layer(64, 96, 14), layer(64, 96, 14, stride=2)
RAGGED, RAGGED_S2 = layer(64, 96, 7), layer(64, 96, 13, stride=2)  # both have 7 x 7 outputs
STEM = layer(3, 64, 224, 7, 2, stage=0)
PAIRS = 64 * 96


@pytest.mark.parametrize(
    ("plan", "found", "expected_rows", "expected_points"),
    [
        ("direct", S1, 196, 9),
        ("direct", layer(64, 96, 14, 1), 196, 1),
        ("direct", S2, 49, 9),
        ("direct_bf16", S1, 196, 9),
        ("torch", S1, 196, 9),
        ("winograd4", S1, 16, 36),  # 4 x 4 tiles, the last ones half outside
        ("winograd4", RAGGED, 4, 36),
        ("winograd2", S1, 49, 16),
        ("winograd2", RAGGED, 16, 16),
        ("winograd2_bf16", RAGGED, 16, 16),
        ("winograd5", S1, 9, 49),
        ("winograd2s2", RAGGED_S2, 16, 25),
        ("winograd2s2_bf16", RAGGED_S2, 16, 25),
        ("winograd4s2", RAGGED_S2, 4, 81),
    ],
)
def test_multiplications(plan, found, expected_rows, expected_points):
    assert rows(plan, found, 1) == expected_rows
    assert multiplications(plan, found, 1) == expected_rows * expected_points * PAIRS
    assert multiplications(plan, found, 8) == 8 * multiplications(plan, found, 1)


def test_multiplications_of_the_stem():
    # 4 output rows from 4 + 3 products of the even taps' phase and 4 + 2 of the odd ones'
    assert rows("stem", STEM, 1) == 28 * 112
    assert multiplications("stem", STEM, 1) == 28 * 112 * 13 * 7 * 3 * 64
    assert direct_multiplications(STEM, 1) == 112 * 112 * 49 * 3 * 64


def test_groups_multiply_their_own_channels_only():
    assert direct_multiplications(layer(64, 96, 14, groups=4), 1) == 196 * 9 * 16 * 96


def test_unknown_plans_are_refused():
    for plan in ("winograd", "winograd4s3", "direct2", ""):
        with pytest.raises(ValueError, match="must be one that is counted here"):
            multiplications(plan, S1, 1)


def suitable(plan):
    """A layer that the plan can compute, its output channels a whole number of panels."""
    if plan == "stem":
        return STEM
    return S2 if "s2" in plan else S1


@needs_extension
@pytest.mark.parametrize("plan", [plan for plan in check.CPU_PLANS if plan != "torch"])
def test_every_plan_packs_the_weights_that_it_is_counted_with(plan):
    found = suitable(plan)
    weight = found.unit().conv.weight.to(getattr(torch, arithmetic(plan)))
    packed = torch.ops.resnet_fused.pack_conv(weight, 1, plan=plan)
    counted = multiplications(plan, found, 1) // rows(plan, found, 1)
    if plan.endswith("_raw"):  # of the kernels, not of what they are transformed to
        counted = weight.numel()
    assert counted <= packed.numel() < 1.5 * counted  # a layout may pad channels


@pytest.mark.parametrize("plan", check.CPU_PLANS)
def test_every_plan_is_counted(plan):
    found = suitable(plan)
    direct = direct_multiplications(found, 1)
    assert (multiplications(plan, found, 1) < direct) == is_winograd(plan)


# ---- what follows from a measurement ------------------------------------------------------------


def test_derived_figures():
    m = measured(layer=S1, batch=2, plan="winograd4", seconds=0.5, peak=1e9)
    made = 2 * 16 * 36 * PAIRS
    direct = 2 * 196 * 9 * PAIRS
    assert m.multiplications == made
    assert m.gflops == pytest.approx(2 * direct / 0.5 / 1e9)
    assert m.share == pytest.approx(made / 1e9 / 0.5)
    assert m.ratio == 4.0
    assert measured(peer_seconds=None).ratio is None


def test_limit():
    work = measured().multiplications / 1e9  # seconds at the peak
    assert measured(read_seconds=work / 2, call_seconds=0).limit == 1
    assert measured(read_seconds=work / 2, call_seconds=work).limit == pytest.approx(1 / 2)
    assert measured(read_seconds=3 * work, call_seconds=work).limit == pytest.approx(1 / 4)


def test_record_holds_all_that_the_table_shows():
    record = measured().record()
    assert json.loads(json.dumps(record)) == record
    assert (record["ms"], record["onednn_ms"]) == (1000.0, 2000.0)
    assert record["plan"] == "direct"
    assert record["share_of_peak"] == measured().share


# ---- targets and reasons -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "stage", "wanted"),
    [
        ("direct", 1, 0.85),
        ("direct", 4, 0.85),
        ("direct_bf16", 2, 0.85),
        ("winograd4", 1, 0.65),
        ("winograd2", 3, 0.65),
        ("winograd2s2", 2, 0.65),
        ("stem", 0, 0.65),
        ("winograd2", 4, None),
        ("torch", 1, None),
    ],
)
def test_targets(plan, stage, wanted):
    kernel, stride = (7, 2) if plan == "stem" else (3, 1 + ("s2" in plan))
    found = layer(kernel=kernel, stride=stride, stage=stage)
    assert target(measured(layer=found, plan=plan)) == wanted


def layers(count):
    return [layer(out_channels=32 * (i + 1)) for i in range(count)]


def test_a_check_passes_with_few_layers_below_and_their_reasons():
    good = [at_share(0.9, layer=found) for found in layers(6)]
    assert judge(good).failures == []
    bad = [at_share(0.8, layer=found, page_faults=9) for found in layers(MOST_BELOW)]
    verdict = judge([*good, *bad])
    assert verdict.failures == []
    assert [below.measured for below in verdict.below] == bad
    assert verdict.held == 6 + MOST_BELOW


def test_a_check_fails_with_too_many_layers_below():
    bad = [at_share(0.8, layer=found, page_faults=9) for found in layers(MOST_BELOW + 1)]
    assert judge(bad).failures == [f"{MOST_BELOW + 1} layers are below, {MOST_BELOW} may be"]


def test_a_layer_below_at_two_batch_sizes_is_one_layer():
    bad = [
        at_share(0.8, layer=found, batch=batch, page_faults=9)
        for found in layers(MOST_BELOW)
        for batch in (4, 8)
    ]
    verdict = judge(bad)
    assert len(verdict.below) == 2 * MOST_BELOW
    assert verdict.failures == []


def test_a_check_fails_without_a_reason_unless_one_is_given():
    bad = [at_share(0.8)]
    assert judge(bad).failures == ["1 of them without a known reason"]
    verdict = judge(bad, [("64>96", "it is Monday"), ("nothing", "no")])
    assert verdict.failures == []
    assert verdict.below[0].reasons == ("it is Monday",)


def test_a_check_of_nothing_fails():
    only_shown = measured(layer=layer(stage=4), plan="winograd2")
    assert judge([only_shown]).failures == ["no layer was measured that has a target"]


def test_no_reason_where_nothing_stands_out():
    assert list(derived_reasons(measured())) == []
    # what a Winograd kernel moves is part of its transforms
    assert list(derived_reasons(measured(plan="winograd4", move_seconds=0.2))) == []


def test_only_pixels_that_are_used_are_moved():
    shortcut = Layer(16, 32, (12, 12), (1, 1), (2, 2), (0, 0), (1, 1), 1, "none", False, 2, "")
    rows, _ = layer_cases.prepare(shortcut, 3, torch.float32).move()
    x, _ = layer_cases.operands(shortcut, 3, torch.float32)
    assert torch.equal(rows, x[:, :, ::2, ::2])
    assert rows.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"call_seconds": 0.06},
            "calling any convolution takes 60000 us, 6% of its time",
        ),
        (
            {"call_seconds": 0.02, "move_seconds": 0.05},
            "a call takes 20000 us and moving its pixels in and out once 50000 us, 7% of its time: "
            "a value is only 576 multiplications",
        ),
        (
            {"read_seconds": 0.4, "weight_bytes": 9_400_000, "map_bytes": 800_000},
            "reading 9.4 MB of weights and 0.8 MB of maps once takes 40% of its time "
            "(limit 22% of peak)",
        ),
        (
            {"page_faults": 12544, "output_bytes": 51_380_224},
            "12544 page faults a call: malloc does not keep its 51.4 MB output",
        ),
        (
            {"layer": layer(size=7), "batch": 1},
            "49 output pixels for 2 threads: a weight that is loaded serves 24",
        ),
        (
            {"layer": layer(size=14), "batch": 1, "plan": "winograd4"},
            "16 tiles for 2 threads: a weight that is loaded serves 8",
        ),
    ],
)
def test_derived_reasons(changes, expected):
    assert list(derived_reasons(measured(**changes))) == [expected]


# ---- real runs ---------------------------------------------------------------------------------


@needs_extension
@pytest.mark.parametrize("weights", [WARM, COLD])
@pytest.mark.parametrize("residual", [False, True])
def test_measure(monkeypatch, weights, residual):
    monkeypatch.setattr(layer_cases, "l3_bytes", lambda: 500_000)
    found = layer(16, 32, 10, residual=residual)
    m = measure(found, 2, torch.float32, weights=weights, rounds=1)
    assert m.plan in check.CPU_PLANS
    assert (m.layer, m.batch, m.weights) == (found, 2, weights)
    assert min(m.seconds, m.read_seconds, m.move_seconds, m.peak, m.call_seconds) > 0
    assert 0 < m.limit < 1
    assert m.error < 2e-6
    assert m.output_bytes == 2 * 32 * 10 * 10 * 4
    assert m.map_bytes == 2 * (16 + 32 * (1 + residual)) * 10 * 10 * 4
    if is_available(torch.float32):
        assert m.peer_error < 2e-6
        assert m.ratio > 0


def test_copies_exceed_the_cache_twice(monkeypatch):
    monkeypatch.setattr(layer_cases, "l3_bytes", lambda: 1000)
    assert copies_beyond_l3(300) == 7
    assert copies_beyond_l3(5000) == 2
    assert copies_beyond_l3(1) == layer_cases.MOST_COPIES


def test_l3_bytes(tmp_path):
    assert l3_bytes(tmp_path) == 32 << 20
    for i, text in enumerate(("32K", "1024K", "36M")):
        folder = tmp_path / f"sys/devices/system/cpu/cpu0/cache/index{i}"
        folder.mkdir(parents=True)
        (folder / "size").write_text(text + "\n")
    assert l3_bytes(tmp_path) == 36 << 20


@pytest.mark.skipif(not is_available(torch.float32), reason="torch was built without oneDNN")
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("act", ["relu", "none"])
@pytest.mark.parametrize("residual", [False, True])
def test_onednn_computes_the_same(residual, act, copies):
    found = layer(6, 10, 9, 3, 2, groups=2, residual=residual, act=act)
    x, other = layer_cases.operands(found, 2, torch.float32)
    unit = found.unit()
    with torch.inference_mode():
        y = unit.bn.double()(unit.conv.double()(x.double()))
        y = y + other.double() if residual else y
        exact = y.relu() if act == "relu" else y
        ways = prepacked(found.unit(), torch.float32, x, other, copies)
        assert list(ways) == (["oneDNN", "oneDNN in place"] if residual else ["oneDNN"])
        for call in ways.values():
            torch.testing.assert_close(call().double(), exact, rtol=1e-5, atol=1e-5)
        for _ in range(copies):
            torch.testing.assert_close(ways["oneDNN"]().double(), exact, rtol=1e-5, atol=1e-5)


def test_profile_lists_every_step_of_the_net():
    model, x = plain_net("resnet18", num_classes=10), random_images(2, size=64)
    parts = profile(model, x, runs=2)
    blocks = [part for part in parts if part.kind == "FusedResidual"]
    assert [part.name for part in blocks] == [f"{i}.{j}" for i in range(1, 5) for j in range(2)]
    assert parts[0].name == "0.0"
    assert (parts[-2].kind, parts[-1].kind) == ("Linear", "between")
    assert all(part.backend for part in blocks)
    assert all(part.seconds > 0 for part in parts[:-1])
    total = sum(direct_multiplications(found, 2) for found in all_layers(model, 64))
    assert sum(part.multiplications for part in parts) == total


# ---- the command -------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(bench_layers.main, arguments)


TINY = ("--net", "resnet18", "--size", "32", "--batches", "1", "--dtypes", "float32")


@needs_extension
def test_command_writes_what_it_measures(tmp_path):
    path, chart = tmp_path / "new" / "layers.json", tmp_path / "new" / "layers.png"
    only = ("--only", "1x1/2 64|3x3 512>512 1 [+]", "--rounds", "1")
    result = run(*TINY, *only, "--json", str(path), "--chart", str(chart))
    assert result.exit_code == 0, result.output
    assert "1x1/2 64>128 8" in result.output
    document = json.loads(path.read_text())
    assert {"when", "machine", "forced", "results", "failures"} <= set(document)
    rows = document["results"]
    assert [row["layer"] for row in rows] == ["1x1/2 64>128 8", "3x3 512>512 1 +res"]
    assert all(row["net"] == "resnet18" and row["error"] < 2e-6 for row in rows)
    assert chart.read_bytes().startswith(b"\x89PNG")


@needs_extension
def test_command_forces_plan_and_instruction_set():
    before = rf.ops.cpu_isa()
    arguments = ("--only", "3x3 64>64", "--rounds", "1", "--plan", "winograd2", "--isa", "scalar")
    result = run(*TINY, *arguments)
    assert result.exit_code == 0, result.output
    assert "winograd2" in result.output
    assert "kernels scalar" in result.output.replace("\n", " ")
    assert rf.ops.cpu_isa() == before
    assert rf.select.force() == "none"


@needs_extension
@pytest.mark.parametrize(("share", "code"), [(0.9, 0), (0.5, 1)])
def test_check_sets_the_exit_code(monkeypatch, share, code):
    def made_up(found, batch, dtype, **_):
        return at_share(share, layer=found, batch=batch, dtype=dtype, plan="direct")

    monkeypatch.setattr(bench_layers, "measure", made_up)
    result = run("--check")
    assert result.exit_code == code, result.output
    assert "resnet18, float32, batch 1," in result.output
    assert "resnet18, float32, batch 8," in result.output
    assert "resnet50" not in result.output
    assert ("without a known reason" in result.output) == bool(code)


@needs_extension
def test_command_profiles_nets(tmp_path):
    path = tmp_path / "steps.json"
    result = run(*TINY, "--in-net", "--json", str(path))
    assert result.exit_code == 0, result.output
    steps = json.loads(path.read_text())["steps"]
    assert [step["kind"] for step in steps].count("FusedResidual") == 8
    assert "FusedResidual" in result.output
    assert "whole net" in result.output


@needs_extension
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "no such layer"), "--only: no layer matches 'no such layer'"),
        (("--only", "["), "must be a regular expression, got '['"),
        (("--reason", "[=text"), "must be a regular expression, got '['"),
        (("--isa", "sse9"), 'got "sse9"'),
        (("--net", "resnet18,resnet19"), "got 'resnet18,resnet19'"),
        (("--dtypes", "int8"), "got 'int8'"),
        (("--reason", "no text"), "must be REGEX=TEXT, got 'no text'"),
    ],
)
def test_command_refuses(arguments, message):
    result = run(*TINY, *arguments)
    assert result.exit_code != 0
    assert message in result.output


def test_command_needs_kernels(monkeypatch):
    monkeypatch.setattr(bench_layers.ops, "extension_error", "it was not built")
    result = run(*TINY)
    assert result.exit_code == 1
    assert "there is nothing of ours to time: it was not built" in result.output


def test_chart_of_several_plans_and_batches(tmp_path):
    results = [
        at_share(0.7, batch=batch, plan=plan, weight_bytes=1 << 20, map_bytes=1 << 22)
        for plan in ("direct", "winograd4", "winograd2_bf16")
        for batch in (1, 8, 32)
    ]
    path = tmp_path / "roofline.png"
    save_roofline(path, "title", results, 1e9, "footer")
    assert path.read_bytes().startswith(b"\x89PNG")
