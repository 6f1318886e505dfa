"""ResNet-18, 34, 50, 101 and 152 as the lesson builds its ResNet-18, with fused or plain blocks.

The lesson is the chapter on ResNet of *Dive into Deep Learning*.
Every net is `nn.Sequential(b1, b2, b3, b4, b5, AdaptiveAvgPool2d((1, 1)), Flatten(), Linear)`: a
stem b1 and four stages b2..b5 of residual blocks. (N, in_channels, H, W) -> (N, num_classes); the
lesson uses 224x224. `block=` chooses the block class; with a fused one the stem is fused too. The
same seed draws the same parameters for either, under the same state_dict keys. The five builders
raise ValueError or TypeError in one sentence for arguments that they cannot use.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

from .fuse import fuse
from .residual import FusedBottleneck, FusedResidual

__all__ = ["BUILDERS", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet_block"]

Block = Callable[..., nn.Module]
STAGE_CHANNELS = (64, 128, 256, 512)


def resnet_block(
    input_channels: int,
    num_channels: int,
    num_residuals: int,
    first_block: bool = False,
    *,
    block: Block = FusedResidual,
    expansion: int = 1,
) -> list[nn.Module]:
    """One stage: `num_residuals` blocks; the first halves height and width unless `first_block`.

    A block has expansion * num_channels outputs. The first one has the 1x1 shortcut where the shape
    changes: in the lesson (expansion 1) in every stage but the first.
    """
    out_channels = expansion * num_channels
    stage = []
    for i in range(num_residuals):
        if i == 0 and not first_block:
            stage.append(block(input_channels, num_channels, use_1x1conv=True, strides=2))
        elif i == 0 and input_channels != out_channels:
            stage.append(block(input_channels, num_channels, use_1x1conv=True))
        else:
            stage.append(block(out_channels, num_channels))
    return stage


def resnet18(
    num_classes: int = 10, in_channels: int = 3, block: Block = FusedResidual
) -> nn.Sequential:
    """The lesson's ResNet-18: 2 + 2 + 2 + 2 blocks of two 3x3 convolutions."""
    return _build("resnet18", (2, 2, 2, 2), 1, num_classes, in_channels, block)


def resnet34(
    num_classes: int = 10, in_channels: int = 3, block: Block = FusedResidual
) -> nn.Sequential:
    """3 + 4 + 6 + 3 blocks of two 3x3 convolutions."""
    return _build("resnet34", (3, 4, 6, 3), 1, num_classes, in_channels, block)


def resnet50(
    num_classes: int = 10, in_channels: int = 3, block: Block = FusedBottleneck
) -> nn.Sequential:
    """3 + 4 + 6 + 3 bottlenecks."""
    return _build("resnet50", (3, 4, 6, 3), 4, num_classes, in_channels, block)


def resnet101(
    num_classes: int = 10, in_channels: int = 3, block: Block = FusedBottleneck
) -> nn.Sequential:
    """3 + 4 + 23 + 3 bottlenecks."""
    return _build("resnet101", (3, 4, 23, 3), 4, num_classes, in_channels, block)


def resnet152(
    num_classes: int = 10, in_channels: int = 3, block: Block = FusedBottleneck
) -> nn.Sequential:
    """3 + 8 + 36 + 3 bottlenecks."""
    return _build("resnet152", (3, 8, 36, 3), 4, num_classes, in_channels, block)


BUILDERS = {f.__name__: f for f in (resnet18, resnet34, resnet50, resnet101, resnet152)}


def _build(
    name: str,
    counts: tuple[int, ...],
    expansion: int,
    num_classes: int,
    in_channels: int,
    block: Block,
) -> nn.Sequential:
    _check_count(name, "num_classes", num_classes)
    _check_count(name, "in_channels", in_channels)
    _check_block(name, expansion, block)
    stem = nn.Sequential(
        nn.Conv2d(in_channels, STAGE_CHANNELS[0], kernel_size=7, stride=2, padding=3),
        nn.BatchNorm2d(STAGE_CHANNELS[0]),
        nn.ReLU(),
        nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )
    stages = []
    channels = STAGE_CHANNELS[0]
    for i, (width, count) in enumerate(zip(STAGE_CHANNELS, counts, strict=True)):
        blocks = resnet_block(
            channels, width, count, first_block=i == 0, block=block, expansion=expansion
        )
        stages.append(nn.Sequential(*blocks))
        channels = expansion * width
    net = nn.Sequential(
        stem, *stages, nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(channels, num_classes)
    )
    if isinstance(block, type) and issubclass(block, FusedResidual):
        fuse(net, inplace=True)  # the blocks are fused already; this adds the stem
    return net


def _check_count(name: str, argument: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: {argument} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: {argument} must be at least 1, got {value}")


def _check_block(name: str, expansion: int, block: object) -> None:
    wanted = (
        "FusedResidual or reference.Residual"
        if expansion == 1
        else "FusedBottleneck or reference.Bottleneck"
    )
    if isinstance(block, nn.Module) or not callable(block):
        got = f"an instance of {type(block).__name__}"
        raise TypeError(f"{name}: block must be a block class such as {wanted}, got {got}")
    try:
        inspect.signature(block).bind(64, 64, use_1x1conv=True, strides=2)
    except TypeError as error:
        got = getattr(block, "__name__", block)
        raise TypeError(
            f"{name}: block must take (input_channels, num_channels, use_1x1conv, strides) as "
            f"{wanted} do, got {got}: {error}"
        ) from None
    except ValueError:
        pass  # it does not tell its arguments
    got = _expansion(block)
    if got not in (None, expansion):
        outputs = "num_channels" if expansion == 1 else f"{expansion} * num_channels"
        raise ValueError(
            f"{name}: block must have {outputs} output channels such as {wanted}, "
            f"got {getattr(block, '__name__', block)} with {got} * num_channels"
        )


def _expansion(block: Block) -> int | None:
    """Output channels over num_channels; None for a factory that does not say."""
    if isinstance(block, type) and issubclass(block, FusedResidual):
        return 4 if issubclass(block, FusedBottleneck) else 1
    return getattr(block, "expansion", 1 if isinstance(block, type) else None)
