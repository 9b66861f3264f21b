"""sanctl: train image-recognition networks built on local self-attention."""

__version__ = "0.1.0"
