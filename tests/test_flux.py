"""The five verbs on FLUX.1 Kontext's parts, against direct calls of the parts themselves."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderTiny, FluxKontextPipeline
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from utils import flux

HEIGHT, WIDTH = 6, 8  # latents


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_text(batch):
    return flux.TextEmbeds(normal(batch, 5, 16, seed=1), normal(batch, 16, seed=2))


def pack_by_hand(latents):
    """Token (row, column) is the 2 x 2 patch there, channels first: written as FLUX's own einops pattern says."""
    batch, channels, height, width = latents.shape
    tokens = [latents[:, :, y : y + 2, x : x + 2].reshape(batch, channels * 4)
              for y in range(0, height, 2) for x in range(0, width, 2)]
    return torch.stack(tokens, dim=1)


def ids_by_hand(height, width, first):
    return torch.tensor([[first, y, x] for y in range(height // 2) for x in range(width // 2)], dtype=torch.float32)


@pytest.mark.parametrize("sizes", [[], [(HEIGHT, WIDTH)], [(4, 6), (HEIGHT, WIDTH)]], ids=len)
@torch.no_grad()
def test_predict_velocity_equals_a_direct_call_with_hand_packed_tokens(tiny_pipe, sizes):
    z, text = normal(2, 16, HEIGHT, WIDTH), random_text(2)
    references = [normal(2, 16, *size, seed=3 + i) for i, size in enumerate(sizes)]
    sigma = torch.tensor([0.25, 0.9])
    tokens, ids = pack_by_hand(z), ids_by_hand(HEIGHT, WIDTH, 0)
    for i, (reference, size) in enumerate(zip(references, sizes, strict=True), start=1):
        tokens = torch.cat([tokens, pack_by_hand(reference)], dim=1)
        ids = torch.cat([ids, ids_by_hand(*size, i)])
    direct = tiny_pipe.transformer(
        hidden_states=tokens, timestep=sigma, guidance=torch.tensor([2.0, 2.0]), encoder_hidden_states=text.prompt,
        pooled_projections=text.pooled, txt_ids=torch.zeros(5, 3), img_ids=ids).sample[:, : HEIGHT * WIDTH // 4]
    for given in [references or None] + references * (len(sizes) == 1):  # one alone may stand without a list
        ours = flux.predict_velocity(tiny_pipe.transformer, z, sigma, given, text, 2.0)
        torch.testing.assert_close(pack_by_hand(ours), direct)


@torch.no_grad()
def test_a_reference_of_another_size_is_seen_and_leaves_the_latents_size(tiny_pipe):
    z, text, sigma = normal(1, 16, HEIGHT, WIDTH), random_text(1), torch.tensor([0.5])
    predictions = [flux.predict_velocity(tiny_pipe.transformer, z, sigma, control, text, 1.0)
                   for control in (None, normal(1, 16, 4, 4, seed=3), normal(1, 16, 4, 4, seed=4))]
    assert all(prediction.shape == z.shape for prediction in predictions)
    assert not torch.allclose(predictions[0], predictions[1]) and not torch.allclose(predictions[1], predictions[2])


@torch.no_grad()
def test_items_of_a_batch_do_not_see_each_other(tiny_pipe):
    z, control, text = normal(2, 16, HEIGHT, WIDTH), normal(2, 16, HEIGHT, WIDTH, seed=3), random_text(2)
    sigma = torch.tensor([0.25, 0.9])
    together = flux.predict_velocity(tiny_pipe.transformer, z, sigma, control, text, 1.0)
    second = flux.TextEmbeds(text.prompt[1:], text.pooled[1:])
    alone = flux.predict_velocity(tiny_pipe.transformer, z[1:], sigma[1:], control[1:], second, 1.0)
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-5)


def test_a_transformer_without_guidance_embedding_is_given_none(tiny_pipe):
    seen = []

    class Bare(torch.nn.Module):
        config = SimpleNamespace(guidance_embeds=False)

        def forward(self, hidden_states, guidance, **others):
            seen.append(guidance)
            return (hidden_states,)

    class Wrapped(torch.nn.Module):  # as DistributedDataParallel holds it
        def __init__(self):
            super().__init__()
            self.module = Bare()

        def forward(self, **inputs):
            return self.module(**inputs)

    z = normal(1, 16, HEIGHT, WIDTH)
    for transformer in (Bare(), Wrapped()):
        torch.testing.assert_close(
            flux.predict_velocity(transformer, z, torch.tensor([0.5]), z, random_text(1), 3.0), z)
    assert seen == [None, None]


def test_pack_and_unpack_are_inverse():
    latents = normal(2, 16, HEIGHT, WIDTH)
    torch.testing.assert_close(flux.pack(latents), pack_by_hand(latents))
    assert torch.equal(flux.unpack(flux.pack(latents), HEIGHT, WIDTH), latents)


@torch.no_grad()
def test_encode_normalises_the_posteriors_mean_with_shift_and_scale(tiny_pipe):
    vae, images = tiny_pipe.vae, normal(2, 3, 32, 48).clamp(-1, 1)
    posterior = vae.encode(images).latent_dist
    config = vae.config
    torch.testing.assert_close(flux.encode(vae, images), (posterior.mean - config.shift_factor) * config.scaling_factor)
    noise = normal(2, 16, 4, 6, seed=5)
    sampled = (posterior.mean + posterior.std * noise - config.shift_factor) * config.scaling_factor
    torch.testing.assert_close(flux.encode(vae, images, noise), sampled)
    assert not torch.allclose(flux.encode(vae, images), sampled)


@torch.no_grad()
def test_decode_undoes_encodes_normalisation(tiny_pipe):
    vae, images = tiny_pipe.vae, normal(1, 3, 32, 48).clamp(-1, 1)
    raw = vae.encode(images).latent_dist.mean
    torch.testing.assert_close(flux.decode(vae, flux.encode(vae, images)), vae.decode(raw).sample)


def test_gradients_flow_through_decode(tiny_pipe):
    latents = normal(1, 16, 4, 4).requires_grad_()
    flux.decode(tiny_pipe.vae, latents).square().mean().backward()
    assert latents.grad.abs().sum() > 0


@torch.no_grad()
def test_autoencoder_tiny_serves_as_vae(tiny_pipe):
    from utils import restore

    torch.manual_seed(0)
    tiny_pipe.vae = vae = AutoencoderTiny(
        latent_channels=16, encoder_block_out_channels=(4,) * 4, decoder_block_out_channels=(4,) * 4,
        num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4, scaling_factor=0.5, shift_factor=0.25).eval()
    images = normal(1, 3, 32, 48).clamp(-1, 1)
    latents = flux.encode(vae, images, normal(1, 16, 4, 6))
    assert latents.shape == (1, *flux.latent_shape(vae, 32, 48)) == (1, 16, 4, 6)
    torch.testing.assert_close(latents, (vae.encode(images).latents - 0.25) * 0.5)
    torch.testing.assert_close(flux.decode(vae, latents), vae.decode(vae.encode(images).latents).sample)
    settings = restore.STOCK_SETTINGS | {"start_noise": [0.5, 0.5]}
    restored = restore.restore(tiny_pipe, images[..., :30, :41], random_text(1), settings, 2, [0])
    assert restored.shape == (1, 3, 30, 41)


def test_sizes_of_the_tiny_model_are_those_of_flux(tiny_pipe):
    assert flux.latent_scale(tiny_pipe.vae) == 8
    assert flux.size_multiple(tiny_pipe.vae) == 16
    flux.check_sizes(tiny_pipe.vae, [(512, 512), (1568, 672)])
    with pytest.raises(ValueError, match="--resolution .*100x512.* 16 "):
        flux.check_sizes(tiny_pipe.vae, [(512, 512), (100, 512)])


def test_models_come_frozen_in_evaluation_mode_and_in_the_wanted_dtype(tiny_model):
    pipe = flux.load_models(tiny_model, "cpu", torch.bfloat16)
    for model in (pipe.vae, pipe.transformer):
        assert not model.training and model.dtype == torch.bfloat16
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert pipe.text_encoder is None and pipe.text_encoder_2 is None and pipe.tokenizer is None


def test_bf16_models_encode_and_decode_to_fp32(tiny_model):
    pipe = flux.load_models(tiny_model, "cpu", torch.bfloat16)
    latents = flux.encode(pipe.vae, normal(1, 3, 32, 32).clamp(-1, 1))
    assert latents.dtype == torch.float32 and flux.decode(pipe.vae, latents).dtype == torch.float32


def test_encode_prompts_equals_the_stock_pipeline_once_per_prompt(tiny_model):
    encoded = flux.encode_prompts(tiny_model, ["a cat", "a dog", "a cat"], "cpu", torch.float32, 16)
    assert list(encoded) == ["a cat", "a dog"]
    stock = FluxKontextPipeline.from_pretrained(tiny_model, vae=None, transformer=None)
    with torch.no_grad():
        prompt, pooled, _ = stock.encode_prompt("a dog", None, max_sequence_length=16)
    assert prompt.shape[1] == 16
    torch.testing.assert_close(encoded["a dog"].prompt, prompt)
    torch.testing.assert_close(encoded["a dog"].pooled, pooled)


def test_stack_text_follows_the_batch(tiny_model):
    encoded = flux.encode_prompts(tiny_model, ["a cat", "a dog"], "cpu", torch.float32, 16)
    text = flux.stack_text(encoded, ["a dog", "a cat", "a dog"], "cpu", torch.bfloat16)
    assert text.prompt.dtype == text.pooled.dtype == torch.bfloat16
    for i, prompt in enumerate(["a dog", "a cat", "a dog"]):
        torch.testing.assert_close(text.prompt[i], encoded[prompt].prompt[0].bfloat16())
        torch.testing.assert_close(text.pooled[i], encoded[prompt].pooled[0].bfloat16())
    assert not torch.equal(text.prompt[0], text.prompt[1]) and not torch.equal(text.pooled[0], text.pooled[1])


def test_text_encoders_are_gone_after_encode_prompts(tiny_model, monkeypatch):
    alive, load_pipeline = [], flux.load_pipeline

    def spy(*args, **kwargs):
        pipe = load_pipeline(*args, **kwargs)
        assert pipe.vae is None and pipe.transformer is None  # these are not even loaded
        alive.extend(weakref.ref(part) for part in (pipe.text_encoder, pipe.text_encoder_2))
        return pipe

    monkeypatch.setattr(flux, "load_pipeline", spy)
    encoded = flux.encode_prompts(tiny_model, ["a cat"], "cpu", torch.float32, 16)
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
    assert not encoded["a cat"].prompt.requires_grad


def test_check_model_accepts_a_pipeline_folder_and_a_hub_id(tiny_model):
    flux.check_model(tiny_model)
    flux.check_model("black-forest-labs/FLUX.1-Kontext-dev")


def test_check_model_refuses_a_folder_without_a_pipeline(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: no model_index.json"):
        flux.check_model(str(tmp_path))


@pytest.mark.parametrize("path", ["/no/such/folder", "./model", "~/model", "assets/tiny/kontext", "kontext"])
def test_check_model_refuses_what_is_neither_folder_nor_hub_id(path):
    with pytest.raises(ValueError, match=f"--pretrained_model_name_or_path {path}: no such folder"):
        flux.check_model(path)


def test_model_id_is_a_hub_id_or_a_folders_last_part(tiny_model, tmp_path, monkeypatch):
    assert flux.model_id("black-forest-labs/FLUX.1-Kontext-dev") == "black-forest-labs/FLUX.1-Kontext-dev"
    assert flux.model_id(tiny_model) == "tiny-random-kontext"
    monkeypatch.chdir(tiny_model)
    assert flux.model_id(".") == "tiny-random-kontext"


def http_error(kind, status):
    """As the hub client raises it; of the response it reads headers and request only."""
    return kind("refused\nsecond line", response=SimpleNamespace(headers={}, request=None, status_code=status))


@pytest.mark.parametrize(("error", "words"), [
    (http_error(GatedRepoError, 403), "gated.*HF_TOKEN"),
    (http_error(RepositoryNotFoundError, 404), "could not be fetched .*path of a downloaded copy"),
    (http_error(HfHubHTTPError, 500), "could not be fetched .*path of a downloaded copy"),
    (LocalEntryNotFoundError("no network\nsecond line"), "could not be fetched .*path of a downloaded copy"),
    (ConnectionError("no route"), "could not be fetched .*path of a downloaded copy"),
    (OSError("We couldn't connect\nsecond line"), "could not be fetched .*path of a downloaded copy"),
    (OSError(), "could not be fetched .*path of a downloaded copy"),
], ids=lambda value: type(value).__name__)
def test_what_the_hub_refuses_becomes_one_line_with_the_cure(monkeypatch, error, words):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(FluxKontextPipeline, "from_pretrained", refuse)
    with pytest.raises(ValueError, match=f"some/model .*{words}") as caught:
        flux.load_pipeline("some/model")
    assert "\n" not in str(caught.value)


def test_an_absent_hub_model_without_network_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="nobody/no-such-model could not be fetched") as caught:
        flux.load_pipeline("nobody/no-such-model", cache_dir=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_broken_model_folder_is_one_line_that_names_the_file(tiny_model, tmp_path):
    import shutil

    broken = tmp_path / "model"
    shutil.copytree(tiny_model, broken)
    for file in (broken / "transformer").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded \(.*no file named diffusion_pytorch_model.safetensors.*"
                       r"/transformer\); download or copy it again") as caught:
        flux.load_pipeline(str(broken))
    assert "\n" not in str(caught.value)


def test_a_variant_that_is_not_there_is_refused_by_its_flag(tiny_model):
    with pytest.raises(ValueError, match="--variant fp16: .* has no such files"):
        flux.load_pipeline(tiny_model, variant="fp16")


def test_an_accident_of_a_library_is_not_taken_for_a_broken_model():
    with pytest.raises(ValueError, match="^an accident$"), flux.fetching("some/model", "fp16"):
        raise ValueError("an accident")


def test_weights_are_read_from_safetensors_only(tiny_model, tmp_path):
    import shutil

    from safetensors.torch import load_file

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(ValueError, match="no file named diffusion_pytorch_model.safetensors .*vae"):
        flux.load_pipeline(str(folder))


@pytest.mark.parametrize("free_gib, expected", [(40, "cuda"), (8, "cpu")])
def test_text_is_encoded_on_the_cpu_where_the_card_is_too_small_for_t5(monkeypatch, free_gib, expected):
    placed = []

    class Pipe:
        def to(self, device):
            placed.append(str(device))
            return self

        def encode_prompt(self, prompt, _, device, max_sequence_length):
            placed.append(str(device))
            return torch.zeros(1, 4, 16), torch.zeros(1, 16), None

    monkeypatch.setattr(flux, "load_pipeline", lambda *args, **where: Pipe())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gib * 2**30, 80 * 2**30))
    flux.encode_prompts("model", ["p"], "cuda", torch.float32)
    assert placed == [expected, expected]
