"""ONNX Runtime on its CPU provider, with every graph optimisation and the batch size fixed.

Its threads go on spinning for some 45 ms after a run. Forbidding that (allow_spinning 0) slows its
own runs, so it keeps its default and the others rest.
"""

from __future__ import annotations

import onnxruntime as ort

from . import INPUT, OUTPUT, Job, Loaded


def convert(net, job: Job) -> None:
    from . import onnx_file

    onnx_file.convert(net, job)


def load(job: Job) -> Loaded:
    options = ort.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_free_dimension_override_by_name("batch", job.batch)  # plans memory once
    path = str(job.file(".onnx"))
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {INPUT: job.images()}
    return Loaded(lambda: session.run([OUTPUT], feed)[0], lambda y: y, "ORT_ENABLE_ALL")
