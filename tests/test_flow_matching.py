"""The flow's mathematics: identities, limits and diffusers' own functions as references."""

from types import SimpleNamespace

import pytest
import torch

from utils import flow_matching as fm

SHAPE = (3, 4, 6, 8)
START_NOISES = ["1", "0.5", "0.25", "0.1", "0.25-1", "0"]


def normal(seed, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def latents():
    """target, control, noise."""
    return normal(1), normal(2), normal(3)


def draw_k(start_noise, count=SHAPE[0]):
    generator = torch.Generator().manual_seed(7)
    return torch.tensor([fm.draw_start_noise(generator, start_noise) for _ in range(count)], dtype=torch.float64)


def test_bridge_equals_readme_formula_with_time_reversed(latents):
    target, control, noise = latents
    s_seed = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    share = s_seed.view(-1, 1, 1, 1)
    interpolated_latent = (1.0 - share) * control + share * target  # the README's lines
    flow_target = target - control
    z, sigma, velocity = fm.flow_path(target, control, noise, 1 - s_seed, torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(z, interpolated_latent)
    torch.testing.assert_close(sigma, 1 - s_seed)
    torch.testing.assert_close(velocity, -flow_target)


def test_start_noise_1_is_rectified_flow(latents):
    target, control, noise = latents
    s = torch.tensor([0.1, 0.6, 1.0], dtype=torch.float64)
    z, sigma, velocity = fm.flow_path(target, control, noise, s, torch.ones(3, dtype=torch.float64))
    share = s.view(-1, 1, 1, 1)
    torch.testing.assert_close(z, (1 - share) * target + share * noise)
    torch.testing.assert_close(sigma, s)
    torch.testing.assert_close(velocity, noise - target)


def test_velocity_between_is_the_rectified_one_plus_the_restoring_one(latents):
    target, control, noise = latents
    k = torch.full((3,), 0.4, dtype=torch.float64)
    _, sigma, velocity = fm.flow_path(target, control, noise, torch.full_like(k, 0.5), k)
    torch.testing.assert_close(velocity, (noise - target) + (0.6 / 0.4) * (control - target))
    torch.testing.assert_close(sigma, torch.full_like(k, 0.2))


@pytest.mark.parametrize(("start_noise", "bridge_noise"), [*((k, 0.0) for k in START_NOISES), ("0", 0.3)])
def test_target_is_z_minus_sigma_velocity(latents, start_noise, bridge_noise):
    target, control, noise = latents
    s = torch.tensor([1e-3, 0.3, 1.0], dtype=torch.float64)
    z, sigma, velocity = fm.flow_path(target, control, noise, s, draw_k(start_noise), bridge_noise)
    torch.testing.assert_close(fm.clean_from_velocity(z, velocity, sigma), target)


def test_noise_levels_stay_in_0_to_1_and_a_range_differs_per_item(latents):
    k = draw_k("0.25-1")
    _, sigma, _ = fm.flow_path(*latents, torch.ones(3, dtype=torch.float64), k)
    assert len(set(k.tolist())) == 3 and 0.25 <= k.min() and k.max() <= 1
    torch.testing.assert_close(sigma, k)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("start_noise", START_NOISES)
def test_euler_with_the_true_velocity_recovers_the_target(latents, start_noise, steps):
    target, control, noise = latents
    k = draw_k(start_noise, 1)
    target, control, noise = target[:1], control[:1], noise[:1]
    z = fm.start_point(control, noise, k)
    _, _, velocity = fm.flow_path(target, control, noise, torch.ones_like(k), k)
    positions = fm.sampling_positions(steps)
    sigmas = [s * (k.item() or 1) for s in positions]
    for now, following in zip(sigmas, sigmas[1:], strict=False):
        z = fm.flow_step(z, velocity, now, following)
    torch.testing.assert_close(z, target, rtol=0, atol=1e-12)


def moments(z, target, control, s, bridge_noise):
    """Mean error and variance ratio of samples z against the bridge's marginal at s."""
    mean = (1 - s) * target + s * control
    return (z.mean() - mean).abs().item(), (z.var() / (bridge_noise**2 * s * (1 - s))).item()


def test_path_has_the_bridge_marginals():
    count, b = 200_000, 0.7
    s = torch.full((count,), 0.35, dtype=torch.float64)
    z, _, _ = fm.flow_path(torch.full((count, 1), 0.5), torch.full((count, 1), -1.0), normal(4, (count, 1)), s,
                           torch.zeros(count, dtype=torch.float64), b)
    error, ratio = moments(z, 0.5, -1.0, 0.35, b)
    assert error < 0.005 and abs(ratio - 1) < 0.02


def test_posterior_sampling_with_an_oracle_keeps_the_bridge_marginals_at_every_step():
    count, b, target, control = 200_000, 0.7, 0.5, -1.0
    positions = [1.0, 0.8, 0.45, 0.2, 0.05, 0.0]
    z = torch.full((count,), control, dtype=torch.float64)
    for i, (s, s_next) in enumerate(zip(positions, positions[1:], strict=False)):
        z = fm.flow_step(z, (z - target) / s, s, s_next, s, s_next, b, normal(10 + i, (count,)))
        if s_next:
            error, ratio = moments(z, target, control, s_next, b)
            assert error < 0.005 and abs(ratio - 1) < 0.02, f"at {s_next}"
    torch.testing.assert_close(z, torch.full_like(z, target))


def test_plain_euler_would_shrink_the_bridge_marginals():
    count, b = 200_000, 0.7
    z = 0.2 * 0.5 + 0.8 * -1.0 + b * (0.8 * 0.2) ** 0.5 * normal(5, (count,))
    euler = fm.flow_step(z, (z - 0.5) / 0.8, 0.8, 0.3)
    posterior = fm.flow_step(z, (z - 0.5) / 0.8, 0.8, 0.3, 0.8, 0.3, b, normal(6, (count,)))
    assert moments(euler, 0.5, -1.0, 0.3, b)[1] < 0.2
    assert abs(moments(posterior, 0.5, -1.0, 0.3, b)[1] - 1) < 0.02


@pytest.mark.parametrize("scheme", ["none", "uniform", "logit_normal", "mode", "sigma_sqrt", "cosmap"])
def test_table_draws_are_the_levels_the_official_script_picks(scheme):
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.training_utils import compute_density_for_timestep_sampling

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    for seed in range(200):
        u = compute_density_for_timestep_sampling(scheme, 1, 0.5, 0.8, 1.29,
                                                  generator=torch.Generator().manual_seed(seed))
        wanted = scheduler.sigmas[(u * 1000).long()].item()
        s = fm.draw_position(torch.Generator().manual_seed(seed), "table", scheme, 0.5, 0.8, 1.29)
        assert s == pytest.approx(wanted, abs=1e-6)
        assert 0 < s <= 1 and s * 1000 == pytest.approx(round(s * 1000))


@pytest.mark.parametrize("scheme", ["none", "logit_normal", "mode"])
def test_continuous_density_matches_diffusers_in_mean_and_spread(scheme):
    from diffusers.training_utils import compute_density_for_timestep_sampling

    generator = torch.Generator().manual_seed(0)
    ours = torch.tensor([fm.draw_position(generator, "continuous", scheme, 0.7, 1.0, 1.29) for _ in range(4000)])
    theirs = 1 - compute_density_for_timestep_sampling(scheme, 40_000, 0.7, 1.0, 1.29,
                                                       generator=torch.Generator().manual_seed(1))
    assert ours.mean().item() == pytest.approx(theirs.mean().item(), abs=0.02)
    assert ours.std().item() == pytest.approx(theirs.std().item(), abs=0.02)
    assert ours.min() > 0 and ours.max() <= 1
    assert len(set(ours.tolist())) > 3900  # no table


def test_list_values_are_drawn_uniformly_and_no_others():
    generator = torch.Generator().manual_seed(0)
    values = [1.0, 0.75, 0.5, 0.25]
    drawn = [fm.draw_position(generator, values) for _ in range(4000)]
    assert set(drawn) == set(values)
    for value in values:
        assert drawn.count(value) == pytest.approx(1000, abs=120)


@pytest.mark.parametrize("train_sigmas", ["table", "continuous"])
def test_no_position_lies_below_the_smallest(train_sigmas):
    generator = torch.Generator().manual_seed(0)
    drawn = [fm.draw_position(generator, train_sigmas, smallest=0.3) for _ in range(500)]
    assert min(drawn) == 0.3 and max(drawn) > 0.9


def test_shift_is_the_formula_of_flux_and_keeps_the_ends():
    from math import exp

    assert fm.shift_position(0.3, 0.8) == pytest.approx(exp(0.8) / (exp(0.8) + 1 / 0.3 - 1))
    assert fm.shift_position(1.0, 1.15) == 1
    assert 0 < fm.shift_position(1e-6, 1.15) < 1e-5
    assert fm.shift_position(0.3, 0.0) == pytest.approx(0.3)


def test_shifted_draw_is_the_shift_of_the_plain_draw():
    for seed in range(50):
        plain, shifted = (fm.draw_position(torch.Generator().manual_seed(seed), mu=mu) for mu in (None, 1.15))
        assert shifted == fm.shift_position(plain, 1.15)
        assert plain <= shifted <= 1


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_resolution_mu_is_diffusers_calculate_shift(tokens):
    from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift

    assert fm.resolution_mu(tokens) == pytest.approx(calculate_shift(tokens, 256, 4096, 0.5, 1.15))


def test_shift_is_what_flux_scheduler_does_to_custom_sigmas():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=1.15)
    assert fm.sampling_positions(4, mu=1.15) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_loss_weights_match_their_formulas():
    sigma = torch.tensor([0.1, 0.5, 1.0])
    torch.testing.assert_close(fm.loss_weight("sigma_sqrt", sigma), sigma**-2)
    torch.testing.assert_close(fm.loss_weight("cosmap", sigma), 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2)))
    for scheme in ("none", "uniform", "logit_normal", "mode"):
        assert fm.loss_weight(scheme, sigma).tolist() == [1, 1, 1]


