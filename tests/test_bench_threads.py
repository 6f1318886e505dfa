"""How nets scale with threads: the command runs, and records what its table shows."""

import json

import pytest
import torch
from click.testing import CliRunner
from conftest import needs_extension

from benchmarks import bench_threads
from benchmarks.common import plain_net
from resnet_fused import select

pytestmark = needs_extension


@pytest.mark.parametrize("plan", ["torch", "direct", "winograd4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_work_of_a_net_counts_the_weights_that_its_plans_hold(plan, dtype):
    with select.forced(plan):
        work = bench_threads.work_of(plain_net("resnet18").to(dtype), dtype, 1, 64)
    weights = sum(
        m.weight.numel() for m in plain_net("resnet18").modules() if isinstance(m, torch.nn.Conv2d)
    )
    # Winograd's points are 4 times the taps; the other kernels pad the first layer's rows at most.
    size, most = (dtype.itemsize, 1) if plan == "torch" else (4, 4 if plan == "winograd4" else 1.1)
    assert size * weights <= work.weight_bytes <= most * size * weights
    assert len(work.parts) == 20


def test_command(tmp_path):
    path = tmp_path / "threads.json"
    options = {"size": 32, "batches": 1, "threads": 2, "seconds": 0, "dtypes": "float32"}
    arguments = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    result = CliRunner().invoke(bench_threads.main, [*arguments, "--json", str(path)])
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())["results"]
    assert [(row["dtype"], row["batch"], row["threads"]) for row in rows] == [
        ("float32", 1, 1),
        ("float32", 1, 2),
    ]
    assert rows[0]["speed_up"] == 1
    assert rows[1]["speed_up"] == pytest.approx(rows[0]["median_ms"] / rows[1]["median_ms"])
    assert "speed-up" in result.output


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1"])
def test_command_refuses(seconds):
    result = CliRunner().invoke(bench_threads.main, ["--seconds", seconds])
    assert result.exit_code == 2
    assert "--seconds" in result.output
