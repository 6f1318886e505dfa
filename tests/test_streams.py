"""Memory that several streams read; the streams and tensors here are stand-ins."""

from types import SimpleNamespace

import pytest
import torch

from resnet_fused import _streams


class OnGpu:
    is_cuda = True
    device = torch.device("cuda", 1)

    def __init__(self):
        self.readers = []

    def record_stream(self, stream):
        self.readers.append(stream.cuda_stream)


@pytest.fixture
def current(monkeypatch):
    """current(handle): from now on that is device 1's current stream."""
    state = SimpleNamespace(handle=0)

    def handle_on(device):
        assert device == 1
        return state.handle

    monkeypatch.setattr(_streams, "_current", handle_on)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=handle_on(device))
    )
    return lambda handle: setattr(state, "handle", handle)


def test_the_allocator_hears_of_each_stream_once(current):
    tensors = [OnGpu(), torch.ones(1), OnGpu()]
    readers = _streams.Readers(tensors)
    assert tensors[0].readers == []
    for handle in (7, 7, 0, 7, 9, 0):
        current(handle)
        readers.add_current()
    assert tensors[0].readers == tensors[2].readers == [7, 0, 9]


def test_tensors_on_the_cpu_have_no_readers(monkeypatch):
    monkeypatch.setattr(_streams, "_current", None)
    _streams.Readers([torch.ones(1)]).add_current()
    _streams.Readers([]).add_current()
