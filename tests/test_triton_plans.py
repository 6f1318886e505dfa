"""Tiles, grids and workspaces of the Triton kernels, for GPUs that are not here."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from resnet_fused.triton_kernels import config as configs
from resnet_fused.triton_kernels.device import KNOWN, Device
from resnet_fused.triton_kernels.plan import plan
from resnet_fused.triton_kernels.problem import Problem, Shortcut

BF16 = torch.bfloat16


def conv(in_channels, size, out_channels, kernel=3, stride=1, **rest):
    pad = kernel // 2
    out = (size + 2 * pad - kernel) // stride + 1
    return Problem(
        dtype=rest.pop("dtype", BF16),
        batch=rest.pop("batch", 1),
        in_channels=in_channels,
        in_size=(size, size),
        out_channels=out_channels,
        out_size=(out, out),
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding=(pad, pad),
        **rest,
    )


RESNET_18 = [
    conv(3, 224, 64, 7, 2),
    conv(64, 56, 64),
    conv(64, 56, 64, residual=True),
    conv(64, 56, 128, 3, 2),
    conv(128, 28, 128, shortcut=Shortcut(64, (56, 56), (2, 2))),
    conv(128, 28, 128, residual=True),
    conv(256, 14, 256, shortcut=Shortcut(128, (28, 28), (2, 2))),
    conv(256, 14, 256, residual=True),
    conv(512, 7, 512, shortcut=Shortcut(256, (14, 14), (2, 2))),
    conv(512, 7, 512, residual=True),
]
RESNET_50 = [
    conv(64, 56, 64, 1),
    conv(256, 56, 64, 1),
    conv(64, 56, 256, 1, residual=True),
    conv(64, 56, 256, 1, shortcut=Shortcut(64, (56, 56), (1, 1))),
    conv(1024, 14, 256, 1),
    conv(256, 14, 1024, 1, residual=True),
    conv(256, 14, 1024, 1, shortcut=Shortcut(512, (28, 28), (2, 2))),
    conv(512, 7, 2048, 1, residual=True),
    conv(2048, 7, 512, 1),
]
OTHERS = [
    conv(1, 96, 64, 7, 2),
    conv(100, 28, 120, residual=True),
    conv(128, 28, 128, groups=32),
    conv(6, 9, 10, 5, groups=2),
    conv(17, 1, 1, 1),
]
PROBLEMS = [
    replace(problem, batch=batch, dtype=dtype, precision=precision)
    for problem in RESNET_18 + RESNET_50 + OTHERS
    for batch in (1, 8, 32, 128, 256)
    for dtype, precision in ((BF16, "tf32"), (torch.float32, "tf32"), (torch.float32, "ieee"))
]


@pytest.mark.parametrize("device", KNOWN.values(), ids=KNOWN)
def test_the_rule_serves_everything_and_fits(device):
    for problem in PROBLEMS:
        config = configs.choose(problem, device)
        assert config.shared_bytes(problem.dtype.itemsize) <= device.shared_bytes
        assert config.sums_per_thread <= 128
        assert configs.fits(config, problem, device)
        assert config in configs.candidates(problem, device)


def test_texts():
    for tile, split in itertools.product(configs.TILES, configs.SPLITS):
        config = replace(tile, split=split)
        assert configs.parse(str(config)) == config
    assert str(configs.Config(128, 64, 32, 4, 3)) == "128x64x32 warps 4 stages 3"
    assert str(configs.Config(256, 64, 64, 8, 4, True, 2)) == (
        "256x64x64 warps 8 stages 4 swap split 2"
    )


def test_small_batches_are_shared_and_large_ones_are_not():
    h200 = KNOWN["NVIDIA H200"]
    small, large = RESNET_18[-1], replace(RESNET_18[1], batch=128)
    assert configs.choose(small, h200).split > 1
    assert configs.choose(large, h200).split == 1
    for problem in RESNET_18:  # every multiprocessor has work, as far as there are steps
        config = configs.choose(problem, h200)
        tiles = plan(problem, config).conv.grid[0] * config.split
        assert tiles >= 90 or config.split == max(configs.SPLITS) or tiles >= problem.pixels // 64


def test_64_channels_on_hopper_are_rows():
    for batch in (32, 128):
        config = configs.choose(replace(RESNET_18[1], batch=batch), KNOWN["NVIDIA H200"])
        assert (config.swap, config.pixels, config.channels) == (True, 256, 64)


def test_a_gpu_with_little_shared_memory_takes_smaller_tiles():
    small = Device("small", (8, 6), 20, 64 << 10, 4 << 20)
    for problem in PROBLEMS:
        assert configs.choose(problem, small).shared_bytes(problem.dtype.itemsize) <= 64 << 10


@pytest.mark.parametrize("tile", configs.TILES, ids=str)
def test_grids_cover_the_output_once(tile):
    for problem in RESNET_18 + OTHERS:
        config = configs.fitted(tile, problem)
        conv = plan(problem, config).conv
        tiles = (conv.scalars["tiles_m"], conv.scalars["tiles_n"])
        assert (tiles[0] - 1) * config.pixels < problem.pixels <= tiles[0] * config.pixels
        assert (tiles[1] - 1) * config.channels < problem.group_out <= tiles[1] * config.channels
        assert conv.grid == (tiles[0] * tiles[1] * problem.groups, 1, 1)


def test_programs_that_share_a_tile_leave_the_epilogue_to_the_second_kernel():
    problem = replace(RESNET_18[-1], batch=2)
    shared = plan(problem, replace(configs.TILES[9], split=4))
    assert shared.conv.grid[1] == 4
    assert shared.parts == (4, 2 * 49, 512)
    assert shared.reduce.grid == (49, 1, 1)
    assert shared.reduce.scalars == {"count": 2 * 49 * 512}
    assert not shared.conv.constants["HAS_RESIDUAL"]
    assert not shared.conv.constants["RELU"]
    assert shared.reduce.constants["HAS_RESIDUAL"]
    assert shared.reduce.constants["RELU"]
    alone = plan(problem, configs.TILES[9])
    assert (alone.reduce, alone.parts) == (None, None)
    assert alone.conv.constants["HAS_RESIDUAL"]


def test_offsets_are_wide_only_where_they_must_be():
    just = conv(64, 1024, 64, batch=31)
    beyond = conv(64, 1024, 64, batch=32)  # 2^31 elements
    assert not plan(just, configs.TILES[0]).conv.constants["WIDE"]
    assert plan(beyond, configs.TILES[0]).conv.constants["WIDE"]
    branch = Shortcut(2048, (1024, 1024), (2, 2))
    assert plan(conv(64, 512, 64, shortcut=branch), configs.TILES[0]).conv.constants["WIDE"]


def test_one_index_for_taps_and_channels_where_a_step_would_be_mostly_empty():
    assert conv(3, 224, 64, 7, 2).is_flat(16)
    assert conv(16, 9, 10).is_flat(32)
    assert not conv(32, 9, 10).is_flat(32)
    assert not conv(64, 56, 64).is_flat(32)
    assert not conv(3, 9, 10, 1).is_flat(16)


def test_ragged_rows_leave_room_for_their_addresses():
    ragged = replace(conv(100, 28, 120), batch=128)
    for device in KNOWN.values():
        able = configs.candidates(ragged, device)
        assert able
        assert all(config.sums_per_thread <= 32 for config in able)


def test_estimates_grow_with_the_work():
    device = KNOWN["NVIDIA H200"]
    for problem in RESNET_18:
        config = configs.choose(problem, device)
        more = replace(problem, batch=64)
        assert configs.clocks(more, config, device) > configs.clocks(problem, config, device)
