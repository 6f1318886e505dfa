"""tune and its answers on a GPU that is not here: configurations, batches, the file. Times are made
up."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import pytest
import torch

from resnet_fused import _gpuinfo, backends, select, tuned
from resnet_fused.measure import plans
from resnet_fused.measure.candidates import ConvCall, Measured, split_name
from resnet_fused.measure.convolutions import Found
from resnet_fused.ops import _cuda

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from resnet_fused.ops import _triton
from resnet_fused.triton_kernels import launch
from resnet_fused.triton_kernels.config import choose, parse
from resnet_fused.triton_kernels.device import KNOWN
from resnet_fused.tune import learn as keep

H200 = KNOWN["NVIDIA H200"]
SHAPE = select.ConvShape("cuda", torch.bfloat16, 512, 512, (3, 3), (7, 7), batch=8)
CALL = ConvCall(SHAPE, (1, 1), "relu", True)
FAST = "64x64x64 warps 4 stages 4 split 2"


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tuning_file):
    """An H200 with the Triton kernels."""
    monkeypatch.setattr(launch, "device_of", lambda index: H200)
    monkeypatch.setattr(tuned, "processor", lambda index: f"NVIDIA H200 {index}")
    monkeypatch.setattr(
        backends, "missing", lambda plan, device, index=0: "no" if plan == "cuda" else ""
    )
    with select.forced("none"):
        yield tuning_file


def measured(monkeypatch, times):
    """Lets `measure` find these times: a candidate's name -> ms; others take 9 ms."""
    asked = []

    def measure(call, names, standard, **_):
        asked.extend(names)
        ms = {name: times.get(name, 9.0) for name in names}
        able = {name: value for name, value in ms.items() if value is not None}
        return Measured(min(able, key=able.get), ms, dict.fromkeys(names, 1e-3), 1e-2)

    monkeypatch.setattr(plans, "measure", measure)
    return asked


def row(monkeypatch, times, call=CALL, without=()):
    asked = measured(monkeypatch, times)
    found = plans.measure_convolution(Found(call, 2), without=without)
    return found, asked


def test_the_likely_configurations_are_measured(monkeypatch):
    found, asked = row(monkeypatch, {"torch": 1.0})
    assert asked[:2] == ["triton", "torch"]
    configured = [split_name(name) for name in asked[2:]]
    assert len(configured) == plans.MOST_CONFIGS
    problem = launch.Problem(
        torch.bfloat16, 8, 512, (7, 7), 512, (7, 7), (3, 3), padding=(1, 1), residual=True
    )
    assert configured[0] == ("triton", str(choose(problem, H200)))
    assert len({text for _, text in configured}) == len(configured)
    assert (found.plan, found.by_rule, found.configs) == ("torch", "triton", {})


def test_configurations_of_the_cuda_kernels_are_measured(monkeypatch):
    """Those that the kernels name, the first ones, and for this very convolution."""
    names = [f"sm90 {tile} split {n}" for n in (1, 2) for tile in ("tap-shift", *"abcde")]
    monkeypatch.setattr(select, "candidates", lambda shape, allow: ["triton", "cuda", "torch"])
    asked_for = []
    monkeypatch.setattr(_cuda, "ranked", lambda sizes: asked_for.append(sizes) or names)
    found, asked = row(monkeypatch, {f"cuda {names[3]}": 0.5})
    assert [n for n in asked if n.startswith("cuda")] == [
        "cuda", *(f"cuda {name}" for name in names[: plans.MOST_CONFIGS])
    ]  # fmt: skip
    assert (found.plan, found.configs["cuda"]) == ("cuda", names[3])
    geometry = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    assert asked_for == [((8, 512, 7, 7), 512, *geometry, (), (1, 1), "bfloat16", 0)]


def test_a_plan_stands_for_its_fastest_configuration(monkeypatch):
    best = row(monkeypatch, {})[1][5]
    found, _ = row(monkeypatch, {"triton": 3.0, best: 2.0, "torch": 4.0})
    assert found.ms == {"triton": 2.0, "torch": 4.0}
    assert (found.plan, found.configs) == ("triton", {"triton": split_name(best)[1]})
    found, _ = row(monkeypatch, {"triton": 2.01, best: 2.0, "torch": 4.0})
    assert found.ms["triton"] in (2.0, 2.01)
    found, _ = row(monkeypatch, {"triton": None, best: 2.0, "torch": 1.0})
    assert (found.plan, found.ms) == ("torch", {"triton": 2.0, "torch": 1.0})


