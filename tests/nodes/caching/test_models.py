"""TeaCache's features against the formulas of the models themselves."""

import torch
from comfy.ldm.genmo.joint_model.asymm_models_joint import AsymmetricJointBlock
from torch import nn

from nibble.nodes.bridge.caching.features import modulated


class Stopped(Exception):
    """The attention has been reached."""


class MochiBlock(nn.Module):
    """What ComfyUI's block needs up to its attention, at another size than it insists on."""

    update_y = False
    forward = AsymmetricJointBlock.forward

    def __init__(self):
        super().__init__()
        self.mod_x, self.mod_y = nn.Linear(64, 4 * 64), nn.Linear(64, 32)

    def attn(self, _x, _y, *, scale_x, **_others):
        self.scale = scale_x
        raise Stopped


def test_mochi_s_feature_is_its_first_block_s_modulated_norm():
    """The block applies SiLU to the timestep before it is projected."""
    torch.manual_seed(0)
    block, image, vector = MochiBlock(), torch.randn(2, 6, 64), torch.randn(2, 64)
    try:
        block(image, vector, torch.randn(2, 4, 32))
    except Stopped:
        pass
    norm = image / image.square().mean(-1, keepdim=True).sqrt()
    wanted = norm * (1 + block.scale[:, None])
    torch.testing.assert_close(modulated(block, image, vector, {}), wanted, rtol=1e-4, atol=1e-5)
