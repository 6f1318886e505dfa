"""Convolution + BN (+ ReLU) as one module: FusedConvBN, and what a parent's slots share with it."""

from __future__ import annotations

from torch import Tensor, nn

from . import check, packing
from ._fused import FusedModule
from ._launches import Launch, prepare_at_once, prepare_unit
from ._links import links_below
from ._pack_cache import Packing
from ._refusals import refuse_altered, refuse_mixture, refuse_unit
from ._unit_runs import Run
from .recipe import ConvUnit, NoMatch


class _ConvBn(nn.Module):
    """The plain module behind FusedConvBN."""

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, act: str) -> None:
        super().__init__()
        self.conv = conv
        self.bn = bn
        self.act = act
        self.training = conv.training

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(self.conv(x))
        return nn.functional.relu(y) if self.act == "relu" else y


class OneUnit(FusedModule):
    """A fused module of a single convolution."""

    kind = "conv_bn"

    def _out_sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        return [self._out_size(self._units[0], size)]

    def _compose(self, x: Tensor, run: Run) -> Tensor:
        return run(0, x, None)

    def _launches(self, x: Tensor, packed: Packing) -> Launch | None:
        if x.dim() != 4:
            return None
        at_once = prepare_at_once(packed.units, None, x, adds=False)
        if at_once is not None:
            return at_once
        run = prepare_unit(packed.units[0], tuple(x.shape), x.device)
        return lambda x: run(x, None)

    def _at_once(self, size: tuple[int, ...], packed: Packing) -> packing.AtOnce | None:
        joined = packing.at_once(packed.units)
        one = {"has_shortcut": False, "adds": False, "pool": self._units[0].max_pool}
        return packing.AtOnce(joined.tensors, joined.keywords | one)


class FusedConvBN(OneUnit):
    """act(bn(conv(x))) as one op in eval mode, for stems and other plain sequences.

    conv: nn.Conv2d; bn: nn.BatchNorm2d with running statistics and conv's channels; act: "relu" or
    "none". The children are `conv` and `bn` themselves, not copies.
    x: (N, C, H, W) or (C, H, W), as conv takes it -> what bn(conv(x)) has, dense channels_last.
    Raises TypeError or ValueError for anything else.
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, act: str = "relu") -> None:
        check.one_of("FusedConvBN", "act", act, check.ACTIVATIONS)
        for name, value, kind in (("conv", conv, nn.Conv2d), ("bn", bn, nn.BatchNorm2d)):
            if not isinstance(value, kind):
                raise TypeError(
                    f"FusedConvBN: {name} must be a {kind.__name__}, got {type(value).__name__}"
                )
        unit = ConvUnit(conv, bn, act, "conv", "bn")
        try:
            refuse_altered(conv, "conv")
            refuse_altered(bn, "bn")
            refuse_unit(unit)
            refuse_mixture((unit,))
        except NoMatch as reason:
            raise ValueError(f"FusedConvBN: {reason}") from None
        plain = _ConvBn(conv, bn, act)
        super().__init__(plain, (unit,), tuple(links_below(plain)))
