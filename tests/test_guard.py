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
        ([(7, {}, "", 0)], ValueError, "Guard: kind must be at least 0 and below 7, got 7"),
        ([(-1, {}, "", 0)], ValueError, "Guard: kind must be at least 0 and below 7, got -1"),
        ([("0", {}, "", 0)], TypeError, "'str' object cannot be interpreted as an integer"),
        ([(0, [], 0, 0)], TypeError, "Guard: object must be a dict for facts about an item"),
        ([(3, {}, "", "0")], TypeError, "Guard: expected must be an int for a length"),
    ],
)
def test_refuses_what_is_no_fact(facts, error, sentence):
    with pytest.raises(error) as caught:
        _guard.Guard(facts)
    assert str(caught.value) == sentence


def test_unhashable_keys_have_changed():
    assert not _guard.Guard([(0, {}, [], 0)])()


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
