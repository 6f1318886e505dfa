"""Bugs to plant in the sm_90a kernel, one at a time, and the convolutions that must show each."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from emulated_sm90 import Conv, Data, alone, build, differs, draw, run
from planting import Bug, plant, rounds

__all__ = ["BUGS", "build_planted", "cases", "rounds", "show"]

_KERNEL, _EPILOGUE = "sm90/conv_kernel.cuh", "sm90/epilogue.cuh"
_JOINT, _SHORTCUT = "joint_scale.cuh", "sm90/shortcut.cuh"
_SPLIT, _SUM, _MAP = "sm90/split_k.cuh", "split_sum.cuh", "sm90/tensor_map.h"
_STAGED = "sm90/staged_store.cuh"
_OPERAND, _RING, _SCHEDULE = "sm90/operand.h", "sm90/ring.h", "sm90/schedule.h"
_TAPS, _WINDOW = "sm90/tap_shift_kernel.cuh", "sm90/tap_shift.h"

BUGS = [
    # ---- mbarriers ----
    Bug(
        "no wait for an empty stage",
        _KERNEL,
        "barrier_wait(stages.empty(ring.stage), empty_parity(ring));",
        ";",
        "more than 1 arrivals",
        ci=True,
    ),
    Bug(
        "no wait for a full stage",
        _KERNEL,
        "barrier_wait(stages.full(ring.stage), full_parity(ring));",
        ";",
        "before any write",
        ci=True,
    ),
    Bug(
        "a full stage's parity inverted",
        _KERNEL,
        "full_parity(ring)",
        "full_parity(ring) ^ 1u",
        "before any write",
    ),
    Bug(
        "the empty parity not inverted",
        _RING,
        "ring.phase ^ 1u",
        "ring.phase",
        "more than 1 arrivals",
    ),
    Bug("the ring's phase never changes", _RING, "ring.phase ^= 1u;", ";", ci=True),
    Bug(
        "a consumer's ring starts one step early",
        _KERNEL,
        "ring_at(iteration, C::kStages)",
        "ring_at(iteration + 1, C::kStages)",
    ),
    Bug(
        "too few bytes expected",
        _KERNEL,
        "barrier_expect(full, C::kStageBytes)",
        "barrier_expect(full, C::kStageBytes - 128)",
        ci=True,
    ),
    Bug(
        "too many bytes expected",
        _KERNEL,
        "barrier_expect(full, C::kStageBytes)",
        "barrier_expect(full, C::kStageBytes + 128)",
        "deadlock",
    ),
    Bug(
        "early weights not expected",
        _KERNEL,
        "barrier_expect(stages.full(early), C::kStageBytes);",
        ";",
    ),
    Bug("one early stage too many counted", _KERNEL, "early > 0", "early >= 0"),
    Bug(
        "a stage released before its wgmma is waited for", _KERNEL, "wgmma_wait<1>();", ";", "wgmma"
    ),
    Bug(
        "the running stage released instead of the last",
        _KERNEL,
        "if (k > begin && lane == 0) barrier_arrive(stages.empty(last));",
        "if (k > begin && lane == 0) barrier_arrive(stages.empty(ring.stage));",
    ),
    Bug(
        "a release too many",
        _KERNEL,
        "if (k > begin && lane == 0) barrier_arrive(stages.empty(last));",
        "if (lane == 0) barrier_arrive(stages.empty(last));",
    ),
    Bug(
        "released by every lane",
        _KERNEL,
        "if (lane == 0) barrier_arrive(stages.empty(last));",
        "barrier_arrive(stages.empty(last));",
        "deadlock",
    ),
    Bug(
        "the last stage never released",
        _KERNEL,
        "if (lane == 0) barrier_arrive(stages.empty(last));",
        ";",
        "deadlock",
    ),
    Bug(
        "no turns in ping-pong",
        _KERNEL,
        "if (C::kPingPong && i > 0) barrier_wait(stages.turn(warpgroup), turn_parity(i));",
        ";",
    ),
    Bug(
        "the turn goes to oneself",
        _KERNEL,
        "stages.turn(warpgroup ^ 1)",
        "stages.turn(warpgroup)",
        "deadlock",
    ),
    Bug(
        "the turn's parity inverted", _RING, "uint32_t((i - 1) >> 1) & 1u", "uint32_t(i >> 1) & 1u"
    ),
    Bug(
        "barriers not made visible to TMA", _KERNEL, "barrier_init_fence();", ";", "fence.mbarrier"
    ),
    Bug(
        "an empty barrier counts one warp less",
        _KERNEL,
        "barrier_init(stages.empty(s), C::kEmptyArrivals)",
        "barrier_init(stages.empty(s), C::kEmptyArrivals - 1)",
    ),
    Bug(
        "a full barrier waits for two arrivals",
        _KERNEL,
        "barrier_init(stages.full(s), 1)",
        "barrier_init(stages.full(s), 2)",
        "deadlock",
    ),
    Bug("no __syncthreads behind the barriers' start", _KERNEL, "__syncthreads();", ";"),
    Bug(
        "all lanes produce",
        _KERNEL,
        "if (warp == 0 && elect_one()) produce<C, kShortcut>(p, stages);",
        "if (warp == 0) produce<C, kShortcut>(p, stages);",
    ),
    # ---- dependent launch ----
    Bug(
        "inputs read before the kernel before has ended",
        _KERNEL,
        "wait_for_earlier_kernels();",
        ";",
        "griddepcontrol",
        ci=True,
        context="wait_for_earlier_kernels(); // Only",
    ),
    Bug(
        "outputs written before the kernel before has ended",
        _KERNEL,
        "wait_for_earlier_kernels();",
        ";",
        "griddepcontrol",
        context="wait_for_earlier_kernels(); // the residual",
    ),
    Bug(
        "weights read before the kernel before has ended, which may write them",
        _KERNEL,
        "p.early_weights",
        "true",
        "griddepcontrol",
        ci=True,
    ),
    # ---- wgmma ----
    Bug("no wait for the last wgmma", _KERNEL, "wgmma_wait<0>();", ";", "wgmma", ci=True),
    Bug("no wgmma.fence", _KERNEL, "wgmma_fence();", ";", "wgmma.fence"),
    Bug("no commit", _KERNEL, "wgmma_commit();", ";", "wgmma"),
    Bug("sums not cleared", _KERNEL, "k > work.begin || c > 0", "true", ci=True),
    Bug("sums cleared at the shortcut", _KERNEL, "k > work.begin || c > 0", "k > begin || c > 0"),
    Bug("A's slice of the reduction twice as far", _KERNEL, "a + 2 * c", "a + 4 * c"),
    Bug("B's slice of the reduction half as far", _KERNEL, "b + 2 * c", "b + c"),
    Bug("the second block of M is the first", _KERNEL, "m * (64 * C::kSpan / 16)", "0"),
    Bug(
        "the second warpgroup reads the first's rows",
        _KERNEL,
        "operand_descriptor(at + row * C::kSpan, C::kSpan)",
        "operand_descriptor(at, C::kSpan)",
    ),
    Bug(
        "the swizzle on wgmma's side only",
        _MAP,
        "f.swizzle_bytes = 2 * chunk;",
        "f.swizzle_bytes = chunk > 16 ? 32 : 64;",
        "wider than the swizzle",
    ),
    Bug(
        "another swizzle in the descriptor",
        _OPERAND,
        "span == 128 ? 1 : span == 64 ? 2 : 3",
        "span == 128 ? 2 : span == 64 ? 3 : 1",
        ci=True,
    ),
    Bug("row groups half as far apart", _OPERAND, "(8 * span) >> 4", "(4 * span) >> 4"),
    # ---- TMA ----
    Bug("the lower corner without padding", _MAP, "f.lower[0] = -pad_w;", "f.lower[0] = 0;"),
    Bug(
        "the upper corner without the kernel's reach", _MAP, "pad_w - dilation_w * (s - 1)", "pad_w"
    ),
    Bug("the upper corner of the rows", _MAP, "pad_h - dilation_h * (r - 1)", "pad_h"),
    Bug("the walk without stride", _MAP, "f.stride[1] = stride_w;", "f.stride[1] = 1;"),
    Bug(
        "strides exchanged in the walk", _MAP, "f.stride[2] = stride_h;", "f.stride[2] = stride_w;"
    ),
    Bug(
        "weights flat over the taps",
        _MAP,
        "f.size[0] = c;\n  f.size[1] = taps;",
        "f.size[0] = c * taps;\n  f.size[1] = taps;",
    ),
    Bug(
        "taps exchanged",
        _KERNEL,
        "step.r * p.reduction.kernel_w + step.s",
        "step.s * p.reduction.kernel_w + step.r",
    ),
    Bug("dilation forgotten", _KERNEL, "uint16_t(step.s * p.dilation_w)", "uint16_t(step.s)"),
    Bug(
        "dilations exchanged",
        _KERNEL,
        "uint16_t(step.r * p.dilation_h)",
        "uint16_t(step.r * p.dilation_w)",
    ),
    Bug(
        "padding exchanged at a tile's start",
        _SCHEDULE,
        "q * stride_w - pad_w",
        "q * stride_w - pad_h",
        context="return {q * stride_w - pad_w",
    ),
    Bug(
        "the shortcut walked with the main strides",
        _KERNEL,
        "first_tap(p.schedule, work.pixel, p.shortcut_stride_h, p.shortcut_stride_w, 0, 0)",
        "first_tap(p.schedule, work.pixel, p.stride_h, p.stride_w, 0, 0)",
    ),
    # ---- the walk ----
    Bug(
        "the shortcut begins one step late", _SCHEDULE, "i + 1 == k.main_steps", "i == k.main_steps"
    ),
    Bug("the column of taps not reset", _SCHEDULE, "step.s = 0;", ";"),
    Bug(
        "splits overlap by one step",
        _SCHEDULE,
        "int(int64_t(w.split + 1) * s.steps / s.splits)",
        "int((int64_t(w.split + 1) * s.steps + s.splits - 1) / s.splits)",
    ),
    # ---- the shortcut ----
    Bug(
        "no rescale between the ranges", _KERNEL, "rescale<C>(sum, p, channel, tid);", ";", ci=True
    ),
    Bug(
        "rescaled one step late",
        _KERNEL,
        "max(work.begin, p.reduction.main_steps)",
        "max(work.begin, p.reduction.main_steps + 1)",
    ),
    Bug(
        "the ratio of the other half of the rows", _SHORTCUT, "ratio[(r >> 1) & 1]", "ratio[r & 1]"
    ),
    Bug(
        "the ratio upside down",
        _JOINT,
        "scale / shortcut_scale",
        "shortcut_scale / scale",
    ),
    Bug(
        "the main scale in the epilogue",
        _SHORTCUT,
        "joint_scale(p, channel).factor",
        "p.scale[channel]",
    ),
    Bug(
        "one shift only",
        _SHORTCUT,
        "p.shift[channel] + p.shortcut_shift[channel]",
        "p.shift[channel]",
    ),
    Bug("dead rows not cleared", _KERNEL, "clear", "false", context="if (clear)"),
    Bug(
        "only zero counts as dead",
        _JOINT,
        "fabsf(shortcut_scale) * kRange < fabsf(scale)",
        "false",
    ),
    Bug(
        "no proxy fence behind the clearing",
        _SHORTCUT,
        "async_proxy_fence();",
        ";",
        "fence.proxy.async",
        ci=True,
    ),
    Bug("no barrier behind the clearing", _SHORTCUT, "group_barrier<C::kTeam>(barrier);", ";"),
    Bug(
        "the fence behind the barrier",
        _SHORTCUT,
        "async_proxy_fence();\n  group_barrier<C::kTeam>(barrier);",
        "{ group_barrier<C::kTeam>(barrier); async_proxy_fence(); }",
        "fence.proxy.async",
    ),
    Bug("half of a dead row cleared", _SHORTCUT, "i < C::kSpan", "i < C::kSpan / 2"),
    # ---- split-K ----
    Bug(
        "sums stored while another warp's products read the stages",
        _SPLIT,
        "group_barrier<128>(barrier);",
        ";",
        "nothing says that",
        ci=True,
    ),
    Bug(
        "sums read before the cluster's barrier",
        _SPLIT,
        "cluster_arrive();\n  cluster_wait();",
        "{ cluster_arrive(); }",
        ci=True,
    ),
    Bug(
        "a block ends while others read its sums",
        _KERNEL,
        "if constexpr (kSplitK) cluster_wait();",
        ";",
        "which has ended",
        ci=True,
    ),
    Bug(
        "a block says that it has read before it has",
        _SPLIT,
        "cluster_arrive();",
        ";",
        "without an arrival",
        context="cluster_arrive(); return adds;",
    ),
    Bug(
        "sums overwritten while others read them",
        _SPLIT,
        "cluster_arrive();",
        "{ mine[0] = make_float4(0.f, 0.f, 0.f, 0.f); cluster_arrive(); }",
        "since another block read it",
        ci=True,
        context="cluster_arrive(); return adds;",
    ),
    Bug("all blocks add all rows", _SPLIT, "(tid >> 5) % min(splits, 4) == split", "true", "twice"),
    Bug(
        "two blocks of eight add the same rows",
        _SPLIT,
        "(tid >> 5) % min(splits, 4) == split",
        "(tid >> 5) % min(splits, 2) == split % 2",
        "twice",
    ),
    Bug("rows that nobody adds", _SPLIT, "min(splits, 4)", "splits + 4"),
    Bug(
        "its own sums for every split's",
        _SPLIT,
        "load_from_block(i, ring + 16 * (quad * 128 + tid))",
        "load_from_block(0, ring + 16 * (quad * 128 + tid))",
    ),
    Bug("another thread's sums", _SPLIT, "(quad * 128 + tid)", "(quad * 128 + (tid ^ 1))"),
    Bug("quads of the first round again", _SUM, "load(split + s, quad + i)", "load(split + s, i)"),
    Bug("the last split left out", _SUM, "split + s < splits", "split + s < splits - 1"),
    Bug("a round of splits skipped", _SUM, "split += kSplits", "split += 2 * kSplits"),
    Bug(
        "a quad kept in its neighbour's place",
        _SUM,
        "keep(quad + i, total[i]);",
        "keep((quad + i) ^ 1, total[i]);",
    ),
    # ---- outputs through shared memory ----
    Bug(
        "no wait for the residual",
        _STAGED,
        "barrier_wait(place.landed, place.loads++ & 1u);",
        ";",
        "copy of TMA to it",
        ci=True,
    ),
    Bug(
        "a residual's parity inverted",
        _STAGED,
        "place.loads++ & 1u",
        "place.loads++ & 1u ^ 1u",
        "copy of TMA to it",
    ),
    Bug(
        "one group of the residual expected",
        _STAGED,
        "groups * (p.box_pixels * 128)",
        "p.box_pixels * 128",
    ),
    Bug(
        "outputs written before the last ones have left",
        _STAGED,
        "if (tid == 0) wait_for_stores_to_read();",
        ";",
        "store of TMA may read it",
        ci=True,
    ),
    Bug(
        "a residual loaded over outputs that have not left",
        _STAGED,
        "wait_for_stores_to_read();",
        ";",
        "store of TMA may read it",
        context="if (groups <= 0) return; wait_for_stores_to_read();",
    ),
    Bug(
        "outputs written before another thread knows that the last ones have left",
        _STAGED,
        "group_barrier<128>(barrier);",
        ";",
        "store read it",
        context="if (tid == 0) wait_for_stores_to_read(); group_barrier<128>(barrier);",
    ),
    Bug(
        "no fence before the outputs leave",
        _STAGED,
        "async_proxy_fence();",
        ";",
        "fence.proxy.async",
        ci=True,
    ),
    Bug(
        "no barrier before the outputs leave",
        _STAGED,
        "group_barrier<128>(barrier);",
        ";",
        context="group_barrier<128>(barrier); if (tid == 0)",
    ),
    Bug(
        "every thread stores",
        _STAGED,
        "if (tid == 0) place.store(p, channel, w, h, n);",
        "place.store(p, channel, w, h, n);",
        "twice",
    ),
    Bug("stores without a group", _STAGED, "commit_stores();", ";", "in flight"),
    Bug(
        "the end without a wait for the stores",
        _KERNEL,
        "if (tid == 0) wait_for_stores_to_read();",
        ";",
        "in flight",
    ),
    Bug("outputs not swizzled", _STAGED, "(chunk ^ pixel)", "chunk"),
    Bug(
        "the second 64 channels half as far",
        _STAGED,
        "(chunk >> 3) * (kPixels * 128)",
        "(chunk >> 3) * (kPixels * 64)",
    ),
    Bug(
        "all groups of channels in one place",
        _STAGED,
        "channel + 64 * g",
        "channel",
        context="&p.y_map, channel + 64 * g",
    ),
    Bug("a column's affine for its neighbour", _STAGED, "2 * (i >> 1) + 1", "2 * (i >> 1)"),
    Bug(
        "the halves' affine exchanged",
        _STAGED,
        "affine[kTransposed ? i & 1 : 2 * (i >> 1)]",
        "affine[kTransposed ? (i & 1) ^ 1 : 2 * (i >> 1)]",
    ),
    Bug("matrices of the other half's pixels", _STAGED, "8 * (lane >> 4)", "8 * ((lane >> 3) & 1)"),
    Bug("the outputs' pixels beyond the last", _MAP, "f.size[1] = q;", "f.size[1] = q + 1;"),
    Bug("the outputs' boxes of another height", _MAP, "f.box[1] = box_q;", "f.box[1] = box_q - 8;"),
    # ---- the epilogue ----
    Bug(
        "one pixel too many stored",
        _EPILOGUE,
        "pixel < s.pixels",
        "pixel <= s.pixels",
        "out of bounds",
        ci=True,
    ),
    Bug(
        "channels behind the last stored",
        _EPILOGUE,
        "channel < s.k",
        "channel <= s.k",
        context="&& channel < s.k",
    ),
    Bug(
        "ReLU swallows NaN", _SHORTCUT, "relu ? relu_keeping_nan(v) : v", "relu ? fmaxf(v, 0.f) : v"
    ),
    Bug(
        "the residual not transposed", _EPILOGUE, "if (p.residual) quad_transpose(w[h], lane);", ";"
    ),
    Bug(
        "more registers taken than given",
        _KERNEL,
        "take_registers<232>();",
        "take_registers<240>();",
        "setmaxnreg",
    ),
    Bug("the turn signalled at the first step", _KERNEL, "k == work.end - 1", "k == begin"),
    Bug(
        "fragment rows of the other half", _OPERAND, "8 * ((r >> 1) & 1)", "8 * ((r >> 1 & 1) ^ 1)"
    ),
]

# The other kernel, where it differs.
BUGS += [
    Bug(
        "tap-shift: no wait for a window",
        _TAPS,
        "barrier_wait(memory.window_full(windows.stage), full_parity(windows));",
        ";",
        "did not wait",
        ci=True,
    ),
    Bug(
        "tap-shift: no wait for an empty window",
        _TAPS,
        "barrier_wait(memory.window_empty(windows.stage), empty_parity(windows));",
        ";",
        "more than 1 arrivals",
    ),
    Bug(
        "tap-shift: no wait for weights",
        _TAPS,
        "barrier_wait(memory.weights_full(weights.stage), full_parity(weights));",
        ";",
        "before any write",
    ),
    Bug(
        "tap-shift: a window released at once",
        _TAPS,
        "window_done",
        "true",
        context="if (window_done)",
    ),
    Bug(
        "tap-shift: a window's bytes of whole stages",
        _TAPS,
        "p.window.box_positions * 128",
        "p.window.bytes",
        "deadlock",
        context="barrier_expect(full, p.window.box_positions * 128)",
    ),
    Bug(
        "tap-shift: no zeros behind the window",
        _TAPS,
        "at < p.window.bytes",
        "false",
        "before any write",
    ),
    Bug(
        "tap-shift: no fence behind the zeros",
        _TAPS,
        "async_proxy_fence();",
        ";",
        "fence.proxy.async",
        ci=True,
    ),
    Bug(
        "tap-shift: a row's shift without dilation",
        _TAPS,
        "r * conv.dilation_h * p.window.pitch",
        "r * p.window.pitch",
    ),
    Bug(
        "tap-shift: the shortcut at the first tap",
        _TAPS,
        "conv.pad_h * p.window.pitch + conv.pad_w",
        "0",
    ),
    Bug("tap-shift: the shortcut's window unstrided", _TAPS, "shortcut ? 2 : 1", "1"),
    Bug(
        "tap-shift: no rescale",
        _TAPS,
        "rescale<C>(sum, conv, channel, tid);",
        ";",
        ci=True,
    ),
    Bug("tap-shift: dead rows not cleared", _TAPS, "clear", "false", context="if (clear)"),
    Bug("tap-shift: no wait for the last wgmma", _TAPS, "wgmma_wait<0>();", ";", "wgmma"),
    Bug(
        "tap-shift: rows too far apart",
        _WINDOW,
        "p.w + p.pad_w",
        "p.w + 2 * p.pad_w",
        "",
        context="g.pitch = p.w + p.pad_w",
    ),
    Bug(
        "tap-shift: one row too few",
        _WINDOW,
        "(p.r - 1) * p.dilation_h",
        "(p.r - 2) * p.dilation_h",
        context="rows + (p.r - 1) * p.dilation_h",
    ),
    Bug(
        "tap-shift: rows of the next tile stored",
        _WINDOW,
        "images > 1 ? g.box_h : rows",
        "images > 1 ? g.box_h : rows + 1",
    ),
    Bug(
        "tap-shift: only the first image's rows stored",
        _WINDOW,
        "images > 1 ? g.box_h : rows",
        "rows",
    ),
    Bug(
        "tap-shift: no zeros behind a residual",
        _TAPS,
        "at < p.window.place_bytes",
        "false",
        "before any write",
    ),
    Bug(
        "tap-shift: the end without a wait for the stores",
        _TAPS,
        "if (tid == 0) wait_for_stores_to_read();",
        ";",
        "in flight",
    ),
]

# c128x256, c64x256, p128x128, p64x128 and p64x64
_DEFINES = ("-DEMULATED_TILES=0xd9", "-w")


def _gamma(data: Data) -> Data:
    """Scales that rescaling must live with, and inputs that NaN and Inf come from."""
    data.shortcut_scale[::4] = 0
    data.shortcut_scale[1::8] = 1e-38
    data.shortcut_scale[2::8] *= -1
    data.scale[3::8] = 0
    return data


def cases() -> list[tuple[Data, str, dict]]:
    """Few and small, and between them every part of the kernel."""
    plain = draw(Conv(3, 9, 11, 72, 88, residual=True))
    odd = draw(
        Conv(2, 13, 12, 24, 40, kernel=(5, 3), stride=(2, 1), padding=(2, 3), dilation=(1, 2))
    )
    joined = _gamma(draw(Conv(2, 9, 7, 72, 136, shortcut=72)))
    many = draw(Conv(2, 16, 17, 16, 72))
    nan = draw(Conv(1, 8, 8, 64, 64))
    nan.x[0, 5, 3, 3] = float("nan")
    windows = _gamma(draw(Conv(5, 7, 7, 64, 136, shortcut=128)))
    # Behind a tap's last channels comes the next tap, which must not be read: 0 * Inf is NaN.
    # Where it is not, -Inf becomes 0.
    flat = draw(Conv(1, 8, 8, 40, 64, padding=0))
    flat.weight[::2, 0, 0, 1] = torch.inf
    flat.x[:, 0] = flat.x[:, 0].abs() + 0.1
    flat.scale[::2] = -flat.scale[::2].abs()
    return [
        (plain, "c128x256", {"early": True}),
        (plain, "p128x128", {"order": 2}),
        (plain, "c64x256", {"order": 1}),
        (plain, "p64x64", {"order": 2}),
        (plain, "p128x128", {"blocks": 1}),
        (odd, "c64x256", {}),
        (odd, "p64x64", {"order": 1}),
        (joined, "c128x256", {"order": 1, "early": True}),
        (joined, "p128x128", {"order": 0}),
        (joined, "c64x256", {"blocks": 3, "order": 2, "early": True}),
        (joined, "p128x128", {"blocks": 1}),
        (joined, "c128x256", {"blocks": 2}),
        (joined, "p64x64", {"blocks": 3, "order": 1}),
        (joined, "p64x64", {"splits": 2, "order": 2, "early": True}),
        (joined, "p64x64", {"splits": 8}),
        (joined, "p64x128", {"splits": 2}),
        (draw(Conv(3, 16, 17, 64, 72, kernel=1)), "p128x128", {"blocks": 1, "order": 2}),
        (many, "p128x128", {"blocks": 1, "order": 1, "early": True}),
        (many, "c64x256", {"blocks": 1, "order": 2}),
        (many, "p64x64", {"splits": 4, "order": 1}),
        (nan, "c64x256", {}),
        (nan, "p64x64", {"early": True}),
        (flat, "p128x128", {}),
        (draw(Conv(3, 13, 11, 64, 72, residual=True)), "tap-shift", {"window": (9, 1, 208)}),
        (draw(Conv(3, 13, 11, 64, 64, residual=True)), "tap-shift", {"window": (9, 1, 232)}),
        (
            draw(Conv(2, 12, 12, 64, 64, dilation=2)),
            "tap-shift",
            {"window": (6, 1, 232), "blocks": 1},
        ),
        (draw(Conv(2, 9, 9, 256, 64)), "tap-shift", {"window": (9, 1, 232), "blocks": 1}),
        (windows, "tap-shift", {"window": (7, 4, 256), "order": 1}),
        (
            _gamma(draw(Conv(2, 9, 9, 128, 64, shortcut=64))),
            "tap-shift",
            {"window": (9, 1, 232), "order": 2, "blocks": 1},
        ),
    ]


def build_planted(folder: Path, bugs: Sequence[Bug]) -> ctypes.CDLL:
    with alone(folder, "plant"):
        return build(folder, plant(folder, bugs, "sm90"), _DEFINES)


def show(library: ctypes.CDLL, number: int, sweep: list, bug: Bug | None = None) -> str:
    """What shows bug `number` (0: none) first, in words; empty where nothing does."""
    library.sm90_plant(number)
    for data, tile, how in sweep:
        if bug and (bug.file in (_TAPS, _WINDOW)) != (tile == "tap-shift"):
            continue
        y, report = run(library, data, tile, **how)
        if report:
            return f"{data.conv} {tile}: {report}"
        if wrong := differs(data, y):
            return f"{data.conv} {tile}: {wrong}"
    return ""
