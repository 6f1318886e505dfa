"""verify: a fused model against the plain one, both measured against float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import check
from ._call import check_example, deep_copy, evaluating, run
from ._tables import table
from .fuse import unfuse
from .measure.error import GRANTED, error_limit


@dataclass(frozen=True)
class Row:
    """One output tensor. Errors are relative L2 norms against float64, over the finite values.

    error: of the fused model. eager_error: of the plain model in the same precision. limit: what
    `error` may be. max_difference: largest |fused - plain|. top1: share of equal argmax over the
    classes of an (N, classes) output, else None. ok: within the limit, finite where eager is, not
    finite where eager is NaN or +Inf and float64 is not finite in the dtype either.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    error: float
    eager_error: float
    limit: float
    max_difference: float
    top1: float | None
    ok: bool


@dataclass(frozen=True)
class Verification:
    """ok: every row is, and `problems` is empty. Prints as a table."""

    rows: tuple[Row, ...]
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems and all(row.ok for row in self.rows)

    def __str__(self) -> str:
        headings = ("error", "eager's", "limit", "max difference", "top-1 agreement")
        columns = {"output": "left", **dict.fromkeys(headings, "right"), "": "left"}
        text = table(columns, [_cells(row) for row in self.rows]) if self.rows else "no output"
        problems = self.problems or ("state_dict: the same keys and values",)
        return "\n".join([text, *problems, "ok" if self.ok else "NOT OK"])

    __repr__ = __str__


def verify(model: nn.Module, fused: nn.Module, x: Any) -> Verification:
    """Whether `fused` computes what `model` computes, as exactly, from the same state_dict.

    x: an example input (a tensor, a tuple of arguments, a dict of keyword arguments). Both models,
    and `model` in float64, run on it in eval mode as deep copies; the arguments stay untouched. An
    output is right when its error against float64 is at most twice eager's, or at most what its
    dtype is granted whatever eager's is; when it is finite where eager's is; and not finite where
    eager's is NaN or +Inf, unless the value in float64 is finite in the dtype.
    Raises TypeError for arguments of another kind and ValueError for models that cannot run on x.
    """
    check.module("verify", "model", model)
    check.module("verify", "fused", fused)
    check_example("verify", x)
    plain = unfuse(deep_copy("verify", "model", model), inplace=True)
    # Autocast, if on, leaves float64 alone.
    exact = _run("model in float64", deep_copy("verify", "model", plain).double(), _in_double(x))
    eager = _run("model", plain, x)
    ours = _run("fused", deep_copy("verify", "fused", fused), x)
    problems = _state_problems(model, fused)
    rows: list[Row] = []
    if eager.keys() != ours.keys():
        problems.append(f"outputs: model gives {', '.join(eager)}, fused {', '.join(ours)}")
    else:
        for name in eager:
            outputs = exact.get(name), eager[name], ours[name]
            if all(isinstance(out, Tensor) for out in outputs):
                _compare(name, *outputs, rows, problems)
            elif not _same(outputs[1], outputs[2]):
                problems.append(f"{name}: model gives {outputs[1]!r}, fused {outputs[2]!r}")
    return Verification(tuple(rows), tuple(problems))


def _run(name: str, model: nn.Module, x: Any) -> dict[str, Any]:
    """The output's leaves by their path."""
    with evaluating(model):
        torch.manual_seed(0)  # for models that draw random numbers even in eval mode
        output = run("verify", name, model, copy.deepcopy(x))  # a model may write to its input
    leaves, _ = pytree.tree_flatten_with_path(output)
    return {f"output{pytree.keystr(path)}": leaf for path, leaf in leaves}


def _in_double(x: Any) -> Any:
    def convert(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.double() if floating else leaf

    return pytree.tree_map(convert, x)


def _compare(
    name: str, exact: Tensor, eager: Tensor, ours: Tensor, rows: list[Row], problems: list[str]
) -> None:
    if (eager.shape, eager.dtype) != (ours.shape, ours.dtype):
        problems.append(
            f"{name}: model gives {tuple(eager.shape)} of {eager.dtype}, "
            f"fused {tuple(ours.shape)} of {ours.dtype}"
        )
        return
    lost = eager.isfinite() & ~ours.isfinite()
    # In float16 eager may overflow between convolution and batch norm, where ours is wider.
    hidden = (eager.isnan() | (eager == torch.inf)) & ours.isfinite()
    hidden &= ~exact.to(ours.dtype).isfinite()
    used = eager.isfinite() & ours.isfinite() & exact.isfinite()
    wide_ours, wide_eager, wide_exact = (t.double()[used] for t in (ours, eager, exact))
    norm = wide_exact.norm().item() or 1.0
    error = (wide_ours - wide_exact).norm().item() / norm
    eager_error = (wide_eager - wide_exact).norm().item() / norm
    # Integers and booleans must agree wholly.
    limit = error_limit(eager_error, ours.dtype) if ours.dtype in GRANTED else eager_error
    difference = (wide_ours - wide_eager).abs()
    rows.append(
        Row(
            name=name,
            shape=tuple(ours.shape),
            dtype=ours.dtype,
            error=error,
            eager_error=eager_error,
            limit=limit,
            max_difference=difference.max().item() if difference.numel() else 0.0,
            top1=_top1(eager, ours),
            ok=not (lost | hidden).any() and error <= limit,
        )
    )


def _top1(eager: Tensor, ours: Tensor) -> float | None:
    if ours.dim() != 2 or ours.numel() == 0 or ours.shape[1] < 2 or not ours.is_floating_point():
        return None
    return (eager.argmax(1) == ours.argmax(1)).double().mean().item()


def _state_problems(model: nn.Module, fused: nn.Module) -> list[str]:
    theirs, ours = model.state_dict(), fused.state_dict()
    problems = []
    for who, extra in (
        ("model", [key for key in theirs if key not in ours]),
        ("fused", [key for key in ours if key not in theirs]),
    ):
        if extra:
            more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
            problems.append(f"state_dict: only {who} has {', '.join(extra[:3])}{more}")
    differ = [key for key in theirs if key in ours and not _same(theirs[key], ours[key])]
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        problems.append(f"state_dict: {', '.join(differ[:3])}{more} differ")
    return problems


def _same(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and bool(a == b)
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    b = b.to(a.device)
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _cells(row: Row) -> tuple[str, ...]:
    shape = " x ".join(map(str, row.shape)) or "scalar"
    return (
        f"{row.name}: {shape} {str(row.dtype).removeprefix('torch.')}",
        f"{row.error:.2e}",
        f"{row.eager_error:.2e}",
        f"{row.limit:.2e}",
        f"{row.max_difference:.2e}",
        "" if row.top1 is None else f"{row.top1:.2%}",
        "ok" if row.ok else "too far",
    )
