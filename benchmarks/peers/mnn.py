"""MNN's module interface on its CPU backend, which picks Winograd by itself.

Its interpreter interface was 20% slower at batch 32. Precision low asks for 16 bits; the package on
PyPI computes float32 all the same on x86, as the error shows.
"""

from __future__ import annotations

import MNN.expr
import MNN.nn

from . import BFLOAT16, INPUT, OUTPUT, Job, Loaded


def convert(net, job: Job) -> None:
    # The command mnnconvert, and MNN.tools, would install and call a logger that reports its use.
    import _tools

    from . import onnx_file

    onnx_file.convert(net, job)
    files = ["--modelFile", str(job.file(".onnx")), "--MNNModel", str(job.file(".mnn"))]
    _tools.mnnconvert(["mnnconvert", "-f", "ONNX", *files, "--bizCode", "benchmark"])


def load(job: Job) -> Loaded:
    precision = "low" if job.dtype == BFLOAT16 else "high"
    config = {
        "backend": "CPU",
        "numThread": job.threads,
        "precision": precision,
        "memory": "normal",
        "power": "high",
    }
    net = MNN.nn.load_module_from_file(
        str(job.file(".mnn")),
        [INPUT],
        [OUTPUT],
        runtime_manager=MNN.nn.create_runtime_manager((config,)),
        shape_mutable=False,
    )
    images = job.images()
    x = MNN.expr.placeholder(list(images.shape), MNN.expr.NCHW)
    x.write(images)
    # read() fetches the logits: forward() alone may leave work undone
    return Loaded(lambda: net.forward(x).read(), lambda y: y, f"precision {precision}")
