"""Train a ControlNet that deblurs: blurred image as hint, sharp image as target, Stable Diffusion 1.5 or any folder of
its layout as the base. deblur_controlnet.py has the formulas:

    loss = simple + elbo_weight vlb + deblur_loss_weight (l1 + mse + perceptual + gradient loss of the clean estimate)

    python -m recipes.deblur_controlnet.train_deblur_controlnet --pretrained_model_name_or_path assets/tiny-sd \\
        --data_root training/deblur_dataset --image_size 128 --batch_size 4 --max_epochs 100
    accelerate launch --multi_gpu --num_processes 2 -m recipes.deblur_controlnet.train_deblur_controlnet \\
        --data_root training/deblur_dataset --batch_size 8 --mixed_precision bf16
"""

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path

import torch

from my_dataset.dataset_deg_bucket import make_loader
from recipes.deblur_controlnet import deblur_controlnet as deblur
from recipes.deblur_controlnet.deblur_dataset import (
    add_data_args,
    collate_fn,
    dataset_from_args,
    fingerprint,
    prompts,
)
from recipes.deblur_controlnet.validation import heldout_from_args, log_images, validate
from utils import checkpoint, flux, run
from utils.losses import MARGIN_LATENTS, VGG16_FILE, crop_boxes, weight_file
from utils.parse import check_least, make_parser, run_main

LASTING = (  # what a resumed run has in common with the one it resumes
    *run.OPTIMIZER_OPTIONS, "sd_locked", "only_mid_control", "use_attention", "use_augmentation",
    "proportion_empty_prompts", "image_size", "type_weights", "linear_light", "crop_zoom", "train_start", "t_min",
    "t_max", "loss_type", "simple_loss_weight", "elbo_weight", "deblur_loss_weight", "l1_loss_weight",
    "mse_loss_weight", "perceptual_loss_weight", "gradient_loss_weight", "target", "deblur_t_max", "deblur_every",
    "decode_crop")
LAUNCH = "accelerate launch --multi_gpu --num_processes {} -m recipes.deblur_controlnet.train_deblur_controlnet"


