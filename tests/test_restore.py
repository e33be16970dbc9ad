"""Sampling: stock Kontext to the letter at start noise 1, the trained schedule and nothing else below it."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline
from PIL import Image

from tests.conftest import photograph
from utils import flow_matching as fm
from utils import flux, lora, restore

STEPS = 4
SHAPE = (16, 6, 8)
SCHEDULERS = [{"shift": 3.0, "use_dynamic_shifting": True}, {"shift": 3.0, "use_dynamic_shifting": False},
              {"shift": 3.0, "use_dynamic_shifting": True, "shift_terminal": 0.02}]


def make_settings(**changes):
    return restore.STOCK_SETTINGS | {"guidance_scale": 1.7, "max_sequence_length": 16} | changes


def random_text(batch, tokens=4, width=16):
    generator = torch.Generator().manual_seed(5)
    return flux.TextEmbeds(torch.randn(1, tokens, width, generator=generator).repeat(batch, 1, 1),
                           torch.randn(1, width, generator=generator).repeat(batch, 1))


def random_latents(seed, batch=1):
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(seed))


def sample(pipe, control, text, settings, steps, seeds, start_noise=None):
    """restore_latents with the noise of `seeds`."""
    noise = restore.sampling_noise(settings, control.shape[1:], steps, seeds)
    return restore.restore_latents(pipe, control, text, settings, steps, noise, start_noise)


def photo_tensor(name, size):
    return torch.from_numpy(photograph(name, size).copy()).movedim(-1, 0)[None].float() / 127.5 - 1


class Oracle(torch.nn.Module):
    """A transformer that knows the target: velocity = (z - x) / sigma, and remembers what it was given."""

    def __init__(self, target):
        super().__init__()
        self.config = SimpleNamespace(guidance_embeds=False)
        self.target, self.seen, self.tokens = target, [], []

    def forward(self, hidden_states, timestep, return_dict, img_ids, **others):
        height, width = self.target.shape[-2:]
        own = height * width // 4
        z = flux.unpack(hidden_states[:, :own], height, width)
        self.seen.append((z, timestep))
        self.tokens.append(hidden_states.shape[1])
        velocity = torch.zeros_like(hidden_states)
        velocity[:, :own] = flux.pack((z - self.target) / timestep.view(-1, 1, 1, 1))
        return (velocity,)


def oracle_pipe(target, **config):
    return SimpleNamespace(transformer=Oracle(target), scheduler=FlowMatchEulerDiscreteScheduler(**config))


@pytest.fixture(scope="module")
def stock_pipe(tiny_model):
    pipe = FluxKontextPipeline.from_pretrained(tiny_model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def stock_and_ours(stock_pipe, tiny_pipe, tiny_lora, request):
    """The stock pipeline and ours, both with or both without the LoRA."""
    if request.param == "lora":
        stock_pipe.load_lora_weights(tiny_lora)
        lora.load(tiny_pipe, tiny_lora)
    yield stock_pipe, tiny_pipe
    stock_pipe.unload_lora_weights()


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("stock_and_ours", ["base", "lora"], indirect=True)
def test_start_noise_1_equals_stock_kontext_in_latents_and_pixels(stock_and_ours, steps):
    stock_pipe, tiny_pipe = stock_and_ours
    height, width = 48, 64
    image = Image.fromarray(photograph("astronaut", (height, width)))
    with torch.no_grad():
        prompt, pooled, _ = stock_pipe.encode_prompt("restore it", None, max_sequence_length=16)

    def run_stock(output_type):
        return stock_pipe(
            image=image, prompt_embeds=prompt, pooled_prompt_embeds=pooled, height=height, width=width,
            max_area=height * width, _auto_resize=False, num_inference_steps=steps, guidance_scale=1.7,
            generator=torch.Generator().manual_seed(3), output_type=output_type).images

    control = photo_tensor("astronaut", (height, width))
    text, settings = flux.TextEmbeds(prompt, pooled), make_settings()
    latents = sample(tiny_pipe, flux.encode(tiny_pipe.vae, control), text, settings, steps, [3])
    torch.testing.assert_close(flux.pack(latents), run_stock("latent"), rtol=0, atol=1e-5)
    pixels = restore.restore(tiny_pipe, control, text, settings, steps, [3])
    torch.testing.assert_close((pixels + 1) / 2, run_stock("pt"), rtol=0, atol=1e-5)


def test_the_lora_changes_the_restoration(tiny_pipe, tiny_lora):
    text, control = random_text(1), random_latents(0)
    base = sample(tiny_pipe, control, text, make_settings(), 2, [0])
    lora.load(tiny_pipe, tiny_lora)
    assert (sample(tiny_pipe, control, text, make_settings(), 2, [0]) - base).abs().max() > 1e-2


@pytest.mark.parametrize("timestep_shift", ["none", "resolution"])
@pytest.mark.parametrize("config", SCHEDULERS)
@pytest.mark.parametrize("start_noise", [0.5, 0.25, 0.0])
def test_transformer_receives_the_trained_pairs_whatever_the_scheduler_says(start_noise, config, timestep_shift):
    target, control = random_latents(1), random_latents(2)
    pipe = oracle_pipe(target, **config)
    settings = make_settings(start_noise=[start_noise] * 2, timestep_shift=timestep_shift)
    restored = sample(pipe, control, random_text(1), settings, STEPS, [9])

    noise = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(9))
    start = (1 - start_noise) * control + start_noise * noise
    mu = fm.resolution_mu(SHAPE[1] * SHAPE[2] // 4) if timestep_shift == "resolution" else None
    positions = [1 - i / STEPS for i in range(STEPS)]
    if mu is not None:
        positions = [fm.shift_position(s, mu) for s in positions]
    assert len(pipe.transformer.seen) == STEPS
    for s, (z, told) in zip(positions, pipe.transformer.seen, strict=True):
        torch.testing.assert_close(z, (1 - s) * target + s * start, rtol=0, atol=1e-5)
        torch.testing.assert_close(told, torch.tensor([s * (start_noise or 1)]), rtol=0, atol=1e-6)
    torch.testing.assert_close(restored, target, rtol=0, atol=1e-5)

    # what that scheduler would have made of the same sigmas
    stock = FlowMatchEulerDiscreteScheduler(**config)
    stock.set_timesteps(sigmas=[s * (start_noise or 1) for s in positions], mu=1.15)
    told = torch.cat([told for _, told in pipe.transformer.seen])
    assert (stock.sigmas[:-1] - told).abs().max() > 0.05


@pytest.mark.parametrize("bridge_noise", [0.0, 0.4])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_sampling_from_the_degraded_latent_recovers_the_target(steps, bridge_noise):
    target, control = random_latents(1), random_latents(2)
    pipe = oracle_pipe(target, shift=3.0, use_dynamic_shifting=True)
    settings = make_settings(start_noise=[0.0, 0.0], bridge_noise=bridge_noise)
    restored = sample(pipe, control, random_text(1), settings, steps, [0])
    torch.testing.assert_close(pipe.transformer.seen[0][0], control)
    torch.testing.assert_close(restored, target, rtol=0, atol=1e-5)


def test_bridge_noise_enters_the_sampling_between_its_ends():
    target, control = random_latents(1), random_latents(2)
    seen = []
    for bridge_noise in (0.0, 0.4):
        pipe = oracle_pipe(target)
        settings = make_settings(start_noise=[0.0, 0.0], bridge_noise=bridge_noise)
        sample(pipe, control, random_text(1), settings, 2, [0])
        seen.append(pipe.transformer.seen[1][0])
    spread = (seen[1] - seen[0]).std().item()
    assert spread == pytest.approx(0.4 * 0.5, rel=0.1)  # b sqrt(s (1 - s)) at s = 1/2


def test_start_noise_1_follows_the_model_folders_scheduler():
    target = random_latents(1)
    for config in SCHEDULERS:
        pipe = oracle_pipe(target, **config)
        sample(pipe, random_latents(2), random_text(1), make_settings(), STEPS, [0])
        pipe.scheduler.set_timesteps(sigmas=[1 - i / STEPS for i in range(STEPS)], mu=fm.resolution_mu(12))
        told = torch.cat([told for _, told in pipe.transformer.seen])
        torch.testing.assert_close(told, pipe.scheduler.sigmas[:-1])


def test_sampling_leaves_the_pipelines_scheduler_alone():
    pipe = oracle_pipe(random_latents(1), shift=3.0)
    before = pipe.scheduler.sigmas.clone()
    sample(pipe, random_latents(2), random_text(1), make_settings(), 3, [0])
    assert torch.equal(pipe.scheduler.sigmas, before) and pipe.scheduler.step_index is None


def test_the_middle_of_the_trained_range_is_the_default_start_noise():
    settings = make_settings(start_noise=[0.25, 0.75])
    assert restore.choose_start_noise(settings) == 0.5
    assert restore.choose_start_noise(settings, 0.25) == 0.25
    assert restore.choose_start_noise(settings, 0.75) == 0.75


@pytest.mark.parametrize("start_noise", [0.0, 0.2, 0.8, 1.0, float("nan")])
def test_start_noise_outside_the_trained_range_is_refused(start_noise):
    pipe = oracle_pipe(random_latents(1))
    with pytest.raises(ValueError, match="--start_noise .* 0.25 to 0.75"):
        sample(pipe, random_latents(2), random_text(1), make_settings(start_noise=[0.25, 0.75]), 2,
                                [0], start_noise)
    assert not pipe.transformer.seen


@pytest.mark.parametrize("start_noise", [0.0, 0.5, 1.0])
def test_zero_steps_are_refused(start_noise):
    settings = make_settings(start_noise=[start_noise] * 2)
    with pytest.raises(ValueError, match="--num_inference_steps 0"):
        sample(oracle_pipe(random_latents(1)), random_latents(2), random_text(1), settings, 0, [0])


def test_a_lora_trained_on_listed_sigmas_is_sampled_at_those_only():
    target = random_latents(1)
    settings = make_settings(start_noise=[0.5, 0.5], train_sigmas=[1.0, 0.75, 0.5, 0.25])
    pipe = oracle_pipe(target)
    sample(pipe, random_latents(2), random_text(1), settings, 2, [0])
    assert [told.item() for _, told in pipe.transformer.seen] == [0.5, 0.25]
    with pytest.raises(ValueError, match=r"--num_inference_steps 3.*\[1, 2, 4\]"):
        sample(pipe, random_latents(2), random_text(1), settings, 3, [0])


@pytest.mark.parametrize(("height", "width"), [(48, 64), (50, 61), (9, 7), (16, 16), (17, 33), (1, 40)])
def test_any_size_comes_out_as_it_went_in(tiny_pipe, height, width):
    control = photo_tensor("chelsea", (height, width))
    restored = restore.restore(tiny_pipe, control, random_text(1), make_settings(start_noise=[0.0, 0.0]), 1, [0])
    assert restored.shape == (1, 3, height, width)
    assert restored.isfinite().all() and restored.abs().max() <= 1
    assert restore.round_trip(tiny_pipe.vae, control).shape == restored.shape


def test_a_multiple_of_the_models_size_is_not_padded_and_others_repeat_their_own_edge():
    image = photo_tensor("chelsea", (32, 48))
    assert torch.equal(restore.pad_to_multiple(image, 16), image)
    padded = restore.pad_to_multiple(image[..., :30, :45], 16)
    assert padded.shape == image.shape
    assert torch.equal(padded[..., :30, :45], image[..., :30, :45])
    assert torch.equal(padded[..., 30:, :45], image[..., 27:29, :45].flip(-2))
    tiny = restore.pad_to_multiple(image[..., :3, :2], 16)
    assert torch.equal(tiny, image[..., :3, :2][..., torch.arange(16).clamp(max=2), :]
                       [..., torch.arange(16).clamp(max=1)])


@pytest.mark.parametrize("changes", [
    {"start_noise": [1.0, 1.0]}, {"start_noise": [0.5, 0.5]}, {"start_noise": [0.0, 0.0]},
    {"start_noise": [0.0, 0.0], "bridge_noise": 0.4}, {"start_noise": [0.5, 0.5], "vae_encode_mode": "sample"},
])
def test_an_items_result_depends_on_its_own_seed_alone(tiny_pipe, changes):
    images = torch.cat([photo_tensor(name, (40, 48)) for name in ("astronaut", "chelsea")])
    settings = make_settings(**changes)
    together = restore.restore(tiny_pipe, images, random_text(2), settings, 3, [11, 12])
    apart = torch.cat([restore.restore(tiny_pipe, images[i : i + 1], random_text(1), settings, 3, [11 + i])
                       for i in range(2)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)


def test_another_seed_gives_another_restoration_and_the_same_seed_the_same(tiny_pipe):
    control, settings = photo_tensor("astronaut", (32, 32)), make_settings(start_noise=[0.5, 0.5])
    first, again, other = (restore.restore(tiny_pipe, control, random_text(1), settings, 2, [seed])
                           for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 1e-4


def test_drawing_noise_moves_no_global_state(tiny_pipe):
    before = torch.get_rng_state()
    settings = make_settings(start_noise=[0.0, 0.0], bridge_noise=0.4, vae_encode_mode="sample")
    restore.restore(tiny_pipe, photo_tensor("astronaut", (32, 32)), random_text(1), settings, 2, [1])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sampled_vae_posterior_differs_from_its_mean_and_repeats(tiny_pipe):
    control = photo_tensor("astronaut", (32, 32))
    mode, sample, again = (
        restore.restore(tiny_pipe, control, random_text(1),
                        make_settings(start_noise=[0.0, 0.0], vae_encode_mode=name), 1, [4])
        for name in ("mode", "sample", "sample"))
    assert torch.equal(sample, again)
    assert (mode - sample).abs().max() > 1e-4


def test_without_reference_tokens_the_transformer_sees_half_the_tokens():
    target, own = random_latents(1), SHAPE[1] * SHAPE[2] // 4
    for reference_tokens, factor in ((True, 2), (False, 1)):
        pipe = oracle_pipe(target)
        settings = make_settings(start_noise=[0.5, 0.5], reference_tokens=reference_tokens)
        sample(pipe, random_latents(2), random_text(1), settings, 2, [0])
        assert pipe.transformer.tokens == [factor * own] * 2


def test_guidance_of_the_settings_reaches_the_transformer(tiny_pipe):
    control, seen = random_latents(2), []
    tiny_pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["guidance"].tolist()), with_kwargs=True)
    sample(tiny_pipe, control, random_text(1), make_settings(guidance_scale=1.25), 1, [0])
    assert seen == [[1.25]]


def test_settings_hold_what_sampling_needs_and_survive_json():
    import json

    args = SimpleNamespace(start_noise="0.25-0.5", bridge_noise=0.0, train_sigmas="1,0.5", timestep_shift="none",
                           reference_tokens=False, vae_encode_mode="sample", guidance_scale=1.0,
                           max_sequence_length=77, instance_prompt="clean", resolution=64, base_model_id="tiny",
                           use_bucket_sampler=False, aspect_ratio_buckets=None)
    settings = restore.make_settings(args)
    assert settings.keys() == restore.STOCK_SETTINGS.keys()
    assert json.loads(json.dumps(settings)) == settings
    assert settings["start_noise"] == [0.25, 0.5] and settings["train_sigmas"] == [1.0, 0.5]
    assert settings["resolution"] == 64
    for buckets in ({"use_bucket_sampler": True}, {"aspect_ratio_buckets": "32:64"}):  # --resolution was not used
        assert restore.make_settings(SimpleNamespace(**vars(args) | buckets))["resolution"] is None


def test_noise_of_a_crop_and_of_a_stack_is_the_noise_of_the_whole():
    settings = make_settings(start_noise=[0.0, 0.0], bridge_noise=0.4, vae_encode_mode="sample")
    noise = restore.sampling_noise(settings, SHAPE, 3, [5])
    assert len(noise.bridge) == 2  # the last step adds none
    halves = [noise.crop(slice(None), slice(start, start + 4)) for start in (0, 4)]
    both = restore.stack_noise(halves)
    for field, stacked in zip([noise.start, noise.vae, *noise.bridge], [both.start, both.vae, *both.bridge],
                              strict=True):
        assert torch.equal(torch.cat(list(stacked), -1), field[0])
    fields = [noise.start, noise.vae, *noise.bridge]
    assert all((a - b).abs().max() > 1 for i, a in enumerate(fields) for b in fields[:i])
    plain = restore.sampling_noise(make_settings(), SHAPE, 3, [5])
    assert torch.equal(plain.start, noise.start) and plain.vae is None and not plain.bridge


def test_restorations_are_bit_equal_to_those_from_one_draw_after_the_other(tiny_pipe):
    """Bridge noise and posterior noise, written out step by step."""
    settings = make_settings(start_noise=[0.0, 0.0], bridge_noise=0.4, vae_encode_mode="sample")
    control, text = photo_tensor("astronaut", (32, 48)), random_text(1)
    vae_noise = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(7 ^ 0xC0DE))
    z = latents = flux.encode(tiny_pipe.vae, control, vae_noise)
    draws = torch.Generator().manual_seed(7 ^ 0x5EED)
    with torch.no_grad():
        for s, s_next in ((1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)):
            velocity = flux.predict_velocity(tiny_pipe.transformer, z, torch.tensor([s]), latents, text, 1.7)
            z = fm.flow_step(z, velocity, s, s_next, s, s_next, 0.4, torch.randn(1, 16, 4, 6, generator=draws))
        expected = flux.decode(tiny_pipe.vae, z).clamp(-1, 1)
    torch.testing.assert_close(restore.restore(tiny_pipe, control, text, settings, 3, [7]), expected, rtol=0, atol=0)


def test_fidelity_turns_start_noise_within_the_trained_range():
    settings = make_settings(start_noise=[0.25, 0.75])
    noise = [restore.fidelity_start_noise(settings, fidelity) for fidelity in (0, 0.25, 1)]
    assert noise == [0.75, 0.625, 0.25]
    assert all(restore.choose_start_noise(settings, k) == k for k in noise)
    with pytest.raises(ValueError, match="--fidelity 0.5: .* start noise 1 alone.*--lora_weight"):
        restore.fidelity_start_noise(make_settings(), 0.5)
