"""ONNX Runtime on its CPU provider, with every graph optimisation and the batch size fixed.

Its threads would go on spinning for some 45 ms after a run; force_spinning_stop ends that without
slowing its own runs (17.6 ms against 18.3, ResNet-18, two threads).
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
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_free_dimension_override_by_name("batch", job.batch)  # plans memory once
    path = str(job.file(".onnx"))
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {INPUT: job.images()}
    return Loaded(lambda: session.run([OUTPUT], feed)[0], lambda y: y, "ORT_ENABLE_ALL")