def test_weighted_mse_weighs_each_item():
    prediction, velocity = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    velocity[1] *= 2
    assert fm.weighted_mse(prediction, velocity, torch.tensor([1.0, 3.0])).item() == (1 * 1 + 3 * 4) / 2


def test_weighted_mse_of_bf16_is_taken_in_fp32():
    prediction = torch.full((1, 4), 1.0, dtype=torch.bfloat16, requires_grad=True)
    velocity = torch.full((1, 4), 1.001)  # the nearest bf16 is 1
    loss = fm.weighted_mse(prediction, velocity, torch.ones(1))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1e-6, rel=1e-2)
    loss.backward()
    assert prediction.grad.abs().max() > 0


@pytest.mark.parametrize(("text", "wanted"), [
    ("0", (0, 0)), ("0.0", (0, 0)), ("1", (1, 1)), ("0.5", (0.5, 0.5)), ("0.1-1", (0.1, 1)), ("0.25-0.5", (0.25, 0.5)),
    (1.0, (1, 1)), (0.5, (0.5, 0.5)),
])
def test_start_noise_is_a_value_or_a_range(text, wanted):
    assert fm.parse_start_noise(text) == wanted


@pytest.mark.parametrize("text", ["0.05", "1.2", "0.5-0.2", "0-0.5", "half", "nan", "0.2-nan", "-0.5", "", "0.2-0.5-1",
                                  "inf", "0.5-"])
