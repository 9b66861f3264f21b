"""Image-recognition networks as plain torch modules: SAN, ResNet, non-local and hybrids of them.

Every network has `forward(x)`, (N, C, H, W) -> (N, classes), `forward_features(x)`, the pooled
vector before the classifier `fc`, and `min_input_size`.
"""

from sanctl_models.build import build_model, create_model
from sanctl_models.compiling import compile_network
from sanctl_models.network import Network, min_input_size
from sanctl_models.registry import list_models, model_kwargs, model_summary
from sanctl_models.weights import load_state, strip_module_prefix

__all__ = [
    "Network",
    "build_model",
    "compile_network",
    "create_model",
    "list_models",
    "load_state",
    "min_input_size",
    "model_kwargs",
    "model_summary",
    "strip_module_prefix",
]
