"""Train a LoRA on Qwen-Image from captioned images, or on Qwen-Image-Edit from captioned pairs of images, before and
after an edit. With x the target's latents, eps noise, sigma in (0, 1]:
    z = (1 - sigma) x + sigma eps,   the model learns velocity = eps - x       (rectified flow, Qwen-Image's own)
In edit training the tokens of the image before follow those of z, and what is predicted for them is cut off.

    accelerate launch -m recipes.qwen_image.train --config recipes/qwen_image/train_configs/train_lora.yaml
    accelerate launch -m recipes.qwen_image.train --config recipes/qwen_image/train_configs/train_lora_4090.yaml \\
        --pretrained_model_name_or_path /path/Qwen-Image --set data_config.img_dir=photos --output_dir outputs/photos
"""

import itertools
import shlex
import sys
from pathlib import Path

import torch
from PIL import Image

from my_dataset.dataset_deg_bucket import make_loader
from my_dataset.dataset_deg_paired import cover_crop, fingerprint, to_tensor
from my_dataset.images import load_rgb
from recipes.qwen_image import qwen
from recipes.qwen_image.image_datasets.dataset import NO_CAPTION, collate_fn, dataset_from_args, edit_size
from recipes.qwen_image.options import parse_qwen_args
from utils import flow_matching as fm
from utils import flux, lora, run
from utils.parse import run_main
from utils.restore import evaluating
from utils.validation import save_grid

STOCK_SIDE_PX = 1024  # the edit pipelines resize what they edit to the area of this square

def parse_args(argv=None):
    return parse_qwen_args(__doc__, argv)


def training_step(pipe, posteriors, batch, text, args):
    """Losses of one batch, {name: scalar}, and nothing random but the items' own generators.

    posteriors: [(mean, standard deviation)] of the target and, in edit training, of the control, each (B, C, h, w) on
    the transformer's device. batch["seed"]: B integers. text: (prompt, mask) of qwen.stack_text."""
    generators = [torch.Generator().manual_seed(seed) for seed in batch["seed"]]
    torch.manual_seed(batch["seed"][0])  # LoRA dropout, the one draw that takes no generator
    device, shapes = text[0].device, [mean.shape[1:] for mean, _ in posteriors]

    # Everything is drawn on the CPU: an item's numbers are the same on any device, rank and worker.
    mu = qwen.resolution_mu(pipe.scheduler, *shapes[0][1:]) if args.timestep_shift == "resolution" else None
    s = torch.tensor([fm.draw_position(generator, "table", args.weighting_scheme, args.logit_mean, args.logit_std,
                                       args.mode_scale, mu) for generator in generators]).to(device, non_blocking=True)
    draws = shapes[:1] + (shapes if args.vae_encode_mode == "sample" else [])
    noise, *vae_noise = (torch.stack([torch.randn(shape, generator=generator) for generator in generators])
                         .to(device, non_blocking=True) for shape in draws)

    latents = [mean for mean, _ in posteriors]
    if args.vae_encode_mode == "sample":
        latents = [mean + std * draw for (mean, std), draw in zip(posteriors, vae_noise, strict=True)]
    target, *controls = latents
    z, sigma, velocity = fm.flow_path(target, target, noise, s, torch.ones_like(s))
    prediction = qwen.predict_velocity(pipe.transformer, z, sigma, controls, *text)
    return {"flow": fm.weighted_mse(prediction, velocity, fm.loss_weight(args.weighting_scheme, sigma))}


