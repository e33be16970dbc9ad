"""Train a restoration LoRA on FLUX.1 Kontext: degraded photograph in, clean photograph out.

Pairs are made on the fly (my_dataset/degradations.py). With x the clean latent, c the degraded one, eps noise:
    start = (1 - k) c + k eps,   z = (1 - s) x + s start,   the model learns velocity = (z - x) / sigma, sigma = k s
k is --start_noise: 1 is stock Kontext (noise to image, c in the reference tokens only), 0 the bridge from c to x.

    accelerate launch train_deg_lora_flux_kontext.py --pretrained_model_name_or_path /path/to/FLUX.1-Kontext-dev \
        --hr_root photos --heldout_root heldout --degradation_types downsample,noise,blur --max_train_steps 3000
"""

import math
import sys
from pathlib import Path

import torch

from my_dataset.dataset_deg_bucket import make_loader
from my_dataset.dataset_deg_paired import add_data_args, collate_fn, dataset_from_args
from my_dataset.degradations import DEFAULTS, add_degradation_args, degrader_from_args, parse_range
from my_dataset.heldout import heldout_from_args, load_validation_images
from my_dataset.streaming import add_stream_args, check_shards
from utils import flow_matching as fm
from utils import flux, lora, placement, run, speed, validation
from utils.cache import encode_all, encode_cached
from utils.card import check_card, push_to_hub, restore_command, write_model_card
from utils.losses import add_perceptual_args, check_perceptual_args, crop_boxes, make_perceptual_loss, perceptual_loss
from utils.parse import make_parser, run_main
from utils.restore import make_settings

SAMPLE_OPTIONS = (  # what decides how a sample looks and what is learned of it
    *sorted(flag.removeprefix("--") for flag in DEFAULTS), "crop_zoom", "center_crop", "random_flip",
    "identity_probability", "perceptual_loss", "perceptual_loss_weight", "perceptual_loss_target",
    "perceptual_max_sigma", "perceptual_crop")
FLUX_LATENT_PX = 8  # side of a latent, for the memory prediction, before the VAE is there to ask


def parse_args(argv=None):
    parser = make_parser(__doc__)
    flux.add_model_args(parser)
    add_data_args(parser)
    add_stream_args(parser)
    parser.add_argument("--instance_prompt", default="Restore this degraded photograph to high fidelity",
                        help="prompt of every image without its own")
    parser.add_argument("--cache_latents", action="store_true",
                        help="keep the clean images' latents on disk; needs --center_crop and no --random_flip")
    add_degradation_args(parser)
    fm.add_flow_args(parser)
    add_perceptual_args(parser)
    lora.add_lora_args(parser)
    run.add_optimizer_args(parser)
    run.add_training_args(parser)
    placement.add_placement_args(parser)
    validation.add_validation_args(parser)
    args = parser.parse_args(argv)

    args.base_model_id = flux.model_id(args.pretrained_model_name_or_path)
    run.check_training_args(args)
    fm.check_flow_args(args)
    if args.num_inference_steps and fm.parse_start_noise(args.start_noise)[1] < 1:
        fm.sampling_positions(args.num_inference_steps, fm.parse_train_sigmas(args.train_sigmas))
    lora.check_lora_args(args)
    check_perceptual_args(args)
    placement.check_placement_args(args)
    flux.check_model(args.pretrained_model_name_or_path)
    fixed_crop = args.center_crop and not args.random_flip and len(set(parse_range(args.crop_zoom, "--crop_zoom"))) == 1
    if args.cache_latents and not fixed_crop:
        raise ValueError("--cache_latents keeps one latent per image: it needs --center_crop, one --crop_zoom and no "
                         "--random_flip")
    run.check_output_dir(args)
    check_card(args.output_dir)
    return args


