"""The non-local block against its definition, and where it starts."""

import pytest
import torch
from torch import Tensor, nn

from sanctl_models import create_model
from sanctl_models.nonlocal_block import MODES, NonLocalBlock


def by_definition(block: NonLocalBlock, x: Tensor) -> Tensor:
    """Equation 1 and 6 with the whole (positions x keys) matrix, image by image."""
    images = []
    for image in x.unsqueeze(1):
        theta = block.theta(image).flatten(2)[0]
        phi = block.phi(image).flatten(2)[0]
        g = block.g(image).flatten(2)[0]
        if block.mode == "concatenate":
            projection = block.W_f[0]
            assert isinstance(projection, nn.Conv2d)
            pairs = torch.cat(
                (
                    theta[:, :, None].expand(-1, -1, phi.shape[1]),
                    phi[:, None, :].expand(-1, theta.shape[1], -1),
                )
            )
            f = block.W_f(pairs[None])[0, 0]
        else:
            f = theta.T @ phi
        if block.mode in ("dot", "concatenate"):
            attention = f / f.shape[1]
        else:
            attention = f.exp() / f.exp().sum(1, keepdim=True)
        y = (attention @ g.T).T
        images.append(block.W_z(y.reshape(1, -1, *x.shape[2:])) + image)
    return torch.cat(images)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sub_sample", [True, False])
@torch.no_grad()
def test_agrees_with_the_definition(mode: str, sub_sample: bool) -> None:
    torch.manual_seed(0)
    block = NonLocalBlock(16, mode, sub_sample).double().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(block(x), by_definition(block, x))


@pytest.mark.parametrize("mode", MODES)
def test_keys_say_what_is_pooled(mode: str) -> None:
    keys = {key.rsplit(".", 1)[0] for key in NonLocalBlock(16, mode).state_dict()}
    assert "g.0" in keys
    assert ("phi.0" in keys) == (mode != "gaussian")
    assert ("theta" in keys) == (mode != "gaussian")
    assert ("W_f.0" in keys) == (mode == "concatenate")
    plain = {key.rsplit(".", 1)[0] for key in NonLocalBlock(16, mode, False).state_dict()}
    assert "g" in plain
    assert ("phi" in plain) == (mode != "gaussian")


@pytest.mark.parametrize("name", ["nl", "resnet26_nl"])
def test_non_local_blocks_of_a_network_start_as_the_identity(name: str) -> None:
    blocks = [m for m in create_model(name).modules() if isinstance(m, NonLocalBlock)]
    assert blocks
    for block in blocks:
        x = torch.randn(2, len(block.W_z.state_dict()["1.weight"]), 4, 4)
        assert block(x).equal(x)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="mode: 'dott' is unknown; use one of dot, embedded"):
        NonLocalBlock(16, "dott")
    with pytest.raises(ValueError, match="channels: 12 is not divisible by 8"):
        NonLocalBlock(12)
