"""Runs convolutions whose operands end where readable memory ends; a program, run by test_ops_conv.

Every operand, the packed weights among them, lies flush against a page that may not be touched,
once behind it and once before it, so that a vector that is loaded for a few lanes too many ends the
process.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
import torch.nn.functional as F
from conftest import (
    ISAS,
    KERNEL_DTYPES,
    Case,
    assert_whole,
    exact,
    integers,
    use_isa,
)

import resnet_fused as rf

_ops = torch.ops.resnet_fused
_PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(t: torch.Tensor, at_end: bool) -> torch.Tensor:
    """A copy of a dense tensor that ends (or begins) at the edge of readable memory."""
    size = t.numel() * t.element_size()
    pages = -(-size // _PAGE)
    memory = mmap.mmap(-1, (pages + 2) * _PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for guard in (base, base + (pages + 1) * _PAGE):
        if _libc.mprotect(ctypes.c_void_p(guard), _PAGE, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    start = (pages + 1) * _PAGE - size if at_end else _PAGE
    flat = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=start)
    order = sorted(range(t.dim()), key=t.stride, reverse=True)
    copy = flat.view([t.shape[d] for d in order]).permute([order.index(d) for d in range(t.dim())])
    return copy.copy_(t)


def channels_last(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last)


CASES = [
    *(
        Case(1, c, 5, 6, k, (3, 3), stride=(s, s), padding=(1, 1))
        for c, k in ((1, 1), (3, 5), (17, 33), (15, 31), (33, 16))
        for s in (1, 2)
    ),
    Case(1, 34, 13, 12, 17, (3, 3)),
    Case(1, 34, 18, 19, 17, (3, 3), stride=(2, 2)),
    *(Case(2, c, 3, 4, k, (1, 1)) for c, k in ((1, 3), (7, 9), (16, 17), (33, 50), (513, 2))),
    Case(1, 3, 9, 9, 20, (7, 7), stride=(2, 2), padding=(3, 3)),
    *(Case(1, 3, h, h + 3, 17, (7, 5), stride=(2, 1), padding=(3, 1)) for h in (6, 13)),
    Case(1, 5, 6, 7, 3, (2, 2)),
    Case(1, 5, 9, 8, 3, (3, 3), stride=(2, 3), dilation=(2, 1)),
    Case(1, 15, 5, 5, 6, (3, 3), padding=(1, 1), groups=3),
    Case(1, 6, 5, 5, 6, (3, 3), padding=(1, 1), groups=6),
]


def main() -> None:
    torch.set_num_threads(1)
    count = 0
    for isa in ISAS:
        use_isa(isa)
        for case in CASES:
            whole = integers(case)
            want = exact(whole, case)
            for dtype in KERNEL_DTYPES:
                o = whole.to(dtype)
                o.x, o.residual = channels_last(o.x), channels_last(o.residual)
                for at_end in (True, False):
                    x, weight, scale, shift, residual = operands = [
                        guarded(t, at_end) for t in o.args()
                    ]
                    for plan in case.plans(dtype):
                        if plan == "torch":  # PyTorch's convolution is not what is tested here
                            first = (o.x, rf.ops.pack_conv(o.weight, case.groups, plan=plan))
                        else:
                            packed = rf.ops.pack_conv(weight, case.groups, plan=plan)
                            first = (x, guarded(packed, at_end))
                        keywords = case.keywords | {"kernel_size": case.kernel, "plan": plan}
                        got = _ops.conv_bn_act_packed(*first, scale, shift, residual, **keywords)
                        assert_whole(got, want, plan, case)
                        count += 1
                    for plan in case.plans(dtype):
                        if plan == "torch":
                            continue
                        packed = rf.ops.pack_conv(weight, case.groups, plan=plan)
                        pooled = _ops.conv_bn_act_packed(
                            *(operands[0], guarded(packed, at_end), *operands[2:]),
                            **case.keywords,
                            kernel_size=case.kernel,
                            plan=plan,
                            pool=True,
                        )
                        assert_whole(pooled, F.max_pool2d(want, 3, 2, 1), plan, case)
                        count += 1
                    rf.ops.add_relu(residual, guarded(o.residual, at_end))
                    rf.ops.add_relu(residual.flatten(1), o.residual.flatten(1))
                    _ops.content_hash(operands)
                    sample = _ops.content_sample(operands)
                    assert _ops.content_equal(operands, sample)
    print(f"{count} convolutions, nothing touched beyond their operands")


if __name__ == "__main__":
    main()
