"""FusedResidual and FusedBottleneck: residual blocks whose convolutions run as fused ops."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import check, packing, reference
from ._fused import FusedModule
from ._launches import Launch, prepare_at_once, prepare_block
from ._links import links_below
from ._pack_cache import Packing
from ._refusals import refuse_channels
from ._unit_runs import Run
from ._wrapper import Wrapper
from .match import match_block
from .recipe import BlockRecipe, NoMatch

_residual_block = torch.ops.resnet_fused.residual_block.default


class FusedResidual(FusedModule):
    """The lesson's Residual, faster: same arguments, children, state_dict keys and initial values.

    input_channels, num_channels: channels of the input and the output.
    use_1x1conv: put a 1x1 convolution on the shortcut, needed where shapes change.
    strides: stride of the first 3x3 convolution and of the shortcut's.

    In eval mode every convolution, its batch norm, the addition and the ReLU are one op; with
    gradients enabled it still back-propagates. In training mode the plain block runs.
    x: (N, input_channels, H, W) -> (N, num_channels, ceil(H / strides), ceil(W / strides)), or both
    without N; of the weights' dtype, autocast's under autocast.
    Output: dense channels_last, whatever came in. Raises ValueError or TypeError for an x that does
    not fit and for bad arguments.
    """

    adds_shortcut = True

    def __init__(
        self, input_channels: int, num_channels: int, use_1x1conv: bool = False, strides: int = 1
    ) -> None:
        self._wrap(*_build(reference.Residual, input_channels, num_channels, use_1x1conv, strides))

    def _wrap(self, block: nn.Module, recipe: BlockRecipe) -> None:
        FusedModule.__init__(self, block, recipe.units(), tuple(links_below(block)))
        self.__dict__["_recipe"] = recipe

    @staticmethod
    def from_block(block: nn.Module) -> FusedResidual:
        """A fused module in the place of any block that can be proved to be a residual block.

        Shares the block's children, parameters and attributes. Returns a FusedBottleneck for
        blocks of three convolutions or more. Raises NoMatch, a ValueError with the reason, for any
        other module and TypeError for anything else.
        """
        check.module("FusedResidual.from_block", "block", block)
        if isinstance(block, Wrapper):
            raise NoMatch("FusedResidual.from_block: block is fused already")
        if not any(isinstance(m, nn.Conv2d) for m in list(block.modules())[1:]):
            kind = type(block).__name__
            raise NoMatch(f"FusedResidual.from_block: block must hold convolutions, got a {kind}")
        return fused_block(block, match_block(block))

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self._recipe.kind

    def _out_sizes(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        sizes = []
        for unit in self._recipe.main:
            size = self._out_size(unit, size)
            sizes.append(size)
        if self._recipe.shortcut is not None:
            sizes.append(size)  # the addition demands it
        return sizes

    def _refuse_edited(self) -> None:
        super()._refuse_edited()
        refuse_channels(self._recipe)

    def _packed_block(self, packed: Packing) -> _PackedBlock:
        if packed.derived is None:
            packed.derived = _PackedBlock(self._error_name, packed.units, self._recipe)
        return packed.derived

    def _run_at_once(self, x: Tensor, dtype: torch.dtype, packed: Packing) -> Tensor | None:
        arguments = self._packed_block(packed).arguments_for(x.shape[-2:])
        if arguments is None:
            return None
        if x.dtype != dtype:
            x = x.to(dtype)
        # Below autograd: nothing needs gradients here, and asking again costs 6 us a call.
        with torch._C._AutoDispatchBelowAutograd():
            return _residual_block(x, *arguments.tensors, **arguments.keywords)

    def _at_once(self, size: tuple[int, ...], packed: Packing) -> packing.AtOnce | None:
        arguments = self._packed_block(packed).arguments_for(size)
        if arguments is None:
            return None
        keywords = arguments.keywords | {"adds": True, "pool": False}
        return packing.AtOnce(arguments.tensors, keywords)

    def _launches(self, x: Tensor, packed: Packing) -> Launch | None:
        block = self._packed_block(packed)
        if x.dim() != 4 or self._recipe.avg_pool is not None or not block.adds_up(x.shape[-2:]):
            return None
        *main, last = packed.units
        shortcut = main.pop() if self._recipe.shortcut is not None else None
        main.append(last)
        at_once = prepare_at_once(main, shortcut, x, adds=True)
        return at_once or prepare_block(main, shortcut, tuple(x.shape), x.device)

    def _compose(self, x: Tensor, run: Run) -> Tensor:
        recipe = self._recipe
        last = len(recipe.units()) - 1
        y = x
        for i in range(len(recipe.main) - 1):
            y = run(i, y, None)
        shortcut = x
        if recipe.shortcut is not None:
            branch = recipe.avg_pool(x) if recipe.avg_pool is not None else x
            shortcut = run(last - 1, branch, None)
        if shortcut.shape[-2:] != self._out_size(recipe.main[-1], y.shape[-2:]):
            return self._run_original(x)  # eager broadcasts, or says what is wrong
        return run(last, y, shortcut)


class _PackedBlock:
    """A block's packed units as residual_block takes them, made once for each packing."""

    def __init__(
        self, op: str, packed: tuple[packing.PackedUnit, ...], recipe: BlockRecipe
    ) -> None:
        self._op, self.recipe = op, recipe
        self.arguments = None  # None: it must go one convolution at a time
        self._adds: dict[tuple[int, ...], bool] = {}
        if recipe.avg_pool is not None:
            return
        # From the order in which a block runs its units to main path first, then the shortcut.
        order = list(packed)
        if recipe.shortcut is not None:
            order.append(order.pop(-2))
        joined = packing.at_once(order)
        keywords = joined.keywords | {"has_shortcut": recipe.shortcut is not None}
        self.arguments = packing.AtOnce(joined.tensors, keywords)

    def arguments_for(self, size: tuple[int, ...]) -> packing.AtOnce | None:
        """residual_block's for images of `size`; None where it cannot compute the block."""
        return self.arguments if self.arguments is not None and self.adds_up(size) else None

    def adds_up(self, size: tuple[int, ...]) -> bool:
        """Whether both paths end in the same size for an image of `size`, so that they add up."""
        found = self._adds.get(size)
        if found is None:
            main = shortcut = tuple(size)
            for unit in self.recipe.main:
                main = packing.out_size(self._op, unit.conv, main)
            if self.recipe.shortcut is not None:
                shortcut = packing.out_size(self._op, self.recipe.shortcut.conv, shortcut)
            if len(self._adds) > _MOST_SIZES:
                self._adds.clear()
            found = self._adds[size] = main == shortcut
        return found


