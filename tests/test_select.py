"""The choice of a plan: the rule, what overrides it, and the sentence that says why."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from resnet_fused import select
from resnet_fused.ops import _library

needs_extension = pytest.mark.skipif(
    _library.extension_error is not None, reason=str(_library.extension_error)
)

STAGE_1 = select.ConvShape("cpu", torch.float32, 64, 64, (3, 3), (56, 56))


def plan(**changes):
    return select.choose(replace(STAGE_1, **changes)).plan


@pytest.fixture(autouse=True)
def _no_force():
    with select.forced("none"):
        yield


@needs_extension
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "winograd4"),
        ({"in_channels": 512, "out_channels": 512, "out_size": (7, 7)}, "winograd2"),
        ({"in_channels": 512, "out_channels": 512, "out_size": (1, 1)}, "direct"),
        ({"out_size": (2, 2)}, "direct"),
        ({"stride": (2, 2)}, "direct"),
        ({"dilation": (2, 2)}, "direct"),
        ({"kernel": (1, 1)}, "direct"),
        ({"groups": 2}, "direct"),
        ({"groups": 64}, "torch"),
        ({"dtype": torch.float64}, "torch"),
        ({"device": "cuda"}, "torch"),
    ],
)
def test_rule(changes, expected):
    assert plan(**changes) == expected


@needs_extension
def test_rule_knows_what_the_cpu_multiplies_fast(monkeypatch):
    for features, expected in ((frozenset(), "winograd4"), (frozenset({"amx_bf16"}), "torch")):
        monkeypatch.setattr(_library, "CPU_FEATURES", features)
        assert plan(dtype=torch.bfloat16) == expected
        assert plan() == "winograd4"


@needs_extension
def test_weights_for_one_call_are_not_transformed():
    assert select.choose(STAGE_1, packed_once=False).plan == "direct"


@needs_extension
def test_exact_nonfinite_wins_over_winograd():
    choice = select.choose(STAGE_1, exact_nonfinite=True)
    assert choice.plan == "direct"
    assert "exact_nonfinite" in choice.reason


def test_without_the_extension_everything_is_torch(monkeypatch):
    monkeypatch.setattr(_library, "extension_error", "it was not built")
    choice = select.choose(STAGE_1)
    assert choice.plan == "torch"
    assert "it was not built" in choice.reason


@needs_extension
@pytest.mark.parametrize(
    ("word", "changes", "expected"),
    [
        ("ours", {"groups": 64}, "direct"),
        ("ours", {"dtype": torch.bfloat16}, "winograd4"),
        ("ours", {"dtype": torch.float64}, "torch"),
        ("torch", {}, "torch"),
        ("direct", {}, "direct"),
        ("winograd2", {}, "winograd2"),
        ("winograd2", {"stride": (2, 2)}, "direct"),
    ],
)
def test_forced(word, changes, expected):
    with select.forced(word):
        assert select.force() == word
        assert plan(**changes) == expected
    assert select.force() == "none"


def test_forced_ends_with_its_block_on_an_exception():
    with pytest.raises(KeyError), select.forced("torch"):
        raise KeyError
    assert select.force() == "none"


def test_forced_refuses_unknown_words():
    expected = r"^forced: plan must be one of none, ours, .*got 'fast'$"
    with pytest.raises(ValueError, match=expected), select.forced("fast"):
        pass


@needs_extension
def test_every_choice_says_why_and_where():
    for changes in ({}, {"out_size": (1, 1)}, {"groups": 64}, {"device": "cuda"}):
        choice = select.choose(replace(STAGE_1, **changes))
        assert choice.reason
        assert choice.backend.startswith(choice.plan)


@pytest.mark.parametrize(("word", "printed"), [("torch", "torch"), ("", "none")])
def test_environment_sets_the_force(word, printed):
    done = run("from resnet_fused import select; print(select.force())", word)
    assert done.stdout.strip() == printed


def test_environment_with_an_unknown_word_is_one_sentence():
    done = run("import resnet_fused", "fast")
    assert done.returncode != 0
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("ValueError: RESNET_FUSED_FORCE must be one of none, ours, direct")
    )


def run(code, word):
    environ = {**os.environ, "RESNET_FUSED_FORCE": word}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
