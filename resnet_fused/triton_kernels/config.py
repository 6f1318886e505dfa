"""Which tile a convolution is cut into: the set, what fits a GPU, and the rule that picks one."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .device import Device
from .problem import Problem


@dataclass(frozen=True)
class Config:
    """A tile: pixels x output channels x steps of the reduction, and how a program walks it.

    swap: output channels are the rows of the product. split: programs that share a tile's
    reduction. group: rows of tiles that are walked together.
    """

    pixels: int
    channels: int
    depth: int
    warps: int
    stages: int
    swap: bool = False
    split: int = 1
    group: int = 8

    def __str__(self) -> str:
        """ "128x64x64 warps 4 stages 3 swap split 2": what `parse` reads."""
        text = f"{self.pixels}x{self.channels}x{self.depth} warps {self.warps} "
        text += f"stages {self.stages}{' swap' if self.swap else ''}"
        return text if self.split == 1 else f"{text} split {self.split}"

    def shared_bytes(self, itemsize: int) -> int:
        """Of the operands that are in flight, and of the tile on its way to memory."""
        operands = self.stages * (self.pixels + self.channels) * self.depth * itemsize
        return max(operands, self.pixels * self.channels * 4)

    @property
    def sums_per_thread(self) -> int:
        """32-bit registers of a thread that hold the tile's sums."""
        return self.pixels * self.channels // (32 * self.warps)


_TEXT = re.compile(r"(\d+)x(\d+)x(\d+) warps (\d+) stages (\d+)( swap)?(?: split (\d+))?")


def parse(text: str) -> Config:
    """The configuration that prints so. Raises ValueError for any other text."""
    found = _TEXT.fullmatch(text)
    if found is None:
        raise ValueError(
            f'config must be like "128x64x64 warps 4 stages 3", with " swap" and " split 2" '
            f"behind it, got {text!r}"
        )
    *numbers, swap, split = found.groups()
    config = Config(*map(int, numbers), swap=swap is not None, split=int(split or 1))
    sides = (config.pixels, config.channels, config.depth, config.warps)
    if any(side & (side - 1) for side in sides) or min(sides[:3]) < 16 or config.stages < 1:
        raise ValueError(f"config must have powers of two, tiles from 16, got {text!r}")
    return config


# depth is for 16-bit operands, half of it for 32-bit ones: the same bytes.
TILES = (
    Config(128, 256, 64, 8, 3),
    Config(256, 128, 64, 8, 3),
    Config(128, 128, 64, 8, 3),
    Config(128, 128, 32, 4, 4),
    Config(256, 64, 64, 8, 4, swap=True),
    Config(256, 64, 64, 8, 3),
    Config(128, 64, 64, 4, 4),
    Config(128, 64, 32, 8, 4),
    Config(64, 128, 64, 4, 4),
    Config(64, 64, 64, 4, 4),
    Config(128, 32, 64, 4, 4),
    Config(32, 64, 64, 4, 5),
    Config(16, 64, 64, 4, 5),
    Config(32, 32, 32, 4, 4),  # serves everything
)
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)

_MOST_SUMS = 128  # registers a thread; 255 is all that it has
_MOST_SPLIT_PIXELS = 1 << 15  # beyond, there are tiles enough
BARRIER_BYTES = 16  # of shared memory beside a tile's, on Blackwell
# Elements of x that a warp gathers one by one in a step with a flat index: 32 addresses and masks a
# thread.
_MOST_GATHERED = 16 * 32


def candidates(problem: Problem, device: Device) -> tuple[Config, ...]:
    """All configurations that are worth measuring for a convolution, by what needs no compiler."""
    return tuple(_candidates(problem, device))


def _candidates(problem: Problem, device: Device) -> Iterator[Config]:
    for tile in TILES:
        config = fitted(tile, problem)
        if not fits(config, problem, device):
            continue
        if config.channels > 32 and config.channels >= 2 * _next_power(problem.group_out):
            continue  # half of it would multiply nothing
        for split in SPLITS:
            if split == 1 or not _too_thin(problem, config, split):
                yield replace(config, split=split)


def fitted(tile: Config, problem: Problem) -> Config:
    """The tile for a dtype: 32-bit operands take steps half as deep."""
    depth = tile.depth if problem.dtype.itemsize == 2 else tile.depth // 2
    return replace(tile, depth=depth)


def _too_thin(problem: Problem, config: Config, split: int) -> bool:
    """Whether there are tiles enough, or a program would not fill its pipeline."""
    if problem.pixels > _MOST_SPLIT_PIXELS:
        return True
    return problem.steps(config.depth) < split * config.stages


