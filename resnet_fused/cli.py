"""The command `resnet-fused`."""

from __future__ import annotations

import click

from .commands.bench import bench
from .commands.demo import demo
from .commands.doctor import doctor
from .measure.machine import package_version


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(package_version(), prog_name="resnet-fused")
def main() -> None:
    """Faster residual networks in PyTorch with one call: demo, benchmark, and a doctor."""


main.add_command(demo)
main.add_command(bench)
main.add_command(doctor)