def training_step(pipe, transformer, perceptual, batch, text, args):
    """Weighted losses of one batch, {name: scalar}, and nothing random but the items' own generators.

    batch["target"], batch["control"]: (B, 3, H, W) in [-1, 1]; batch["seed"]: B integers. text: TextEmbeds of B."""
    device = batch["target"].device
    generators = [torch.Generator().manual_seed(seed) for seed in batch["seed"]]
    torch.manual_seed(batch["seed"][0])  # LoRA dropout, the one draw that takes no generator

    # Everything is drawn on the CPU: an item's numbers are the same on any device, rank and worker.
    shape = flux.latent_shape(pipe.vae, *batch["target"].shape[-2:])
    tokens = shape[1] * shape[2] // flux.PATCH**2
    train_sigmas = fm.parse_train_sigmas(args.train_sigmas)
    mu = fm.resolution_mu(tokens) if args.timestep_shift == "resolution" else None
    smallest = fm.SMALLEST_BRIDGE_POSITION if args.bridge_noise else 0.0
    s = [fm.draw_position(generator, train_sigmas, args.weighting_scheme, args.logit_mean, args.logit_std,
                          args.mode_scale, mu, smallest) for generator in generators]
    k = [fm.draw_start_noise(generator, args.start_noise) for generator in generators]
    noise, *vae_noise = (torch.stack([torch.randn(shape, generator=generator) for generator in generators])
                         .to(device, non_blocking=True) for _ in range(3 if args.vae_encode_mode == "sample" else 1))
    boxes = crop_boxes(*shape[1:], args.perceptual_crop, generators)
    s, k = torch.tensor(s), torch.tensor(k)
    told = s * torch.where(k == 0, 1.0, k)  # sigma, on the CPU, where it is known without waiting for the device

    with torch.no_grad():
        if args.cache_latents:
            target = encode_cached(pipe.vae, batch["target"], Path(args.output_dir) / "latent_cache", *vae_noise[:1])
        else:
            target = flux.encode(pipe.vae, batch["target"], *vae_noise[:1])
        control = flux.encode(pipe.vae, batch["control"], *vae_noise[1:])
        z, sigma, velocity = fm.flow_path(target, control, noise, s.to(device, non_blocking=True),
                                          k.to(device, non_blocking=True), args.bridge_noise)

    reference = control if args.reference_tokens else None
    prediction = flux.predict_velocity(transformer, z, told, reference, text, args.guidance_scale)
    losses = {"flow": fm.weighted_mse(prediction, velocity, fm.loss_weight(args.weighting_scheme, sigma))}
    if perceptual is not None:
        losses["perceptual"] = args.perceptual_loss_weight * perceptual_loss(
            perceptual, pipe.vae, z, prediction, velocity, told.tolist(), batch["target"], boxes,
            args.perceptual_loss_target, args.perceptual_max_sigma)
    return losses


