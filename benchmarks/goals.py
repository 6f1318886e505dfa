"""How much faster than its peers the fused net is to be, and whether a record shows it.

`judge` reads records only (the JSON of bench_engines), so what is judged is what was written down.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .cases import Case
from .common import COMPILE, FUSED
from .peers import BFLOAT16, BY_KEY, ENTRANTS, FLOAT32

PEERS = tuple(entrant.title for entrant in ENTRANTS if entrant.title != FUSED)
MOST_USED = (COMPILE, BY_KEY["onnxruntime"].title, BY_KEY["openvino"].title)


@dataclass(frozen=True)
class Goal:
    """In `case`, the fastest of the peers `over` takes `at_least` times as long as the fused net.

    aim: the factor that is hoped for; it decides nothing.
    """

    case: Case
    at_least: float
    aim: float
    over: tuple[str, ...] = PEERS


GOALS = (
    Goal(Case("resnet18", FLOAT32, 1), 1.4, 1.7),
    Goal(Case("resnet18", FLOAT32, 1), 1.9, 2.3, over=MOST_USED),
    Goal(Case("resnet18", FLOAT32, 8), 1.6, 1.9),
    Goal(Case("resnet18", FLOAT32, 32), 1.45, 1.75),
    Goal(Case("resnet18", BFLOAT16, 1), 1.4, 1.7),
    Goal(Case("resnet18", BFLOAT16, 32), 1.3, 1.6),
    Goal(Case("resnet50", FLOAT32, 1), 1.1, 1.25),
    Goal(Case("resnet50", FLOAT32, 8), 1.1, 1.25),
)


class Outcome(enum.Enum):
    """INCOMPLETE: fast enough against those that ran, but a peer that could have run did not."""

    PASS = "pass"
    FAIL = "fail"
    INCOMPLETE = "incomplete"


@dataclass(frozen=True)
class Verdict:
    """One goal held against a record. ratio: None where it has not been measured."""

    goal: Goal
    outcome: Outcome
    ratio: float | None
    peer: str  # the fastest of goal.over, "" without one
    remark: str  # why it failed or is incomplete


def judge(goal: Goal, cases: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """cases: a record's, by name."""
    case = cases.get(str(goal.case))
    rows = {row["engine"]: row for row in case["results"]} if case else {}
    ours = rows.get(FUSED)
    if ours is None or "median_ms" not in ours:
        return Verdict(goal, Outcome.INCOMPLETE, None, "", "not measured")
    times = {
        peer: rows[peer]["median_ms"] for peer in goal.over if "median_ms" in rows.get(peer, {})
    }
    able = [e.title for e in ENTRANTS if e.title in goal.over and goal.case.dtype in e.dtypes]
    absent = [title for title in able if title not in times]
    if not times:
        return Verdict(goal, Outcome.INCOMPLETE, None, "", f"without {', '.join(absent)}")
    peer = min(times, key=times.get)
    ratio = times[peer] / ours["median_ms"]
    if case["error_limit"] is not None and not ours["error"] <= case["error_limit"]:
        remark = f"error {ours['error']:.1e}, allowed {case['error_limit']:.1e}"
        return Verdict(goal, Outcome.FAIL, ratio, peer, remark)
    if ratio < goal.at_least:
        return Verdict(goal, Outcome.FAIL, ratio, peer, "too slow")
    if absent:
        return Verdict(goal, Outcome.INCOMPLETE, ratio, peer, f"without {', '.join(absent)}")
    return Verdict(goal, Outcome.PASS, ratio, peer, "aim reached" if ratio >= goal.aim else "")


def overall(outcomes: Iterable[Outcome]) -> Outcome:
    """FAIL before INCOMPLETE before PASS; nothing at all is INCOMPLETE."""
    outcomes = set(outcomes)
    for worst in (Outcome.FAIL, Outcome.INCOMPLETE):
        if worst in outcomes:
            return worst
    return Outcome.PASS if outcomes else Outcome.INCOMPLETE