def test_impossible_start_noise_is_refused_by_name(text):
    with pytest.raises(ValueError, match="--start_noise") as error:
        fm.parse_start_noise(text)
    assert "\n" not in str(error.value)


def test_train_sigmas_are_a_word_or_a_descending_list():
    assert fm.parse_train_sigmas("table") == "table"
    assert fm.parse_train_sigmas("continuous") == "continuous"
    assert fm.parse_train_sigmas("0.25,1,0.5,0.75") == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("text", ["0.5,0.25", "1,0", "1,-0.5", "1.5,1", "some", "", "1,,0.5", "1,nan", "nan,1"])
def test_impossible_train_sigmas_are_refused_by_name(text):
    with pytest.raises(ValueError, match="--train_sigmas"):
        fm.parse_train_sigmas(text)


def flow_args(**changes):
    args = {"start_noise": "0.5", "bridge_noise": 0.0, "train_sigmas": "table", "weighting_scheme": "none",
            "logit_std": 1.0, "timestep_shift": "none", "reference_tokens": True}
    return SimpleNamespace(**args | changes)


@pytest.mark.parametrize("changes", [
    {}, {"start_noise": "1"}, {"start_noise": "0", "bridge_noise": 0.3}, {"reference_tokens": False},
    {"train_sigmas": "1,0.5"}, {"start_noise": "0", "train_sigmas": "1,0.5", "weighting_scheme": "cosmap"},
    {"weighting_scheme": "logit_normal", "timestep_shift": "resolution"},
])
def test_options_that_fit_together_pass(changes):
    fm.check_flow_args(flow_args(**changes))


