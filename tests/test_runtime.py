"""One OpenMP runtime in the process, as many threads as were asked for, failures that stay calm.

Each test is a process of its own: thread pools and limits cannot be taken back.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import needs_extension

pytestmark = [needs_extension, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


def run(code: str, **environ: str) -> str:
    """What `code` prints in a new interpreter; variables named here are the only OpenMP ones."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**inherited, **environ},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- one runtime ---------------------------------------------------------------------------------

RUNTIMES = """
import os, re, torch
torch.set_num_threads(2)

def runtimes():
    files = {os.path.realpath(line.split()[-1]) for line in open("/proc/self/maps")}
    return [f for f in sorted(files) if re.match(r"lib[a-z]*omp\\d*\\b", os.path.basename(f))]

torch.nn.functional.conv2d(torch.randn(2, 64, 28, 28), torch.randn(64, 64, 3, 3))
before = runtimes()
import resnet_fused as rf
assert rf.ops.extension_error is None
vector = torch.ones(64)
rf.ops.conv_bn_act(torch.randn(2, 64, 28, 28), torch.randn(64, 64, 3, 3), vector, vector)
rf.ops.add_relu(torch.randn(99999), torch.randn(99999))
print(len(before), len(runtimes()), runtimes())
"""


def test_exactly_one_openmp_runtime():
    """PyTorch's own. A second one would have threads of its own, which fight for the cores."""
    printed = run(RUNTIMES)
    assert printed.startswith("1 1 ["), printed


def needed_libraries(path: Path) -> list[str]:
    """The DT_NEEDED entries of a 64-bit little-endian ELF file."""
    elf = path.read_bytes()
    assert elf[:6] == b"\x7fELF\x02\x01"
    (header_offset,) = struct.unpack_from("<Q", elf, 32)
    entry_size, count = struct.unpack_from("<HH", elf, 54)
    headers = [
        struct.unpack_from("<IIQQQQ", elf, header_offset + i * entry_size) for i in range(count)
    ]
    loaded = [(h[3], h[2], h[5]) for h in headers if h[0] == 1]  # address, offset, size
    (dynamic,) = (h for h in headers if h[0] == 2)
    entries = list(struct.iter_unpack("<QQ", elf[dynamic[2] : dynamic[2] + dynamic[5]]))
    entries = entries[: entries.index((0, 0))]
    strings = dict(entries)[5]
    (table,) = (strings - a + offset for a, offset, size in loaded if a <= strings < a + size)
    names = (elf[table + value :] for tag, value in entries if tag == 1)
    return [name[: name.index(0)].decode() for name in names]


def test_the_extension_links_no_threads_of_its_own():
    spec = find_spec("resnet_fused._C")
    assert spec is not None
    needed = needed_libraries(Path(spec.origin))
    assert "libtorch_cpu.so" in needed, "the reader of ELF files is broken"
    assert not [name for name in needed if re.match(r"lib(\w*omp|tbb|pthread)", name)]


# ---- as many threads as were asked for -----------------------------------------------------------

# Threads that compute are told from those that wait by their share of the processor time, whatever
# the machine's load: waiting ones sleep (GOMP_SPINCOUNT and its like below).
WORKERS = """
import os, torch, resnet_fused as rf
from resnet_fused import select

x, weight, vector = torch.randn(1, 64, 80, 80), torch.randn(64, 64, 3, 3), torch.ones(64)

def work():
    with torch.inference_mode(), select.forced("direct"):
        rf.ops.conv_bn_act(x, weight, vector, vector, padding=1)

def ticks():
    found = {}
    for thread in os.listdir("/proc/self/task"):
        stat = open(f"/proc/self/task/{thread}/stat").read().rpartition(")")[2].split()
        found[thread] = int(stat[11]) + int(stat[12])  # user and system time
    return found

def workers():
    work()
    before, gained = ticks(), {}
    while sum(gained.values()) < 100:
        for _ in range(5):
            work()
        gained = {thread: count - before.get(thread, 0) for thread, count in ticks().items()}
    return sum(count > 0.05 * sum(gained.values()) for count in gained.values())

wanted = SETTINGS
for count in wanted:
    if count:
        torch.set_num_threads(count)
    print(torch.get_num_threads(), workers(), end=" ")
"""
QUIET = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}


def count_workers(settings: list[int], **environ: str) -> list[int]:
    """torch.get_num_threads() and the threads that compute, after each of the settings.

    0 leaves the number of threads as it is. The scalar kernels make a call last.
    """
    code = WORKERS.replace("SETTINGS", repr(settings))
    return [int(word) for word in run(code, RESNET_FUSED_ISA="scalar", **QUIET, **environ).split()]


@pytest.mark.parametrize("count", [1, 2])
def test_the_environment_sets_the_number_of_threads(count):
    if count > len(os.sched_getaffinity(0)):
        pytest.skip("PyTorch starts no more threads than there are cores")
    assert count_workers([0], OMP_NUM_THREADS=str(count)) == [count, count]


def test_set_num_threads_is_obeyed_each_time():
    assert count_workers([1, 3, 1, 2]) == [1, 1, 3, 3, 1, 1, 2, 2]


# ---- failures ------------------------------------------------------------------------------------

NO_MEMORY = """
import resource, torch, resnet_fused as rf
from resnet_fused import select

torch.set_num_threads(THREADS)
vector = torch.ones(32)
small = torch.randn(1, 64, 40, 40), torch.randn(32, 64, 3, 3), vector, vector

# Few pixels that every window sees: little to read, much to gather into scratch memory.
channels = 50_000
x, weight = torch.randn(1, channels, 1, 1), torch.randn(32, channels, 1, 1)
packed = torch.ops.resnet_fused.pack_conv(weight, plan="direct")

def large():
    return torch.ops.resnet_fused.conv_bn_act_packed(
        x, packed, vector, vector, kernel_size=1, padding=10, plan="direct"
    )

with torch.inference_mode(), select.forced("direct"):
    want_small = rf.ops.conv_bn_act(*small)  # starts the threads
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 20), before[1]))
    try:
        large()
        raise SystemExit("there was memory enough")
    except RuntimeError as error:
        print(error)
    same = torch.equal(rf.ops.conv_bn_act(*small), want_small)
    resource.setrlimit(resource.RLIMIT_AS, before)
    y = large()
middle = (weight[:, :, 0, 0] @ x[0, :, 0, 0] + 1).relu()
torch.testing.assert_close(y[0, :, 10, 10], middle, rtol=1e-3, atol=1e-2)
assert y[0, :, 0, 0].eq(1).all()
print(same)
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_a_thread_without_memory_is_an_exception(threads):
    """It reaches the caller with its sentence, also from another thread, and nothing is spoiled."""
    printed = run(NO_MEMORY.replace("THREADS", str(threads)))
    sentence = r"out of memory: a thread needs \d+ bytes of scratch memory"
    assert re.fullmatch(sentence + r"\nTrue\n", printed), printed


FORK = """
import os, torch, resnet_fused as rf

torch.set_num_threads(2)
x, weight, vector = torch.randn(1, 64, 30, 30), torch.randn(64, 64, 3, 3), torch.ones(64)

def work():
    y = rf.ops.conv_bn_act(x, weight, vector, vector, padding=1)
    return rf.ops.add_relu(y, y), torch.ops.resnet_fused.content_hash([weight, x])

want = work()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    got = work()
    os._exit(not (torch.equal(got[0], want[0]) and got[1] == want[1]))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_process_computes_in_one_thread():
    """Like PyTorch's own operations and its DataLoader's workers: OpenMP's threads stay behind."""
    assert run(FORK) == "0\n"
