"""graph, as far as it can be seen without a GPU: when it replays, records again or steps aside.

The recording itself is a stand-in that runs the model; test_gpu_*.py have the real one.
"""

from __future__ import annotations

import copy
import importlib
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import randomize
from torch import nn

import resnet_fused as rf
from resnet_fused import guard

graph_module = importlib.import_module("resnet_fused.graph")

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

needs_guard = pytest.mark.skipif(guard.watch([]) is None, reason="_guard was not built")


class Stand:
    """In a Recording's place: the inputs have buffers of their own, a replay runs the model."""

    made = 0

    def __init__(self, run, inputs):
        type(self).made += 1
        self.run, self.inputs = run, [x.clone() for x in inputs]
        self.lock = threading.Lock()
        run(self.inputs)

    def replay(self, inputs):
        with self.lock:
            for ours, given in zip(self.inputs, inputs, strict=True):
                ours.copy_(given)
            return [y.clone() for y in self.run(self.inputs)]


@pytest.fixture
def recorded(monkeypatch):
    """As if the CPU could record graphs; counts the recordings."""
    monkeypatch.setattr(graph_module, "Recording", Stand)
    monkeypatch.setattr(graph_module, "_why_never", lambda model, inputs: None)
    Stand.made = 0
    return Stand


@pytest.fixture
def net():
    return rf.fuse(randomize(rf.models.resnet18(in_channels=3, block=rf.reference.Residual))).eval()


def test_on_the_cpu_it_runs_the_model_and_says_so(net):
    graphed = rf.graph(net, X)
    assert graphed.reason == "CUDA graphs need a GPU, the model is on cpu"
    with torch.no_grad():
        assert torch.equal(graphed(X), net(X))
    assert "eager: CUDA graphs need a GPU" in repr(graphed)


@needs_guard
def test_one_recording_serves_all_inputs_like_the_example(net, recorded):
    graphed = rf.graph(net, X)
    assert (graphed.reason, recorded.made) == (None, 1)
    with torch.no_grad():
        for seed in range(3):
            x = torch.randn(X.shape, generator=torch.Generator().manual_seed(seed))
            for like in (x, x.contiguous(memory_format=torch.channels_last), x.flip(3)):
                assert torch.equal(graphed(like), net(like))
                assert graphed.reason is None
    assert recorded.made == 1
    assert "replayed as a CUDA graph" in repr(graphed)


@needs_guard
def test_outputs_are_the_callers(net, recorded):
    graphed = rf.graph(net, X)
    with torch.no_grad():
        first = graphed(X)
        kept = first.clone()
        graphed(X + 1)
    assert torch.equal(first, kept)


@needs_guard
def test_several_threads_record_once_for_each_change(net, recorded):
    """While one thread records again, the others neither fail nor replay what no longer holds."""
    graphed = rf.graph(net, X)

    def work(_):
        with torch.no_grad():
            return [graphed(X) for _ in range(5)]

    for change in range(3):
        with torch.no_grad():
            next(net.parameters()).mul_(1.1)
            want = net(X)
        with ThreadPoolExecutor(4) as pool:
            results = [y for found in pool.map(work, range(4)) for y in found]
        assert all(torch.equal(y, want) for y in results)
        assert (graphed.reason, recorded.made) == (None, 2 + change)


OTHERS = {
    "shape": (lambda x: x[:1], r"the input is float32 \(1, 3, 32, 32\) on cpu, not float32 \(2, "),
    "subclass": (lambda x: x.as_subclass(type("Sub", (torch.Tensor,), {})), "the input is a Sub"),
}


@needs_guard
@pytest.mark.parametrize(("change", "reason"), OTHERS.values(), ids=OTHERS)
def test_other_inputs_run_the_model(net, recorded, change, reason):
    graphed = rf.graph(net, X)
    with torch.no_grad():
        other = change(X)
        want = net(other)
        assert torch.equal(graphed(other).as_subclass(torch.Tensor), want.as_subclass(torch.Tensor))
        assert re.match(reason, graphed.reason)
        graphed(X)
    assert (graphed.reason, recorded.made) == (None, 1)


@needs_guard
def test_more_arguments_run_the_model(recorded):
    class Two(nn.Module):
        def forward(self, x, y=None, *, scale=1.0):
            return {"sum": x if y is None else x + y, "scaled": [x * scale]}

    graphed = rf.graph(Two().eval(), {"x": X, "y": X, "scale": 2.0})
    assert graphed.reason is None
    result = graphed(x=X, y=X, scale=2.0)
    assert torch.equal(result["sum"], 2 * X)
    assert torch.equal(result["scaled"][0], 2 * X)
    assert graphed.reason is None
    for arguments, keywords, reason in (
        ((X,), {}, "the arguments are other than the example's"),
        ((), {"x": X, "y": X, "scale": 3.0}, "an argument is 3.0, not 2.0"),
        ((), {"x": X, "y": X, "scale": X}, "an argument is "),
    ):
        graphed(*arguments, **keywords)
        assert graphed.reason.startswith(reason)
    assert recorded.made == 1


