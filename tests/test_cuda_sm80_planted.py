"""Bugs planted in the sm_80 kernel: a few of each kind must show, and nothing where there is none.

`make mutants` plants all of them, and those of the sm_90a kernel.
"""

from __future__ import annotations

import planted_sm80
import pytest
from emulated_sm80 import ROOT, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
BUGS = [bug for bug in planted_sm80.BUGS if bug.ci]


@pytest.fixture(scope="module")
def planted():
    """The library of planted bugs, and what must show them."""
    return planted_sm80.build_planted(ROOT / "build" / "emulated", BUGS), planted_sm80.cases()


def test_one_library_holds_them_all():
    assert planted_sm80.rounds(BUGS) == [BUGS]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_planted_bug_shows(planted, bug):
    library, cases = planted
    shown = planted_sm80.show(library, 1 + BUGS.index(bug), cases)
    assert shown
    assert bug.report in shown


def test_without_a_planted_bug_nothing_shows(planted):
    library, cases = planted
    assert not planted_sm80.show(library, 0, cases)
