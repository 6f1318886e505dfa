"""The net as an ONNX file with a free batch size, for the engines that read it."""

from __future__ import annotations

from torch import nn, onnx
from torch.export import Dim

from resnet_fused.measure.networks import random_images

from . import INPUT, OUTPUT, Job

BATCH = "batch"  # the free dimension's name


def convert(net: nn.Module, job: Job) -> None:
    path = job.file(".onnx")
    if path.exists():
        return
    onnx.export(
        net,
        (random_images(2, size=job.size),),
        path,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: Dim(BATCH)},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
