"""OpenVINO's CPU plugin under whichever of its two performance hints is faster here.

LATENCY runs the batch as one request on all threads; THROUGHPUT runs a part of it on each thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy
import openvino as ov

from . import BFLOAT16, Job, Loaded

TRIALS = 3


def convert(net, job: Job) -> None:
    from . import onnx_file

    onnx_file.convert(net, job)


def load(job: Job) -> Loaded:
    images = job.images()
    calls = {"LATENCY": _requests(job, images, "LATENCY", 1)}
    if job.threads > 1 and job.batch % job.threads == 0:
        calls["THROUGHPUT"] = _requests(job, images, "THROUGHPUT", job.threads)
    hint = min(calls, key=lambda hint: _seconds(calls[hint]))
    return Loaded(calls[hint], numpy.concatenate, f"{hint}, {_precision(job)}")


def _requests(job: Job, images, hint: str, parts: int) -> Callable[[], list]:
    """Runs `parts` equal parts of the batch side by side; returns their logits."""
    core = ov.Core()
    model = core.read_model(job.file(".onnx"))
    model.reshape([job.batch // parts, *images.shape[1:]])
    compiled = core.compile_model(
        model,
        "CPU",
        {
            "PERFORMANCE_HINT": hint,
            "PERFORMANCE_HINT_NUM_REQUESTS": parts,
            "NUM_STREAMS": parts,
            "INFERENCE_NUM_THREADS": job.threads,
            "INFERENCE_PRECISION_HINT": _precision(job),
        },
    )
    requests = []
    for part in numpy.split(images, parts):
        request = compiled.create_infer_request()
        request.set_input_tensor(ov.Tensor(numpy.ascontiguousarray(part)))
        requests.append(request)

    def call() -> list:
        if parts == 1:
            requests[0].infer()
        else:
            for request in requests:
                request.start_async()
            for request in requests:
                request.wait()
        return [request.get_output_tensor().data for request in requests]

    return call


def _precision(job: Job) -> str:
    return "bf16" if job.dtype == BFLOAT16 else "f32"


def _seconds(call: Callable[[], object]) -> float:
    """The fastest of a few runs after one for warming up."""
    call()
    best = float("inf")
    for _ in range(TRIALS):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best
