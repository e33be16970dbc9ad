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
from recipes.pairedit.options import choose_seeds, last_repeats, parse_pairedit_args, plan_tasks
from recipes.pairedit.pairs import load_square
from recipes.pairedit.pictures import describe_origin, settings_file, write_slide
from recipes.pairedit.sampling import edit, load_models
from utils import flux
from utils.parse import public_args, run_main, writable_folder, write_json
from utils.restore import draw_noise, noise_levels


def parse_args(argv=None):
    args = parse_pairedit_args(__doc__, argv)
    if args.objective != "real":
        raise ValueError(f"--python_name {args.python_name}: real images are edited with a content LoRA of "
                         "train_image_real")
    if not args.semantic_lora_path:
        raise ValueError("--semantic_lora_path: name the LoRA of the edit")
    writable_folder(args.output_folder_gen, "--output_folder_gen")
    return args


@torch.no_grad()
def main(args):
    # --- what to make, before any model loads
    tasks = plan_tasks(args)
    semantic = Path(args.semantic_lora_path)
    stored_semantic = adapters.read_settings(semantic, args)
    files = [task.file(args, args.train_iteration) for task in tasks]
    settings = [adapters.read_settings(file, args) for file in files]
    folders = [Path(args.output_folder_gen, task.dataset, task.name(args), semantic.stem) for task in tasks]
    origins = [describe_origin(args, stored, file, semantic) for stored, file in zip(settings, files, strict=True)]
    notes = [settings_file(folder, args.train_iteration, origin)
             for folder, origin in zip(folders, origins, strict=True)]
    seeds = choose_seeds(args)
    prompts = [last_repeats(args.prompt, task.position) for task in tasks]
    pipe, encoded, device, dtype = load_models(args, prompts, stored_semantic["max_sequence_length"])
    adapters.load(pipe, semantic, SEMANTIC)

    # --- image by image
    for task, file, stored, prompt, folder, origin, note in zip(tasks, files, settings, prompts, folders, origins,
                                                                notes, strict=True):
        adapters.load(pipe, file, CONTENT)
        side = stored["resolution"]
        flux.check_sizes(pipe.vae, [(side, side)])
        sigmas = noise_levels(pipe.vae, pipe.scheduler, stored["num_inference_steps"], side, side)
        first = next(i for i, sigma in enumerate(sigmas) if sigma <= args.start_sigma)
        if first == len(sigmas) - 1:
            raise ValueError(f"--start_sigma {args.start_sigma}: no step is left; give {sigmas[-2]:.3f} or more")
        photograph = load_square(task.images[0][0], side).to(device)
        latents = flux.encode(pipe.vae, photograph)
        text = flux.stack_text(encoded, [prompt], device, dtype)
        writable_folder(folder, "--output_folder_gen")
        write_json(note, {
            "content_lora": file.name, "semantic_lora": semantic.name, "origin": origin,
            "sigma": sigmas[first], "seeds": seeds, "prompt": prompt, "arguments": public_args(args)})
        for skip in args.skips:
            for seed in tqdm(seeds, desc=f"{task.name(args)}, skip {skip}", unit="seed", disable=None):
                noise = draw_noise(latents.shape[1:], [seed]).to(device)
                start = (1 - sigmas[first]) * latents + sigmas[first] * noise
                results = edit(pipe, start, sigmas, text, stored["guidance_scale"], args.scales, skip, args.real_mix,
                               args.semantic_cfg_scale, first)
                write_slide(folder, task.dataset, seed, skip, args.train_iteration, args.scales,
                            flux.decode(pipe.vae, results[:, 0]), prompt, args.image_format, photograph[0])
        print(f"images: {folder}")


if __name__ == "__main__":
    sys.exit(run_main(lambda: main(parse_args())))
