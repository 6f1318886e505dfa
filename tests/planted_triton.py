"""Plants bugs in the Triton kernels and their launches, one at a time, and counts those that the
tests show.

    python tests/planted_triton.py [word ...]    exit status 1 where one goes unseen

Words pick bugs by name. Each is written into a copy of the package, on which the tests of its file
run until one fails or crashes. Not part of `make test`: a bug takes 20 s of a
core, one that is not seen two minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_CONV, _PLAN, _CONFIG = "conv.py", "plan.py", "config.py"
_PROBLEM, _LAUNCH, _ADD = "problem.py", "launch.py", "add_relu.py"


@dataclass(frozen=True)
class Bug:
    name: str
    file: str  # in resnet_fused/triton_kernels
    source: str
    bug: str
    which: int = 0  # of the places where the source is


BUGS = [
    Bug("rows: mask one too far", _CONV, "(at_h < in_h)", "(at_h <= in_h)"),
    Bug("rows: mask one too far, by taps", _CONV, "(at_h < in_h)", "(at_h <= in_h)", 1),
    Bug("columns: mask one too near", _CONV, "(at_w < in_w)", "(at_w < in_w - 1)"),
    Bug("columns: mask one too near, by taps", _CONV, "(at_w < in_w)", "(at_w < in_w - 1)", 1),
    Bug(
        "columns: negative ones are read",
        _CONV,
        "(at_w >= 0) & (at_w < in_w) & m_in",
        "(at_w < in_w) & m_in",
    ),
    Bug("rows: the first is padding", _CONV, "(at_h >= 0)", "(at_h > 0)", 1),
    Bug("pixels: beyond the last are read", _CONV, "& (at_w < in_w) & m_in", "& (at_w < in_w)"),
    Bug(
        "pixels: beyond the last are written",
        _CONV,
        "m_in[:, None] & k_in[None, :]",
        "(m_in | ~m_in)[:, None] & k_in[None, :]",
    ),
    Bug(
        "pixels: swapped, beyond the last are written",
        _CONV,
        "k_in[:, None] & m_in[None, :] if",
        "k_in[:, None] & (m_in | ~m_in)[None, :] if",
    ),
    Bug(
        "channels: the last is not written",
        _CONV,
        "_both(m_in, k < left, SWAP)",
        "_both(m_in, k < left - 1, SWAP)",
    ),
    Bug(
        "channels: beyond the group are written",
        _CONV,
        "_both(m_in, k < left, SWAP)",
        "_both(m_in, k < left + 1, SWAP)",
    ),
    Bug(
        "input channels: beyond the group are read",
        _CONV,
        "c_in = first_c + c < GROUP_IN",
        "c_in = first_c + c < IN",
    ),
    Bug(
        "input channels: the last is left out",
        _CONV,
        "c_in = first_c + c < GROUP_IN",
        "c_in = first_c + c < GROUP_IN - 1",
    ),
    Bug(
        "window: beyond the last tap", _CONV, "in_window = at < WINDOW", "in_window = at <= WINDOW"
    ),
    Bug(
        "taps: rows not dilated",
        _CONV,
        "r = tap // KERNEL_W * DILATION_H",
        "r = tap // KERNEL_W",
        1,
    ),
    Bug(
        "taps: columns not dilated",
        _CONV,
        "s = tap % KERNEL_W * DILATION_W",
        "s = tap % KERNEL_W",
        1,
    ),
    Bug(
        "taps: flat, columns not dilated",
        _CONV,
        "s = tap % KERNEL_W * DILATION_W",
        "s = tap % KERNEL_W",
    ),
    Bug(
        "taps: rows for columns",
        _CONV,
        "tap // KERNEL_W * DILATION_H",
        "tap // KERNEL_H * DILATION_H",
        1,
    ),
    Bug(
        "stride: of rows for columns", _CONV, "w = q * STRIDE_W - PAD_W", "w = q * STRIDE_H - PAD_W"
    ),
    Bug(
        "padding: of rows for columns",
        _CONV,
        "w = q * STRIDE_W - PAD_W",
        "w = q * STRIDE_W - PAD_H",
    ),
    Bug("groups: the first group's input", _CONV, "* IN + group * GROUP_IN", "* IN"),
    Bug(
        "groups: the first group's weights", _CONV, "(group * group_out + k) * WINDOW", "k * WINDOW"
    ),
    Bug("groups: the first group's scale", _CONV, "k_all = group * group_out + k", "k_all = k"),
    Bug(
        "order: rows of the last group of tiles",
        _CONV,
        "rows = min(tiles_m - first_m, GROUP_M)",
        "rows = GROUP_M",
    ),
    Bug(
        "order: group walked by columns",
        _CONV,
        "first_m + within % rows, within // rows",
        "first_m + within % rows, within % tiles_n",
    ),
    Bug(
        "split: the last steps are dropped",
        _CONV,
        "+ SHORTCUT_STEPS + SPLIT - 1) // SPLIT",
        "+ SHORTCUT_STEPS) // SPLIT",
    ),
    Bug(
        "split: parts overlap",
        _CONV,
        "end = min(start + PER_PART, ",
        "end = min(start + PER_PART + 1, ",
    ),
    Bug(
        "split: sums of the wrong part",
        _CONV,
        "part.to(tl.int64) * pixels",
        "part.to(tl.int64) * (pixels - 1)",
    ),
    Bug(
        "reduce: the last part is dropped",
        _CONV,
        "for _ in range(SPLIT)",
        "for _ in range(SPLIT - 1)",
    ),
    Bug(
        "reduce: channel of the first element", _CONV, "k = ((first % CHANNELS)", "k = ((first % 1)"
    ),
    Bug(
        "reduce: beyond the last is read as inside",
        _CONV,
        "inside = at < count",
        "inside = at < count - 1",
    ),
    Bug("reduce: no shift", _CONV, "y = sums * scale + shift\n", "y = sums * scale\n"),
    Bug(
        "reduce: the shortcut's shift is lost",
        _CONV,
        "shift += tl.load(shortcut_shift_ptr + k, mask",
        "shift = shift + 0 * tl.load(shortcut_shift_ptr + k, mask",
    ),
    Bug(
        "reduce: scale of the main branch",
        _CONV,
        "_, scale, _ = _ratio(scale,",
        "_, _, _ = _ratio(scale,",
    ),
    Bug(
        "reduce: no residual",
        _CONV,
        "y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)",
        "y += 0",
        1,
    ),
    Bug(
        "reduce: activation before the residual",
        _PLAN,
        '"RELU": problem.act == "relu" and epilogue',
        '"RELU": problem.act == "relu"',
    ),
    Bug(
        "epilogue: no shift", _CONV, "+ _by_channel(shift, SWAP)", "+ 0 * _by_channel(shift, SWAP)"
    ),
    Bug(
        "epilogue: activation before the residual",
        _CONV,
        "    if HAS_RESIDUAL:\n        y += tl.load(residual_ptr + at",
        "    if RELU:\n        y = tl.where(y < 0, 0.0, y)\n"
        "    if HAS_RESIDUAL:\n        y += tl.load(residual_ptr + at",
    ),
    Bug(
        "epilogue: NaN becomes 0",
        _CONV,
        "y = tl.where(y < 0, 0.0, y)",
        "y = tl.where(y > 0, y, 0.0)",
    ),
    Bug(
        "reduce: NaN becomes 0",
        _CONV,
        "y = tl.where(y < 0, 0.0, y)",
        "y = tl.where(y > 0, y, 0.0)",
        1,
    ),
    Bug(
        "epilogue: residual rounded first",
        _CONV,
        "y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)",
        "y = rounded(y, y_ptr.dtype.element_ty, INTERPRETED).to(tl.float32)\n"
        "        y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)",
    ),
    Bug(
        "halves: the second one's scale",
        _CONV,
        "*(high, high_scale, high_shift",
        "*(high, low_scale, high_shift",
    ),
    Bug("halves: the second one's place", _CONV, "m_in, first_k + half)", "m_in, first_k)"),
    Bug(
        "halves: channels left of the second", _CONV, "*(left - half, channels", "*(left, channels"
    ),
    Bug(
        "shortcut: ratio upside down",
        _CONV,
        "ratio = scale / shortcut_scale",
        "ratio = shortcut_scale / scale",
    ),
    Bug(
        "shortcut: zero scales divide",
        _CONV,
        "(tl.abs(shortcut_scale) <= 7.9e-31)",
        "(tl.abs(shortcut_scale) < 0)",
    ),
    Bug("shortcut: large ratios overflow", _CONV, " | (tl.abs(ratio) >= 1e30)", ""),
    Bug(
        "shortcut: epilogue's scale of lost channels",
        _CONV,
        "tl.where(lost, 1.0, shortcut_scale)",
        "tl.where(lost, scale, shortcut_scale)",
    ),
    Bug(
        "shortcut: weights of lost channels stay",
        _CONV,
        "(k_in & (lost == 0))",
        "(k_in & (lost >= 0))",
    ),
    Bug(
        "shortcut: accumulator not rescaled",
        _CONV,
        "sums = sums * _by_channel(ratio, SWAP)",
        "sums = sums * 1.0",
    ),
    Bug(
        "shortcut: its shift is lost",
        _CONV,
        "shift += tl.load(shortcut_shift_ptr + k_all",
        "shift = shift + 0 * tl.load(shortcut_shift_ptr + k_all",
    ),
    Bug("shortcut: stride of columns", _CONV, "+ q * SHORTCUT_STRIDE_W", "+ q"),
    Bug(
        "shortcut: stride of rows",
        _CONV,
        "(n * shortcut_h + p * SHORTCUT_STRIDE_H)",
        "(n * shortcut_h + p)",
    ),
    Bug("shortcut: image of the first", _CONV, "(n * shortcut_h + p", "(0 * n + p"),
    Bug(
        "shortcut: channels beyond the last",
        _CONV,
        "c_in = first_c + c < SHORTCUT_C",
        "c_in = first_c + c <= SHORTCUT_C",
    ),
    Bug(
        "shortcut: first step twice where shared",
        _CONV,
        "range(max(start, STEPS), end)",
        "range(min(start, STEPS), end)",
    ),
    Bug("rounding: cut off", _CONV, "0x7FFF + ((bits >> 16) & 1)", "0"),
    Bug("rounding: ties away from even", _CONV, "0x7FFF + ((bits >> 16) & 1)", "0x8000"),
    Bug(
        "products: swapped without being turned",
        _CONV,
        "return k[:, None] + m[None, :] * channels if SWAP",
        "return k[:, None] * channels + m[None, :] if SWAP",
    ),
    Bug(
        "grid: a row of tiles is missing",
        _PLAN,
        "tiles_m = -(-problem.pixels // config.pixels)",
        "tiles_m = max(1, problem.pixels // config.pixels)",
    ),
    Bug(
        "grid: groups are missing", _PLAN, "tiles_m * tiles_n * problem.groups", "tiles_m * tiles_n"
    ),
    Bug(
        "grid: the second kernel's last block",
        _PLAN,
        "-(-count // _REDUCE_BLOCK)",
        "max(1, count // _REDUCE_BLOCK)",
    ),
    Bug(
        "plan: offsets stay narrow",
        _PLAN,
        "problem.largest > LARGEST",
        "problem.largest > 2 * LARGEST",
    ),
    Bug(
        "plan: the weights' sizes for offsets only",
        _PROBLEM,
        "return max(inputs, outputs, others, weights)",
        "return max(inputs, outputs, weights)",
    ),
    Bug(
        "plan: flat without need",
        _PROBLEM,
        "return taps > 1 and self.group_in < depth",
        "return taps > 1 and self.group_in <= depth",
    ),
    Bug(
        "rule: shared memory is not looked at",
        _CONFIG,
        "config.shared_bytes(problem.dtype.itemsize) + BARRIER_BYTES > device.shared_bytes",
        "config.sums_per_thread > 255",
    ),
    Bug(
        "rule: sums beyond what is held",
        _CONFIG,
        "return sums <= 32  # an address and",
        "return sums <= 64  # an address and",
    ),
    Bug(
        "launch: the shortcut's vectors in the other order",
        _LAUNCH,
        "*shortcut[2:], y]",
        "*shortcut[:1:-1], y]",
    ),
    Bug(
        "launch: the residual twice",
        _LAUNCH,
        "[x, weight, scale, shift, None, *shortcut, parts]",
        "[x, weight, scale, shift, residual, *shortcut, parts]",
    ),
    Bug(
        "add_relu: the last block",
        _LAUNCH,
        "_add_launch(-(-count // _ADD_BLOCK), count)",
        "_add_launch(max(1, count // _ADD_BLOCK), count)",
    ),
    Bug("add_relu: mask", _ADD, "inside = at < count", "inside = at < count - 1"),
    Bug("add_relu: NaN becomes 0", _ADD, "tl.where(y < 0, 0.0, y)", "tl.where(y > 0, y, 0.0)"),
    Bug("add_relu: one operand", _ADD, "y = a + b", "y = a + a"),
]


def planted(bug: Bug, text: str) -> str:
    """The file with the bug. Raises ValueError where the source is not there."""
    pieces = text.split(bug.source)
    if len(pieces) < bug.which + 2:
        raise ValueError(f"{bug.name}: {bug.file} has no {bug.source!r}")
    before = bug.source.join(pieces[: bug.which + 1])
    return before + bug.bug + bug.source.join(pieces[bug.which + 1 :])


def _tests_of(bug: Bug | None) -> list[tuple[str, str]]:
    """Files of tests that look at the bug's file, and whether the interpreter must be on."""
    interpreted = ("interpreted_triton.py", "1")
    if bug is not None and bug.file in (_CONV, _ADD):
        return [interpreted]
    return [("test_triton_plans.py", "0"), ("test_triton_launches.py", "0"), interpreted]


