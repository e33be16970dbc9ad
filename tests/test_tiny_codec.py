"""The embedded model's autoencoder: the diffusers class computes the linear transform that was fitted."""

import numpy as np
import pytest
import torch

from scripts import make_tiny_kontext as tiny
from scripts import tiny_codec


@pytest.fixture(scope="module")
def crops():
    return tiny.to_tensor(tiny.draw_crops(tiny.load_photos([]), np.random.default_rng(0), 60, 64))


@pytest.fixture(scope="module")
def transform(crops):
    """Principal components, made to overlap at random so that every weight counts."""
    transform = tiny_codec.LappedTransform().init(crops)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return transform.equalise(crops).requires_grad_(False)


@pytest.fixture(scope="module")
def vae(transform):
    vae = tiny_codec.make_vae()
    tiny_codec.install(vae, transform)
    return vae.requires_grad_(False)


def test_unshuffle_and_shuffle_are_inverse():
    images = torch.arange(2 * 3 * 8 * 4.0).view(2, 3, 8, 4)
    assert torch.equal(tiny_codec.shuffle(tiny_codec.unshuffle(images)), images)
    assert torch.equal(tiny_codec.unshuffle(images)[:, 3:6], images[..., 0::2, 1::2])


def test_encoder_equals_the_transform_and_is_deterministic(vae, transform, crops):
    posterior = vae.encode(crops).latent_dist
    assert torch.allclose(posterior.mean, transform.encode(crops), atol=1e-5)
    assert posterior.std.max() < 1e-6


@pytest.mark.parametrize("level", [-1.0, 0.0, 1.0])
def test_decoder_equals_the_transform_on_photographs_shifted_to_any_brightness(vae, transform, crops, level):
    latents = transform.encode(0.3 * crops[:4] + level)
    wanted = transform.decode(latents)
    assert (vae.decode(latents).sample - wanted).abs().max() < 2e-3  # a quarter of a grey level


def test_decoder_stays_within_a_grey_level_in_half_precision_on_disk(transform, crops):
    vae = tiny_codec.make_vae()
    tiny_codec.install(vae, transform)
    vae = vae.half().float().requires_grad_(False)
    wanted = transform(crops[:4])
    assert (vae.decode(vae.encode(crops[:4]).latent_dist.mean).sample - wanted).abs().mean() < 1 / 255


def test_decoder_in_bf16_keeps_the_mean_colour(transform, crops):
    """The pedestals must not cost the precision that bf16 has."""
    vae = tiny_codec.make_vae()
    tiny_codec.install(vae, transform)
    latents = transform.encode(crops[:4])
    wanted = transform.decode(latents)
    decoded = vae.bfloat16().requires_grad_(False).decode(latents.bfloat16()).sample.float()
    assert (decoded - wanted).mean((2, 3)).abs().max() < 2 / 127.5
    assert (decoded - wanted).square().mean().sqrt() < 3 / 127.5


def test_equalising_changes_latents_and_not_images(crops):
    transform = tiny_codec.LappedTransform().init(crops)
    before, spread = transform(crops[:2]), transform.encode(crops).std((0, 2, 3))
    transform.equalise(crops)
    assert torch.allclose(transform(crops[:2]), before, atol=1e-5)
    assert torch.allclose(transform.encode(crops).std((0, 2, 3)), spread.sqrt(), rtol=0.05)


def test_principal_components_alone_reproduce_a_photograph_at_30_db(crops):
    transform = tiny_codec.LappedTransform().init(crops)
    unseen = tiny.to_tensor(tiny.heldout_crops(128, 1))
    assert tiny.mean_psnr(transform(unseen), unseen) > 30
