"""Who takes part in bench_engines: one module per engine, which only its own process imports.

A module defines `load(job) -> Loaded`; one that needs the net in a file also defines `convert(net,
job)`, which runs in another process beforehand. This file imports neither torch nor an engine.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLOAT32, BFLOAT16 = "float32", "bfloat16"
INPUT, OUTPUT = "images", "logits"  # names in converted files


@dataclass(frozen=True)
class Job:
    """What is to be run. folder has images.npy (N >= batch, 3, size, size) and converted files."""

    engine: str  # an entrant's key
    model: str
    dtype: str
    batch: int
    size: int
    threads: int
    folder: Path

    def images(self):
        """(batch, 3, size, size) float32 as a numpy array of its own."""
        import numpy

        images = numpy.load(self.folder / "images.npy", mmap_mode="r")
        return numpy.array(images[: self.batch])

    def file(self, ending: str) -> Path:
        """Where a converted net is, or is to be written."""
        return self.folder / f"{self.model}{ending}"


@dataclass(frozen=True)
class Loaded:
    """call() runs the whole batch; logits(what it returned): float32 (batch, classes) in numpy."""

    call: Callable[[], Any]
    logits: Callable[[Any], Any]
    settings: str  # what was chosen, for the record


@dataclass(frozen=True)
class Entrant:
    """An engine in the comparison, known as `key` to --only and as `title` in tables."""

    key: str
    title: str
    module: str  # absolute, or relative to this package
    packages: tuple[str, ...]  # distributions, the first one is the engine itself
    converts: tuple[str, ...] = ()  # further ones that converting takes; empty: needs no file
    dtypes: tuple[str, ...] = (FLOAT32, BFLOAT16)

    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.packages + self.converts if version(name) is None]


ENTRANTS = (
    Entrant("eager", "eager channels_last", ".torch_engines", ("torch",)),
    Entrant("compile", "torch.compile", ".torch_engines", ("torch",)),
    Entrant(
        "onnxruntime",
        "ONNX Runtime",
        ".onnxruntime",
        ("onnxruntime",),
        ("onnx", "onnxscript"),
        dtypes=(FLOAT32,),  # its CPU kernels have no bfloat16
    ),
    Entrant("openvino", "OpenVINO", ".openvino", ("openvino",), ("onnx", "onnxscript")),
    Entrant("ncnn", "ncnn", ".ncnn", ("ncnn",), ("pnnx",)),
    Entrant("mnn", "MNN", ".mnn", ("MNN",), ("onnx", "onnxscript")),
    Entrant("ours", "fused", ".torch_engines", ("torch",)),
)
BY_KEY = {entrant.key: entrant for entrant in ENTRANTS}
BY_TITLE = {entrant.title: entrant for entrant in ENTRANTS}


def version(package: str) -> str | None:
    """The version that is installed, None without one."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
