"""Generate images along a slider: for every seed all weights of a semantic LoRA from one noise, and all side by side.

    python -m recipes.pairedit.generate --config recipes/pairedit/config/train_image.yaml --scales 0,0.5,1 --count_gen 4
"""

import sys
from pathlib import Path

from tqdm import tqdm

from recipes.pairedit import adapters
from recipes.pairedit.objectives import SEMANTIC
from recipes.pairedit.options import choose_loras, choose_prompts, choose_seeds, parse_pairedit_args, plan_tasks
from recipes.pairedit.pictures import describe_origin, settings_file, write_slide
from recipes.pairedit.sampling import load_models, plan_schedules, slide
from utils import flux
from utils.parse import public_args, run_main, writable_folder, write_json
from utils.restore import draw_noise


def parse_args(argv=None):
    args = parse_pairedit_args(__doc__, argv)
    if args.objective == "real":
        raise ValueError("--python_name train_image_real trains a content LoRA, which recreates one image; edit that "
                         "by python -m recipes.pairedit.generate_real_image")
    writable_folder(args.output_folder_gen, "--output_folder_gen")
    return args


def main(args):
    # --- what to make, before any model loads
    tasks, files, names = zip(*choose_loras(plan_tasks(args, check_images=False), args), strict=True)
    settings = [adapters.read_settings(file, args) for file in files]
    folders = [Path(args.output_folder_gen, task.dataset, name, "origin")
               for task, name in zip(tasks, names, strict=True)]
    origins = [describe_origin(args, stored, file) for stored, file in zip(settings, files, strict=True)]
    notes = [settings_file(folder, args.train_iteration, origin)
             for folder, origin in zip(folders, origins, strict=True)]
    seeds = choose_seeds(args)
    prompts = {task.dataset: choose_prompts(args, task.position, seeds) for task in tasks}
    schedules = plan_schedules(args, settings)
    pipe, encoded, device, dtype = load_models(args, files, [prompt for group in prompts.values() for prompt in group],
                                               max(s["max_sequence_length"] for s in settings))

    # --- LoRA by LoRA
    for task, file, stored, sigmas, folder, origin, note in zip(tasks, files, settings, schedules, folders, origins,
                                                                notes, strict=True):
        adapters.load(pipe, file, SEMANTIC)
        shape = flux.latent_shape(pipe.vae, stored["resolution"], stored["resolution"])
        writable_folder(folder, "--output_folder_gen")
        write_json(note, {
            "lora": file.name, "origin": origin, "seeds": seeds, "prompts": prompts[task.dataset],
            "arguments": public_args(args)})
        for skip in args.skips:
            batches = range(0, len(seeds), args.sample_batch_size)
            for first in tqdm(batches, desc=f"{folder.parent.name}, skip {skip}", unit="batch", disable=None):
                batch = slice(first, first + args.sample_batch_size)
                text = flux.stack_text(encoded, prompts[task.dataset][batch], device, dtype)
                noise = draw_noise(shape, seeds[batch]).to(device)
                results = slide(pipe, noise, sigmas, text, stored["guidance_scale"], args.scales, start_index=skip + 1)
                for i, seed in enumerate(seeds[batch]):
                    images = flux.decode(pipe.vae, results[:, i])
                    write_slide(folder, task.dataset, seed, skip, args.train_iteration, args.scales, images,
                                prompts[task.dataset][first + i], args.image_format)
        print(f"images: {folder}")


if __name__ == "__main__":
    sys.exit(run_main(lambda: main(parse_args())))
