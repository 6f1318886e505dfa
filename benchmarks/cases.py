"""What is measured at a time: one net, one precision, one batch size, through all engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resnet_fused import models

from .peers import BFLOAT16, FLOAT32

DTYPES = (FLOAT32, BFLOAT16)


@dataclass(frozen=True)
class Case:
    """str(case) is its name, "resnet18-float32-8"; Case.parse is the inverse."""

    model: str
    dtype: str
    batch: int

    def __str__(self) -> str:
        return f"{self.model}-{self.dtype}-{self.batch}"

    @classmethod
    def parse(cls, name: str, dtypes: Sequence[str] = DTYPES) -> Case:
        """Raises ValueError in one sentence for other words, or a dtype not in `dtypes`."""
        model, _, rest = name.partition("-")
        dtype, _, batch = rest.partition("-")
        known = model in models.BUILDERS and dtype in dtypes
        if not (known and batch.isdecimal() and int(batch) > 0):
            raise ValueError(f"case must be like resnet18-{dtypes[0]}-8, got {name!r}")
        return cls(model, dtype, int(batch))
