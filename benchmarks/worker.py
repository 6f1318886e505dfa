"""One engine in a process of its own, run on request: python -m benchmarks.worker MODULE FD

So no engine's threads or OpenMP runtime are in another one's process, and an engine that crashes
takes nothing with it. FD is one end of a socket pair. The other end (`remote.py`) sends

    ("convert", job)  the net is written to a file      -> (True, None)
    ("load", job)     the engine is made and runs once  -> (True, (logits, settings))
    ("time", calls)   that many calls in a row          -> (True, seconds per call)

and gets (False, reason) where one fails. The process ends with the connection.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import ModuleType

from . import peers


def convert(engine: ModuleType, job: peers.Job) -> None:
    from resnet_fused.measure.networks import plain_net  # with torch, which engines are kept from

    engine.convert(plain_net(job.model), job)


def seconds(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def serve(connection: Connection, module: str) -> None:
    loaded = None
    while True:
        try:
            verb, argument = connection.recv()
        except EOFError:
            return
        try:
            engine = importlib.import_module(module, peers.__name__)
            if verb == "convert":
                answer = convert(engine, argument)
            elif verb == "load":
                loaded = engine.load(argument)
                answer = loaded.logits(loaded.call()), loaded.settings
            else:
                answer = seconds(loaded.call, argument)
        except Exception as error:  # whatever an engine may raise is the reason that is shown
            connection.send((False, f"{type(error).__name__}: {error}"))
        else:
            connection.send((True, answer))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[2])), sys.argv[1])
