"""The roofline of a machine and where each layer lies below it (PNG)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from resnet_fused.commands.picture import FAINT, INK, LINE, STYLE, plotting

from .accounting import arithmetic
from .layer_cases import Measured

COLOURS = ("#0b8a6f", "#c2410c", "#2f6f9f", "#8a5fb0", "#a8871a", "#6c7a8d")
MARKERS = "os^Dv<>"


def save_roofline(
    path: Path, title: str, measured: Sequence[Measured], bandwidth: float, footer: str
) -> None:
    """Multiplications a second against multiplications a byte; one colour a plan, one mark a batch.

    Each layer counts what its plan multiplies and, once, the bytes of its operands; bandwidth is
    memory's, in bytes a second.
    """
    matplotlib, new_figure = plotting()
    with matplotlib.rc_context(STYLE):
        figure = new_figure(figsize=(9, 6.2))
        ax = figure.add_axes((0.09, 0.15, 0.87, 0.73))
        intensity = [_intensity(m) for m in measured]
        least, most = min(intensity) / 1.5, max(intensity) * 1.5
        for peak in _peaks(measured):
            corners = [x for x in (least, peak / bandwidth, most) if least <= x <= most]
            heights = [2e-9 * min(peak, bandwidth * x) for x in corners]
            ax.plot(corners, heights, color=INK, linewidth=1.2)
            label = f"{2e-9 * peak:.0f} GFLOP/s"
            ax.text(most, 2.1e-9 * peak, label, ha="right", va="bottom", fontsize=9)
        plans = list(dict.fromkeys(m.plan for m in measured))
        batches = sorted({m.batch for m in measured})
        for m, x in zip(measured, intensity, strict=True):
            ax.plot(
                x,
                2e-9 * m.multiplications / m.seconds,
                linestyle="none",
                markersize=6,
                alpha=0.8,
                color=COLOURS[plans.index(m.plan) % len(COLOURS)],
                marker=MARKERS[batches.index(m.batch) % len(MARKERS)],
            )
        for i, plan in enumerate(plans):
            ax.plot([], [], "o", color=COLOURS[i % len(COLOURS)], label=plan)
        for i, batch in enumerate(batches):
            ax.plot([], [], MARKERS[i % len(MARKERS)], color=FAINT, label=f"batch {batch}")
        ax.set_xscale("log")
        ax.set_yscale("log")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
        ax.set_xlabel("multiply-adds for each byte of input, weights, residual and output")
        ax.set_ylabel("GFLOP/s that the plan computes")
        ax.grid(color=LINE, linewidth=0.6)
        ax.set_axisbelow(True)
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
        ax.legend(frameon=False, fontsize=9, loc="lower right")
        figure.text(0.03, 0.94, title, fontsize=15, fontweight="bold", va="center")
        figure.text(0.03, 0.035, footer, fontsize=7.5, color=FAINT, va="center")
        figure.savefig(path)


def _peaks(measured: Sequence[Measured]) -> list[float]:
    """One for each arithmetic that the plans use: the median over the layers."""
    peaks: dict[str, list[float]] = {}
    for m in measured:
        peaks.setdefault(arithmetic(m.plan), []).append(m.peak)
    return [median(values) for values in peaks.values()]


def _intensity(m: Measured) -> float:
    return m.multiplications / (m.weight_bytes + m.map_bytes)
