"""Memory of a GPU that is read by streams other than the one it was allocated on.

The caching allocator gives freed memory to work that comes later on the allocating stream. What is
still queued on another stream may read it then, unless the allocator was told of that stream.
Packed weights need that: the first caller allocates them, callers on any stream read them, and they
are freed when they are packed again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Readers:
    """The streams that read some tensors of one GPU; tensors elsewhere are left out.

    The allocator is told once of each: it looks at what is queued there when the memory is freed.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = [t for t in tensors if t.is_cuda]
        self._device = self.tensors[0].device.index if self.tensors else None
        self._known: set[int] = set()

    def add_current(self) -> None:
        """To be called before the current stream gets work that reads the tensors."""
        if self._device is None or _current(self._device) in self._known:
            return
        stream = torch.cuda.current_stream(self._device)
        for tensor in self.tensors:
            tensor.record_stream(stream)  # nothing, if it was allocated there
        self._known.add(stream.cuda_stream)


def _current(device: int) -> int:
    """The handle of the current stream, in a tenth of the time of torch.cuda.current_stream()."""
    return torch._C._cuda_getCurrentRawStream(device)
