"""What our training steps cost, restoration and edit, beside the same step written plainly with diffusers and peft, and
whether the loader keeps up:  OMP_NUM_THREADS=1 python -m bench.train_step

The arms run on the same images on copies of the model in one process, interleaved, order alternating; medians of the
paired steps. The plain arm has no guard, no item generators and no Accelerate. Exit code 1 where restoration takes
more than 1.02 of the plain step, or an edit more than 1.02 of restoration.

--compile compiles our arms, and restoration may then take 0.9 of the plain step; --cached_latents takes the VAE out of
all arms."""

import argparse
import platform
import statistics
import time

import torch
import torch.nn.functional as F
from diffusers import FluxKontextPipeline

import train_deg_lora_flux_kontext as script
import train_dreambooth_lora_flux_kontext as edit_script
from my_dataset.dataset_deg_bucket import make_loader
from my_dataset.dataset_deg_paired import collate_fn, dataset_from_args
from my_dataset.degradations import degrader_from_args
from utils import flux, lora, run, speed
from utils.parse import check_least, run_main

LIMIT, COMPILED_LIMIT = 1.02, 0.9


def plain_step(pipe, optimizer, parameters, batch, text):
    """Kontext flow-matching step as one would write it down: encode, noise, predict, backward, clip, step."""
    vae, transformer = pipe.vae, pipe.transformer
    with torch.no_grad():
        target, control = (batch["latents"][key] if "latents" in batch else
                           (flux_latents(vae, batch[key]) - vae.config.shift_factor) * vae.config.scaling_factor
                           for key in ("target", "control"))
    noise = torch.randn_like(target)
    sigma = torch.rand(len(target), device=target.device)
    column = sigma.view(-1, 1, 1, 1)
    noisy = (1 - column) * target + column * noise
    b, c, h, w = noisy.shape
    tokens = torch.cat([FluxKontextPipeline._pack_latents(x, b, c, h, w) for x in (noisy, control)], 1)
    ids = FluxKontextPipeline._prepare_latent_image_ids(b, h // 2, w // 2, target.device, torch.float32)
    reference_ids = ids.clone()
    reference_ids[:, 0] = 1
    with torch.autocast(target.device.type, text.prompt.dtype, enabled=text.prompt.dtype != torch.float32):
        prediction = transformer(
            hidden_states=tokens.to(text.prompt.dtype), timestep=sigma, guidance=torch.ones_like(sigma),
            encoder_hidden_states=text.prompt, pooled_projections=text.pooled,
            txt_ids=torch.zeros(text.prompt.shape[1], 3, device=target.device),
            img_ids=torch.cat([ids, reference_ids]), return_dict=False)[0][:, : h * w // 4]
    prediction = FluxKontextPipeline._unpack_latents(prediction, h, w, 1)
    loss = F.mse_loss(prediction.float(), noise - target)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def flux_latents(vae, pixels):
    encoded = vae.encode(pixels.to(vae.dtype))
    return (encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents).float()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--train_batch_size", type=int, default=4)
    parser.add_argument("--resolution", type=int, default=128)
    parser.add_argument("--max_sequence_length", type=int, default=32)
    parser.add_argument("--hr_root", default="data/sample/train")
    parser.add_argument("--model", default="assets/tiny-kontext")
    parser.add_argument("--compile", action="store_true", help="compile the blocks of our arms")
    parser.add_argument("--cached_latents", action="store_true", help="latents are there already, in every arm")
    options = parser.parse_args()
    check_least(options, steps=1)  # the others are the training script's, which checks them
    args = script.parse_args([
        "--pretrained_model_name_or_path", options.model, "--hr_root", options.hr_root, "--resolution",
        str(options.resolution), "--train_batch_size", str(options.train_batch_size), "--max_sequence_length",
        str(options.max_sequence_length), "--degradation_types", "downsample,noise,blur", "--report_to", "none",
        "--dataloader_num_workers", "1", "--output_dir", "outputs/bench-train-step", "--max_train_steps", "1000"])
    dataset = dataset_from_args(args, degrader_from_args(args), args.instance_prompt, args.seed)
    accelerator, dtype = run.make_accelerator(args)
    device = accelerator.device
    encoded = flux.encode_prompts(options.model, [args.instance_prompt], device, dtype, args.max_sequence_length)
    edit_args = edit_script.parse_args([
        "--pretrained_model_name_or_path", options.model, "--guidance_scale", str(args.guidance_scale), "--rank",
        str(args.rank), "--lora_alpha", str(args.rank), "--output_dir", "outputs/bench-train-step"])
    arms = []
    for _ in range(3):
        pipe = flux.load_models(options.model, device, dtype)
        parameters = lora.attach(pipe.transformer, args.rank, seed=args.seed)
        arms.append((pipe, parameters, run.make_optimizer(parameters, args, 1)))
    plain, plain_parameters, plain_optimizer = arms.pop()
    plain.transformer.train()
    prepared = []
    for pipe, parameters, optimizer in arms:
        lr_scheduler = run.make_lr_scheduler(optimizer, args)
        if options.compile:
            speed.compile_blocks(pipe.transformer)
        transformer, optimizer = accelerator.prepare(pipe.transformer, optimizer)
        transformer.train()
        prepared.append((pipe, transformer, parameters, optimizer, lr_scheduler, run.FiniteGuard()))
    batches = iter(accelerator.prepare(make_loader(dataset, collate_fn, args)))
    text = flux.stack_text(encoded, [args.instance_prompt] * args.train_batch_size, device, dtype)

    def our_step(arm, compute, batch, step):  # the loop of the training scripts
        _, transformer, parameters, optimizer, lr_scheduler, guard = arm
        with accelerator.accumulate(transformer):
            losses = compute(batch)
            accelerator.backward(guard.protect(sum(losses.values()), batch["path"]))
            guard.filter(parameters, args.max_grad_norm, step)
            optimizer.step()
            optimizer.zero_grad()
        lr_scheduler.step()
        if step % args.logging_steps == 0:
            guard.check(accelerator)

    def restoration(batch):
        pipe, transformer = prepared[0][:2]
        return script.training_step(pipe, transformer, None, batch, text, args)

    def edit(batch):
        pipe, transformer = prepared[1][:2]
        return edit_script.training_step(pipe, transformer, None, batch | {"references": [batch["control"]]}, text,
                                         edit_args)

    def timed(work):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    encode = flux.encode
    times = {"restoration": [], "edit": [], "plain diffusers + peft": []}
    waits = []
    for step in range(-6, options.steps):
        start = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - start
        if options.cached_latents:
            with torch.no_grad():
                batch["latents"] = {key: encode(plain.vae, batch[key]) for key in ("target", "control")}
            known = {id(batch[key]): latents for key, latents in batch["latents"].items()}
            flux.encode = lambda vae, images, noise=None: known[id(images)]  # noqa: B023  (called at once)
        work = [lambda: our_step(prepared[0], restoration, batch, step + 7),  # noqa: B023  (called at once)
                lambda: our_step(prepared[1], edit, batch, step + 7),  # noqa: B023
                lambda: plain_step(plain, plain_optimizer, plain_parameters, batch, text)]  # noqa: B023
        seconds = {}
        for i in range(3):
            arm = (i + step) % 3 if step % 2 else (step - i) % 3  # every order comes up
            seconds[arm] = timed(work[arm])
        if step == -6 and options.compile:
            print(f"first step, with compilation: {seconds[0]:.0f} s and {seconds[1]:.0f} s", flush=True)
        if step >= 0:
            for arm, values in enumerate(times.values()):
                values.append(seconds[arm])
            waits.append(waited)
    medians = {label: 1000 * statistics.median(values) for label, values in times.items()}
    wait = 1000 * statistics.median(waits)

    def ratio(a, b):
        return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))

    ours, edited = ratio("restoration", "plain diffusers + peft"), ratio("edit", "restoration")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}; batch {args.train_batch_size} at "
          f"{args.resolution} px, {args.max_sequence_length} text tokens, {options.steps} steps")
    print("| | median ms per step |\n|---|---|")
    for label, value in medians.items():
        print(f"| {label} | {value:.1f} |")
    print(f"| waiting for data, one worker | {wait:.2f} |")
    limit = COMPILED_LIMIT if options.compile else LIMIT
    print(f"medians of paired ratios: restoration / plain {ours:.3f} (at most {limit}), edit / restoration "
          f"{edited:.3f} (at most {LIMIT}); waiting: {100 * wait / medians['restoration']:.1f} % of a step")
    return int(ours > limit or edited > LIMIT)


if __name__ == "__main__":
    run_main(main)
