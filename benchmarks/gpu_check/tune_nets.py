"""Tunes whole nets on the GPU: python -m benchmarks.gpu_check.tune_nets resnet18-bfloat16-128 ...

Answers go where RESNET_FUSED_TUNE_FILE says. A case is a net, a dtype and a number of images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

import resnet_fused as rf
from resnet_fused.measure.networks import plain_net, random_images
from resnet_fused.tune import Tuning

SECONDS = 0.1  # timed, per convolution


def tune(case: str, device: str = "cuda", *, size: int = 224, seconds: float = SECONDS) -> Tuning:
    """The measured answers for one case, which are kept in the file, too."""
    name, dtype, batch = case.split("-")
    net = plain_net(name).to(getattr(torch, dtype)).to(device, memory_format=torch.channels_last)
    x = random_images(int(batch), size=size).to(getattr(torch, dtype)).to(device)
    with torch.inference_mode():
        return rf.tune(rf.fuse(net), x.to(memory_format=torch.channels_last), seconds=seconds)


def main(cases: Sequence[str]) -> None:
    for case in cases:
        print(case)
        print(tune(case))


if __name__ == "__main__":
    main(sys.argv[1:])
