"""Fast residual networks in PyTorch: fused conv+BN(+add)+ReLU kernels, one call to swap them in."""

from . import models, ops, reference, select
from ._version import __version__ as __version__
from .conv_bn import FusedConvBN
from .fuse import fuse, refresh, unfuse
from .graph import graph
from .recipe import NoMatch
from .report import report
from .residual import FusedBottleneck, FusedResidual
from .tune import tune
from .verify import verify

__all__ = [
    "FusedBottleneck",
    "FusedConvBN",
    "FusedResidual",
    "NoMatch",
    "fuse",
    "graph",
    "models",
    "ops",
    "reference",
    "refresh",
    "report",
    "select",
    "tune",
    "unfuse",
    "verify",
]
