"""The caches on disk: what comes out is what the VAE and the text encoders give, whatever happened to the files."""

import pytest
import torch

from utils import cache, flux
from utils.cache import TextCache, encode_cached


@pytest.fixture
def images():
    return torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def encoded_counts(monkeypatch):
    """Batch sizes of the calls of the real encoder."""
    counts, posterior = [], flux.posterior
    monkeypatch.setattr(cache.flux, "posterior",
                        lambda vae, images: counts.append(len(images)) or posterior(vae, images))
    return counts


@torch.no_grad()
def test_a_hit_equals_the_encoding_bit_for_bit(tiny_pipe, images, tmp_path, encoded_counts):
    one_by_one = torch.cat([flux.encode(tiny_pipe.vae, image[None]) for image in images])
    encoded_counts.clear()
    folder = tmp_path / "new" / "cache"
    missed = encode_cached(tiny_pipe.vae, images, folder)
    assert encoded_counts == [1, 1, 1]
    hit = encode_cached(tiny_pipe.vae, images, folder)
    assert encoded_counts == [1, 1, 1]
    assert torch.equal(missed, one_by_one) and torch.equal(hit, one_by_one)
    torch.testing.assert_close(hit, flux.encode(tiny_pipe.vae, images), rtol=0, atol=1e-5)
    assert len(list(folder.iterdir())) == 3 and not list(folder.glob("*.tmp"))


@torch.no_grad()
def test_a_cached_posterior_is_sampled_anew_with_each_noise(tiny_pipe, images, tmp_path):
    noises = torch.randn(2, 3, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    for noise in noises:
        torch.testing.assert_close(encode_cached(tiny_pipe.vae, images, tmp_path, noise),
                                   flux.encode(tiny_pipe.vae, images, noise))
    assert len(list(tmp_path.iterdir())) == 3


@torch.no_grad()
def test_entries_follow_the_pixels_not_the_order(tiny_pipe, images, tmp_path, encoded_counts):
    first = encode_cached(tiny_pipe.vae, images, tmp_path)
    encoded_counts.clear()
    assert torch.equal(encode_cached(tiny_pipe.vae, images.flip(0), tmp_path), first.flip(0))
    assert encoded_counts == []


@torch.no_grad()
def test_one_changed_pixel_value_is_another_entry(tiny_pipe, images, tmp_path, encoded_counts):
    encode_cached(tiny_pipe.vae, images[:1], tmp_path)
    changed = images[:1].clone()
    changed[0, 0, 0, 0] += 2 / 255
    latents = encode_cached(tiny_pipe.vae, changed, tmp_path)
    assert encoded_counts == [1, 1] and len(list(tmp_path.iterdir())) == 2
    assert torch.equal(latents, flux.encode(tiny_pipe.vae, changed))


@torch.no_grad()
def test_the_same_bytes_in_another_shape_are_another_entry(tiny_pipe, images, tmp_path):
    image = torch.zeros_like(images[:1])
    encode_cached(tiny_pipe.vae, image, tmp_path)
    latents = encode_cached(tiny_pipe.vae, image.reshape(1, 3, 48, 32), tmp_path)
    assert latents.shape[-2:] == (6, 4) and len(list(tmp_path.iterdir())) == 2


@torch.no_grad()
def test_another_vae_config_or_dtype_is_another_entry(tiny_pipe, images, tmp_path, encoded_counts):
    encode_cached(tiny_pipe.vae, images[:1], tmp_path)
    tiny_pipe.vae.register_to_config(scaling_factor=0.5)
    scaled = encode_cached(tiny_pipe.vae, images[:1], tmp_path)
    assert torch.equal(scaled, flux.encode(tiny_pipe.vae, images[:1]))
    encode_cached(tiny_pipe.vae.to(torch.bfloat16), images[:1], tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", [b"", b"not safetensors", None])
@torch.no_grad()
def test_a_damaged_entry_is_made_again(tiny_pipe, images, tmp_path, encoded_counts, damage):
    latents = encode_cached(tiny_pipe.vae, images[:1], tmp_path)
    entry, = tmp_path.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-10] if damage is None else damage)
    assert torch.equal(encode_cached(tiny_pipe.vae, images[:1], tmp_path), latents)
    assert encoded_counts == [1, 1]
    assert entry.read_bytes() == whole and list(tmp_path.iterdir()) == [entry]


@torch.no_grad()
def test_an_interrupted_write_leaves_no_entry(tiny_pipe, images, tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "replace", fail)
        with pytest.raises(KeyboardInterrupt):
            encode_cached(tiny_pipe.vae, images[:1], tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    assert torch.equal(encode_cached(tiny_pipe.vae, images[:1], tmp_path), flux.encode(tiny_pipe.vae, images[:1]))


@pytest.mark.parametrize("damage", [b"", b"not safetensors", None])
def test_a_damaged_text_counts_as_missing_and_is_written_anew(tmp_path, damage):
    texts = TextCache(tmp_path / "texts", "encoders")
    assert "a cat" not in texts
    texts["a cat"] = flux.TextEmbeds(torch.rand(1, 8, 4), torch.rand(1, 6))
    entry, = (tmp_path / "texts").iterdir()
    whole = entry.read_bytes()
    assert "a cat" in texts and "a dog" not in texts
    entry.write_bytes(whole[:-10] if damage is None else damage)
    assert "a cat" not in texts
    texts["a cat"] = flux.TextEmbeds(torch.ones(1, 8, 4), torch.ones(1, 6))
    assert "a cat" in texts and texts["a cat"].prompt.sum() == 32
