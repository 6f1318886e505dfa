"""ncnn, converted by pnnx: Winograd on, one image after the other, as its API has no batches.

In float32 the file keeps float32 weights; pnnx's default, 16-bit ones, makes logits 1000 times less
exact and no run faster. In bfloat16 values are stored in 16 bits and multiplied in float32.
"""

from __future__ import annotations

import subprocess

import ncnn
import numpy

from . import BFLOAT16, Job, Loaded


def convert(net, job: Job) -> None:
    import pnnx
    import torch

    from resnet_fused.measure.networks import random_images

    traced = job.file(".pt")
    torch.jit.trace(net, random_images(1, size=job.size)).save(traced)
    shape = f"inputshape=[1,3,{job.size},{job.size}]"
    # pnnx.export() would import a Python file that names modules by number, and fail
    subprocess.run([pnnx.EXEC_PATH, traced, shape, "fp16=0"], check=True)


def load(job: Job) -> Loaded:
    narrow = job.dtype == BFLOAT16
    net = ncnn.Net()
    net.opt.num_threads = job.threads
    net.opt.use_winograd_convolution = True
    net.opt.use_sgemm_convolution = True
    net.opt.use_packing_layout = True
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = net.opt.use_bf16_packed = narrow
    for read, ending in ((net.load_param, ".ncnn.param"), (net.load_model, ".ncnn.bin")):
        if read(str(job.file(ending))):
            raise RuntimeError(f"cannot read {job.file(ending).name}")
    inputs = [ncnn.Mat(image).clone() for image in job.images()]  # else they point into the array

    def one(image: ncnn.Mat) -> numpy.ndarray:
        extractor = net.create_extractor()
        extractor.input("in0", image)
        return numpy.array(extractor.extract("out0")[1])

    settings = "Winograd, bf16 storage" if narrow else "Winograd, float32 weights"
    return Loaded(lambda: [one(image) for image in inputs], numpy.stack, settings)
