"""The ops that measure the machine: right sums, sane rates, one-sentence errors."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import NATIVE, needs_extension

from resnet_fused.measure import peak

_ops = torch.ops.resnet_fused
SECONDS = 0.002


@needs_extension
def test_every_instruction_set_has_a_peak(isa):
    rate = _ops.multiply_peak(SECONDS)
    assert math.isfinite(rate)
    assert rate > 1e6  # a multiply-add takes less than a microsecond


@needs_extension
@pytest.mark.parametrize("seconds", [0.0, -1.0, 61.0, float("nan")])
def test_peak_refuses_seconds(seconds):
    with pytest.raises(RuntimeError) as error:
        _ops.multiply_peak(seconds)
    assert str(error.value).startswith(
        "multiply_peak: seconds must be positive and at most 60, got "
    )


@needs_extension
def test_peak_refuses_dtypes():
    with pytest.raises(RuntimeError) as error:
        _ops.multiply_peak(SECONDS, "int8")
    expected = 'multiply_peak: dtype must be "float32" or "bfloat16", got "int8"'
    assert str(error.value) == expected


@needs_extension
def test_peak_in_bfloat16_where_the_instruction_set_multiplies_it(isa):
    if isa == "avx512bf16":
        assert _ops.multiply_peak(SECONDS, "bfloat16") > 1e6
        assert peak.multiply_peak(torch.bfloat16, SECONDS) > 1e6
    else:
        with pytest.raises(RuntimeError) as error:
            _ops.multiply_peak(SECONDS, "bfloat16")
        assert str(error.value) == (
            f'multiply_peak: dtype "bfloat16" must have the instruction set avx512bf16, got {isa}'
        )
        assert peak.multiply_peak(torch.bfloat16, SECONDS) is None


def test_rates_where_there_are_no_kernels(monkeypatch):
    monkeypatch.setattr(peak.machine, "isa_in_use", lambda: None)
    assert peak.multiply_peak() is None
    assert peak.read_bandwidth(1 << 20) is None


@pytest.mark.skipif(not NATIVE, reason="the C++ extension is not loaded")
def test_read_bandwidth():
    rate = peak.read_bandwidth(1 << 20, SECONDS)
    assert math.isfinite(rate)
    assert rate > 1e6


def exclusive_or(tensors):
    """Word by word in Python, the last bytes that are no whole word left out."""
    result = 0
    for tensor in tensors:
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        for at in range(0, len(raw) - 7, 8):
            result ^= int.from_bytes(raw[at : at + 8], "little", signed=True)
    return result


@needs_extension
@pytest.mark.parametrize("size", [0, 7, 8, 63, 64, 136, 1000, 16384, 16384 * 3 + 40])
def test_read_words_reads_every_word(size):
    tensor = torch.randint(0, 256, (size,), dtype=torch.uint8)
    assert _ops.read_words([tensor]) == exclusive_or([tensor])


@needs_extension
def test_read_words_of_several_tensors_and_dtypes(threads):
    tensors = [torch.randn(33, 129), torch.randn(70001).bfloat16(), torch.randn(5, 5).double()]
    expected = exclusive_or([*tensors[:1], tensors[1].view(torch.int16), tensors[2]])
    for count in (1, 2):
        threads(count)
        assert _ops.read_words(tensors) == expected


@needs_extension
def test_read_words_sees_each_single_change():
    tensor = torch.zeros(20000, dtype=torch.int64)
    for at in (0, 1, 15, 16, 9999, 19999):
        tensor[at] = 77
        assert _ops.read_words([tensor]) == 77
        tensor[at] = 0


@needs_extension
def test_read_words_refuses_strides():
    with pytest.raises(RuntimeError) as error:
        _ops.read_words([torch.zeros(4, 6)[:, ::2]])
    assert str(error.value) == (
        "read_words: tensors must be contiguous, got shape (4, 3) with other strides"
    )
