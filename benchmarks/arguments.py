"""Arguments that the benchmarks share: words and cases between commas."""

from __future__ import annotations

from collections.abc import Sequence

import click

from .cases import DTYPES, Case


class Words(click.ParamType):
    """ "a,b" -> ("a", "b"), each one of `choices`, none twice."""

    name = "word,word,..."

    def __init__(self, choices):
        self.choices = tuple(choices)

    def convert(self, value, param, ctx) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        words = tuple(value.split(","))
        if len(set(words)) < len(words) or not set(words) <= set(self.choices):
            known = ", ".join(self.choices)
            self.fail(f"must be some of {known} between commas, got {value!r}", param, ctx)
        return words


class Cases(click.ParamType):
    """ "resnet18-float32-8,accuracy" -> (Case, "accuracy"); `others` are the words beside cases."""

    name = "case,case,..."

    def __init__(self, others: Sequence[str] = (), dtypes: Sequence[str] = DTYPES):
        self.others, self.dtypes = tuple(others), tuple(dtypes)

    def convert(self, value, param, ctx) -> tuple[Case | str, ...]:
        if isinstance(value, tuple):
            return value
        words = value.split(",")
        try:
            return tuple(w if w in self.others else Case.parse(w, self.dtypes) for w in words)
        except ValueError as error:
            self.fail(str(error), param, ctx)
