"""What launches depend on of a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """A GPU as far as tiles depend on it.

    capability: (9, 0) for Hopper. multiprocessors: their number. shared_bytes: of shared memory
    that a block may ask for. l2_bytes: of its level 2 cache.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int
    l2_bytes: int

    @property
    def has_wgmma(self) -> bool:
        """Products from shared memory by groups of four warps: Hopper only."""
        return self.capability[0] == 9

    @property
    def arch(self) -> str:
        """As the compilers call it, "sm_90"."""
        return f"sm_{self.capability[0]}{self.capability[1]}"


# As CUDA reports them; for tests, and for what is decided without such a GPU at hand.
KNOWN = {
    device.name: device
    for device in (
        Device("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912, 40 << 20),
        Device("NVIDIA GeForce RTX 4090", (8, 9), 128, 101376, 72 << 20),
        Device("NVIDIA H100 80GB HBM3", (9, 0), 132, 232448, 50 << 20),
        Device("NVIDIA H200", (9, 0), 132, 232448, 60 << 20),
        Device("NVIDIA B200", (10, 0), 148, 232448, 126 << 20),
    )
}
# What the interpreter's programs are cut for: it takes its time for each step of each, so they are
# few and large.
INTERPRETED = Device("Triton's interpreter", (9, 0), 4, 232448, 60 << 20)


@functools.cache
def device_of(index: int) -> Device:
    """One GPU of this process."""
    found = torch.cuda.get_device_properties(index)
    return Device(
        name=found.name,
        capability=(found.major, found.minor),
        multiprocessors=found.multi_processor_count,
        shared_bytes=found.shared_memory_per_block_optin,
        l2_bytes=found.L2_cache_size,
    )
