"""benchmarks/results/README.md says what the records beside it say, and leaves none out."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.common import FUSED
from benchmarks.goals import GOALS, PEERS, judge
from benchmarks.layer_check import DIRECT_SHARE, MOST_BELOW, WINOGRAD_SHARE

FOLDER = Path(__file__).parents[1] / "benchmarks" / "results"
PAGE = (FOLDER / "README.md").read_text()
RECORDS = sorted(path.name for path in FOLDER.glob("*.json"))
ENGINES = "cpu_zen4_engines.json"


def record(name):
    return json.loads((FOLDER / name).read_text())


def cells(first):
    """The cells of the page's table rows whose first cell is `first`."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    return [row for row in rows if row[0] == first]


def link(name):
    return f"[{name}]({name})"


def test_every_record_is_listed_and_every_listed_one_is_there():
    assert RECORDS
    assert sorted(set(re.findall(r"\]\((\w+\.json)\)", PAGE))) == RECORDS


@pytest.mark.parametrize("name", [name for name in RECORDS if name.startswith("cpu_")])
def test_a_row_names_date_processor_and_batches(name):
    (row,) = cells(link(name))
    content = record(name)
    machine = content["machine"]
    assert machine["gpu"] is None
    assert row[1] == content["when"][:10]
    assert row[2] == f"{machine['cpu']}, {machine['isa_in_use']}"
    for model, dtype, batches in measured(content):
        batches = ", ".join(map(str, batches))
        if "net" not in content:  # of several nets, or of their layers
            net = rf"{model.replace('resnet', 'ResNet-')}[^;]* {dtype} batch {batches}\b(?!,)"
            assert re.search(net, row[3].split(", goals")[0])
        else:
            assert name == f"cpu_{model}_{dtype}.json"
            assert row[3].startswith(f"batch {batches} ") or row[3].startswith(f"batch {batches},")


def measured(content):
    """(model, dtype, batches) of each net that has a time in a record."""
    if "net" in content:
        net = content["net"]
        results = [r for r in content["results"] if "median_ms" in r]
        return [(net["model"], net["dtype"], sorted({r["batch"] for r in results}))]
    nets = {}
    cases = content["cases"].values() if "cases" in content else layers(content)
    for case in cases:
        nets.setdefault((case["model"], case["dtype"]), []).append(case["batch"])
    return [(*net, sorted(set(batches))) for net, batches in nets.items()]


def layers(content):
    return [{**layer, "model": layer["net"]} for layer in content["results"]]


def test_the_goals_are_those_the_record_shows():
    cases = record(ENGINES)["cases"]
    listed = [row for case in dict.fromkeys(str(g.case) for g in GOALS) for row in cells(case)]
    assert sorted(listed) == sorted(goal_row(goal, judge(goal, cases)) for goal in GOALS)


def goal_row(goal, verdict):
    over = "all" if goal.over == PEERS else f"the {len(goal.over)} most used"
    figures = [f"{goal.at_least:.2f}", f"{verdict.ratio:.2f}", verdict.peer, verdict.outcome.value]
    return [str(goal.case), over, *figures]


def test_the_layers_on_a_cpu_are_those_the_record_shows():
    content = record("cpu_zen4_layers.json")
    assert content["failures"] == []
    (direct, winograd, most) = (f"{DIRECT_SHARE:.0%}", f"{WINOGRAD_SHARE:.0%}", MOST_BELOW)
    assert (
        f"held to {direct} of the multiply peak, Winograd kernels up to stage 3 to {winograd}"
        in PAGE
    )
    assert f"{most} layers may fall below, each with a reason. {content['layers_below']} do" in PAGE
    shortcuts = [m for m in content["results"] if m["layer"].startswith("1x1/2")]
    took, calls = (
        [1e3 * m[key] for m in shortcuts if m["batch"] == 1] for key in ("ms", "call_ms")
    )
    text = (
        f"they take {min(took):.0f} to {max(took):.0f} us, {min(calls):.0f} to {max(calls):.0f}\n"
    )
    assert text in PAGE
    below = [m for m in shortcuts if m["batch"] == 8 and m["share_of_peak"] < DIRECT_SHARE]
    moved = [(m["call_ms"] + m["move_ms"]) / m["ms"] for m in below]
    assert f"pixels once are {100 * min(moved):.0f} to {max(moved):.0%} of what the two" in PAGE
    assert len(below) == 2
    ratios = [layer["ratio_to_onednn"] for layer in content["results"]]
    slower = [ratio for ratio in ratios if ratio < 1]
    text = (
        f"{len(ratios) - len(slower)} of {len(ratios)} are faster; the other {len(slower)} reach "
    )
    assert text + f"{min(slower):.2f} to {max(slower):.2f}" in PAGE