def parse_args(argv=None):
    parser = make_parser(__doc__)
    add_data_args(parser)
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", default=deblur.BASE_MODEL, help="folder of a StableDiffusionPipeline, or "
        "its hub id; assets/tiny-sd is the embedded one")
    add("--controlnet_model_name_or_path", help="ControlNet to go on from, with its attention and its UNet's decoder "
        "where they lie beside it: a folder or hub id of diffusers, or a .ckpt of the original implementation; "
        "default: a copy of the base model's encoder")
    add("--sd_locked", action=argparse.BooleanOptionalAction, default=True, help="--no-sd_locked also trains the "
        "UNet's decoder")
    add("--only_mid_control", action="store_true", help="only the ControlNet's middle block steers the UNet")
    add("--use_attention", action="store_true", help="learn a map that weighs the hint's pixels")
    add = parser.add_argument_group("losses").add_argument
    add("--loss_type", choices=["l2", "l1"], default="l2", help="of the predicted noise")
    add("--simple_loss_weight", type=float, default=1.0, help="weight of the plain noise loss")
    add("--elbo_weight", type=float, default=0.0, help="weight of the variational bound, which is logged in any case")
    add("--deblur_loss_weight", type=float, default=1.0, help="weight of all deblurring losses; 0 decodes nothing")
    add("--l1_loss_weight", type=float, default=1.0, help="of the pixels, among the deblurring losses")
    add("--mse_loss_weight", type=float, default=1.0, help="likewise")
    add("--perceptual_loss_weight", type=float, default=0.1, help="of VGG16's features, likewise; 0 needs no weights")
    add("--gradient_loss_weight", type=float, default=0.1, help="of the image gradients, likewise")
    add("--perceptual_weights", help="file of VGG16 weights; default: torch's cache")
    add("--target", choices=["image", "vae"], default="image", help="compare with the sharp image, or with what the "
        "autoencoder can show of it")
    add("--deblur_t_max", type=int, help="items at this timestep or above have no deblurring loss; default: all have, "
        "weighted by their share of signal")
    add("--deblur_every", type=int, default=1, help="compute the deblurring losses in every n-th step")
    add("--decode_crop", type=int, default=32, help="side of the decoded crop, latents; 0 = whole")
    add("--train_start", choices=["clean", "blurred"], default="clean", help="noise is added to the sharp image's "
        "latents, as usual, or to the blurred one's, from which sampling with a --strength below 1 starts")
    add("--t_min", type=int, default=0, help="first timestep that is trained")
    add("--t_max", type=int, help="end of the trained timesteps, itself left out; default: the base model's 1000")
    run.add_optimizer_args(parser)
    add = parser.add_argument_group("training").add_argument
    add("--output_dir", default="trained-deblur-controlnet", help="folder for all that is written")
    add("--seed", type=int, default=0, help="seed of data order, blurs, noise and hint network")
    add("--batch_size", "--train_batch_size", dest="train_batch_size", type=int, default=4,
        help="images per process and micro-step")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-steps per optimizer step")
    add("--max_epochs", "--num_train_epochs", dest="num_train_epochs", type=int, default=100,
        help="epochs of ceil(items / global batch) steps; --max_train_steps wins")
    add("--max_train_steps", type=int, help="optimizer steps")
    add("--gradient_checkpointing", action="store_true", help="less memory, about a third slower")
    add("--mixed_precision", choices=["no", "bf16"], help="default bf16 on a GPU; a CPU always trains in fp32. What is "
        "trained, and the autoencoder, stay fp32")
    add("--allow_tf32", action="store_true", help="TF32 for the fp32 matrices on a GPU")
    add("--max_grad_norm", type=float, default=1.0, help="gradient clipping norm; 0 = off")
    add("--num_workers", "--dataloader_num_workers", dest="dataloader_num_workers", type=int, default=4,
        help="loader processes; 0 loads in the training process")
    add("--checkpointing_steps", type=int, default=500, help="steps between checkpoints; 0 = none")
    add("--checkpoints_total_limit", type=int, help="keep at most so many checkpoints; default all")
    add("--resume_from_checkpoint", help="'latest' in --output_dir, or the path of one")
    add("--logging_steps", type=int, default=10, help="steps between read-backs of losses")
    add("--report_to", choices=["tensorboard", "wandb", "none"], default="tensorboard", help="metrics.jsonl is always "
        "written")
    add = parser.add_argument_group("validation and image log").add_argument
    add("--validation_dir", help="folder that training never sees, of pairs or of sharp images; default: the "
        "validation split in --data_root, if any")
    add("--validation_steps", type=int, default=500, help="steps between validations")
    add("--num_validation_images", type=int, default=4, help="images deblurred and scored each time")
    add("--num_inference_steps", type=int, default=50, help="DDIM steps; stored beside the ControlNet, as are the next "
        "two")
    add("--guidance_scale", type=float, default=3.0, help="classifier-free guidance of validation; 1 = off")
    add("--strength", type=float, help="in (0, 1]: sampling starts from noise at 1, below from the blurred image with "
        "the noise of t = strength * 1000; default: the trained part of the timesteps")
    add("--logger_freq", type=int, default=300, help="batches between image logs; 0 = none")
    add("--log_guidance_scale", type=float, default=9.0, help="guidance of the image log's samples")
    add = parser.add_argument_group("accepted, without effect").add_argument
    add("--gpus", type=int, help="processes are accelerate launch's business")
    add("--precision", choices=["16", "32"], help="see --mixed_precision")
    parser.set_defaults(learning_rate=1e-5, lr_scheduler="cosine", lr_warmup_steps=0)
    args = parser.parse_args(argv)

    for flag, value in (("--gpus", args.gpus), ("--precision", args.precision)):
        if value is not None:
            print(f"{flag} {value} does nothing; start with `{LAUNCH.format(args.gpus or 1)}"
                  f"{' --mixed_precision bf16' if args.precision == '16' else ''}`", flush=True)
    weights = [f"{name}_loss_weight" for name in ("simple", "deblur", "l1", "mse", "perceptual", "gradient")]
    check_least(args, train_batch_size=1, gradient_accumulation_steps=1, num_train_epochs=1, max_train_steps=1, seed=0,
                max_grad_norm=0, dataloader_num_workers=0, checkpointing_steps=0, checkpoints_total_limit=1,
                logging_steps=1, validation_steps=1, num_validation_images=1, guidance_scale=0, logger_freq=0,
                log_guidance_scale=0, elbo_weight=0, deblur_t_max=1, deblur_every=1, decode_crop=0, t_min=0, t_max=1,
                **dict.fromkeys(weights, 0))
    if args.deblur_loss_weight and not any(getattr(args, name) for name in weights[2:]):
        raise ValueError("--deblur_loss_weight without a part: --l1_loss_weight, --mse_loss_weight, "
                         "--perceptual_loss_weight and --gradient_loss_weight are all 0; raise one, or give it 0")
    if args.simple_loss_weight == args.elbo_weight == args.deblur_loss_weight == 0:
        raise ValueError("--simple_loss_weight, --elbo_weight and --deblur_loss_weight are all 0; raise one")
    if 0 < args.decode_crop < 4 * MARGIN_LATENTS:
        raise ValueError(f"--decode_crop {args.decode_crop}: give 0 or at least {4 * MARGIN_LATENTS} latents")
    if args.deblur_loss_weight and args.deblur_t_max is not None and args.deblur_t_max <= args.t_min:
        raise ValueError(f"--deblur_t_max {args.deblur_t_max} must be above --t_min {args.t_min}, or no item has a "
                         "deblurring loss; raise it, or give --deblur_loss_weight 0")
    deblur.check_sampling(args.num_inference_steps, args.strength)
    run.check_optimizer_args(args)
    source = Path(args.controlnet_model_name_or_path or "")
    for file, flag, is_trained in ((deblur.ATTENTION_FILE, "--use_attention", args.use_attention),
                                   (deblur.DECODER_FILE, "--no-sd_locked", not args.sd_locked)):
        if args.controlnet_model_name_or_path and (source / file).is_file() and not is_trained:
            raise ValueError(f"--controlnet_model_name_or_path {source} was trained with {file}; add {flag}")
    args.vgg_file = None
    if args.deblur_loss_weight and args.perceptual_loss_weight:
        try:
            args.vgg_file = weight_file(args.perceptual_weights)
        except ValueError as error:
            raise ValueError(f"--perceptual_loss_weight {args.perceptual_loss_weight:g} needs {VGG16_FILE} "
                             "(torchvision's VGG16); name it with --perceptual_weights, or give weight 0") from error
    deblur.check_base(args.pretrained_model_name_or_path)
    if args.controlnet_model_name_or_path:
        deblur.check_source(args.controlnet_model_name_or_path, "--controlnet_model_name_or_path")
    args.logging_dir = "logs"
    run.check_output_dir(args)
    return args


