"""`resnet-fused demo`: a net learns real digits, is fused, answers the same and runs faster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor, nn

import resnet_fused as rf

from ..measure.error import exact_logits, largest_difference
from ..measure.machine import machine
from . import demo_speed, picture
from . import digits as data
from .console import console, progress_bar
from .options import FILE
from .tables import swapped_table

ACCURACY_WANTED = 0.97
PICTURED = 2 * picture.COLUMNS  # digits in the picture
TINY = (96, 48)  # digits to train on and held out with --quick


@dataclass(frozen=True)
class Answers:
    """What both nets say about the held-out digits: logits (N, 10) each, and the labels (N,)."""

    plain: Tensor
    fused: Tensor
    labels: Tensor

    def same(self) -> int:
        """How many predictions agree."""
        return _agreeing(self.plain, self.fused)


@click.command()
@click.option(
    "--output",
    type=FILE,
    default=Path("results/demo.png"),
    help="The picture to write (PNG).",
)
@click.option("--epochs", type=click.IntRange(min=1), default=8, help="Passes over the digits.")
@click.option("--seed", type=int, default=0, help="Of split, weights and order.")
@click.option("--quick", is_flag=True, help="Tiny, without a verdict on accuracy and speed.")
@click.option("--no-compile", is_flag=True, help="Leave torch.compile out of the comparison.")
def demo(output: Path, epochs: int, seed: int, quick: bool, no_compile: bool) -> None:
    """Train the lesson's ResNet-18 on handwritten digits, fuse it, compare answers and speed.

    Fails unless both nets agree on every held-out digit and the fused one is faster at 224x224.
    """
    picture.require()
    digits = data.load_digits(seed)
    output.parent.mkdir(parents=True, exist_ok=True)
    with rf.select.forced("none"):  # whatever RESNET_FUSED_FORCE says: the demo shows both
        _demo(console(), digits, output, epochs, seed, quick, compile=not no_compile)


def _demo(
    out: Console,
    digits: data.Digits,
    output: Path,
    epochs: int,
    seed: int,
    quick: bool,
    compile: bool,
) -> None:
    if quick:
        digits = digits.subset(*TINY)
    net = _train(out, digits, epochs, seed)
    fused = rf.fuse(net)

    _heading(out, "What was swapped")
    out.print(swapped_table(rf.report(fused, digits.test_x[:1])))

    _heading(out, "The same answers")
    answers = Answers(
        data.logits(net, digits.test_x), data.logits(fused, digits.test_x), digits.test_y
    )
    wrong = _check_answers(out, net, fused, digits.test_x, answers)
    if wrong:
        raise click.ClickException(" ".join(wrong))
    failures = []
    accuracy = _accuracy(answers.fused, answers.labels)
    if accuracy < ACCURACY_WANTED and not quick:
        failures.append(
            f"Training reached {accuracy:.1%} on held-out digits where {ACCURACY_WANTED:.0%} "
            "are wanted: give it more --epochs."
        )

    _heading(out, "Speed")
    scale = demo_speed.QUICK if quick else demo_speed.FULL
    panels, too_slow = demo_speed.show(out, net, seed, scale, compile=compile)
    failures += too_slow

    _save_picture(output, digits.test_x, answers, panels)
    out.print(f"\nPicture: {output}", highlight=False, soft_wrap=True)
    if failures:
        raise click.ClickException(" ".join(failures))
    gain = "" if quick else ", and faster"
    out.print(f"[green]The fused net gives the same answers{gain}.[/green]")


def _train(out: Console, digits: data.Digits, epochs: int, seed: int) -> nn.Module:
    """The lesson's net with plain blocks, full width, one input channel; returned in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = rf.models.resnet18(10, 1, block=rf.reference.Residual)
    with progress_bar(out) as progress:
        task = progress.add_task("training", total=None)

        def on_step(done: int, total: int, loss: float) -> None:
            text = f"training on {len(digits.train_y)} digits, loss {loss:.3f}"
            progress.update(task, completed=done, total=total, description=text)

        return data.train(net, digits, epochs, seed, on_step)


def _check_answers(
    out: Console, net: nn.Module, fused: nn.Module, x: Tensor, answers: Answers
) -> list[str]:
    """Prints accuracy, error, agreement and the checkpoint's way back; returns what is wrong."""
    count = len(x)
    exact = exact_logits(net, x)
    columns = ("", Column("plain", justify="right"), Column("fused", justify="right"))
    table = Table(*columns, header_style="bold")
    both = (answers.plain, answers.fused)
    accuracies = [f"{_accuracy(y, answers.labels):.2%}" for y in both]
    table.add_row(f"accuracy on {count} held-out digits", *accuracies)
    differences = [f"{largest_difference(y, exact):.1e}" for y in both]
    table.add_row("largest difference of the logits from fp64", *differences)
    table.add_row("largest logit", *(f"{float(y.abs().max()):.1f}" for y in both))
    out.print(table)

    failures = []
    same = answers.same()
    _verdict(out, same == count, f"{same} of {count} predictions are the same after rf.fuse(net).")
    if same != count:
        failures.append(
            f"The fused net predicts another digit for {count - same} of {count} held-out images."
        )
    back = _agreeing(answers.plain, data.logits(_plain_copy(fused), x))
    text = "predictions are the same after fused.state_dict() was loaded into a plain net (strict)."
    _verdict(out, back == count, f"{back} of {count} {text}")
    if back != count:
        failures.append("A plain net with the fused net's state_dict predicts other digits.")
    return failures


def _plain_copy(fused: nn.Module) -> nn.Module:
    """A plain net of its own with the fused net's checkpoint."""
    with torch.random.fork_rng(devices=[]):
        net = rf.models.resnet18(10, 1, block=rf.reference.Residual)
    net.load_state_dict(fused.state_dict(), strict=True)
    return net.eval()


def _save_picture(path: Path, x: Tensor, answers: Answers, panels: list[picture.Panel]) -> None:
    """Digits that a net got wrong first (at most half of the picture), then others in order."""
    plain, fused = answers.plain.argmax(1), answers.fused.argmax(1)
    odd = ((plain != answers.labels) | (fused != plain)).nonzero()[:, 0].tolist()[: PICTURED // 2]
    others = [i for i in range(len(x)) if i not in odd][: PICTURED - len(odd)]
    samples = [
        picture.Sample(
            data.to_pixels(x[i, 0]), int(answers.labels[i]), int(plain[i]), int(fused[i])
        )
        for i in others + odd
    ]
    count, same = len(x), answers.same()
    m = machine()
    picture.save_demo(
        path,
        "ResNet-18 before and after rf.fuse(net)",
        f"{count} handwritten digits that training never saw: "
        f"{_accuracy(answers.fused, answers.labels):.1%} right, "
        f"{'all' if same == count else same} predictions the same before and after. "
        "Red: wrong, and what it is.",
        samples,
        panels,
        "Milliseconds a batch, and how many times as fast as eager channels_last. "
        "Medians of interleaved runs; the thin line spans the quartiles.",
        m.describe(),
    )


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean())


def _agreeing(a: Tensor, b: Tensor) -> int:
    return int((a.argmax(1) == b.argmax(1)).sum())


def _heading(out: Console, text: str) -> None:
    out.print(f"\n[bold]{text}[/bold]")


def _verdict(out: Console, good: bool, text: str) -> None:
    out.print(("[green]yes[/green]  " if good else "[red]no[/red]   ") + text, highlight=False)
