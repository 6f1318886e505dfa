"""Bugs planted in the kernels of csrc/cuda/sm80 and in the Hopper stem's: a few of each kind must
show, and nothing where there is none.

`make mutants` plants all of them, and those of the sm_90a kernel.
"""

from __future__ import annotations

import planted_sm80
import planted_stem
import planted_stem90
import planted_tail
import pytest
from emulated_sm80 import ROOT, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
KERNELS = (planted_sm80, planted_stem, planted_stem90, planted_tail)
BUGS = {kernel: [bug for bug in kernel.BUGS if bug.ci] for kernel in KERNELS}
every_kernel = pytest.mark.parametrize(
    "planted", KERNELS, ids=lambda kernel: kernel.__name__, indirect=True, scope="module"
)


@pytest.fixture(scope="module")
def planted(request):
    """The kernel's bugs, the library of them, and what must show them."""
    kernel = request.param
    library = kernel.build_planted(ROOT / "build" / "emulated", BUGS[kernel])
    return kernel, library, kernel.cases()


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_one_library_holds_them_all(kernel):
    assert kernel.rounds(BUGS[kernel]) == [BUGS[kernel]]


@pytest.mark.parametrize(
    ("planted", "bug"),
    [
        pytest.param(kernel, bug, id=f"{kernel.__name__}-{bug.name}")
        for kernel in KERNELS
        for bug in BUGS[kernel]
    ],
    indirect=["planted"],
)
def test_planted_bug_shows(planted, bug):
    kernel, library, cases = planted
    shown = kernel.show(library, 1 + BUGS[kernel].index(bug), cases)
    assert shown
    assert bug.report in shown


@every_kernel
def test_without_a_planted_bug_nothing_shows(planted):
    kernel, library, cases = planted
    assert not kernel.show(library, 0, cases)
