"""The kinds of values that a configuration's keys hold."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _number_from_text(value: Any) -> Any:
    """Read `1e-4`, which YAML 1.1 takes for text because it has no dot, as the number it is."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _no_controls(text: str) -> str:
    """Refuse what no path or name holds, and what a terminal would obey."""
    if any(char < " " or "\x7f" <= char <= "\x9f" or "\ud800" <= char < "\udc80" for char in text):
        raise ValueError("control characters in it")
    return text


# Above anything that makes sense: a file with a larger number is damaged, or is to fill memory.
MOST_CLASSES, MOST_PIXELS, MOST_WORKERS = 1_000_000, 16_384, 1_024
_MOST_STAGES, _MOST_BLOCKS, _MOST_CHANNELS, _MOST_KERNEL = 16, 1_000, 65_536, 255
_MOST, _MOST_INDEX = 2**31 - 1, 2**63 - 1

Number = Annotated[float, BeforeValidator(_number_from_text), Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1), AfterValidator(_no_controls)]
Count = Annotated[int, Field(ge=1, le=_MOST)]
Index = Annotated[int, Field(ge=0, le=_MOST_INDEX)]
Pixels = Annotated[int, Field(ge=1, le=MOST_PIXELS)]
Workers = Annotated[int, Field(ge=0, le=MOST_WORKERS)]
Blocks = Annotated[
    list[Annotated[int, Field(ge=1, le=_MOST_BLOCKS)]], Field(max_length=_MOST_STAGES)
]
Widths = Annotated[
    list[Annotated[int, Field(ge=1, le=_MOST_CHANNELS)]], Field(max_length=_MOST_STAGES)
]
Kernels = Annotated[
    list[Annotated[int, Field(ge=1, le=_MOST_KERNEL)]], Field(max_length=_MOST_STAGES)
]
Gpus = Annotated[list[Index], BeforeValidator(_as_list)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
PerChannel = Annotated[list[Number], BeforeValidator(_as_list), Field(min_length=1)]


class Section(BaseModel):
    """One section of a configuration file: no keys but its own, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
