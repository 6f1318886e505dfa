"""The layer benchmarks under pytest-benchmark, which compares runs: `make bench-layers`.

    pytest benchmarks/test_layers.py --benchmark-autosave --benchmark-compare

Every distinct convolution of ResNet-18, ours beside PyTorch's prepacked oneDNN, weights warm.
"""

from __future__ import annotations

import pytest
import torch

from resnet_fused import ops

from .accounting import direct_multiplications
from .layer_cases import prepare
from .layers import Layer, layers_of

pytestmark = pytest.mark.skipif(ops.extension_error is not None, reason=str(ops.extension_error))

LAYERS = layers_of("resnet18")
BATCHES = (1, 8)
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=LAYERS, ids=lambda layer: layer.text)
def layer(request) -> Layer:
    return request.param


@pytest.fixture(params=BATCHES, ids=lambda batch: f"batch {batch}")
def batch(request) -> int:
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


def test_ours(benchmark, layer, batch, dtype):
    with torch.inference_mode():
        calls = prepare(layer, batch, dtype)
        _describe(benchmark, layer, batch, dtype)
        benchmark.extra_info["plan"] = calls.choice.plan
        benchmark(calls.ours)


@pytest.mark.parametrize("way", ["oneDNN", "oneDNN in place"])
def test_onednn(benchmark, layer, batch, dtype, way):
    with torch.inference_mode():
        peers = prepare(layer, batch, dtype).peers
        if way not in peers:
            pytest.skip("oneDNN lacks this dtype" if not peers else "no residual to add in place")
        _describe(benchmark, layer, batch, dtype)
        benchmark(peers[way])


def _describe(benchmark, layer: Layer, batch: int, dtype: torch.dtype) -> None:
    benchmark.group = f"{layer.text}, batch {batch}, {str(dtype).removeprefix('torch.')}"
    benchmark.extra_info["multiplications"] = direct_multiplications(layer, batch)
    benchmark.extra_info["threads"] = torch.get_num_threads()
