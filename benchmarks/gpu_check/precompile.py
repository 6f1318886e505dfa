"""Compiles what tune will measure: python -m benchmarks.gpu_check.precompile resnet18-bfloat16-1

tune compiles one configuration after another, each for about a second. Triton keeps on disk what it
compiled, so processes side by side save most of that. What fails here is left to tune, which tells.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence

import torch

import resnet_fused as rf
from resnet_fused import select
from resnet_fused._fused import FusedModule
from resnet_fused.measure import candidates
from resnet_fused.measure.candidates import ConvCall
from resnet_fused.measure.networks import plain_net, random_images
from resnet_fused.tune import _configured, _convolutions

MOST_PROCESSES = 8


def configured(case: str, device: str, size: int = 224) -> Iterator[tuple[ConvCall, str]]:
    """Every convolution of a net with each candidate of it that has a configuration."""
    model, dtype, batch = case.split("-")
    fused = rf.fuse(plain_net(model).to(device, getattr(torch, dtype)))
    x = random_images(int(batch), size=size).to(device, getattr(torch, dtype))
    modules = [m for m in fused.modules() if isinstance(m, FusedModule)]
    for found in _convolutions(fused, x, modules):
        for plan in select.candidates(found.call.shape):
            for name in _configured(plan, found.call):
                yield found.call, name


def run_share(
    cases: Sequence[str], share: int, shares: int, device: str = "cuda", size: int = 224
) -> int:
    """Runs one of `shares` parts of the candidates once; how many that were."""
    done = 0
    todo = itertools.chain.from_iterable(configured(case, device, size) for case in cases)
    with torch.inference_mode():
        for call, name in itertools.islice(todo, share, None, shares):
            try:
                o = candidates._operands(call)
                candidates._run(call, o, name, candidates._pack(call, o, name))
            except RuntimeError as error:
                print(f"{name} on {call.shape}: {str(error).splitlines()[0]}", flush=True)
            done += 1
    return done


def main(cases: Sequence[str]) -> None:
    shares = min(os.cpu_count() or 1, MOST_PROCESSES)
    # Spawned: a process that was forked cannot use the GPU.
    with multiprocessing.get_context("spawn").Pool(shares) as pool:
        done = pool.starmap(run_share, [(cases, i, shares) for i in range(shares)])
    print(f"{sum(done)} candidates, compiled by {shares} processes")


if __name__ == "__main__":
    main(sys.argv[1:])
