"""Memory of large outputs is used again, and never twice at a time."""

from __future__ import annotations

import gc
import os
import resource
import threading

import pytest
import torch
from conftest import needs_extension, resident_bytes

import resnet_fused as rf

pytestmark = needs_extension

SIZES = [(1, 64, 96, 96), (1, 64, 128, 128), (1, 64, 160, 160)]  # 2.25, 4 and 6.25 MiB


def copied(value, shape=SIZES[0]):
    """A large output that is `value` everywhere, from an op of ours."""
    channels = shape[1]
    x = torch.full((shape[0], 1, *shape[2:]), float(value))
    ones, zeros = torch.ones(channels), torch.zeros(channels)
    return rf.ops.conv_bn_act(x, torch.ones(channels, 1, 1, 1), ones, zeros, act="none")


@pytest.fixture(autouse=True)
def nothing_is_kept():
    gc.collect()
    torch.ops.resnet_fused.drop_output_memory()


def test_a_freed_output_serves_the_next_of_its_size():
    y = copied(1)
    address = y.data_ptr()
    del y
    assert copied(2).data_ptr() == address
    torch.ops.resnet_fused.drop_output_memory()


def test_outputs_alive_share_no_memory():
    alive = []
    for turn in range(5):
        for shape in SIZES:
            for _ in range(3):
                value = len(alive) + 100 * turn
                alive.append((copied(value, shape), value))
        for y, value in alive:
            assert (y == value).all(), value
        del alive[:: turn + 2]


def test_a_view_keeps_its_memory():
    y = copied(1)
    view = y[:, 3, 2:5]
    del y
    others = [copied(2) for _ in range(3)]
    assert (view == 1).all()
    del others


def test_what_keeps_the_storage_keeps_the_memory():
    y = copied(1)
    storage = y.untyped_storage()
    numpy = y.numpy()
    del y
    other = copied(2)
    assert (numpy == 1).all()
    assert storage.nbytes() == numpy.nbytes
    assert (other == 2).all()


def test_steady_state_has_no_page_faults():
    net = rf.fuse(rf.models.resnet18()).eval()
    x = torch.randn(8, 3, 128, 128).to(memory_format=torch.channels_last)

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        net(x)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with torch.inference_mode():
        for _ in range(3):
            net(x)
        pages = 8 * 64 * 32 * 32 * 4 // 4096
        assert min(faults() for _ in range(5)) < pages / 4, "an output of stage 1 came from nowhere"


def test_refresh_gives_it_back():
    y = copied(1, (16, 64, 160, 160))  # 100 MiB
    del y
    before = resident_bytes()
    rf.refresh(torch.nn.Identity())
    assert before - resident_bytes() > 90 << 20


def test_no_more_is_kept_than_the_limit():
    before = resident_bytes()
    outputs = [copied(i, (16, 64, 160, 160)) for i in range(8)]  # 800 MiB
    del outputs
    assert resident_bytes() - before < 600 << 20
    torch.ops.resnet_fused.drop_output_memory()


def test_threads():
    wrong = []

    def work(number):
        kept = []
        for turn in range(30):
            kept.append((copied(number + turn, SIZES[turn % 3]), number + turn))
            if turn % 4 == 3:
                wrong.extend(value for y, value in kept if not (y == value).all())
                kept.clear()

    threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.usefixtures("one_thread")  # others do not live on in a child
def test_forked_processes():
    y = copied(1)
    kept = copied(2)
    del kept
    child = os.fork()
    if child == 0:
        ok = (y == 1).all() and (copied(3) == 3).all()
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (y == 1).all()


def test_absurd_sizes_are_refused():
    x = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**20, 2**20)
    with pytest.raises(RuntimeError, match="memory"):
        rf.ops.conv_bn_act(x, torch.ones(64, 1, 1, 1), torch.ones(64), torch.zeros(64))