def is_seen(bug: Bug | None) -> tuple[bool, str]:
    """Whether a test fails on a copy of the package with the bug, and which; None plants none."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("resnet_fused", "tests", "pyproject.toml"):
            source = ROOT / part
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "_C*.so")
                shutil.copytree(source, copy / part, ignore=ignored)
            else:
                shutil.copy(source, copy)
        if bug is not None:
            path = copy / "resnet_fused" / "triton_kernels" / bug.file
            path.write_text(planted(bug, path.read_text()))
        for file, interpret in _tests_of(bug):
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", f"tests/{file}"],
                cwd=copy,
                capture_output=True,
                text=True,
                check=False,
                env=os.environ
                | {
                    "TRITON_INTERPRET": interpret,
                    "RESNET_FUSED_DISABLE_EXT": "1",
                    "OMP_NUM_THREADS": "1",
                    "PYTHONPATH": str(copy),
                },
            )
            if done.returncode > 1:  # 1: a test failed; below 0: a crash
                raise RuntimeError(f"{file} could not be run:\n{done.stdout[-2000:]}")
            if done.returncode:
                lines = [s for s in done.stdout.splitlines() if s.startswith(("FAILED", "ERROR"))]
                return True, lines[0] if lines else done.stdout[-300:]
    return False, ""


def main(words: list[str]) -> int:
    bugs = [bug for bug in BUGS if not words or any(word in bug.name for word in words)]
    missed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for bug, (seen, where) in zip(bugs, pool.map(is_seen, bugs), strict=True):
            missed += not seen
            print(f"{'seen  ' if seen else 'UNSEEN'} {bug.name}   {where[:100]}", flush=True)
    print(f"{len(bugs) - missed} of {len(bugs)} bugs are seen")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
