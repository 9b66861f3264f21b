"""The kinds of values that a configuration's keys hold."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


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


Number = Annotated[float, BeforeValidator(_number_from_text), Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Gpus = Annotated[list[Index], BeforeValidator(_as_list)]
Fraction = Annotated[Number, Field(ge=0, lt=1)]
PerChannel = Annotated[list[Number], BeforeValidator(_as_list), Field(min_length=1)]


class Section(BaseModel):
    """One section of a configuration file: no keys but its own, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