def fits(config: Config, problem: Problem, device: Device) -> bool:
    """Whether a tile's operands find room in shared memory, and its sums and addresses in
    registers: read off compiled kernels, which tests hold (tests/test_triton_ahead.py)."""
    if config.shared_bytes(problem.dtype.itemsize) + BARRIER_BYTES > device.shared_bytes:
        return False
    sums = config.sums_per_thread
    if problem.is_flat(config.depth):
        return sums <= 32 and config.pixels * config.depth <= _MOST_GATHERED * config.warps
    if problem.precision == "ieee" and problem.dtype.itemsize == 4:
        few_rows = config.pixels < 128 or problem.shortcut is None or device.capability[0] == 9
        return sums <= 32 and few_rows  # operands in registers, too
    if problem.is_ragged:
        return sums <= 32  # an address and a mask for every few elements
    if device.capability[0] == 10 and not _fits_blackwell(config, problem):
        return False
    return sums <= 64 or (sums <= _MOST_SUMS and _fits_large(config, problem, device))


def _fits_blackwell(config: Config, problem: Problem) -> bool:
    """Whether the sums, which come from tensor memory all at once, leave room for the rest."""
    if config.sums_per_thread <= 32 or config.swap:
        return True
    if problem.dtype.itemsize == 4:
        if config.sums_per_thread > 64 or problem.shortcut is not None:
            return False
        return config.channels <= 64 or not problem.residual
    return problem.shortcut is None or config.channels > 64


def _fits_large(config: Config, problem: Problem, device: Device) -> bool:
    """Whether a tile with more than 64 sums a thread does without spills."""
    if device.capability[0] == 9:
        return config.pixels < 256 or problem.shortcut is None
    if device.capability[0] == 10:
        return config.pixels < 256 and problem.shortcut is None and not problem.residual
    return False  # without wgmma operands pass through registers, too


def _next_power(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


# Clocks, by derivation: products of a multiprocessor in a clock with 16-bit operands (half of it
# for TF32; ieee has no tensor cores), bytes from L2 in a clock (an assumption that H200 figures
# must confirm), what a program and a second kernel take beside their work.
_PRODUCTS = {8: 1024, 9: 2048, 10: 4096}
_IEEE_PRODUCTS = 128
_L2_BYTES = 36
_PROGRAM = 2000
_KERNEL = 4000


@functools.lru_cache(maxsize=4096)
def choose(problem: Problem, device: Device) -> Config:
    """The configuration with the least estimated time; measured ones come first, see launch."""
    able = candidates(problem, device)
    return min(able, key=lambda config: clocks(problem, config, device))


def clocks(problem: Problem, config: Config, device: Device) -> float:
    """An estimate of a convolution's time.

    A tile's time is that of its products or of its operands' way from L2, whichever is longer;
    programs that share a multiprocessor share both, and hide each other's latency.
    """
    itemsize = problem.dtype.itemsize
    tiles = -(-problem.pixels // config.pixels) * -(-problem.group_out // config.channels)
    programs = tiles * problem.groups * config.split
    resident = min(_resident(config, itemsize, device), -(-programs // device.multiprocessors))
    waves = -(-programs // (device.multiprocessors * resident))
    rate = (
        _IEEE_PRODUCTS
        if problem.precision == "ieee" and itemsize == 4
        else (_PRODUCTS.get(device.capability[0], 1024) * 2 // itemsize)
    )
    steps = -(-problem.steps(config.depth) // config.split)
    products = config.pixels * config.channels * config.depth / rate
    loads = (config.pixels + config.channels) * config.depth * itemsize / _L2_BYTES
    stored = 4 if config.split > 1 else itemsize * (2 if problem.residual else 1)
    epilogue = config.pixels * config.channels * stored / _L2_BYTES
    time = waves * (resident * (steps * max(products, loads) + epilogue) + _PROGRAM)
    if config.split > 1:
        moved = problem.pixels * problem.out_channels * (4 * config.split + itemsize)
        time += _KERNEL + moved / (_L2_BYTES * device.multiprocessors)
    return time


def _resident(config: Config, itemsize: int, device: Device) -> int:
    """Programs that a multiprocessor holds at a time, by shared memory and registers."""
    by_memory = device.shared_bytes // config.shared_bytes(itemsize)
    by_registers = 65536 // (32 * config.warps * min(255, config.sums_per_thread + 96))
    return max(1, min(by_memory, by_registers, 8))
