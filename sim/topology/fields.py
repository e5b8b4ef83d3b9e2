"""Fields that the YAML models share: numbers with their limits, and the frozen model that knows its keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from sim.errors import nearest
from sim.ops import DTYPE_BYTES


def _no_smaller(value: float) -> float:
    if value < SMALLEST:
        raise ValueError(f"must be at least {SMALLEST:g}, found {value:g}")
    return value


def _no_bool(value: object) -> object:
    """YAML's true and false (and yes, no, on, off) are 1 and 0 to Python."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, found {str(value).lower()}")
    return value


NotBool = BeforeValidator(_no_bool)
# Beyond these no figure of a machine lies, and sums of times and sizes no longer fit into 64 bits.
SMALLEST = 1e-9
Positive = Annotated[float, Field(gt=0, le=1e18, allow_inf_nan=False), AfterValidator(_no_smaller), NotBool]
Time = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False), NotBool]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False), NotBool]
Count = Annotated[int, Field(gt=0, le=1_000_000), NotBool]
Text = Annotated[str, Field(min_length=1)]


def _known_dtype(name: str) -> str:
    if name not in DTYPE_BYTES:
        raise ValueError(f"unknown dtype {name!r}: {nearest(name, DTYPE_BYTES)}")
    return name


Dtype = Annotated[str, AfterValidator(_known_dtype)]


def one_of(what: str, known: Sequence[str]) -> AfterValidator:
    """A key that stands for one of a few things."""

    def check(name: str) -> str:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}: {nearest(name, known)}")
        return name

    return AfterValidator(check)


class FileModel(BaseModel):
    """Frozen; a key that is not known is a mistake; numbers are numbers, not text."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)
