"""Packed weights, kept between calls for ops that are given plain ones each time.

In a compiled graph that is every call, because a graph may not look at version counters. Packing
ResNet-18 takes 100 ms, hashing its weights 1.5.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from .. import check
from ._shapes import is_nhwc

_ops = torch.ops.resnet_fused

_MOST_BYTES = 1 << 30


class KeptWeights:
    """Packed weights by the content of the plain ones: a hash of every value (content.h)."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._entries: OrderedDict[tuple[Any, ...], Tensor] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def pack(self, weight: Tensor, groups: int, plan: str) -> Tensor:
        """pack_conv(weight, groups, plan=plan), which nobody may write to."""
        if plan in check.PLAIN_LAYOUT and is_nhwc(weight):
            return weight
        if type(weight) not in (Tensor, torch.nn.Parameter) or weight.device.type != "cpu":
            return _ops.pack_conv(weight, groups, plan=plan)
        key = (_ops.content_hash([weight]), tuple(weight.shape), weight.dtype, groups, plan)
        with self._lock:
            packed = self._entries.get(key)
            if packed is not None:
                self._entries.move_to_end(key)
                return packed
        packed = _ops.pack_conv(weight, groups, plan=plan)
        with self._lock:
            if key not in self._entries:
                self._entries[key] = packed
                self._bytes += packed.nbytes
            while self._bytes > self._most_bytes:
                _, oldest = self._entries.popitem(last=False)
                self._bytes -= oldest.nbytes
        return packed

    def drop(self) -> None:
        with self._lock:
            self._entries.clear()
            self._bytes = 0


kept_weights = KeptWeights(_MOST_BYTES)