@needs_guard
def test_gradients_and_training_run_the_model(net, recorded):
    graphed = rf.graph(net, X)
    y = graphed(X)  # gradients are on, and the parameters need them
    assert graphed.reason == "gradients are asked for"
    y.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    with torch.no_grad():
        graphed(X)
        assert graphed.reason is None
        graphed.train()
        graphed(X)
        assert graphed.reason == "the model is in training mode"
        graphed.eval()
        graphed(X)
    assert graphed.reason is None
    for p in net.parameters():
        p.requires_grad_(False)
    graphed(X)
    assert graphed.reason is None
    graphed(X.clone().requires_grad_())
    assert graphed.reason == "gradients are asked for"


def first_block(net):
    return next(m for m in net.modules() if isinstance(m, rf.FusedResidual))


def _scale_weights(net):
    with torch.no_grad():
        first_block(net).conv1.weight.mul_(2)


def _replace_weights(net):
    conv = first_block(net).conv2
    conv.weight = nn.Parameter(conv.weight.detach() * 3)


def _move_weights(net):
    weight = first_block(net).conv1.weight
    weight.data = weight.data * 0.5


def _other_eps(net):
    first_block(net).bn1.eps = 0.1


def _other_classifier(net):
    *_, (name, linear) = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear)]
    setattr(net, name, nn.Linear(linear.in_features, 7).eval())


def _load(net):
    net.load_state_dict({k: v * 1.5 for k, v in net.state_dict().items()})


CHANGES = [_scale_weights, _replace_weights, _move_weights, _other_eps, _other_classifier, _load]


@needs_guard
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__.strip("_"))
def test_a_changed_model_is_recorded_again(net, recorded, change):
    graphed = rf.graph(net, X)
    with torch.no_grad():
        before = graphed(X)
    change(net)
    with torch.no_grad():
        after = graphed(X)
        assert (graphed.reason, recorded.made) == (None, 2)
        assert torch.equal(after, net(X))
        assert before.shape != after.shape or not torch.equal(before, after)
        graphed(X)
    assert recorded.made == 2


@needs_guard
def test_hooks_run_the_model(net, recorded):
    graphed = rf.graph(net, X)
    seen = []
    handle = net.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        graphed(X)
        assert seen == [1]
        assert graphed.reason == "it cannot be recorded: the model has hooks"
        handle.remove()
        graphed(X)
    assert (graphed.reason, seen) == (None, [1])


@needs_guard
def test_autocast_is_recorded_anew(net, recorded):
    graphed = rf.graph(net, X)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        graphed(X)
    assert (graphed.reason, recorded.made) == (None, 2)


@needs_guard
def test_what_cannot_be_recorded_is_not_tried_again_and_again(recorded, monkeypatch):
    class Refuses(Stand):
        def __init__(self, run, inputs):
            type(self).made += 1
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    Refuses.made = 0
    monkeypatch.setattr(graph_module, "Recording", Refuses)
    model = nn.Conv2d(3, 4, 1).eval()
    graphed = rf.graph(model, X)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(graphed(X), model(X))
            assert graphed.reason == (
                "it cannot be recorded: operation not permitted when stream is capturing"
            )
        assert Refuses.made == 1
        model.weight = nn.Parameter(model.weight.detach().clone())
        graphed(X)
    assert Refuses.made == 2


@needs_guard
def test_an_exception_without_text_is_a_reason_too(recorded):
    class Raises(nn.Conv2d):
        def forward(self, x):
            raise RuntimeError

    graphed = rf.graph(Raises(3, 4, 1).eval(), X)
    assert graphed.reason == "it cannot be recorded: RuntimeError"


@needs_guard
def test_outputs_that_are_no_tensors_run_the_model(recorded):
    class Counts(nn.Module):
        def forward(self, x):
            return x, 3

    graphed = rf.graph(Counts().eval(), X)
    assert graphed.reason == "it cannot be recorded: the model's output must be tensors"
    assert graphed(X)[1] == 3


@needs_guard
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_record_for_themselves(net, recorded, copied):
    graphed = rf.graph(net, X)
    other = copied(graphed)
    with torch.no_grad():
        assert torch.equal(other(X), graphed(X))
    assert (other.reason, recorded.made) == (None, 2)
    assert list(graphed.state_dict()) == [f"model.{key}" for key in net.state_dict()]


@needs_guard
def test_in_inference_mode(net, recorded):
    with torch.inference_mode():
        graphed = rf.graph(net, X)
        inside = graphed(X)
        assert inside.is_inference()
    with torch.no_grad():
        outside = graphed(X)
    assert not outside.is_inference()
    assert torch.equal(inside, outside)
    assert recorded.made == 1


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"graph: model must be a torch.nn.Module, got int"):
        rf.graph(3, X)
    with pytest.raises(TypeError, match="graph: example must be a tensor, a tuple of"):
        rf.graph(nn.Identity(), 3)