def main(args):
    # --- data: cheap to check, so it comes before any model
    degrade = None if args.lr_root else degrader_from_args(args)
    dataset = dataset_from_args(args, degrade, args.instance_prompt, args.seed)
    heldout = heldout_from_args(args, dataset, degrade)
    extra_images = load_validation_images(args)

    accelerator, dtype = run.make_accelerator(args, can_shard=True)
    validation_steps = run.plan_steps(args, dataset.images, accelerator.num_processes)
    if dataset.stream:
        check_shards(dataset.stream, accelerator.num_processes)
    settings, device = make_settings(args), accelerator.device
    validation_prompt = args.validation_prompt or args.instance_prompt
    prompts = [record.prompt or args.instance_prompt for record in dataset.records] + [validation_prompt]
    largest = max(dataset.buckets, key=math.prod)
    decode_px = args.perceptual_crop * FLUX_LATENT_PX if args.perceptual_loss else 0
    plan = placement.plan(args, device, dtype, [largest] * (1 + args.reference_tokens), prompts, decode_px=decode_px)
    images = dataset.images or str(dataset.stream)
    identity = run.identity(args, settings, images, accelerator.num_processes,
                            more=SAMPLE_OPTIONS)
    identity |= {"base_precision": plan.base_precision, "data": None if dataset.stream else dataset.fingerprint()}
    lpips, perceptual = validation.load_lpips(args.lpips_backbone), None
    if args.perceptual_loss:
        perceptual = make_perceptual_loss(args.perceptual_loss, args.perceptual_weights)
    step, state = run.resume(args, identity)
    if args.dry_run:
        return run.print_plan(accelerator, args, images, step, validation_steps, plan)
    run.start_run(accelerator, args, step, "flux-kontext-restoration")
    if accelerator.is_main_process and step == 0:
        run.report_skipped([f"{path}: {reason}" for path, reason in dataset.unreadable], args.output_dir, "left out")

    # --- models. Text first: T5-XXL is gone before the transformer arrives.
    where = flux.source(args)
    encoded = encode_all(args.pretrained_model_name_or_path, prompts, accelerator, dtype, args.max_sequence_length,
                         Path(args.output_dir) / "text_cache", **where)
    pipe = placement.load(args.pretrained_model_name_or_path, args, plan, device, dtype, settings,
                          encoded[validation_prompt].pooled, **where)
    flux.check_sizes(pipe.vae, dataset.buckets)
    lora_parameters = lora.attach(pipe.transformer, args.rank, args.lora_alpha, args.lora_dropout, args.lora_layers,
                                  args.use_dora, args.use_rslora, args.seed)
    tokens = args.max_sequence_length + (1 + args.reference_tokens) * flux.image_tokens(pipe.vae, dataset.buckets)
    placement.prepare(pipe.transformer, args, plan, tokens, device, dtype)
    perceptual = perceptual and perceptual.to(device)

    models = {"transformer": pipe.transformer}
    optimizer = run.make_optimizer(lora_parameters, args, accelerator.num_processes)
    lr_scheduler = run.make_lr_scheduler(optimizer, args)
    ema = lora.make_ema(lora_parameters, args.ema_decay) if args.use_ema else None
    if state:
        run.load_state(state, models, optimizer, lr_scheduler, ema)

    loader = make_loader(dataset, collate_fn, args, pin_memory=device.type == "cuda",
                         start=step * args.gradient_accumulation_steps * accelerator.num_processes)
    transformer, optimizer, loader = accelerator.prepare(pipe.transformer, optimizer, loader)
    transformer.train()
    run.set_optimizer_mode(optimizer, training=True)

    # --- what is saved and validated
    validation_text = encoded[validation_prompt].to(device, dtype)

    def write_lora(folder):
        with run.evaluation_weights(optimizer, ema, lora_parameters):
            return lora.save(pipe.transformer, folder, settings)

    def validate():
        if (accelerator.is_main_process or plan.shards > 1) and (heldout or extra_images):
            with run.evaluation_weights(optimizer, ema, lora_parameters), speed.eagerly():
                grid = Path(args.output_dir) / "validation" / f"step-{step:06d}.png"
                steps = args.num_inference_steps or validation.default_steps(settings)
                scores = validation.validate(pipe, heldout, validation_text, settings, steps, args.seed, grid,
                                             extra_images, lpips)
            run.report_validation(accelerator, args.output_dir, scores, grid, step)
        accelerator.wait_for_everyone()

    # --- the loop
    stop = run.StopSignal(accelerator.num_processes)
    guard = run.FiniteGuard()
    progress = run.Progress(accelerator, args, step)
    if run.lacks_validation(accelerator, args, step, validation_steps):
        validate()  # at step 0 the base model, before any training
        progress.restart()
    batches = iter(loader)
    while step < args.max_train_steps:
        for _ in range(args.gradient_accumulation_steps):
            batch = progress.next_batch(batches)
            with accelerator.accumulate(transformer):
                text = flux.stack_text(encoded, batch["prompt"], device, dtype)
                losses = training_step(pipe, transformer, perceptual, batch, text, args)
                accelerator.backward(guard.protect(sum(losses.values()), batch["path"]))
                if accelerator.sync_gradients:
                    norm = guard.filter(lora_parameters, args.max_grad_norm, step + 1)
                optimizer.step()
                optimizer.zero_grad()
            progress.add(losses)
        lr_scheduler.step()
        if ema:
            ema.step(lora_parameters)
        step += 1
        progress.step()

        is_last = step == args.max_train_steps
        is_checkpoint = args.checkpointing_steps and step % args.checkpointing_steps == 0
        is_validation = is_last or step % validation_steps == 0
        signal_number = stop.agreed()
        if is_last or is_checkpoint or is_validation or signal_number or step % args.logging_steps == 0:
            guard.check(accelerator)
            progress.report(accelerator, step, norm, lr_scheduler)
        if is_checkpoint or signal_number:
            run.save_checkpoint(accelerator, args, step, identity, models, optimizer, lr_scheduler, ema, write_lora)
        if signal_number:
            return run.stopped(accelerator, progress, step, signal_number)
        if is_validation:
            validate()
            progress.restart()
    progress.bar.close()

    if accelerator.is_main_process:
        results = {"LoRA": write_lora(args.output_dir),
                   "model card": write_model_card(args, settings, images, dataset.is_paired)}
        command = restore_command(args.pretrained_model_name_or_path, args.output_dir)
        run.print_summary(args, results, run.lora_uses(args, settings, command))
        if args.push_to_hub:
            push_to_hub(args)
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(run_main(lambda: main(parse_args())))