def test_what_is_known_to_fail_is_left_out(monkeypatch):
    """The rest is measured, and its answer holds although a plan has no time."""
    every = row(monkeypatch, {})[1]
    found, asked = row(monkeypatch, {"torch": 1.0}, without=[every[0], every[4]])
    assert asked == [name for name in every if name not in (every[0], every[4])]
    assert found.ms == {"triton": 9.0, "torch": 1.0}
    found, asked = row(monkeypatch, {}, without=[name for name in every if name != "torch"])
    assert asked == ["torch"]
    assert (found.plan, found.by_rule, found.ms) == (
        "torch",
        "triton",
        {"triton": None, "torch": 9.0},
    )
    keep([found])
    assert select.choose(SHAPE).plan == "torch"
    found, asked = row(monkeypatch, {}, without=every)
    assert (found.ms, asked) == ({}, [])


def learn(**changes):
    given = {"plan": "triton", "ms": {"triton": 1.0, "torch": 2.0}, "configs": {"triton": FAST}}
    given |= changes
    shape = given.pop("shape", SHAPE)
    return keep([plans.Row(shape, 1, given["ms"], {}, given["plan"], "triton", given["configs"])])


def test_an_answer_is_of_one_batch_and_one_gpu():
    learn(plan="torch", ms={"triton": 2.0, "torch": 1.0})
    assert select.choose(SHAPE).plan == "torch"
    assert (
        select.choose(SHAPE).reason == "tuned on this machine at batch 8: torch 1 ms, triton 2 ms"
    )
    assert select.choose(replace(SHAPE, batch=16)).plan == "triton"
    assert select.choose(replace(SHAPE, index=1)).plan == "triton"
    assert select.choose(replace(SHAPE, device="cpu", dtype=torch.float32)).plan != "cuda"


def test_the_kernel_takes_the_configuration_that_was_measured():
    problem = launch.Problem(
        torch.bfloat16, 8, 512, (7, 7), 512, (7, 7), (3, 3), padding=(1, 1), residual=True
    )
    device = torch.device("cuda", 0)
    assert _triton._measured(problem, device) == ""
    learn()
    assert _triton._measured(problem, device) == FAST
    assert _triton._measured(problem, torch.device("cuda", 1)) == ""
    made = launch.Conv(problem, device, FAST)
    assert made._launches.conv.grid[1] == parse(FAST).split == 2
    learn(configs={"triton": "256x128x64 warps 8 stages 9"})  # more shared memory than there is
    assert _triton._measured(problem, device) == ""
    learn(configs={"triton": "of another version"})
    assert _triton._measured(problem, device) == ""


def test_the_file(gpu):
    learn()
    entries = json.loads(gpu.read_text())["machines"]
    (name,) = entries
    assert name.startswith("NVIDIA H200 0, torch ")
    assert "triton kernels" in name
    assert entries[name] == {
        "3x3 512->512 to 7x7 bfloat16 cuda batch 8": {
            "batch": 8,
            "plan": "triton",
            "ms": {"triton": 1.0, "torch": 2.0},
            "configs": {"triton": FAST},
        }
    }
    tuned._table.clear()
    tuned.load()
    assert tuned.config("triton", SHAPE) == FAST


@pytest.mark.parametrize("configs", [{"triton": 3}, {"cuda": FAST}, [1], "x", None])
def test_damaged_configurations_count_as_no_file(gpu, configs):
    learn()
    content = json.loads(gpu.read_text())
    for entry in next(iter(content["machines"].values())).values():
        entry["configs"] = configs
    gpu.write_text(json.dumps(content))
    with pytest.warns(RuntimeWarning, match="is damaged"):
        tuned.load()
    assert tuned.config("triton", SHAPE) == ""


def test_the_driver(tmp_path):
    file = tmp_path / "proc/driver/nvidia/version"
    file.parent.mkdir(parents=True)
    file.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue Sep 23 10:11:16 UTC 2025\n"
    )
    assert _gpuinfo.driver_version(tmp_path) == "580.95.05"
    assert _gpuinfo.driver_version(tmp_path / "none")
