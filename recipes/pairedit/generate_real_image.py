"""Edit real images with a semantic LoRA: a content LoRA that was trained on the image (config/train_image_real.yaml)
holds it, the semantic one moves it, and the slider is drawn side by side.

    python -m recipes.pairedit.generate_real_image --config recipes/pairedit/config/train_image_real.yaml
"""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

from recipes.pairedit import adapters
from recipes.pairedit.objectives import CONTENT, SEMANTIC
from recipes.pairedit.options import choose_loras, choose_prompts, choose_seeds, parse_pairedit_args, plan_tasks
from recipes.pairedit.pairs import load_square
from recipes.pairedit.pictures import describe_origin, settings_file, write_slide
from recipes.pairedit.sampling import edit, load_models, plan_schedules
from utils import flux
from utils.parse import public_args, run_main, writable_folder, write_json
from utils.restore import draw_noise


def parse_args(argv=None):
    args = parse_pairedit_args(__doc__, argv)
    if args.objective != "real":
        raise ValueError(f"--python_name {args.python_name}: real images are edited with a content LoRA of "
                         "train_image_real")
    if not args.semantic_lora_path:
        raise ValueError("--semantic_lora_path: name the LoRA of the edit")
    writable_folder(args.output_folder_gen, "--output_folder_gen")
    return args


def find_start(sigmas, start_sigma):
    """The first index of the schedule at or below start_sigma. ValueError where only its end is."""
    first = next(i for i, sigma in enumerate(sigmas) if sigma <= start_sigma)
    if first == len(sigmas) - 1:
        raise ValueError(f"--start_sigma {start_sigma}: no step is left; give {sigmas[-2]:.3f} or more")
    return first


@torch.no_grad()
def main(args):
    # --- what to make, before any model loads
    tasks, files, names = zip(*choose_loras(plan_tasks(args), args), strict=True)
    if args.use_trained_lora_path and len(tasks) > 1:
        raise ValueError(f"--trained_lora_path {args.trained_lora_path} holds one image, and --image_ids and "
                         f"--datasets name {len(tasks)}; name one")
    semantic = Path(args.semantic_lora_path)
    settings = [adapters.read_settings(file, args) for file in files]
    for i, stored in enumerate(settings):
        if stored not in settings[:i]:
            adapters.report_differing(semantic, args, stored)
    schedules = plan_schedules(args, settings)
    starts = [find_start(sigmas, args.start_sigma) for sigmas in schedules]
    folders = [Path(args.output_folder_gen, task.dataset, name, semantic.stem)
               for task, name in zip(tasks, names, strict=True)]
    origins = [describe_origin(args, stored, file, semantic) for stored, file in zip(settings, files, strict=True)]
    notes = [settings_file(folder, args.train_iteration, origin)
             for folder, origin in zip(folders, origins, strict=True)]
    seeds = choose_seeds(args)
    prompts = {task.dataset: choose_prompts(args, task.position, seeds) for task in tasks}
    pipe, encoded, device, dtype = load_models(args, [semantic, *files],
                                               [prompt for group in prompts.values() for prompt in group],
                                               max(s["max_sequence_length"] for s in settings))
    adapters.load(pipe, semantic, SEMANTIC)

    # --- image by image
    for task, file, stored, sigmas, first, name, folder, origin, note in zip(
            tasks, files, settings, schedules, starts, names, folders, origins, notes, strict=True):
        adapters.load(pipe, file, CONTENT)
        photograph = load_square(task.images[0][0], stored["resolution"]).to(device)
        latents = flux.encode(pipe.vae, photograph)
        writable_folder(folder, "--output_folder_gen")
        write_json(note, {
            "content_lora": file.name, "semantic_lora": semantic.name, "origin": origin,
            "sigma": sigmas[first], "seeds": seeds, "prompts": prompts[task.dataset], "arguments": public_args(args)})
        for skip in args.skips:
            batches = range(0, len(seeds), args.sample_batch_size)
            for at in tqdm(batches, desc=f"{name}, skip {skip}", unit="batch", disable=None):
                batch = slice(at, at + args.sample_batch_size)
                text = flux.stack_text(encoded, prompts[task.dataset][batch], device, dtype)
                noise = draw_noise(latents.shape[1:], seeds[batch]).to(device)
                start = (1 - sigmas[first]) * latents + sigmas[first] * noise
                results = edit(pipe, start, sigmas, text, stored["guidance_scale"], args.scales, skip, args.real_mix,
                               args.semantic_cfg_scale, first)
                for i, seed in enumerate(seeds[batch]):
                    images = flux.decode(pipe.vae, results[:, i])
                    write_slide(folder, task.dataset, seed, skip, args.train_iteration, args.scales, images,
                                prompts[task.dataset][at + i], args.image_format, photograph[0])
        print(f"images: {folder}")


if __name__ == "__main__":
    sys.exit(run_main(lambda: main(parse_args())))
