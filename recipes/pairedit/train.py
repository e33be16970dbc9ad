"""Train PairEdit's LoRAs from a few (source, target) image pairs and no text: a semantic LoRA whose weight is a slider
of the edit, and a content LoRA that takes what both images have in common. FLUX.1-dev or any folder of its layout.

z_A, z_B: latents of a pair; eps: noise; s: noise scale; sigma: of the sampling schedule; x_A = z_A + sigma s eps:
    content LoRA:            velocity(x_A) -> s eps
    content and semantic:    velocity(x_A) -> s eps + eta (z_A - z_B),   whose gradient the semantic LoRA alone gets
The other variants (objectives.py) are values of --python_name, each with a file in config/.

    python -m recipes.pairedit.train --config recipes/pairedit/config/train_image.yaml --train_iteration 1000
    accelerate launch -m recipes.pairedit.train --c train_image
"""

import argparse
import shlex
import sys

import torch
import torch.nn.functional as F
from diffusers.training_utils import free_memory

from my_dataset.dataset_deg_paired import IDENTITY_STREAM, item_seed
from recipes.pairedit import adapters
from recipes.pairedit.objectives import SEMANTIC, Pass, adapters_of, pair_passes, text_target
from recipes.pairedit.options import (
    check_new,
    is_finished,
    make_settings,
    parse_pairedit_args,
    plan_tasks,
    resume,
    text_prompts,
)
from recipes.pairedit.pairs import encode_images
from recipes.pairedit.sampling import euler, predict
from utils import flux, placement, run
from utils.parse import run_main, writable_folder
from utils.restore import STOCK_SETTINGS, noise_levels


def parse_args(argv=None):
    args = parse_pairedit_args(__doc__, argv)
    args.output_dir = str(writable_folder(args.output_folder, "--output_folder"))
    args.report_to, args.logging_dir = "none", "logs"  # there is a metrics.jsonl beside every LoRA
    args.checkpoints_total_limit = 1  # every saved LoRA stays; what a resume needs is only the newest
    args.max_train_steps = args.train_iteration
    return args


def training_step(pipe, trained, images, text, sigmas, seeds, backward, args):
    """One micro-step: forward and `backward` of every pass of the variant; its losses {name: scalar}, detached.

    trained: {adapter: parameters}, which get the gradients. images: (mean, standard deviation) of the posteriors, each
    (pairs, 2, C, h, w), source and target; of a text slider only the shape counts. text: TextEmbeds of batch 1, of a
    text slider of 3: target, positive, negative prompt. sigmas: the schedule. seeds: one for each item of the batch;
    its pair, its step of the schedule and its noise come from it alone."""
    mean, std = images
    device = mean.device
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    pairs = [int(torch.randint(len(mean), (), generator=draw)) for draw in draws]
    steps = [int(torch.randint(args.start_step, args.end_step + 1, (), generator=draw)) for draw in draws]
    noise, vae_noise = (torch.stack([torch.randn(mean.shape[2:], generator=draw) for draw in draws])
                        .to(device, non_blocking=True) for _ in range(2))
    sigma = torch.tensor([sigmas[step] for step in steps])  # on the CPU, where AdaLN tables read it

    if args.objective == "text":
        prompts = [flux.TextEmbeds(*(part[i:i + 1] for part in (text.prompt, text.pooled))) for i in range(3)]
        text = prompts[0]
        with torch.no_grad():
            adapters.activate(pipe.transformer, {})
            z = torch.cat([euler(lambda z, i: predict(pipe, z, sigmas[i], text, args.guidance_scale), noise[[item]],
                                 sigmas, 0, step) for item, step in enumerate(steps)])
            velocities = [predict(pipe, z, sigma, prompt, args.guidance_scale).float() for prompt in prompts]
        passes = [Pass("slider", {SEMANTIC: 1.0}, SEMANTIC, z, text_target(*velocities, args.cfg_eta))]
    else:
        latents = mean[pairs]
        if args.vae_encode_mode == "sample":  # one draw for both images: two would be part of the edit
            latents = latents + std[pairs] * vae_noise[:, None]
        passes = pair_passes(args.objective, latents[:, 0], latents[:, 1], sigma.to(device, non_blocking=True), noise,
                             args.noise_scale, args.cfg_eta, args.fm_target)

    losses = {}
    for each in passes:  # backward comes before the next forward: a checkpointed block is computed with its own LoRAs
        adapters.activate(pipe.transformer, each.active, trained[each.learns])
        prediction = predict(pipe, each.latents, sigma, text, args.guidance_scale)
        loss = F.mse_loss(prediction.float(), each.target)
        backward(loss)
        losses[each.loss] = loss.detach()
    return losses


