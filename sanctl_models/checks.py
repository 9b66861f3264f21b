"""Checks of what describes a network; messages name the YAML key, the value and the mend."""

from collections.abc import Sequence


def check_integer(key: str, value: object, smallest: int = 1) -> None:
    """Raise ValueError unless value is an integer of at least `smallest`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
        raise ValueError(f"{key}: {value!r} is not an integer of {smallest} or more")


def check_list(key: str, values: object, what: str) -> None:
    """Raise ValueError unless values is a list that is not empty; `what` says what it holds."""
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) == 0:
        raise ValueError(f"{key}: {values!r} is not a list of {what}, one per stage")


def check_integers(key: str, values: Sequence[int], smallest: int = 1) -> None:
    """Raise ValueError unless values is a list, not empty, of integers of at least `smallest`."""
    check_list(key, values, "integers")
    for stage, value in enumerate(values):
        check_integer(f"{key}[{stage}]", value, smallest)


def check_stages(count: int, key: str, values: Sequence[object]) -> None:
    """Raise ValueError unless the list has `count` entries, as many as this arch has stages."""
    if len(values) != count:
        raise ValueError(
            f"{key}: {list(values)} has {len(values)} entries, but this arch has {count} stages; "
            f"give {count}"
        )


def check_same_length(**lists: Sequence[object]) -> None:
    """Raise ValueError unless all lists, named by their keys, have one length."""
    if len({len(values) for values in lists.values()}) > 1:
        lengths = ", ".join(f"{key} has {len(values)}" for key, values in lists.items())
        raise ValueError(f"lists of different lengths: {lengths}; give each one entry per stage")


def check_choice(key: str, value: object, choices: Sequence[object]) -> None:
    """Raise ValueError unless value is one of choices (and of the same type, so not True for 1)."""
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        known = ", ".join(str(choice) for choice in choices)
        raise ValueError(f"{key}: {value!r} is unknown; use one of {known}")


def check_width(key: str, width: int, divisor: int, kind: str) -> None:
    """Raise ValueError unless divisor divides width, as stages of this kind need."""
    if width % divisor != 0:
        lower, upper = width // divisor * divisor, (width // divisor + 1) * divisor
        nearest = f"{lower} or {upper}" if lower > 0 else str(upper)
        raise ValueError(
            f"{key}: {width} is not divisible by {divisor}, as {kind} needs; use {nearest}"
        )


def check_kernel(key: str, kernel_size: int) -> None:
    """Raise ValueError unless kernel_size is odd and positive."""
    check_integer(key, kernel_size)
    if kernel_size % 2 == 0:
        raise ValueError(
            f"{key}: {kernel_size} is even, but a window needs a centre pixel; "
            f"use {kernel_size - 1} or {kernel_size + 1}"
        )
