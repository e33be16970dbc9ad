"""Flow matching in FLUX's convention: paths, noise levels, weights and sampling steps. Model-free.

    x target (clean) latent, c control (degraded) latent, eps Gaussian noise, s position on the path, k start noise.
    start = (1 - k) c + k eps         z = (1 - s) x + s start         s = 0 is clean, s = 1 is the start

    k > 0   the model is told sigma = k s, the true noise level, and learns velocity = (start - x) / k.
            k = 1 is FLUX's rectified flow (velocity = eps - x), what stock Kontext samples.
    k = 0   the bridge from control to target: sigma = s, velocity = c - x. With bridge noise b,
            z += b sqrt(s (1 - s)) eps and velocity = (z - x) / s, which keeps the estimate of x unbiased.

In every case x = z - sigma * velocity, and a sampling step is z' = z + (sigma' - sigma) * velocity.
"""

import argparse
import math

import torch

from utils.parse import check_least

SMALLEST_START_NOISE = 0.1  # below, velocity = (start - x) / k grows without need; 0 itself is the bridge
SMALLEST_BRIDGE_POSITION = 1e-3  # with bridge noise the velocity's noise term grows as 1 / sqrt(s)
SMALLEST_POSITION = 1e-5  # that is drawn where s is continuous
TABLE_SIZE = 1000  # noise levels of FLUX's training table, sigma = 1/1000 ... 1


def add_density_args(group):
    """How noise levels are drawn and weighted in training."""
    group.add_argument("--weighting_scheme", default="none",
                       choices=["none", "uniform", "sigma_sqrt", "logit_normal", "mode", "cosmap"],
                       help="density of s (uniform, logit_normal, mode) or loss weight (sigma_sqrt, cosmap); "
                            "none = uniform density, weight 1")
    group.add_argument("--logit_mean", type=float, default=0.0, help="mean of the logit_normal density")
    group.add_argument("--logit_std", type=float, default=1.0, help="standard deviation of the logit_normal density")
    group.add_argument("--mode_scale", type=float, default=1.29, help="scale of the mode density")


def add_flow_args(parser):
    group = parser.add_argument_group("flow")
    group.add_argument("--start_noise", default="1.0",
                       help="noise share k of the path's start: 1 = pure noise (stock Kontext), 0 = the control image "
                            "(bridge), between = noisy control; a value or lo-hi, 0 or within 0.1 to 1")
    group.add_argument("--bridge_noise", type=float, default=0.0,
                       help="noise b added along the bridge, b sqrt(s(1-s)); needs --start_noise 0")
    group.add_argument("--train_sigmas", default="table",
                       help="positions s that are trained: table (1000 levels), continuous, or a list such as "
                            "1,0.75,0.5,0.25 (drawn uniformly; sampling then uses those only)")
    add_density_args(group)
    group.add_argument("--timestep_shift", default="none", choices=["none", "resolution"],
                       help="resolution: shift s towards the start by FLUX's mu(image tokens), in training and, "
                            "below start noise 1, in sampling")
    group.add_argument("--reference_tokens", action=argparse.BooleanOptionalAction, default=True,
                       help="append the control image's tokens, as Kontext does; off halves the sequence and needs "
                            "a start noise below 1")


def parse_start_noise(text):
    """'1', '0.5' or '0.25-0.5' -> (lo, hi). ValueError unless 0, or 0.1 <= lo <= hi <= 1."""
    parts = str(text).split("-")
    try:
        lo, hi = float(parts[0]), float(parts[-1])
    except ValueError:
        lo = hi = math.nan
    if len(parts) <= 2 and (lo == hi == 0 or SMALLEST_START_NOISE <= lo <= hi <= 1):
        return lo, hi
    raise ValueError(f"--start_noise {text}: give 0, a value from {SMALLEST_START_NOISE} to 1, or a range such as "
                     "0.25-0.5")


def parse_train_sigmas(text):
    """'table' and 'continuous' pass through; '1,0.5' -> [1.0, 0.5], descending, in (0, 1], starting at 1."""
    if text in ("table", "continuous"):
        return text
    try:
        values = sorted({float(part) for part in text.split(",")}, reverse=True)
    except ValueError:
        values = []
    if not values or values[0] != 1 or not all(0 < value <= 1 for value in values):  # NaN fails every comparison
        raise ValueError(f"--train_sigmas {text}: give table, continuous or a list in (0, 1] that holds 1, such as "
                         "1,0.75,0.5,0.25")
    return values


def check_flow_args(args):
    """Refuse flow options that contradict each other, before anything loads. ValueError with the cure."""
    check_least(args, logit_std=0)
    _, hi = parse_start_noise(args.start_noise)
    sigmas = parse_train_sigmas(args.train_sigmas)
    if not 0 <= args.bridge_noise < math.inf or (args.bridge_noise > 0 and hi > 0):
        raise ValueError(f"--bridge_noise {args.bridge_noise} needs --start_noise 0 and a value of 0 or more")
    if not args.reference_tokens and hi == 1:
        raise ValueError("--no-reference_tokens with --start_noise 1 would never show the model the image; "
                         "lower --start_noise or keep the reference tokens")
    if isinstance(sigmas, list) and (args.weighting_scheme in ("logit_normal", "mode")
                                     or args.timestep_shift != "none" or hi == 1):
        raise ValueError(f"--train_sigmas {args.train_sigmas} is a fixed list: it takes no --weighting_scheme "
                         f"{args.weighting_scheme} density, no --timestep_shift, and a --start_noise below 1")


