"""What `match` finds in a module, as plain data: the only thing the fused modules know of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ._caller import CallPath


@dataclass(frozen=True, eq=False)
class ConvUnit:
    """A convolution, the batch norm behind it if there is one, and the activation after both.

    max_pool: with a stem's max-pool behind the activation, 3x3, stride 2, padding 1.
    """

    conv: nn.Conv2d
    bn: nn.BatchNorm2d | None
    act: str  # "relu" | "none"
    conv_name: str  # dotted path below the block or parent, "downsample.0"
    bn_name: str | None
    max_pool: bool = False


@dataclass(frozen=True, eq=False)
class BlockRecipe:
    """A residual block: main path, shortcut, addition, activation.

    The activation of main[-1] comes after the addition. shortcut is None for the identity;
    avg_pool, if present, is applied to the block's input before the shortcut's convolution.
    """

    kind: str  # "basic" | "bottleneck"
    main: tuple[ConvUnit, ...]
    shortcut: ConvUnit | None = None
    avg_pool: nn.AvgPool2d | None = None
    avg_pool_name: str | None = None

    def units(self) -> tuple[ConvUnit, ...]:
        """Every convolution of the block in the order in which the block runs them."""
        return self.main[:-1] + ((self.shortcut,) if self.shortcut else ()) + self.main[-1:]


@dataclass(frozen=True, eq=False)
class Site:
    """conv -> bn (-> ReLU) (-> max-pool) among one parent's direct children, outside blocks."""

    unit: ConvUnit
    # The ReLU child that the site absorbs; None where the activation is not a module.
    act_name: str | None
    max_pool: nn.MaxPool2d | None = None  # the child behind it that the site absorbs too
    max_pool_name: str | None = None
    path: CallPath = ()  # of the convolution's call, from the parent's forward


class NoMatch(ValueError):
    """Why a module cannot be fused, as one sentence for the report."""
