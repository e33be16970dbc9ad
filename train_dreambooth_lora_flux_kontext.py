"""Train a subject or an edit LoRA on FLUX.1 Kontext. Takes the command lines of diffusers' own script of this name.

Subject: images with a prompt; text to image. Edit: images with the references they are made from and an instruction
each; references are appended as tokens. With x the target latent, eps noise, sigma in (0, 1]:
    z = (1 - sigma) x + sigma eps,   the model learns velocity = eps - x        (rectified flow, stock Kontext's own)

    accelerate launch train_dreambooth_lora_flux_kontext.py --pretrained_model_name_or_path /path/FLUX.1-Kontext-dev \
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --guidance_scale 1 --max_train_steps 500
    accelerate launch train_dreambooth_lora_flux_kontext.py --pretrained_model_name_or_path /path/FLUX.1-Kontext-dev \
        --instance_data_dir edited --cond_data_dir originals --instance_prompt "turn it into a drawing"
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch

from my_dataset.dataset_deg_bucket import make_loader
from my_dataset.dataset_dreambooth import (
    add_data_args,
    collate_fn,
    dataset_from_args,
    heldout_from_args,
    load_validation_references,
    plan_class_images,
)
from my_dataset.prompts import tokenize_prompt
from utils import flow_matching as fm
from utils import flux, lora, placement, run, speed, validation
from utils.cache import encode_all, encode_cached
from utils.card import check_card, generate_command, push_to_hub, write_dreambooth_card
from utils.generate import generate_class_images
from utils.parse import check_least, make_parser, run_main, writable_folder
from utils.restore import STOCK_SETTINGS, evaluating

SUBJECT_IMAGES = 64  # at most so many, evenly spread, are what generated images are compared with


def parse_args(argv=None):
    parser = make_parser(__doc__)
    flux.add_model_args(parser)
    parser.add_argument("--offload", action="store_true", help="keep the VAE on the CPU while it is not used (the text "
                        "encoders never stay)")
    add_data_args(parser)
    parser.add_argument("--cache_latents", action="store_true",
                        help="keep latents on disk; crops and mirroring are then drawn once and kept")
    parser.add_argument("--prior_generation_precision", choices=["no", "fp32", "fp16", "bf16"],
                        help="precision in which class images are generated; default: that of training")
    fm.add_density_args(parser.add_argument_group("flow"))
    lora.add_lora_args(parser)
    group = parser.add_argument_group("text encoder")
    group.add_argument("--train_text_encoder", action="store_true", help="train a LoRA on CLIP too")
    group.add_argument("--text_encoder_lr", type=float, default=5e-6,
                       help="its learning rate; with 0 or Prodigy that of the rest")
    group.add_argument("--adam_weight_decay_text_encoder", type=float, default=1e-3, help="its weight decay")
    run.add_optimizer_args(parser)
    run.add_training_args(parser)
    placement.add_placement_args(parser)
    group = validation.add_schedule_args(parser)
    group.add_argument("--validation_image", nargs="+", default=[], help="edit training: image to edit, or several "
                       "references; --validation_prompt says how")
    group.add_argument("--skip_final_inference", action="store_true", help="no validation after the last step")
    run.add_obsolete_args(parser)
    # The official script's defaults.
    parser.set_defaults(guidance_scale=3.5, rank=4, lora_alpha=4, output_dir="flux-kontext-lora")
    args = parser.parse_args(argv)

    args.base_model_id = flux.model_id(args.pretrained_model_name_or_path)
    run.replace_obsolete(args)
    run.check_training_args(args)
    lora.check_lora_args(args)
    check_least(args, logit_std=0, repeats=1, num_class_images=1, sample_batch_size=1, prior_loss_weight=0,
                text_encoder_lr=0, cond_resolution=16, max_pixels=1, dataloader_num_workers=0)
    if not 0 <= args.caption_dropout <= 1:
        raise ValueError(f"--caption_dropout {args.caption_dropout}: give 0 to 1")
    if args.lora_alpha != args.rank:
        print(f"--lora_alpha {args.lora_alpha:g} with --rank {args.rank}: the LoRA is scaled by "
              f"{args.lora_alpha / args.rank:g}; --lora_alpha {args.rank} would scale it by 1", flush=True)
    if args.with_prior_preservation:
        if not (args.class_data_dir and args.class_prompt):
            raise ValueError("--with_prior_preservation needs --class_data_dir and --class_prompt")
        writable_folder(args.class_data_dir, "--class_data_dir")
    if not args.with_prior_preservation and (args.class_data_dir or args.class_prompt):
        print("--class_data_dir and --class_prompt do nothing without --with_prior_preservation", flush=True)
    placement.check_placement_args(args)
    flux.check_model(args.pretrained_model_name_or_path)
    run.check_output_dir(args)
    check_card(args.output_dir)
    return args


def training_step(pipe, transformer, text_encoder, batch, text, args):
    """Weighted losses of one batch, {name: scalar}, and nothing random but the items' own generators.

    batch["target"]: (B, 3, H, W) in [-1, 1], with prior preservation the class images last; batch["references"]: list
    of (B, 3, h, w); batch["seed"]: B integers. text: TextEmbeds of B. text_encoder: CLIP where it is trained."""
    device = batch["target"].device
    generators = [torch.Generator().manual_seed(seed) for seed in batch["seed"]]
    torch.manual_seed(batch["seed"][0])  # LoRA dropout, the one draw that takes no generator

    # Everything is drawn on the CPU: an item's numbers are the same on any device, rank and worker.
    images = [batch["target"], *batch["references"]]
    shapes = [flux.latent_shape(pipe.vae, *image.shape[-2:]) for image in images]
    told = torch.tensor([fm.draw_position(generator, "table", args.weighting_scheme, args.logit_mean, args.logit_std,
                                          args.mode_scale) for generator in generators])  # sigma, on the CPU
    draws = shapes[:1] + (shapes if args.vae_encode_mode == "sample" else [])
    noise, *vae_noise = (torch.stack([torch.randn(shape, generator=generator) for generator in generators])
                         .to(device, non_blocking=True) for shape in draws)

    with torch.no_grad():
        pairs = list(zip(images, vae_noise or [None] * len(images), strict=True))
        if args.cache_latents:
            folder = Path(args.output_dir) / "latent_cache"
            latents = [encode_cached(pipe.vae, image, folder, draw, args.offload) for image, draw in pairs]
        else:
            with flux.on_device(pipe.vae, device, args.offload):
                latents = [flux.encode(pipe.vae, image, draw) for image, draw in pairs]
        target, *references = latents
        s = told.to(device, non_blocking=True)
        z, sigma, velocity = fm.flow_path(target, target, noise, s, torch.ones_like(s))

    if text_encoder is not None:
        tokens = tokenize_prompt(pipe.tokenizer, batch["prompt"], pipe.tokenizer.model_max_length)
        text.pooled = text_encoder(tokens.to(device)).pooler_output.to(text.prompt.dtype)
    prediction = flux.predict_velocity(transformer, z, told, references, text, args.guidance_scale)
    weight = fm.loss_weight(args.weighting_scheme, sigma)
    if not args.with_prior_preservation:
        return {"flow": fm.weighted_mse(prediction, velocity, weight)}
    instance, prior = zip(*(values.chunk(2) for values in (prediction, velocity, weight)), strict=True)
    return {"instance": fm.weighted_mse(*instance), "prior": args.prior_loss_weight * fm.weighted_mse(*prior)}


def main(args):
    # --- data: cheap to check, so it comes before any model
    class_images, missing = [], []
    if args.with_prior_preservation:
        class_images, missing = plan_class_images(args.class_data_dir, args.num_class_images)
    dataset = dataset_from_args(args, class_images)
    references = len(dataset.examples[0].references)
    if references and args.with_prior_preservation:
        raise ValueError("--with_prior_preservation is for subjects: class images have no references; drop it, or "
                         "train without references")
    if args.validation_image and not references:
        print("--validation_image does nothing for a subject, which is trained without references", flush=True)
        args.validation_image = []
    if args.validation_image and len(args.validation_image) != references:
        raise ValueError(f"--validation_image: {len(args.validation_image)} given, and training has {references} "
                         "references an image")
    heldout = heldout_from_args(args, dataset)
    validation_references = load_validation_references(args)
    if references and args.validation_prompt and not (heldout or validation_references):
        print("--validation_prompt does nothing in edit training without --validation_image or --heldout_data_dir",
              flush=True)
    validation_prompt = next(prompt for prompt in (args.validation_prompt, args.instance_prompt,
                                                   dataset.examples[0].prompt) if prompt is not None)

    accelerator, dtype = run.make_accelerator(args, can_shard=True)
    validation_steps = run.plan_steps(args, len(dataset), accelerator.num_processes)
    settings = STOCK_SETTINGS | {
        "vae_encode_mode": args.vae_encode_mode, "guidance_scale": args.guidance_scale,
        "max_sequence_length": args.max_sequence_length, "prompt": validation_prompt, "base_model": args.base_model_id,
        "reference_tokens": references > 0, "references": references,
        "resolution": args.resolution if len(dataset.buckets) == 1 else None,
    }
    device = accelerator.device
    prompts = [example.prompt or args.instance_prompt for example in dataset.examples] + [validation_prompt]
    prompts += [item["prompt"] for item in heldout] + [""] * (args.caption_dropout > 0)
    prompts += [args.class_prompt] * args.with_prior_preservation
    plan = placement.plan(args, device, dtype, dataset.largest_sizes(), prompts, args.train_text_encoder,
                          batch=args.train_batch_size * (1 + args.with_prior_preservation))
    lasting = {name: value for name, value in settings.items() if name != "prompt"}  # that is validation's
    identity = run.identity(args, lasting, len(dataset), accelerator.num_processes, more=(
        "train_text_encoder", "with_prior_preservation", "cond_resolution", "cache_latents", "repeats", "random_flip",
        "center_crop", "caption_dropout", "class_prompt", "prior_loss_weight"))
    identity |= {"data": dataset.fingerprint(), "base_precision": plan.base_precision}
    step, state = run.resume(args, identity)
    if args.dry_run:
        return run.print_plan(accelerator, args, len(dataset), step, validation_steps, plan)
    run.start_run(accelerator, args, step, "flux-kontext-dreambooth")
    if accelerator.is_main_process and step == 0:
        run.report_skipped([f"{path}: {reason}" for path, reason in dataset.unreadable], args.output_dir, "left out")

    # --- models. Text first: T5-XXL is gone before the transformer arrives.
    path = args.pretrained_model_name_or_path
    where = flux.source(args)
    generation_dtype = {None: dtype, "bf16": torch.bfloat16}.get(args.prior_generation_precision, torch.float32)
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    side_px = max(math.isqrt(height * width) for height, width in dataset.buckets) // 16 * 16
    if missing and (plan.offload_blocks or plan.shards > 1):
        raise ValueError(f"--class_data_dir {args.class_data_dir}: {len(missing)} class images are missing, and making "
                         "them takes the whole transformer on one GPU; give --memory nf4, without FSDP, or make them "
                         "elsewhere")
    precision = placement.precision(args, plan) if args.prior_generation_precision is None else {}
    generate_class_images(path, args.class_prompt, mine, side_px, args.sample_batch_size, args.seed, device,
                          generation_dtype, args.max_sequence_length, precision, **where)
    accelerator.wait_for_everyone()
    encoded = encode_all(path, prompts, accelerator, dtype, args.max_sequence_length,
                         Path(args.output_dir) / "text_cache", **where)
    pipe = placement.load(path, args, plan, device, dtype, settings, encoded[validation_prompt].pooled, **where)
    flux.check_sizes(pipe.vae, dataset.buckets)
    if args.offload:
        pipe.vae.to("cpu")
    models = {"transformer": pipe.transformer}
    parameters = lora.attach(pipe.transformer, args.rank, args.lora_alpha, args.lora_dropout, args.lora_layers,
                             args.use_dora, args.use_rslora, args.seed)
    groups = [{"params": parameters}]
    if args.train_text_encoder:
        pipe.tokenizer, pipe.text_encoder = flux.load_text_encoder(path, device, dtype, **where)
        models["text_encoder"] = pipe.text_encoder
        text_parameters = lora.attach(pipe.text_encoder, args.rank, args.lora_alpha, args.lora_dropout,
                                      lora.CLIP_LAYERS, args.use_dora, args.use_rslora, args.seed)
        rate = {} if args.optimizer == "prodigy" or not args.text_encoder_lr else {"lr": args.text_encoder_lr}
        groups.append({"params": text_parameters, "weight_decay": args.adam_weight_decay_text_encoder} | rate)
        parameters = parameters + text_parameters
    tokens = args.max_sequence_length + (1 + references) * flux.image_tokens(pipe.vae, dataset.buckets)
    placement.prepare(pipe.transformer, args, plan, tokens, device, dtype)

    optimizer = run.make_optimizer(groups, args, accelerator.num_processes)
    lr_scheduler = run.make_lr_scheduler(optimizer, args)
    ema = lora.make_ema(parameters, args.ema_decay) if args.use_ema else None
    if state:
        run.load_state(state, models, optimizer, lr_scheduler, ema)
    loader = make_loader(dataset, collate_fn, args, pin_memory=device.type == "cuda",
                         start=step * args.gradient_accumulation_steps * accelerator.num_processes)
    optimizer, loader, *trained = accelerator.prepare(optimizer, loader, *models.values())
    transformer, text_encoder = (*trained, None)[:2]
    for model in trained:
        model.train()
    run.set_optimizer_mode(optimizer, training=True)

    # --- what is saved and validated
    spread = np.linspace(0, len(dataset.examples) - 1, min(len(dataset.examples), SUBJECT_IMAGES)).round().astype(int)
    is_validated = args.num_validation_images > 0 and (
        heldout or validation_references or (args.validation_prompt is not None and not references))
    validates = is_validated and (accelerator.is_main_process or plan.shards > 1)
    if validates and not references:
        subject = validation.thumbnails(dataset[int(i)]["target"] for i in spread)

    def write_lora(folder):
        with run.evaluation_weights(optimizer, ema, parameters):
            return lora.save(pipe.transformer, folder, settings, models.get("text_encoder"))

    def encode_live(prompt):
        text = encoded[prompt].to(device, dtype)
        if text_encoder is not None:
            tokens = tokenize_prompt(pipe.tokenizer, [prompt], pipe.tokenizer.model_max_length)
            text.pooled = pipe.text_encoder(tokens.to(device)).pooler_output.to(dtype)
        return text

    @torch.no_grad()
    def validate():
        if validates:
            grid = Path(args.output_dir) / "validation" / f"step-{step:06d}.png"
            steps = args.num_inference_steps or validation.default_steps(settings)
            with (run.evaluation_weights(optimizer, ema, parameters), evaluating(*models.values()), speed.eagerly(),
                  flux.on_device(pipe.vae, device, args.offload)):
                text = encode_live(validation_prompt)
                if references:
                    texts = [encode_live(item["prompt"]) for item in heldout]
                    scores = validation.validate_edits(pipe, heldout, texts, settings, steps, args.seed, grid, text,
                                                       validation_references, args.num_validation_images)
                else:
                    scores = validation.validate_subject(pipe, text, settings, steps, args.seed,
                                                         args.num_validation_images, dataset.size_of[0][0], subject,
                                                         grid)
            run.report_validation(accelerator, args.output_dir, scores, grid, step)
        accelerator.wait_for_everyone()

    # --- the loop
    stop = run.StopSignal(accelerator.num_processes)
    guard = run.FiniteGuard()
    progress = run.Progress(accelerator, args, step)
    if run.lacks_validation(accelerator, args, step, validation_steps, not args.skip_final_inference):
        validate()  # at step 0 the base model, before any training
        progress.restart()
    batches = iter(loader)
    while step < args.max_train_steps:
        for _ in range(args.gradient_accumulation_steps):
            batch = progress.next_batch(batches)
            with accelerator.accumulate(*trained):
                text = flux.stack_text(encoded, batch["prompt"], device, dtype)
                losses = training_step(pipe, transformer, text_encoder, batch, text, args)
                accelerator.backward(guard.protect(sum(losses.values()), batch["path"]))
                if accelerator.sync_gradients:
                    norm = guard.filter(parameters, args.max_grad_norm, step + 1)
                optimizer.step()
                optimizer.zero_grad()
            progress.add(losses)
        lr_scheduler.step()
        if ema:
            ema.step(parameters)
        step += 1
        progress.step()

        is_last = step == args.max_train_steps
        is_checkpoint = args.checkpointing_steps and step % args.checkpointing_steps == 0
        is_validation = not args.skip_final_inference if is_last else step % validation_steps == 0
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
                   "model card": write_dreambooth_card(args, settings, len(dataset.examples))}
        command = generate_command(args.pretrained_model_name_or_path, args.output_dir, settings)
        run.print_summary(args, results, run.lora_uses(args, settings, command))
        if args.push_to_hub:
            push_to_hub(args)
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(run_main(lambda: main(parse_args())))
