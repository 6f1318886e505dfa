"""Packed weights of the ops that are given plain ones: kept by content, within a limit."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import assert_same, needs_extension

import resnet_fused as rf
from resnet_fused.ops import _kept
from resnet_fused.ops._kept import KeptWeights, kept_weights

pytestmark = pytest.mark.usefixtures("one_thread")

_ops = torch.ops.resnet_fused
X = torch.randn(1, 8, 12, 12, generator=torch.Generator().manual_seed(1))


def weights(seed=0, channels=8):
    return torch.randn(channels, 8, 3, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def packed(monkeypatch):
    """The weights that were packed."""
    kept_weights.drop()
    seen = []
    real = _kept._ops

    class Counted:
        content_hash = real.content_hash

        @staticmethod
        def pack_conv(weight, groups, plan):
            seen.append(weight)
            return real.pack_conv(weight, groups, plan=plan)

    monkeypatch.setattr(_kept, "_ops", Counted)
    yield seen
    kept_weights.drop()


def conv(weight, x=X, **keywords):
    channels = weight.shape[0]
    return rf.ops.conv_bn_act(
        x, weight, torch.ones(channels), torch.zeros(channels), padding=1, act="none", **keywords
    )


def assert_right(y, weight):
    want = torch.nn.functional.conv2d(X.double(), weight.double(), padding=1)
    assert (y.double() - want).norm() <= 3e-6 * want.norm()


def test_the_same_weights_are_packed_once(packed):
    weight = weights()
    first = conv(weight)
    assert_same(conv(weight), first)
    assert_same(conv(weight.clone()), first)
    assert_same(conv(weight.to(memory_format=torch.channels_last)), first)
    assert len(packed) == 1
    assert_right(first, weight)


def test_an_edited_value_is_noticed_wherever_it_is(packed):
    weight = weights()
    for turn, place in enumerate([(0, 0, 0, 0), (3, 5, 1, 2), (7, 7, 2, 2)]):
        weight.data[place] += 1
        assert_right(conv(weight), weight)
        assert len(packed) == turn + 1


def test_weights_of_other_shapes_groups_and_types_are_others(packed):
    values = torch.zeros(8 * 8 * 9)
    for shape, groups in (((8, 8, 3, 3), 1), ((64, 1, 3, 3), 8), ((24, 8, 3, 1), 1)):
        conv(values.view(shape), groups=groups) if groups == 1 else conv(
            values.view(shape), groups=8
        )
    conv(torch.zeros(8, 8, 3, 3, dtype=torch.bfloat16), X.bfloat16())
    assert len(packed) == 4


@needs_extension
def test_groups_have_layouts_of_their_own(packed):
    weight, wide = weights(channels=64), torch.cat([X, X], dim=1)
    with rf.select.forced("direct"):
        assert_right(conv(weight), weight)
        got = conv(weight, wide, groups=2)
    want = torch.nn.functional.conv2d(wide, weight, padding=1, groups=2)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert len(packed) == 2


@needs_extension
def test_plans_have_layouts_of_their_own(packed):
    weight = weights()
    for plan in ("direct", "torch", "direct"):
        with rf.select.forced(plan):
            assert_right(conv(weight), weight)
    assert len(packed) == 2


def test_no_more_is_kept_than_the_limit(packed):
    size = _ops.pack_conv(weights(), 1, plan="torch").nbytes
    kept = KeptWeights(3 * size)
    for seed in (0, 1, 2, 0, 3, 0, 1):  # 1 is the oldest when 3 comes
        kept.pack(weights(seed), 1, "torch")
    assert [int(w.sum() * 1e4) for w in packed] == [
        int(weights(seed).sum() * 1e4) for seed in (0, 1, 2, 3, 1)
    ]
    assert kept._bytes == 3 * size
    assert len(kept._entries) == 3


def test_larger_than_the_limit_is_packed_and_not_kept(packed):
    kept = KeptWeights(100)
    assert kept.pack(weights(), 1, "torch").shape == (8, 8, 3, 3)
    assert kept._bytes == 0
    assert not kept._entries


def test_refresh_drops_them(packed):
    conv(weights())
    rf.refresh(torch.nn.Identity())
    conv(weights())
    assert len(packed) == 2


def test_writes_to_the_weights_do_not_reach_what_is_kept(packed):
    weight = weights()
    kept = kept_weights.pack(weight, 1, "torch")
    before = kept.clone()
    weight.zero_()
    assert_same(kept, before)


def test_threads(packed):
    wrong = []

    def work(seed):
        for turn in range(20):
            weight = weights((seed + turn) % 5)
            want = torch.nn.functional.conv2d(X, weight, padding=1)
            if not torch.allclose(conv(weight), want, atol=1e-4):
                wrong.append((seed, turn))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- in graphs -----------------------------------------------------------------------------------


def test_a_compiled_net_packs_once_and_notices_edits(packed):
    torch._dynamo.reset()
    fused = rf.fuse(torch.nn.Sequential(rf.reference.Residual(8, 8))).eval()
    compiled = torch.compile(fused, fullgraph=True, backend="eager")
    with torch.no_grad():
        for _ in range(3):
            assert_same(compiled(X), fused(X))
        assert len(packed) == 2
        fused[0].conv1.weight.mul_(2)
        assert_same(compiled(X), fused(X))
        fused[0].conv2.weight.data[0, 0, 0, 0] += 1
        rf.refresh(fused)  # for the eager one, which looks at samples
        assert_same(compiled(X), fused(X))


def test_frozen_graphs_hold_packed_weights():
    import torch._inductor.config as config

    torch._dynamo.reset()
    fused = rf.fuse(torch.nn.Sequential(rf.reference.Residual(8, 8))).eval()
    targets = []

    def backend(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad(), config.patch(freezing=True):
        torch.compile(fused, fullgraph=True, backend=backend)(X)
    assert sum("pack_conv" in target for target in targets) == 2
    assert not any("conv_bn_act_kept" in target for target in targets)


@needs_extension
def test_graphs_keep_to_exact_kernels_where_asked():
    torch._dynamo.reset()
    net = torch.nn.Sequential(rf.reference.Residual(8, 8)).eval()
    fused = rf.fuse(net, exact_nonfinite=True)
    plans = []

    def backend(graph, inputs):
        plans.extend(node.kwargs["plan"] for node in graph.graph.nodes if "plan" in node.kwargs)
        return graph.forward

    with torch.no_grad():
        torch.compile(fused, fullgraph=True, backend=backend)(X)
    assert plans == ["direct"] * 2


def test_kept_is_forward_only():
    weight = weights().requires_grad_()
    with pytest.raises(RuntimeError, match="conv_bn_act_kept: is forward only"):
        _ops.conv_bn_act_kept(X, weight, torch.ones(8), torch.zeros(8), plan="torch")


@pytest.mark.parametrize("plan", ["torch", "direct", "winograd4"])
@pytest.mark.parametrize("pool", [False, True])
def test_kept_is_a_good_op(plan, pool):
    if plan not in rf.select.candidates(
        rf.select.ConvShape("cpu", torch.float32, 8, 8, (3, 3), (12, 12))
    ):
        pytest.skip("no kernel of ours")
    args = (X, weights(), torch.rand(8), torch.rand(8))
    keywords = {"padding": (1, 1), "plan": plan, "pool": pool}
    torch.library.opcheck(_ops.conv_bn_act_kept, args, keywords)


def test_kept_refuses_what_does_not_fit():
    args = (X, weights(), torch.ones(8), torch.zeros(8))
    for keywords, sentence in (
        ({"plan": "fast"}, 'conv_bn_act_kept: plan must be "direct" or '),
        ({"plan": "torch", "stride": (0, 1)}, "conv_bn_act_kept: stride must be at least 1, got"),
    ):
        with pytest.raises(RuntimeError) as caught:
            _ops.conv_bn_act_kept(*args, **keywords)
        assert str(caught.value).startswith(sentence)