@pytest.mark.parametrize(("changes", "flag"), [
    ({"bridge_noise": 0.3}, "--bridge_noise"),
    ({"start_noise": "0", "bridge_noise": -0.1}, "--bridge_noise"),
    ({"start_noise": "0", "bridge_noise": float("nan")}, "--bridge_noise"),
    ({"start_noise": "0", "bridge_noise": float("inf")}, "--bridge_noise"),
    ({"start_noise": "1", "reference_tokens": False}, "--no-reference_tokens"),
    ({"start_noise": "0.5-1", "reference_tokens": False}, "--no-reference_tokens"),
    ({"train_sigmas": "1,0.5", "weighting_scheme": "mode"}, "--weighting_scheme"),
    ({"train_sigmas": "1,0.5", "timestep_shift": "resolution"}, "--timestep_shift"),
    ({"train_sigmas": "1,0.5", "start_noise": "1"}, "--start_noise"),
    ({"train_sigmas": "1,0.5", "start_noise": "0.5-1"}, "--start_noise"),
    ({"start_noise": "2"}, "--start_noise"),
    ({"train_sigmas": "0.5"}, "--train_sigmas"),
])
def test_options_that_contradict_each_other_are_refused_by_name(changes, flag):
    with pytest.raises(ValueError, match=flag) as error:
        fm.check_flow_args(flow_args(**changes))
    assert "\n" not in str(error.value)


def test_sampling_positions_run_from_1_to_0():
    assert fm.sampling_positions(4) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert fm.sampling_positions(1) == [1.0, 0.0]


def test_a_trained_list_is_sampled_on_its_own_sub_grids():
    values = [1.0, 0.75, 0.5, 0.25]
    assert fm.sampling_positions(4, values) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert fm.sampling_positions(2, values) == [1.0, 0.5, 0.0]
    assert fm.sampling_positions(1, values) == [1.0, 0.0]


@pytest.mark.parametrize("steps", [0, 3, 5, 8])
def test_steps_outside_the_sub_grids_of_a_trained_list_are_refused_with_those_allowed(steps):
    with pytest.raises(ValueError, match=r"--num_inference_steps .*\[1, 2, 4\]"):
        fm.sampling_positions(steps, [1.0, 0.75, 0.5, 0.25])