def main(args):
    # --- data: cheap to check, so it comes before any model
    tasks = plan_tasks(args)
    check_new(tasks, args)
    prompts = {task.dataset: text_prompts(args, task.position) if args.objective == "text" else [args.train_prompt]
               for task in tasks}
    every_prompt = [prompt for group in prompts.values() for prompt in group]
    accelerator, dtype = run.make_accelerator(args)
    unfinished = []  # (task, settings)
    for task in tasks:
        settings = make_settings(args, task, prompts[task.dataset])
        if is_finished(task, args, settings):
            accelerator.print(f"{task.file(args, args.train_iteration)} is there already")
        else:
            unfinished.append((task, settings))
    if not unfinished:
        return accelerator.end_training()
    device, path, where = accelerator.device, args.pretrained_model_name_or_path, flux.source(args)
    names = adapters_of(args.objective)
    sizes = [(args.resolution, args.resolution)]
    lora_args = {"rank": args.rank * len(names), "lora_layers": ",".join(adapters.METHODS[args.train_method]),
                 "lora_dropout": 0.0, "use_dora": False, "use_ema": False}  # to the memory, one LoRA of all their ranks
    plan = placement.plan(argparse.Namespace(**vars(args) | lora_args), device, dtype, sizes, every_prompt)
    runs = []  # (task, settings, identity, step, state)
    for task, settings in unfinished:
        args.output_dir = str(task.folder(args))
        identity = settings | {name: getattr(args, name) for name in run.OPTIMIZER_OPTIONS} | {
            "processes": accelerator.num_processes, "base_precision": plan.base_precision}
        runs.append((task, settings, identity, *resume(task, args, identity)))

    # --- models. Text first: T5-XXL is gone before the transformer arrives.
    encoded = flux.encode_prompts(path, every_prompt, device, dtype, args.max_sequence_length, **where)
    pipe = placement.load(path, args, plan, device, dtype, STOCK_SETTINGS, encoded[every_prompt[0]].pooled, **where)
    flux.check_sizes(pipe.vae, sizes)
    posteriors = encode_images(pipe.vae, [task for task, *_ in runs], args.resolution, device)
    sigmas = noise_levels(pipe.vae, pipe.scheduler, args.num_inference_steps, *sizes[0])
    tokens = args.max_sequence_length + flux.image_tokens(pipe.vae, sizes)
    pipe.vae = None
    free_memory()
    trained = adapters.attach(pipe.transformer, names, args.rank, args.lora_alpha, args.train_method)
    parameters = [parameter for name in names for parameter in trained[name]]
    placement.prepare(pipe.transformer, args, plan, tokens, device, dtype)
    pipe.transformer.train()

    # --- one LoRA, or two, after the other
    stop = run.StopSignal(accelerator.num_processes)
    for (task, settings, identity, step, state), images in zip(runs, posteriors, strict=True):
        args.output_dir, args.noise_scale = str(task.folder(args)), task.noise_scale
        adapters.reset(pipe.transformer, names, args.train_method,
                       [item_seed(args.seed, task.version, i, IDENTITY_STREAM) for i in range(len(names))])
        optimizer = run.make_optimizer(parameters, args, accelerator.num_processes)
        lr_scheduler = run.make_lr_scheduler(optimizer, args)
        models = dict.fromkeys(names, pipe.transformer)
        if state:
            run.load_state(state, models, optimizer, lr_scheduler, ema=None)
        task.folder(args).mkdir(parents=True, exist_ok=True)
        run.start_run(accelerator, args, step, "pairedit")
        run.set_optimizer_mode(optimizer, training=True)
        guard, progress = run.FiniteGuard(), run.Progress(accelerator, args, step)
        files = [str(path) for pair in task.images for path in pair]
        text = flux.stack_text(encoded, prompts[task.dataset], device, dtype)

        def write_loras(step=None, task=task, settings=settings, optimizer=optimizer):
            with run.evaluation_weights(optimizer, None, parameters):
                for name in names:  # the slider last: where it is, the other is too
                    adapters.save(pipe.transformer, name, task.file(args, step, name != names[-1]), settings)

        def backward(loss, guard=guard, files=files):
            (guard.protect(loss, files) / args.gradient_accumulation_steps).backward()

        while step < args.train_iteration:
            for micro in range(args.gradient_accumulation_steps):
                first = (step * args.gradient_accumulation_steps + micro) * accelerator.num_processes
                first = (first + accelerator.process_index) * args.train_batch_size
                seeds = [item_seed(args.seed, task.version, first + item) for item in range(args.train_batch_size)]
                progress.add(training_step(pipe, trained, images, text, sigmas, seeds, backward, args))
            run.average_gradients(parameters, accelerator)
            norm = guard.filter(parameters, args.max_grad_norm, step + 1)
            optimizer.step()
            optimizer.zero_grad()
            lr_scheduler.step()
            step += 1
            progress.step()

            is_last = step == args.train_iteration
            signal_number = stop.agreed()
            is_saved = is_last or step % args.save_per_steps == 0 or signal_number
            if is_saved or step % args.logging_steps == 0:
                guard.check(accelerator)
                progress.report(accelerator, step, norm, lr_scheduler)
            if is_saved:
                run.save_checkpoint(accelerator, args, step, identity, models, optimizer, lr_scheduler, None,
                                    lambda _, step=step: write_loras(step))
            if signal_number and not is_last:
                return run.stopped(accelerator, progress, step, signal_number)
        progress.bar.close()
        if accelerator.is_main_process:
            file = task.file(args, step)
            results = {("slider" if name == SEMANTIC else "content LoRA"): task.file(args, step, name != names[-1])
                       for name in reversed(names)}
            run.print_summary(args, results, {
                "here": "python -m recipes.pairedit.generate_real_image with the options of this run and "
                        "--semantic_lora_path, the slider" if args.objective == "real" else
                        f"python -m recipes.pairedit.generate --pretrained_model_name_or_path {shlex.quote(path)} "
                        f"--use_trained_lora_path 1 --trained_lora_path {shlex.quote(str(file))} --datasets "
                        f"{shlex.quote(task.dataset)}",
                "diffusers": f"pipe.load_lora_weights({str(file)!r})",
                "ComfyUI": run.comfyui_command(file, file.with_name(f"{file.stem}_comfyui.safetensors"))})
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(run_main(lambda: main(parse_args())))
