"""Initial weights."""

from torch import nn

from sanctl_models.nonlocal_block import NonLocalBlock


def init_weights(network: nn.Module) -> None:
    """Draw convolutions from the Kaiming normal distribution, set batch norms to the identity.

    The variance is 2 / fan_out (He et al., "Delving Deep into Rectifiers", ICCV 2015). Biases of
    convolutions and the linear classifier keep torch's default; non-local blocks start as the
    identity.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, NonLocalBlock):
            module.start_as_identity()
