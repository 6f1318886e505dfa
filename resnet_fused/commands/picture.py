"""Pictures (PNG) of speed and of classified digits, drawn with matplotlib (the [demo] extra)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..measure.compare import Result, ratio
from ..measure.engines import CHANNELS_LAST, COMPILE, EAGER, FUSED, GRAPHED, OURS, OWN, RECORDED
from .console import extra, milliseconds

COLOURS = {
    EAGER: "#c9ced6",
    CHANNELS_LAST: "#9aa5b4",
    COMPILE: "#6c7a8d",
    FUSED: "#0b8a6f",
    OURS: "#5bb89f",
    RECORDED: "#0b8a6f",
    GRAPHED: "#5bb89f",
}
INK, FAINT, LINE, WRONG = "#1f2933", "#7b8794", "#d5dbe1", "#c2410c"
COLUMNS = 12  # digits in a row
STYLE = {
    "font.family": "DejaVu Sans",  # ships with matplotlib
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
}


@dataclass(frozen=True)
class Panel:
    """One bar chart: heading, one result an engine, and the result that ratios refer to."""

    heading: str
    results: Sequence[Result]
    standard: Result | None


@dataclass(frozen=True)
class Sample:
    """A digit's image (H, W) with brightness 0..1, its label and what both nets say."""

    image: Tensor
    label: int
    plain: int
    fused: int


def require() -> None:
    """Fails early, in one sentence, where matplotlib is missing."""
    extra(_import, "matplotlib", "a picture")


def save_speed(
    path: Path, title: str, panels: Sequence[Panel], footer: str, *, columns: int = 1
) -> None:
    """A chart of panels with horizontal bars, `columns` side by side; all lengths are inches.

    Panels in one row have the same engines, which stand at its left.
    """
    matplotlib, new_figure = extra(_import, "matplotlib", "a picture")
    with matplotlib.rc_context(STYLE):
        columns = min(columns, len(panels))
        bars = [len(panel.results) for panel in panels[::columns]]
        rows = sum(bars)
        height = 1.0 + 0.42 * rows + 0.65 * len(bars) + 0.45
        width = 9 + 6 * (columns - 1)
        figure = new_figure(figsize=(width, height))
        figure.text(
            0.27 / width, 1 - 0.42 / height, title, fontsize=15, fontweight="bold", va="center"
        )
        grid = figure.add_gridspec(
            len(bars),
            columns,
            left=1.9 / width,
            right=1 - 0.27 / width,
            top=1 - 1.15 / height,
            bottom=0.6 / height,
            height_ratios=bars,
            hspace=0.65 * len(bars) / (0.42 * rows),
            wspace=0.08,
        )
        for i, panel in enumerate(panels):
            _bars(figure.add_subplot(grid[i]), panel, names=i % columns == 0)
        figure.text(0.27 / width, 0.25 / height, footer, fontsize=7.5, color=FAINT, va="center")
        figure.savefig(path)


def save_demo(
    path: Path,
    title: str,
    subtitle: str,
    samples: Sequence[Sample],
    panels: Sequence[Panel],
    caption: str,
    footer: str,
) -> None:
    """Digits with both predictions above, speed bars side by side below; lengths are inches."""
    matplotlib, new_figure = extra(_import, "matplotlib", "a picture")
    rows = -(-len(samples) // COLUMNS)
    height = 1.35 + 1.6 * rows + 4.0
    with matplotlib.rc_context(STYLE):
        figure = new_figure(figsize=(14, height))
        figure.text(0.03, 1 - 0.5 / height, title, fontsize=19, fontweight="bold", va="center")
        figure.text(0.03, 1 - 0.92 / height, subtitle, fontsize=11, color=FAINT, va="center")
        grid = figure.add_gridspec(
            rows,
            COLUMNS,
            left=0.03,
            right=0.97,
            top=1 - 1.35 / height,
            bottom=4.25 / height,
            hspace=0.5,
            wspace=0.12,
        )
        for i, sample in enumerate(samples):
            _digit(figure.add_subplot(grid[divmod(i, COLUMNS)]), sample)
        figure.text(0.03, 3.6 / height, caption, fontsize=11, color=FAINT, va="center")
        bars = figure.add_gridspec(
            1,
            len(panels),
            left=0.15,
            right=0.97,
            top=2.95 / height,
            bottom=0.7 / height,
            wspace=0.1,
        )
        for i, panel in enumerate(panels):
            _bars(figure.add_subplot(bars[0, i]), panel, names=i == 0)
        figure.text(0.03, 0.3 / height, footer, fontsize=8.5, color=FAINT, va="center")
        figure.savefig(path)


def _digit(ax, sample: Sample) -> None:
    """The image above both predictions; anything wrong in red, with the label."""
    ax.imshow(sample.image.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="bilinear")
    ax.set_xticks([])
    ax.set_yticks([])
    right = sample.plain == sample.fused == sample.label
    for spine in ax.spines.values():
        spine.set_color(LINE if right else WRONG)
        spine.set_linewidth(0.8 if right else 2)
    said = f"plain {sample.plain}   fused {sample.fused}"
    ax.set_xlabel(said, fontsize=8.5, labelpad=4, color=INK if right else WRONG)
    if not right:
        ax.set_title(f"is a {sample.label}", fontsize=8.5, color=WRONG, pad=3)


def _bars(ax, panel: Panel, *, names: bool) -> None:
    """Milliseconds as horizontal bars with quartiles, each with its number and its ratio."""
    longest = max((r.samples.quartiles[1] for r in panel.results if r.samples), default=1.0)
    for y, result in enumerate(panel.results):
        if result.samples is None:
            ax.text(0.015 * longest, y, "not available here", va="center", fontsize=9, color=FAINT)
            continue
        median, (q1, q3) = result.samples.median, result.samples.quartiles
        colour = COLOURS.get(result.engine, COLOURS[COMPILE])
        ax.barh(y, median, height=0.68, color=colour)
        ax.plot([q1, q3], [y, y], color=INK, linewidth=1.2, solid_capstyle="butt")
        label = f"{milliseconds(median)} ms"
        if result is not panel.standard and panel.standard is not None:
            label += f"   {ratio(result, panel.standard):.2f}x"
        weight = "bold" if result.engine in OWN else "normal"
        ax.text(q3 + 0.02 * longest, y, label, va="center", fontsize=9.5, fontweight=weight)
    ax.set_ylim(len(panel.results) - 0.5, -0.5)
    ax.set_xlim(0, 1.45 * longest)
    ax.set_yticks([])
    if names:
        ax.set_yticks(range(len(panel.results)), [r.engine for r in panel.results])
    ax.tick_params(length=0, labelsize=10)
    ax.set_xticks([])
    ax.set_title(panel.heading, fontsize=11.5, fontweight="bold", loc="left", pad=8)
    for side in ("top", "right", "bottom"):
        ax.spines[side].set_visible(False)
    ax.spines["left"].set_color(LINE)


def plotting():
    """matplotlib and a function that makes a Figure; one sentence where it is missing."""
    return extra(_import, "matplotlib", "a picture")


def _import():
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    def new_figure(**kwargs) -> Figure:
        figure = Figure(**kwargs)  # not pyplot: no window, no global state
        FigureCanvasAgg(figure)
        return figure

    return matplotlib, new_figure
