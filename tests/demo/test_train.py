import numpy as np
import torch

from nibble.demo import pictures, train


def test_the_closed_form_encoder_equals_its_convolutions():
    encoder, vae = train.PatchEncoder(np.random.default_rng(0), count=60), pictures.build_vae()
    encoder.write(vae)
    images = train.picture_batch(2, np.random.default_rng(1))[1]
    with torch.no_grad():
        torch.testing.assert_close(
            vae.encode(images).latents, encoder.latents(images), atol=1e-4, rtol=1e-4
        )


def test_one_step_of_training_has_a_finite_loss_and_gradients():
    torch.manual_seed(0)
    flux = pictures.build_flux()
    loss = train.flow_loss(flux, torch.randn(2, 16, 8, 8), torch.zeros(2, 4, dtype=torch.long))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flux.parameters())
