"""What the layers have to reach, and why one that does not falls short.

Direct kernels are held to 85% of the multiply peak; Winograd kernels to 65% of the peak for the
multiplications that they make themselves, in the stages where they are chosen for speed (the stem
and stages 1 to 3). Stage 4 is shown, not held: few pixels, weights from memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .accounting import is_winograd
from .layer_cases import Measured
from .layers import Layer

DIRECT_SHARE = 0.85
WINOGRAD_SHARE = 0.65
WINOGRAD_STAGES = range(4)
MOST_BELOW = 4  # layers that may fall below, each with its reason

# From when on something counts as a reason, as a part of the layer's time.
_NOTICEABLE_CALL = 0.05  # with what it moves, for direct kernels
_NOTICEABLE_READS = 0.25
# Rows (pixels or tiles) of a thread: below two of AVX-512's register tiles neither the loads of the
# weights nor the ragged last tile are hidden (csrc/cpu/winograd.cpp).
_FEW_ROWS = 28
_PAGE = 4096


@dataclass(frozen=True)
class Below:
    """A layer that falls short of its target, with all reasons that are known."""

    measured: Measured
    target: float
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """Which of the layers held to a target fall below it."""

    held: int  # measurements that have a target
    below: tuple[Below, ...]

    @property
    def layers(self) -> set[Layer]:
        """A layer below at several batch sizes is one layer."""
        return {below.measured.layer for below in self.below}

    @property
    def failures(self) -> list[str]:
        """Why the check fails, one sentence each; empty where it passes."""
        failures = []
        if self.held == 0:
            failures.append("no layer was measured that has a target")
        if len(self.layers) > MOST_BELOW:
            failures.append(f"{len(self.layers)} layers are below, {MOST_BELOW} may be")
        unknown = {below.measured.layer for below in self.below if not below.reasons}
        if unknown:
            failures.append(f"{len(unknown)} of them without a known reason")
        return failures


def target(m: Measured) -> float | None:
    """The share of the peak that this layer has to reach; None for those that are only shown."""
    if m.plan == "torch":
        return None
    if not is_winograd(m.plan):
        return DIRECT_SHARE
    return WINOGRAD_SHARE if m.layer.stage in WINOGRAD_STAGES else None


def judge(
    measured: Sequence[Measured], given: Sequence[tuple[str | re.Pattern[str], str]] = ()
) -> Verdict:
    """given: (regular expression, reason) for layers whose reason cannot be derived."""
    held = [(m, target(m)) for m in measured if target(m) is not None]
    below = [
        Below(m, wanted, (*derived_reasons(m), *_matching(m, given)))
        for m, wanted in held
        if m.share < wanted
    ]
    return Verdict(len(held), tuple(below))


def derived_reasons(m: Measured) -> Iterator[str]:
    """What keeps a layer from its share of the peak, as far as the measurements show it."""
    call = m.call_seconds / m.seconds
    moves = 0.0 if is_winograd(m.plan) else m.move_seconds / m.seconds
    if call >= _NOTICEABLE_CALL:
        yield f"calling any convolution takes {_us(m.call_seconds)}, {call:.0%} of its time"
    elif call + moves >= _NOTICEABLE_CALL:
        yield (
            f"a call takes {_us(m.call_seconds)} and moving its pixels in and out once "
            f"{_us(m.move_seconds)}, {call + moves:.0%} of its time: a value is only "
            f"{m.multiplications // m.values} multiplications"
        )
    reads = m.read_seconds / m.seconds
    if reads >= _NOTICEABLE_READS:
        yield (
            f"reading {m.weight_bytes / 1e6:.1f} MB of weights and {m.map_bytes / 1e6:.1f} MB of "
            f"maps once takes {reads:.0%} of its time (limit {m.limit:.0%} of peak)"
        )
    if m.page_faults * _PAGE > m.output_bytes / 2:
        yield (
            f"{m.page_faults:.0f} page faults a call: malloc does not keep its "
            f"{m.output_bytes / 1e6:.1f} MB output"
        )
    rows = m.rows / m.threads
    if rows < _FEW_ROWS:
        what = "tiles" if is_winograd(m.plan) else "output pixels"
        yield f"{m.rows} {what} for {m.threads} threads: a weight that is loaded serves {rows:.0f}"


def _matching(m: Measured, given: Sequence[tuple[str | re.Pattern[str], str]]) -> Iterator[str]:
    for expression, reason in given:
        if re.search(expression, f"{m.layer.text} {m.layer.name}"):
            yield reason


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.0f} us"
