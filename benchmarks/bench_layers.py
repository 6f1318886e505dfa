"""How fast is each convolution, against the machine's peak and PyTorch's prepacked oneDNN?

    python -m benchmarks.bench_layers                    every layer of ResNet-18 and ResNet-50
    python -m benchmarks.bench_layers --in-net           where a whole net's time goes
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
import re

import click
import torch

from resnet_fused import models, select
from resnet_fused.commands.bench import DTYPES, FILE, BatchSizes

from .common import console, machine, plain_net, progress_bar, random_images
from .in_net import profile
from .layer_cases import COLD, WARM, Measured, measure
from .layer_tables import add_layer, heading, layer_table, net_table
from .layers import layers_of

_ops = torch.ops.resnet_fused


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--net", "nets", multiple=True, type=click.Choice(list(models.BUILDERS)))
@click.option("--batches", type=BatchSizes(), default="1,8,32", help="Batch sizes.")
@click.option("--dtypes", multiple=True, type=click.Choice(list(DTYPES)))
@click.option("--size", type=click.IntRange(min=32), default=224, help="Height and width.")
@click.option("--only", metavar="REGEX", default="", help="Layers whose text or name it finds.")
@click.option("--plan", type=click.Choice(select.FORCES), default="none", help="Force a plan.")
@click.option("--isa", default="", help="Instruction set [default: the widest].")
@click.option("--cold", is_flag=True, help="Weights from memory, as in a net: copies in turn.")
@click.option("--seconds", type=click.FloatRange(min=0), default=1.0, help="Timed, per layer.")
@click.option("--rounds", type=click.IntRange(min=1), help="Interleaved rounds, not --seconds.")
@click.option("--json", "json_path", type=FILE, help="Write results and surroundings here.")
@click.option("--in-net", is_flag=True, help="Time the steps of whole nets instead.")
def main(
    nets: tuple[str, ...],
    batches: tuple[int, ...],
    dtypes: tuple[str, ...],
    size: int,
    only: str,
    plan: str,
    isa: str,
    cold: bool,
    seconds: float,
    rounds: int | None,
    json_path: Path | None,
    in_net: bool,
) -> None:
    """Time every distinct convolution of a net: ours, oneDNN, the machine's peak, interleaved."""
    out = console()
    nets = nets or ("resnet18", "resnet50")
    chosen = [DTYPES[name] for name in dtypes or ("float32", "bfloat16")]
    weights = COLD if cold else WARM
    records = []
    with _instruction_set(isa), select.forced(plan):
        for net in nets:
            for dtype in chosen:
                for batch in batches:
                    if in_net:
                        model, x = plain_net(net).to(dtype), random_images(batch, size=size).to(dtype)
                        parts = profile(model, x)
                        peak = _ops.multiply_peak(0.2)
                        out.print(net_table(f"{net}, {dtype}, batch {batch}", parts, peak))
                        continue
                    layers = [
                        layer
                        for layer in layers_of(net, size)
                        if re.search(only, f"{layer.text} {layer.name}")
                    ]
                    measured = []
                    with progress_bar(out) as progress:
                        for layer in progress.track(layers, description=f"{net} batch {batch}"):
                            measured.append(
                                measure(layer, batch, dtype, weights=weights, seconds=seconds, rounds=rounds)
                            )
                    table = layer_table(heading(net, batch, measured))
                    for m in measured:
                        add_layer(table, m)
                    out.print(table)
                    records += [{"net": net} | m.record() for m in measured]
    if json_path:
        document = {"machine": machine().record(), "results": records}
        json_path.write_text(json.dumps(document, indent=2) + "\n")


@contextmanager
def _instruction_set(isa: str) -> Iterator[None]:
    """The kernels of `isa` within the block; "" leaves the choice alone."""
    if isa:
        _ops.set_cpu_isa(isa)
    try:
        yield
    finally:
        if isa:
            _ops.set_cpu_isa("")


if __name__ == "__main__":
    main()