def main(args):
    # --- data: cheap to check, so it comes before any model
    dataset = dataset_from_args(args)
    path, where, is_edit = args.pretrained_model_name_or_path, flux.source(args), bool(args.control_dir)
    if qwen.is_edit_model(path, **where) != is_edit:
        raise ValueError(f"--pretrained_model_name_or_path {path} "
                         + ("makes images from text; for --control_dir name a Qwen-Image-Edit" if is_edit else
                            "edits images; add --control_dir, the images before the edit, or name a Qwen-Image"))
    layers = lora.check_layers(qwen.weightless_transformer(path, **where),
                               args.lora_layers or qwen.lora_targets(args.lora_target_preset))
    edited = control = None  # of validation: the picture, and what the text encoder reads of it
    size = dataset.sizes[0][0]
    if args.validation_image:
        picture = load_rgb(args.validation_image)
        edited, size = Image.fromarray(picture), edit_size(*picture.shape[:2], args.img_size)
        control = to_tensor(cover_crop(picture, edit_size(*picture.shape[:2], STOCK_SIDE_PX), (0.5, 0.5)))
    wanted = [(caption, control) for caption in (args.validation_prompt, NO_CAPTION) if args.validation_prompt]

    accelerator, dtype = run.make_accelerator(args)
    device, output = accelerator.device, Path(args.output_dir)
    settings = {name: getattr(args, name) for name in (
        "max_sequence_length", "vae_encode_mode", "weighting_scheme", "timestep_shift", "img_size", "seed",
        "learning_rate")} | {"base_model": args.base_model_id, "is_edit": is_edit}
    pictures = [(example.target.relative_to(args.img_dir).as_posix(), example.prompt)  # wherever the folder lies
                for example in dataset.examples]
    identity = settings | {name: getattr(args, name) for name in (
        *run.OPTIMIZER_OPTIONS, "rank", "lora_alpha", "lora_dropout", "lora_layers", "lora_target_preset", "use_dora",
        "use_rslora", "use_ema", "caption_dropout_rate", "repeats", "base_precision", "bnb_options",
        "precompute_image_embeddings")}
    identity |= {"data": fingerprint([dataset.sizes, pictures]), "processes": accelerator.num_processes}
    step, state = run.resume(args, identity)
    run.start_run(accelerator, args, step, args.tracker_project_name)
    if accelerator.is_main_process and step == 0:
        run.report_skipped([f"{file}: {reason}" for file, reason in dataset.unreadable], args.output_dir, "left out")

    # --- models. Text and, if asked for, images first: what encodes them is gone before the transformer arrives.
    inputs = dataset.text_inputs() if is_edit else ((caption, None) for caption in dataset.captions())
    texts = qwen.encode_texts(path, itertools.chain(inputs, wanted), accelerator, dtype, args.max_sequence_length,
                              output / "cache" / "text_embs" if args.save_cache_on_disk else None, **where)
    encoded = None
    if args.precompute_image_embeddings:
        encoded = qwen.encode_pictures(path, dataset, accelerator, dtype, is_edit,
                                       output / "cache" / "img_embs" if args.save_cache_on_disk else None, **where)
    pipe = qwen.load_models(path, device, dtype, is_edit, vae_device="cpu" if encoded else None,
                            bnb_options=args.bnb_options, base_precision=args.base_precision or "bf16", **where)
    parameters = lora.attach(pipe.transformer, args.rank, args.lora_alpha, args.lora_dropout, layers, args.use_dora,
                             args.use_rslora, args.seed)
    if args.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    pipe.transformer.train()
    if accelerator.is_main_process:
        print(qwen.describe_trainable(pipe.transformer, output / "trainable.txt"), flush=True)

    models = {"transformer": pipe.transformer}
    optimizer = run.make_optimizer(parameters, args, accelerator.num_processes)
    lr_scheduler = run.make_lr_scheduler(optimizer, args)
    ema = lora.make_ema(parameters, args.ema_decay) if args.use_ema else None
    if state:
        run.load_state(state, models, optimizer, lr_scheduler, ema)
    loader = accelerator.prepare(make_loader(
        qwen.TrainingItems(dataset, encoded), collate_fn, args, pin_memory=device.type == "cuda",
        start=step * args.gradient_accumulation_steps * accelerator.num_processes))
    run.set_optimizer_mode(optimizer, training=True)

    @torch.no_grad()
    def posteriors_of(batch):
        images = [batch[name] for name in ("target", "control") if name in batch]
        return [image.unbind(1) if encoded else qwen.posterior(pipe.vae, image) for image in images]

    def write_lora(folder):
        with run.evaluation_weights(optimizer, ema, parameters):
            return lora.save(pipe.transformer, folder, settings)

    control_key = None if control is None else qwen.content_key(control)
    prompts = [texts[qwen.text_key(caption, control_key)] for caption, _ in wanted]

    def validate():
        if accelerator.is_main_process and args.validation_prompt:
            seeds = [args.seed + i for i in range(args.num_validation_images)]
            with (run.evaluation_weights(optimizer, ema, parameters), evaluating(pipe.transformer),
                  flux.on_device(pipe.vae, device, encoded is not None)):
                images = qwen.sample(pipe, *prompts, size, args.num_inference_steps, args.true_cfg_scale, seeds, edited)
            grid = output / "validation" / f"step-{step:06d}.png"
            save_grid([images], [f"seed {seed}" for seed in seeds], None, grid)
            run.log_image(accelerator, "validation", grid, step)
        accelerator.wait_for_everyone()

    # --- the loop
    stop = run.StopSignal(accelerator.num_processes)
    guard = run.FiniteGuard()
    progress = run.Progress(accelerator, args, step)
    if run.lacks_validation(accelerator, args, step, args.validation_steps):
        validate()  # at step 0 the base model, before any training
        progress.restart()
    batches = iter(loader)
    while step < args.max_train_steps:
        for _ in range(args.gradient_accumulation_steps):
            batch = progress.next_batch(batches)
            text = qwen.stack_text([texts[key] for key in batch["text_key"]], device, dtype)
            losses = training_step(pipe, posteriors_of(batch), batch, text, args)
            (guard.protect(sum(losses.values()), batch["path"]) / args.gradient_accumulation_steps).backward()
            progress.add(losses)
        run.average_gradients(parameters, accelerator)
        norm = guard.filter(parameters, args.max_grad_norm, step + 1)
        optimizer.step()
        optimizer.zero_grad()
        lr_scheduler.step()
        if ema:
            ema.step(parameters)
        step += 1
        progress.step()

        is_last = step == args.max_train_steps
        is_checkpoint = args.checkpointing_steps and step % args.checkpointing_steps == 0
        is_validation = is_last or step % args.validation_steps == 0
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
        results = {"LoRA": write_lora(args.output_dir)}
        run.print_summary(args, results, {
            "here": f"python -m recipes.qwen_image.inference --model_name {shlex.quote(path)} --lora_weights "
                    f"{shlex.quote(args.output_dir)}{' --image photo.jpg' * is_edit} --prompt 'man in the city'",
            "diffusers": f"pipe.load_lora_weights({args.output_dir!r})"})
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(run_main(lambda: main(parse_args())))
