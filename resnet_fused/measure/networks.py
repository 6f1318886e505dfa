"""The nets that benchmarks run: the package's own builders with weights that look trained."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import models, reference


def plain_net(
    name: str, *, num_classes: int = 1000, in_channels: int = 3, seed: int = 0
) -> nn.Module:
    """`models.<name>` with plain blocks in eval mode and batch norms that look trained.

    The global random state is left as it was.
    """
    block = reference.Residual if name in ("resnet18", "resnet34") else reference.Bottleneck
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = models.BUILDERS[name](num_classes, in_channels, block=block)
        draw_statistics(net)
    return net.eval()


def draw_statistics(net: nn.Module) -> None:
    """Batch norms get means N(0, .1) and variances U(.5, 1.5) from torch's random state.

    Fresh ones (0 and 1) would hide an error in folding them.
    """
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)


def random_images(batch: int, channels: int = 3, size: int = 224, seed: int = 0) -> Tensor:
    """(batch, channels, size, size), N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, size, size, generator=generator)
