"""The command `resnet-fused`."""

from __future__ import annotations

import click

from . import ops, select
from .commands.bench import bench
from .commands.demo import demo
from .commands.doctor import doctor
from .commands.tune import tune
from .measure.machine import package_version


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_version(), prog_name="resnet-fused")
@click.pass_context
def main(context: click.Context) -> None:
    """Faster residual networks in PyTorch with one call: demo, benchmark, tuning, and a doctor."""
    if context.invoked_subcommand != "doctor":  # which tells of it among its findings
        try:
            select.force()
            ops.cpu_isa()
        except (ValueError, RuntimeError) as error:
            raise click.ClickException(f"{error}.") from error


main.add_command(demo)
main.add_command(bench)
main.add_command(tune)
main.add_command(doctor)
