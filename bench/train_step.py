"""What our training step costs beside the same step written plainly with diffusers and peft, and whether the loader
keeps up:  OMP_NUM_THREADS=1 python -m bench.train_step

Both arms run the same numbers on two copies of the model in one process, interleaved, order alternating; medians of
the paired steps. The plain arm has no guard, no item generators and no Accelerate. Exit code 1 above 1.02."""

import argparse
import platform
import statistics
import time

import torch
import torch.nn.functional as F
from diffusers import FluxKontextPipeline

import train_deg_lora_flux_kontext as script
from my_dataset.dataset_deg_bucket import make_loader
from my_dataset.dataset_deg_paired import collate_fn, dataset_from_args
from my_dataset.degradations import degrader_from_args
from utils import flux, lora, run
from utils.parse import check_least, run_main

LIMIT = 1.02


def plain_step(pipe, optimizer, parameters, batch, text):
    """Kontext flow-matching step as one would write it down: encode, noise, predict, backward, clip, step."""
    vae, transformer = pipe.vae, pipe.transformer
    with torch.no_grad():
        target, control = ((flux_latents(vae, batch[key]) - vae.config.shift_factor) * vae.config.scaling_factor
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
    options = parser.parse_args()
    check_least(options, steps=1)  # the others are the training script's, which checks them
    args = script.parse_args([
        "--pretrained_model_name_or_path", options.model, "--hr_root", options.hr_root, "--resolution",
        str(options.resolution), "--train_batch_size", str(options.train_batch_size), "--max_sequence_length",
        str(options.max_sequence_length), "--degradation_types", "downsample,noise,blur", "--report_to", "none",
        "--dataloader_num_workers", "1", "--output_dir", "outputs/bench-train-step", "--max_train_steps", "1000"])
    dataset = dataset_from_args(args, degrader_from_args(args), args.instance_prompt, args.seed)
    accelerator = run.make_accelerator(args)
    device, dtype = accelerator.device, run.weight_dtype(accelerator)
    encoded = flux.encode_prompts(options.model, [args.instance_prompt], device, dtype, args.max_sequence_length)
    arms = []
    for _ in range(2):
        pipe = flux.load_models(options.model, device, dtype)
        parameters = lora.attach(pipe.transformer, args.rank, seed=args.seed)
        arms.append((pipe, parameters, run.make_optimizer(parameters, args, 1)))
    (plain, plain_parameters, plain_optimizer), (pipe, parameters, optimizer) = arms
    lr_scheduler = run.make_lr_scheduler(optimizer, args)
    transformer, optimizer = accelerator.prepare(pipe.transformer, optimizer)
    plain.transformer.train(), transformer.train()
    guard = run.FiniteGuard()
    batches = iter(accelerator.prepare(make_loader(dataset, collate_fn, args)))
    text = flux.stack_text(encoded, [args.instance_prompt] * args.train_batch_size, device, dtype)

    def our_step(batch, step):  # the loop of the training script
        with accelerator.accumulate(transformer):
            losses = script.training_step(pipe, transformer, None, batch, text, args)
            accelerator.backward(guard.protect(sum(losses.values()), batch["path"]))
            guard.filter(parameters, args.max_grad_norm, step)
            optimizer.step()
            optimizer.zero_grad()
        lr_scheduler.step()
        if step % args.logging_steps == 0:
            guard.check(accelerator)

    def timed(work):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    ours, plainly, waits = [], [], []
    for step in range(-5, options.steps):
        start = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - start
        work = [(ours, lambda: our_step(batch, step + 6)),  # noqa: B023  (called at once)
                (plainly, lambda: plain_step(plain, plain_optimizer, plain_parameters, batch, text))]  # noqa: B023
        for times, call in work if step % 2 else work[::-1]:
            seconds = timed(call)
            if step >= 0:
                times.append(seconds)
        if step >= 0:
            waits.append(waited)
    ratio = statistics.median(a / b for a, b in zip(ours, plainly, strict=True))
    a, b, wait = (1000 * statistics.median(times) for times in (ours, plainly, waits))
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}; batch {args.train_batch_size} at "
          f"{args.resolution} px, {args.max_sequence_length} text tokens, {options.steps} steps")
    print("| | median ms per step |\n|---|---|")
    print(f"| ours | {a:.1f} |\n| plain diffusers + peft | {b:.1f} |\n| waiting for data, one worker | {wait:.2f} |")
    print(f"median of paired ratios: {ratio:.3f} (at most {LIMIT}); waiting: {100 * wait / a:.1f} % of a step")
    return int(ratio > LIMIT)


if __name__ == "__main__":
    run_main(main)