_MOST_SIZES = 256  # of images, remembered


class FusedBottleneck(FusedResidual):
    """reference.Bottleneck, faster: 1x1, 3x3, 1x1 convolutions; else as FusedResidual.

    x: (N, input_channels, H, W) -> (N, 4 * num_channels, ceil(H / strides), ceil(W / strides)).
    """

    expansion = reference.Bottleneck.expansion

    def __init__(
        self, input_channels: int, num_channels: int, use_1x1conv: bool = False, strides: int = 1
    ) -> None:
        self._wrap(
            *_build(reference.Bottleneck, input_channels, num_channels, use_1x1conv, strides)
        )


def fused_block(block: nn.Module, recipe: BlockRecipe) -> FusedResidual:
    """The fused module in the place of a block that match has found to be the recipe's."""
    kind = FusedBottleneck if recipe.kind == "bottleneck" else FusedResidual
    fused = kind.__new__(kind)
    fused._wrap(block, recipe)
    return fused


def _build(
    block: type[nn.Module], input_channels: int, num_channels: int, use_1x1conv: bool, strides: int
) -> tuple[nn.Module, BlockRecipe]:
    name = f"Fused{block.__name__}"
    for argument, value in (
        ("input_channels", input_channels),
        ("num_channels", num_channels),
        ("strides", strides),
    ):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: {argument} must be an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: {argument} must be at least 1, got {value}")
    if not isinstance(use_1x1conv, bool):
        raise TypeError(f"{name}: use_1x1conv must be a bool, got {type(use_1x1conv).__name__}")
    outputs = getattr(block, "expansion", 1) * num_channels
    if not use_1x1conv and (input_channels != outputs or strides != 1):
        raise ValueError(
            f"{name}: use_1x1conv must be True where the shortcut changes shape, "
            f"got {use_1x1conv} with "
            f"{input_channels} input channels, {outputs} output channels and strides {strides}"
        )
    built = block(input_channels, num_channels, use_1x1conv, strides)
    try:
        return built, match_block(built)
    except NoMatch as reason:  # global hooks
        raise ValueError(f"{name}: the block cannot be fused: {reason}") from None
