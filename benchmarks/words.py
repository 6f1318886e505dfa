"""An option of click that takes several words of a known set."""

from __future__ import annotations

import click


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
