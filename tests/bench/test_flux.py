"""The FLUX that the GPU bench times is FLUX.1: it computes what diffusers' transformer computes
with the same weights.
"""

import pytest
import torch

from bench import flux

CONFIG = flux.Config(double=2, single=2, hidden=256, heads=2, channels=16, context=48, vector=24)


def test_it_computes_what_diffusers_computes():
    models = pytest.importorskip("nibble.quant.diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    model = flux.Flux(CONFIG).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    theirs = models.flux_transformer(
        {name: tensor.clone() for name, tensor in model.flux_state().items()}
    ).eval()
    img, txt, t, vector, guidance, positions = flux.inputs(
        CONFIG, picture=6, words=5, device="cpu", dtype=torch.float32
    )
    with torch.no_grad():
        ours = model(img, txt, t, vector, guidance, positions)
        expected = theirs(
            hidden_states=img,
            encoder_hidden_states=txt,
            timestep=t,
            pooled_projections=vector,
            guidance=guidance,
            img_ids=positions[5:],
            txt_ids=positions[:5],
            return_dict=False,
        )[0]
    assert ours.shape == expected.shape
    # Both embed 1000 t with float32 angles of up to 3500, rounded differently: a few 1e-5 at the
    # output.
    assert (ours - expected).norm() < 2e-4 * expected.norm()


def test_its_names_and_shapes_are_those_of_flux_1_dev():
    from nibble.quant.files.known_shapes import flux1_shapes

    with torch.device("meta"):
        state = flux.Flux().flux_state()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        name: tuple(shape) for name, shape in flux1_shapes().items()
    }