def resolution_mu(image_tokens):
    """FLUX's shift parameter: 0.5 at 256 target tokens to 1.15 at 4096, linear (Kontext's scheduler defaults)."""
    return 0.5 + (1.15 - 0.5) * (image_tokens - 256) / (4096 - 256)


def shift_position(s, mu):
    """s -> e^mu / (e^mu + 1/s - 1), which keeps 0 and 1 (Esser et al. 2024, eq. 23, in FLUX's form); s > 0."""
    return math.exp(mu) / (math.exp(mu) + (1 / s - 1))


def draw_position(generator, train_sigmas="table", weighting_scheme="none", logit_mean=0.0, logit_std=1.0,
                  mode_scale=1.29, mu=None, smallest=0.0):
    """One position s in (0, 1] as a float, drawn from `generator` (CPU).

    train_sigmas: "table" (sigma = ceil(1000 u) / 1000), "continuous" or a list. mu: shift, or None. smallest: bound."""
    from diffusers.training_utils import compute_density_for_timestep_sampling  # seconds to import

    u = compute_density_for_timestep_sampling(
        weighting_scheme, 1, logit_mean=logit_mean, logit_std=logit_std, mode_scale=mode_scale, generator=generator
    ).clamp(0, 1).item()
    if isinstance(train_sigmas, list):
        return train_sigmas[min(int(u * len(train_sigmas)), len(train_sigmas) - 1)]
    # diffusers indexes a table that runs from 1000 down: u = 0 is the noisiest level, so small u is large sigma.
    s = 1 - u
    if train_sigmas == "table":
        s = (TABLE_SIZE - min(int(u * TABLE_SIZE), TABLE_SIZE - 1)) / TABLE_SIZE
    s = max(s, SMALLEST_POSITION, smallest)
    return s if mu is None else shift_position(s, mu)


def draw_start_noise(generator, start_noise):
    """One k from the range that `start_noise` states (text), uniform, as a float."""
    lo, hi = parse_start_noise(start_noise)
    return lo + (hi - lo) * torch.rand((), generator=generator).item()


def column(values, like):
    """(B,) -> (B, 1, 1, ...), broadcastable against `like` (B, ...)."""
    return values.view(-1, *[1] * (like.ndim - 1))


def start_point(control, noise, start_noise):
    """(1 - k) c + k eps. control, noise: (B, ...); start_noise: (B,) in [0, 1]."""
    k = column(start_noise, control)
    return (1 - k) * control + k * noise


def flow_path(target, control, noise, s, start_noise, bridge_noise=0.0):
    """Point on the path, the noise level the model is told, and the velocity it must predict.

    target, control, noise: (B, ...) latents in fp32. s, start_noise: (B,); start_noise is 0 for all items or for none.
    Returns (z, sigma, velocity): z and velocity like target, sigma (B,) in (0, 1]."""
    bridge = start_noise == 0
    k = torch.where(bridge, torch.ones_like(start_noise), start_noise)
    sigma = k * s
    start = start_point(control, noise, start_noise)
    z = (1 - column(s, target)) * target + column(s, target) * start
    velocity = (start - target) / column(k, target)
    if bridge_noise:
        spread = bridge_noise * column((s * (1 - s)).sqrt(), target) * noise
        z = z + spread
        velocity = velocity + spread / column(s, target)
    return z, sigma, velocity


def clean_from_velocity(z, velocity, sigma):
    """Estimate of the target: z - sigma * velocity. sigma: (B,)."""
    return z - column(sigma, z) * velocity


def loss_weight(weighting_scheme, sigma):
    """Weight per item, (B,) fp32: sigma^-2 (sigma_sqrt), 2 / (pi (1 - 2 sigma + 2 sigma^2)) (cosmap), else 1."""
    from diffusers.training_utils import compute_loss_weighting_for_sd3  # seconds to import

    return compute_loss_weighting_for_sd3(weighting_scheme, sigma.float())


def weighted_mse(prediction, velocity, weight):
    """Mean over items of weight * squared error, in fp32. prediction, velocity: (B, ...); weight: (B,)."""
    error = (prediction.float() - velocity.float()).square().flatten(1).mean(1)
    return (weight * error).mean()


def sampling_positions(steps, train_sigmas="table", mu=None):
    """Descending positions s of a schedule, `steps` values and a final 0, for a start noise below 1.

    linspace(1, 1/steps) shifted as in training. With a trained list, a subset at equal stride that starts at 1;
    ValueError when `steps` does not divide the list."""
    if isinstance(train_sigmas, list):
        if steps < 1 or len(train_sigmas) % steps:
            allowed = [n for n in range(1, len(train_sigmas) + 1) if len(train_sigmas) % n == 0]
            raise ValueError(f"--num_inference_steps {steps}: this LoRA was trained at s = {train_sigmas} only; "
                             f"use one of {allowed}")
        return [*train_sigmas[:: len(train_sigmas) // steps], 0.0]
    positions = [1 - i / steps for i in range(steps)]
    return [*(s if mu is None else shift_position(s, mu) for s in positions), 0.0]


def flow_step(z, velocity, sigma, sigma_next, s=None, s_next=None, bridge_noise=0.0, noise=None):
    """From sigma to sigma_next. All but z, velocity and noise are floats; s, s_next: the positions, for bridge noise.

    x_hat + (s'/s)(z - x_hat) + b sqrt(s'(s - s')/s) eps: Euler, plus the noise of the bridge's own posterior
    (z' given z and x_hat), without which its marginals would shrink."""
    z_next = z + (sigma_next - sigma) * velocity
    if bridge_noise and s_next > 0:
        z_next = z_next + bridge_noise * math.sqrt(s_next * (s - s_next) / s) * noise
    return z_next
