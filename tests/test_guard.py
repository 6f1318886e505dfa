"""Guards: every kind of fact notices its change, and nothing is leaked."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch

from resnet_fused import guard

_guard = pytest.importorskip("resnet_fused._guard", reason="compiled with Python's headers only")


class Plain:
    pass


class Slotted:
    kind = "class attribute"


def test_all_facts_hold_until_one_does_not():
    first, second = {"a": 1}, {"b": []}
    holds = guard.watch([guard.item_equals(first, "a", 1), guard.item_length(second, "b", 0)])
    assert holds() is True
    second["b"].append(None)
    assert holds() is False
    second["b"].clear()
    assert holds() is True
    first["a"] = 2
    assert holds() is False


def test_no_facts_hold():
    assert guard.watch([])() is True


def test_item_is():
    value = (1, 2)
    owner = {"key": value}
    holds = guard.watch([guard.item_is(owner, "key", value)])
    assert holds()
    owner["key"] = tuple(iter(value))  # equal, not the same
    assert not holds()
    del owner["key"]
    assert not holds()
    owner["key"] = value
    assert holds()


def test_item_is_none_is_not_a_missing_item():
    owner = {"key": None}
    holds = guard.watch([guard.item_is(owner, "key", None)])
    assert holds()
    del owner["key"]
    assert not holds()


def test_item_equals():
    owner = {"key": (1, 2)}
    holds = guard.watch([guard.item_equals(owner, "key", (1, 2))])
    assert holds()
    owner["key"] = tuple(range(1, 3))
    assert holds()
    owner["key"] = (1, 3)
    assert not holds()


def test_absent():
    owner = {}
    holds = guard.watch([guard.absent(owner, "key")])
    assert holds()
    owner["key"] = None
    assert not holds()


@pytest.mark.parametrize("value", [{}, [], torch.nn.Linear(1, 1)._forward_hooks])
def test_item_length(value):
    owner = {"key": value}
    holds = guard.watch([guard.item_length(owner, "key", 0)])
    assert holds()
    owner["key"] = {1: 2}
    assert not holds()
    owner["key"] = None  # has no length
    assert not holds()


def test_attribute_of_the_instance_and_of_its_class():
    value = Slotted()
    holds = guard.watch([guard.attribute(value, "kind")])
    assert holds()
    value.kind = "class attribute"  # now the instance's own, which must not go unnoticed
    assert not holds()
    holds = guard.watch([guard.attribute(value, "kind")])
    assert holds()
    value.kind = "another"
    assert not holds()


def test_type_is():
    value = Plain()
    holds = guard.watch([guard.type_is(value, Plain)])
    assert holds()
    value.__class__ = type("Other", (Plain,), {})
    assert not holds()


@pytest.mark.parametrize("make", [torch.zeros, lambda n: torch.nn.Parameter(torch.zeros(n))])
def test_version_is(make):
    tensor = make(3)
    holds = guard.watch([guard.version_is(tensor, tensor._version)])
    assert holds()
    with torch.no_grad():
        tensor.add_(1)
    assert not holds()


def test_returns():
    holds = guard.watch([guard.returns(torch.is_grad_enabled, True)])
    assert holds()
    with torch.no_grad():
        assert not holds()
    assert holds()


def test_what_raises_has_changed():
    def refuse():
        raise RuntimeError("refused")

    class Incomparable:
        def __eq__(self, other):
            raise RuntimeError("refused")

    assert not guard.watch([guard.returns(refuse, None)])()
    assert not guard.watch([guard.item_equals({"key": Incomparable()}, "key", 1)])()
    inference = torch.inference_mode()(torch.zeros)(1)
    assert not guard.watch([guard.version_is(inference, 0)])()


@pytest.mark.parametrize(
    ("facts", "error", "sentence"),
    [
        (5, TypeError, "'int' object is not iterable"),
        ([5], TypeError, "Guard: facts must be tuples of (kind, object, key, expected)"),
        (
            [(0, {}, "key")],
            TypeError,
            "Guard: facts must be tuples of (kind, object, key, expected)",
        ),
        ([(8, {}, "", 0)], ValueError, "Guard: kind must be at least 0 and below 8, got 8"),
        ([(-1, {}, "", 0)], ValueError, "Guard: kind must be at least 0 and below 8, got -1"),
        ([("0", {}, "", 0)], TypeError, "'str' object cannot be interpreted as an integer"),
        ([(0, [], 0, 0)], TypeError, "Guard: object must be a dict for facts about an item"),
        ([(3, {}, "", "0")], TypeError, "Guard: expected must be an int for a length"),
        ([(7, {}, "", 0)], TypeError, "Guard: object must be a Snapshot for facts about tensors"),
    ],
)
def test_refuses_what_is_no_fact(facts, error, sentence):
    with pytest.raises(error) as caught:
        _guard.Guard(facts)
    assert str(caught.value) == sentence


def test_unhashable_keys_have_changed():
    assert not _guard.Guard([(0, {}, [], 0)])()


def test_of_facts_about_one_place_the_last_counts():
    owner = {"key": 2}
    assert guard.watch([guard.item_equals(owner, "key", 1), guard.item_equals(owner, "key", 2)])()


# ---- snapshots -----------------------------------------------------------------------------------


def replaced(tensor, other):
    tensor.data = other


CHANGES = {
    "a value": lambda t: t.data.view(-1)[:1].add_(1),
    "all values": lambda t: t.data.fill_(2),
    "sign of zero": lambda t: t.data.zero_().neg_(),
    "through numpy": lambda t: t.detach().numpy().__iadd__(1),
    "address": lambda t: replaced(t, t.data.clone()),
    "shape": lambda t: replaced(t, t.data.flatten()[:3]),
    "strides": lambda t: replaced(t, t.data.as_strided(t.shape, (0,) * t.dim())),
    "dtype": lambda t: replaced(t, t.data.double()),
}


@pytest.mark.parametrize("shape", [(5,), (8, 8), (8, 4, 3, 3), (40, 16, 3, 3)], ids=str)
@pytest.mark.parametrize("make", [torch.zeros, lambda s: torch.nn.Parameter(torch.zeros(s))])
@pytest.mark.parametrize("name", CHANGES)
def test_snapshot_notices(name, make, shape):
    first, tensor = torch.ones(3), make(shape)
    taken = guard.snapshot([first, tensor])
    holds = guard.watch([guard.lies(taken)])
    assert taken() is True
    assert holds() is True
    CHANGES[name](tensor)
    assert taken() is False
    assert holds() is False
    assert guard.snapshot([first])() is True


def test_snapshot_takes_every_tensor_there_is():
    whole = torch.arange(24.0).view(2, 3, 4)
    tensors = [torch.tensor(1.0), torch.empty(0, 3), whole[..., ::2], whole.mT, whole.bfloat16()]
    tensors += [torch.arange(6.0)[::2], torch.inference_mode()(torch.ones)(3)]
    assert guard.snapshot(tensors)()
    assert guard.snapshot([])()
    assert guard.snapshot([whole, torch.empty(2, device="meta")]) is None
    assert guard.snapshot([whole.to_sparse()]) is None


def test_snapshot_sees_nan_as_itself():
    assert guard.snapshot([torch.full((4, 4), float("nan"))])()


def test_snapshot_lets_tensors_be_swapped():
    tensor, other = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.ones(4))
    taken = guard.snapshot([tensor])
    torch.utils.swap_tensors(tensor, other)
    del other
    assert not taken()


def test_snapshot_keeps_tensors_and_is_collected_with_them():
    value, tensor = Plain(), torch.ones(3)
    value.taken, value.tensor = guard.snapshot([tensor]), tensor
    tensor.owner = value
    gone = weakref.ref(tensor)
    del tensor, value.tensor
    assert gone() is not None
    assert value.taken()
    del value
    gc.collect()
    assert gone() is None


def test_copies_of_snapshots_are_none():
    taken = guard.snapshot([torch.ones(3)])
    assert copy.deepcopy(taken) is None
    assert pickle.loads(pickle.dumps(taken)) is None


def test_snapshot_refuses_other_tables():
    with pytest.raises(ValueError, match="PyCapsule"):
        _guard.Snapshot(None, [])


def test_keeps_its_objects_and_is_collected_with_them():
    """A guard that is kept by what it watches is a cycle, as in every fused module."""
    value, watched = Plain(), Plain()
    value.holds = guard.watch([guard.item_is(vars(value), "watched", watched)])
    value.watched = watched
    gone = weakref.ref(watched)
    del watched
    assert value.holds()
    value.watched = None
    assert gone() is not None
    assert not value.holds()
    del value
    gc.collect()
    assert gone() is None


def test_a_comparison_may_replace_what_is_compared():
    owner = {}

    class Replacing:
        def __eq__(self, other):
            owner["key"] = None  # the last reference to self but the comparison's own
            return True

    owner["key"] = Replacing()
    assert guard.watch([guard.item_equals(owner, "key", 1)])()


@pytest.mark.parametrize(
    "copier", [copy.copy, copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))]
)
def test_copies_are_none(copier):
    """Objects that are copied by their __dict__, as parametrized modules are, need no more."""
    assert copier(guard.watch([])) is None
    assert copier({"guard": guard.watch([])}) is not None
