"""What torch remarks on replicas, every process for itself, and nobody can act on."""

import logging
import warnings

# Where a kernel is 1 x 1, strides that differ mean the same places in memory.
_STRIDES = "Grad strides do not match bucket view strides"
# Compiling leaves out the marks that replicas set for a profiler.
_PROFILER = "Profiler record function"


def overlook_remarks() -> None:
    """Drop these remarks from now on, in this process."""
    warnings.filterwarnings("ignore", message=_STRIDES)
    for handler in logging.getLogger("torch._dynamo").handlers:
        handler.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_PROFILER)
