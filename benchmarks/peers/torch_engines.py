"""PyTorch itself and this package: the engines of `resnet-fused bench`, in a process of their own.

In bfloat16 weights and images are cast, as `model.bfloat16()` does.
"""

from __future__ import annotations

import torch

from resnet_fused import select
from resnet_fused.measure import engines
from resnet_fused.measure.networks import plain_net

from . import Job, Loaded

ENGINES = {
    "eager": (engines.CHANNELS_LAST, "channels_last"),
    "compile": (engines.COMPILE, "channels_last, freezing, fullgraph"),
    "ours": (engines.FUSED, "channels_last"),
}


def load(job: Job) -> Loaded:
    torch.set_num_threads(job.threads)
    name, settings = ENGINES[job.engine]
    dtype = getattr(torch, job.dtype)
    net = plain_net(job.model).to(dtype)
    runner = engines.engines()[name](net, torch.from_numpy(job.images()).to(dtype))
    if job.engine == "ours" and select.force() != "none":
        settings += f", selection forced to {select.force()}"
    return Loaded(runner.run, lambda y: y.float().numpy(), settings)