def training_step(model, vae, scheduler, perceptual, batch, text, args, has_deblur=True):
    """Losses of one batch under the names of the log, {name: scalar}; "loss" is what is minimised, and its parts are
    weighted as they add up, but for the vlb and the deblur_*_loss_raw, which have no weight at all.

    batch["target"]: (B, 3, H, W) in [-1, 1]; batch["control"]: the same in [0, 1]; batch["seed"]: B integers, from
    which all randomness comes. text: (B, T, D). Items left out by --deblur_t_max count as 0."""
    target, count = batch["target"], len(batch["target"])
    scale = flux.latent_scale(vae)
    shape = (vae.config.latent_channels, *(side // scale for side in target.shape[-2:]))
    draws = [torch.Generator().manual_seed(seed) for seed in batch["seed"]]
    t = torch.tensor([int(torch.randint(args.t_min, args.t_max, (), generator=draw)) for draw in draws])
    noise, vae_noise = (torch.stack([torch.randn(shape, generator=draw) for draw in draws])
                        .to(target, non_blocking=True) for _ in range(2))
    boxes = crop_boxes(*shape[1:], args.decode_crop, draws)

    with torch.no_grad():
        clean = deblur.encode(vae, target, vae_noise)
        start = deblur.encode(vae, 2 * batch["control"] - 1) if args.train_start == "blurred" else clean
    on_device = t.to(target.device, non_blocking=True)
    z, noise = deblur.noisy_latents(scheduler, clean, start, noise, on_device)
    prediction = model(z, on_device, text, batch["control"])
    error = prediction - deblur.prediction_target(scheduler, clean, noise, on_device)
    errors = (error.square() if args.loss_type == "l2" else error.abs()).flatten(1).mean(1)
    weights = deblur.vlb_weights(scheduler.betas, scheduler.config.prediction_type)[t].to(errors)
    losses = {"loss_simple": args.simple_loss_weight * errors.mean(), "loss_vlb": (weights * errors).mean()}
    losses["loss"] = losses["loss_simple"] + args.elbo_weight * losses["loss_vlb"]
    if not has_deblur or not args.deblur_loss_weight:
        return losses

    chosen = [i for i, step in enumerate(t.tolist()) if args.deblur_t_max is None or step < args.deblur_t_max]
    names = ["l1", "mse", "gradient"] + ["perceptual"] * (perceptual is not None)
    weighted, raw = ({name: errors.new_zeros(()) for name in names} for _ in range(2))
    if chosen:
        boxes = [boxes[i] for i in chosen]
        estimate = deblur.clean_estimate(scheduler, z[chosen], prediction[chosen], t[chosen])
        if args.target == "vae":
            with torch.no_grad():
                wanted = deblur.decode_crops(vae, clean[chosen], boxes)
        else:
            wanted = deblur.crop_pixels(target[chosen], boxes, scale)
        signal = scheduler.alphas_cumprod.to(z)[on_device[chosen]]
        for share, pixels, sharp in zip(signal, deblur.decode_crops(vae, estimate, boxes), wanted, strict=True):
            for name, value in deblur.deblur_losses(pixels, sharp, perceptual).items():
                weight = getattr(args, f"{name}_loss_weight")
                weighted[name] = weighted[name] + weight * share * value.sum() / count
                raw[name] = raw[name] + value.sum() / count
    losses |= {f"deblur_{name}_loss": value for name, value in weighted.items()}
    losses |= {f"deblur_{name}_loss_raw": value for name, value in raw.items()}
    losses["total_deblur_loss"] = sum(weighted.values())
    losses["loss"] = losses["loss"] + args.deblur_loss_weight * losses["total_deblur_loss"]
    return losses


def main(args):
    # --- the base model's configs and the data: cheap to check, so they come before any weights
    base, source = deblur.read_base(args.pretrained_model_name_or_path), args.controlnet_model_name_or_path
    if source:
        deblur.check_controlnet(base, source, "--controlnet_model_name_or_path")
    multiple, table = deblur.size_multiple(base), base.scheduler.config.num_train_timesteps
    if args.image_size % multiple:
        raise ValueError(f"--image_size {args.image_size}: this model needs a multiple of {multiple} pixels")
    args.t_max = args.t_max or table
    if args.t_max > table:
        raise ValueError(f"--t_max {args.t_max}: the base model has {table} timesteps; lower it")
    if args.t_min >= args.t_max:
        raise ValueError(f"--t_min {args.t_min}: must be below the end of the trained timesteps, {args.t_max}")
    args.strength = args.strength or args.t_max / table
    if args.strength * table > args.t_max:
        raise ValueError(f"--strength {args.strength:g}: sampling would begin beyond --t_max {args.t_max} of {table} "
                         "timesteps, where nothing is trained; lower it, or raise --t_max")
    deblur.sampling_timesteps(base.scheduler, args.num_inference_steps, args.strength, args.t_min)
    dataset = dataset_from_args(args, args.seed)
    heldout = heldout_from_args(args, dataset)

    accelerator, dtype = run.make_accelerator(args)
    validation_steps = run.plan_steps(args, len(dataset), accelerator.num_processes)
    device, output = accelerator.device, Path(args.output_dir)
    identity = {name: getattr(args, name) for name in LASTING}
    identity |= {"base_model": flux.model_id(args.pretrained_model_name_or_path),
                 "images": fingerprint(dataset.records, args.data_root or args.source_dir),
                 "processes": accelerator.num_processes}
    step, state = run.resume(args, identity, result=deblur.MODEL_FOLDER)

    # --- models. The handful of prompts is encoded once, on the CPU, and CLIP is gone before training.
    pipe = deblur.load_base(args.pretrained_model_name_or_path)
    vae, scheduler = pipe.vae.to(device), pipe.scheduler
    settings = {name: getattr(args, name) for name in (
        "image_size", "train_start", "t_min", "t_max", "use_augmentation", "proportion_empty_prompts",
        "num_inference_steps", "guidance_scale", "strength")} | {"base_model": identity["base_model"]}
    texts = [*prompts(args.use_augmentation).values(), ""]
    embedded = dict(zip(texts, deblur.encode_text(pipe, texts).to(device), strict=True))
    pipe.text_encoder = None
    attention = deblur.load_parts(pipe.unet, Path(source)) if source else None
    torch.manual_seed(args.seed)  # of the hint network and the attention
    if args.use_attention and not attention:
        attention = deblur.HintAttention()
    models = deblur.ControlledUNet(pipe.unet, deblur.make_controlnet(pipe, source), attention, args.sd_locked,
                                   args.only_mid_control, dtype).to(device)
    if args.gradient_checkpointing:
        for module in (models.controlnet, models.unet, vae):
            module.enable_gradient_checkpointing()
    perceptual = deblur.PerceptualLoss(args.vgg_file).to(device) if args.vgg_file else None

    parameters = models.trained_parameters()
    optimizer = run.make_optimizer(parameters, args, accelerator.num_processes)
    lr_scheduler = run.make_lr_scheduler(optimizer, args)
    if state:
        for name, module in models.trained_modules().items():
            module.load_state_dict(state["models"][name])
        optimizer.load_state_dict(state["optimizer"])
        lr_scheduler.load_state_dict(state["lr_scheduler"])
        del state
    run.start_run(accelerator, args, step, "deblur-controlnet")
    if accelerator.is_main_process and step == 0:
        run.report_skipped([f"{path}: {reason}" for path, reason in dataset.unreadable], output, "left out")

    batches_seen = step * args.gradient_accumulation_steps
    loader = make_loader(dataset, collate_fn, args, pin_memory=device.type == "cuda",
                         start=batches_seen * accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(models, optimizer, loader)
    model.train()
    run.set_optimizer_mode(optimizer, training=True)

    # --- what is saved and shown
    evaluation_weights = partial(run.evaluation_weights, optimizer, None, parameters)

    def embed(texts):
        return torch.stack([embedded[text] for text in texts])

    def write(folder):
        with evaluation_weights():
            deblur.write_model(folder, models, settings)

    def save():
        if accelerator.is_main_process:
            state = {"models": {name: module.state_dict() for name, module in models.trained_modules().items()},
                     "optimizer": optimizer.state_dict(), "lr_scheduler": lr_scheduler.state_dict()}
            checkpoint.save(output, step, state, identity, write, limit=args.checkpoints_total_limit)
        accelerator.wait_for_everyone()

    def show_validation():
        if accelerator.is_main_process and heldout:
            with evaluation_weights():
                grid = output / "validation" / f"step-{step:06d}.png"
                scores = validate(models, vae, scheduler, heldout, embed, settings, args.seed, grid)
            run.report_validation(accelerator, output, scores, grid, step)
        accelerator.wait_for_everyone()

    def show_images(batch):
        if accelerator.is_main_process:
            global_batch = args.train_batch_size * accelerator.num_processes
            epoch, place = divmod(batches_seen * global_batch, len(dataset))
            name = f"gs-{step:06d}_e-{epoch:06d}_b-{place // global_batch:06d}"
            with evaluation_weights():
                paths = log_images(output / "image_log" / "train", models, vae, scheduler, batch, embed,
                                   settings | {"guidance_scale": args.log_guidance_scale}, args.seed, name)
            for key, path in paths.items():
                run.log_image(accelerator, f"train/{key}", path, step)
        accelerator.wait_for_everyone()

    # --- the loop
    stop = run.StopSignal(accelerator.num_processes)
    guard, progress = run.FiniteGuard(), run.Progress(accelerator, args, step, prefix="train/", on_bar=("loss",))
    if run.lacks_validation(accelerator, args, step, validation_steps):
        show_validation()  # at step 0 the base model, which no hint steers yet
        progress.restart()
    batches = iter(loader)
    while step < args.max_train_steps:
        for _ in range(args.gradient_accumulation_steps):
            batch = progress.next_batch(batches)
            with accelerator.accumulate(model):
                losses = training_step(model, vae, scheduler, perceptual, batch, embed(batch["prompt"]), args,
                                       step % args.deblur_every == 0)
                accelerator.backward(guard.protect(losses["loss"], batch["path"]))
                if accelerator.sync_gradients:
                    norm = guard.filter(parameters, args.max_grad_norm, step + 1)
                optimizer.step()
                optimizer.zero_grad()
            progress.add(losses)
            batches_seen += 1
        lr_scheduler.step()
        step += 1
        progress.step()

        is_last = step == args.max_train_steps
        is_checkpoint = args.checkpointing_steps and step % args.checkpointing_steps == 0
        is_validation = is_last or step % validation_steps == 0
        is_image_log = args.logger_freq and batches_seen % args.logger_freq < args.gradient_accumulation_steps
        signal_number = stop.agreed()
        if (is_last or is_checkpoint or is_validation or is_image_log or signal_number
                or step % args.logging_steps == 0):
            guard.check(accelerator)
            progress.report(accelerator, step, norm, lr_scheduler)
        if is_checkpoint or signal_number:
            save()
        if signal_number:
            return run.stopped(accelerator, progress, step, signal_number)
        if is_image_log:
            show_images(batch)
        if is_validation:
            show_validation()
        if is_image_log or is_validation:
            progress.restart()
    progress.bar.close()

    if accelerator.is_main_process:
        folder = checkpoint.write_folder(output / deblur.MODEL_FOLDER, write)
        run.print_summary(args, {"ControlNet": folder}, {
            "here": "python -m recipes.deblur_controlnet.deblur --pretrained_model_name_or_path "
                    f"{shlex.quote(args.pretrained_model_name_or_path)} --model {shlex.quote(args.output_dir)} "
                    "--input blurred --output deblurred",
            "diffusers": f"ControlNetModel.from_pretrained({str(folder)!r}); README_deblur_training.md, section 4"})
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(run_main(lambda: main(parse_args())))
