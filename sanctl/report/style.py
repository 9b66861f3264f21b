"""The ways in which stdout can show a run."""

from enum import StrEnum


class ProgressStyle(StrEnum):
    """How stdout shows a run.

    `auto` draws on a terminal and writes lines elsewhere, `rich` draws, `plain` writes lines, and
    `none` tells only how it ended.
    """

    AUTO = "auto"
    RICH = "rich"
    PLAIN = "plain"
    NONE = "none"