def test_the_ratios_to_eager_on_avx2_are_those_the_record_shows():
    shown = {}
    for case in record("cpu_zen4_avx2.json")["cases"].values():
        times = {r["engine"]: r["median_ms"] for r in case["results"]}
        ratio = f"{times['eager channels_last'] / times[FUSED]:.2f}"
        shown.setdefault(f"{case['model']} {case['dtype']}", []).append(ratio)
    assert {net: cells(net)[0][1:] for net in shown} == shown


def test_the_ratios_on_avx2_are_those_the_record_shows():
    shown = {}
    for case in record("cpu_zen3_engines.json")["cases"].values():
        times = {r["engine"]: r["median_ms"] for r in case["results"] if "median_ms" in r}
        ours = times.pop(FUSED)
        peer = min(times, key=times.get)
        net = f"{case['model'].replace('resnet', 'ResNet-')} {case['dtype']}"
        shown[net, str(case["batch"])] = [peer, f"{times[peer] / ours:.2f}"]
    listed = [row for net in dict.fromkeys(net for net, _ in shown) for row in cells(net)]
    assert {(net, batch): rest for net, batch, *rest in listed} == shown


GRAPHED, CUDNN = "fused + CUDA graph", "cuDNN fused ops"


def test_the_times_on_a_gpu_are_those_the_record_shows():
    shown = []
    for case in record("gpu_h100_resnet18.json")["cases"].values():
        ms = {r["engine"]: r["median_ms"] for r in case["results"]}
        times = [f"{ms[CUDNN]:.3f}", f"{ms[GRAPHED]:.3f}", f"{ms[CUDNN] / ms[GRAPHED]:.2f}"]
        per_second = next(r["images_per_second"] for r in case["results"] if r["engine"] == GRAPHED)
        shown.append([str(case["batch"]), *times, f"{per_second:.0f}"])
    assert [row for _, *row in cells("ResNet-18")] == shown
    readme = (FOLDER.parents[1] / "README.md").read_text()
    for _, cudnn, ours, *_ in shown:
        assert f"{ours} ms" in readme
        assert cudnn in readme
    assert shown[-1][-1] in readme
    first, last = sorted(float(ratio) for *_, ratio, _ in shown)
    assert f"[{first:.1f} to\n{last:.1f} times as fast as cuDNN's" in readme


def test_the_layers_on_a_gpu_are_those_the_record_shows():
    ratios = []
    for layer in record("gpu_h100_layers.json")["layers"]:
        us = layer["us"]
        peers = [time for way, time in us.items() if not way.startswith("sm")]
        ratios.append(min(peers) / us[layer["chosen"]])
        assert layer["error"] < 5e-3
    slower = [ratio for ratio in ratios if ratio < 1]
    faster = len(ratios) - len(slower)
    text = f"{faster} of {len(ratios)} are faster;\nthe other {len(slower)} reach "
    assert text + f"{min(slower):.2f} to {max(slower):.2f}" in PAGE


@pytest.mark.parametrize("name", [name for name in RECORDS if name.startswith("gpu_")])
def test_a_record_of_a_gpu_names_it_and_its_commit(name):
    (row,) = cells(link(name))
    content = record(name)
    assert content["machine"]["gpu"] == "NVIDIA H100 80GB HBM3"
    assert row[1] == content["when"][:10]
    assert f"commit {content['machine']['commit'][:7]}" in row[2]
