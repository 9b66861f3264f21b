"""What torch remarks in every process of a team, and nobody can act on."""

import logging
import warnings

# Of replicas: where a kernel is 1 x 1, strides that differ mean the same places in memory.
_STRIDES = "Grad strides do not match bucket view strides"
_LOGGED = (
    "Profiler record function",  # marks of replicas for a profiler, which compiling leaves out
    "No CUDA runtime is found",  # where the CUDA toolkit is there, and no GPU
)


def overlook_remarks() -> None:
    """Drop these remarks from now on, in this process."""
    warnings.filterwarnings("ignore", message=_STRIDES)
    for name in ("torch", "torch._dynamo"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LOGGED)
