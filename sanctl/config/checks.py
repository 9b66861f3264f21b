"""Checks that need more than one key: lengths that must agree, values that exclude each other."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from sanctl.config.schema import Config


class Problem(NamedTuple):
    """A finding about several keys; the first is the one to mend."""

    keys: tuple[str, ...]
    message: str


def cross_check(config: Config) -> list[Problem]:
    """Return everything that is wrong between the keys of a configuration whose types are right."""
    return [problem for check in _CHECKS for problem in check(config)]


def _network(config: Config) -> Iterator[Problem]:
    train = config.TRAIN
    if train.model is None and train.arch is None:
        yield Problem(
            ("TRAIN.arch", "TRAIN.model"),
            "no network: set TRAIN.model (a name of `sanctl config list`) or TRAIN.arch",
        )
    if train.model is None and train.arch is not None:
        needed = {"san": ("layers", "sa_type"), "hybrid": ("layers", "layer_types", "widths")}
        for key in needed.get(train.arch, ("layers",)):
            if getattr(train, key) is None:
                yield Problem(
                    (f"TRAIN.{key}", "TRAIN.arch", "TRAIN.model"),
                    f"missing, arch {train.arch} needs it",
                )


def _stages(config: Config) -> Iterator[Problem]:
    train = config.TRAIN
    if train.layers is None:
        return
    for key in ("layer_types", "widths", "kernels", "added_nl_blocks"):
        values = getattr(train, key)
        if values is not None and len(values) != len(train.layers):
            yield Problem(
                (f"TRAIN.{key}", "TRAIN.layers", "TRAIN.arch"),
                f"{len(values)} values, but TRAIN.layers has {len(train.layers)} stages;"
                " give one for each stage",
            )
    if any(kernel % 2 == 0 for kernel in train.kernels or ()):
        yield Problem(("TRAIN.kernels",), f"must be odd, got {train.kernels}")


def _channels(config: Config) -> Iterator[Problem]:
    data = config.DATA
    if data.channels is not None and data.channels != data.in_chans:
        yield Problem(
            ("DATA.channels", "DATA.grayscale"),
            f"{data.channels}, but DATA.grayscale is {str(data.grayscale).lower()};"
            " give one of the two",
        )
        return
    for key, values in (("mean", data.mean), ("std", data.std)):
        if len(values) not in (1, data.in_chans):
            yield Problem(
                (f"DATA.{key}", "DATA.grayscale", "DATA.channels"),
                f"{len(values)} values for {data.in_chans} channel(s)",
            )
    if any(value <= 0 for value in data.std):
        yield Problem(("DATA.std",), f"must be more than 0, got {data.std}")


def _sizes(config: Config) -> Iterator[Problem]:
    data = config.DATA
    if data.resize < data.image_size:
        yield Problem(
            ("DATA.resize", "DATA.image_size"),
            f"{data.resize} px is less than DATA.image_size, {data.image_size} px, which is cut"
            " out of it",
        )


def _labels(config: Config) -> Iterator[Problem]:
    label, classes = config.TRAIN.ignore_label, config.DATA.classes
    if 0 <= label < classes:
        yield Problem(
            ("TRAIN.ignore_label", "DATA.classes"),
            f"{label} is one of the {classes} classes, which would be left out; use -1",
        )


def _epochs(config: Config) -> Iterator[Problem]:
    train = config.TRAIN
    for key in ("start_epoch", "warmup_epochs"):
        if getattr(train, key) >= train.epochs:
            yield Problem(
                (f"TRAIN.{key}", "TRAIN.epochs"),
                f"{getattr(train, key)} must be less than TRAIN.epochs, {train.epochs}",
            )
    if train.step_epochs != sorted(set(train.step_epochs)):
        yield Problem(("TRAIN.step_epochs",), f"must rise, got {train.step_epochs}")


def _batches(config: Config) -> Iterator[Problem]:
    train = config.TRAIN
    if train.accumulate > train.batch_size:
        yield Problem(
            ("TRAIN.accumulate", "TRAIN.batch_size"),
            f"{train.accumulate} parts of a batch of {train.batch_size} images",
        )


_CHECKS: tuple[Callable[[Config], Iterator[Problem]], ...] = (
    _network,
    _stages,
    _channels,
    _sizes,
    _labels,
    _epochs,
    _batches,
)
