"""Timing, verification, table and record for the files here: the code of `resnet-fused bench`.

It lives in resnet_fused.measure so that an installed package has it; this folder is not installed.
"""

from resnet_fused._errors import one_line
from resnet_fused.commands.console import console, milliseconds, progress_bar
from resnet_fused.commands.tables import add_results, speed_table, titled_table, verdict
from resnet_fused.measure.compare import Result, best_peer, compare, of_engine, ratio, with_samples
from resnet_fused.measure.engines import (
    CHANNELS_LAST,
    COMPILE,
    FUSED,
    Unavailable,
    engines,
    prepare,
)
from resnet_fused.measure.error import GRANTED, error_limit, exact_logits, relative_error
from resnet_fused.measure.machine import machine
from resnet_fused.measure.networks import plain_net, random_images
from resnet_fused.measure.timing import Runner, Samples, Timed, interleave

__all__ = [
    "CHANNELS_LAST",
    "COMPILE",
    "FUSED",
    "GRANTED",
    "Result",
    "Runner",
    "Samples",
    "Timed",
    "Unavailable",
    "add_results",
    "best_peer",
    "compare",
    "console",
    "engines",
    "error_limit",
    "exact_logits",
    "interleave",
    "machine",
    "milliseconds",
    "of_engine",
    "one_line",
    "plain_net",
    "prepare",
    "progress_bar",
    "random_images",
    "ratio",
    "relative_error",
    "speed_table",
    "titled_table",
    "verdict",
    "with_samples",
]
