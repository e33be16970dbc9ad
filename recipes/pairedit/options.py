"""PairEdit's options, which training and generation read from the same YAML file, and the names of what they write."""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from my_dataset.dataset_deg_paired import item_rng
from recipes.pairedit.adapters import METHODS
from recipes.pairedit.objectives import VARIANTS
from recipes.pairedit.pairs import check_pairs, find_image, find_pairs, fingerprint
from utils import flux, placement, run
from utils.lora import read_settings
from utils.parse import check_least, make_parser, run_main

CONFIGS = Path(__file__).parent / "config"
RANDOM_SEEDS = 2**15
PROMPTS = Path(__file__).parent / "prompts"


def make_pairedit_parser(description):
    """The parser of every program of this recipe. --config FILE or --c NAME (config/NAME.yaml) sets defaults."""
    parser = make_parser(description)
    flux.add_model_args(parser)
    add = parser.add_argument_group("data").add_argument
    add("--datasets_folder", default="datasets", help="folder of the datasets")
    add("--datasets", nargs="+", required=True, help="names of datasets, each trained on its own; of a text slider: "
        "free names, one for each --target_prompt")
    add("--source_folder", default="source", help="folder of source images in a dataset")
    add("--target_folder", default="target", help="folder of target images in a dataset")
    add("--image_ids", nargs="+", default=[], help="real images: names of files in the source folder, each trained on "
        "its own")
    add("--resolution", type=int, default=512, help="side in px of the square that images are cropped to")
    add("--train_prompt", default="", help="prompt of training")
    add = parser.add_argument_group("method").add_argument
    add("--python_name", default="train_image", choices=VARIANTS, help="the variant; also a part of file names")
    add("--start_step", type=int, default=0, help="first index of the schedule that is trained")
    add("--end_step", type=int, help="last index that is trained; default: the schedule's last")
    add("--num_inference_steps", type=int, default=28, help="steps of the schedule, in training and sampling")
    add("--cfg_eta", type=float, default=4.0, help="eta, strength of the edit at slider 1; a text slider's guidance")
    add("--noise_scales", type=float, nargs="+", default=[1.0], help="factors of the noise; one LoRA for each")
    add("--fm_target", choices=["velocity", "noise"], default="velocity", help="train_image_fm: a velocity of its "
        "path, or the noise, as some forks have it")
    add("--target_prompt", nargs="+", default=[], help="text slider: what is changed, such as 'a person'")
    add("--positive_prompt", nargs="+", default=[], help="text slider: what it moves towards")
    add("--negative_prompt", nargs="+", default=[], help="text slider: what it moves away from")
    add("--train_method", default="full", choices=METHODS, help="full and xattn: all attention layers; xattn-strict: "
        "keys and values; all but full train A alone, with B random orthonormal")
    add("--rank", type=int, default=16, help="LoRA rank")
    add("--lora_alpha", type=float, default=1.0, help="LoRA scale is alpha / rank")
    run.add_optimizer_args(parser)
    add = parser.add_argument_group("training").add_argument
    add("--config_name", default="base", help="free tag of this run, a part of file names")
    add("--train_iteration", type=int, default=500, help="steps")
    add("--save_per_steps", type=int, default=200, help="steps between saved LoRAs")
    add("--train_start", type=int, default=1, help="first version, the N of vN")
    add("--train_count", type=int, default=1, help="versions, each with randomness of its own")
    add("--output_folder", default="output/models/image", help="folder of LoRAs")
    add("--seed", type=int, default=0, help="seed of training")
    add("--train_batch_size", type=int, default=1, help="pairs per process and micro-step")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-steps per step")
    add("--gradient_checkpointing", action="store_true", help="less memory, about a third slower")
    add("--max_grad_norm", type=float, default=0.0, help="gradient clipping norm; 0 = off")
    add("--mixed_precision", choices=["no", "bf16"], help="default bf16 on a GPU; a CPU computes in fp32")
    add("--allow_tf32", action="store_true", help="TF32 for the fp32 matrices on a GPU")
    add("--device", type=int, default=0, help="index of the GPU, for a single process")
    add("--logging_steps", type=int, default=10, help="steps between read-backs of losses")
    add("--resume_from_checkpoint", choices=["latest"], help="go on where the runs of this command were stopped")
    placement.add_placement_args(parser)
    add = parser.add_argument_group("generation").add_argument
    add("--use_trained_lora_path", type=int, choices=[0, 1], default=0, help="1: use --trained_lora_path, whatever "
        "this file would train")
    add("--trained_lora_path", help="LoRA file, .safetensors or the original's .pt")
    add("--use_prompts_file", type=int, choices=[0, 1], default=0, help="1: draw prompts from --prompts_file")
    add("--prompts_file", nargs="+", default=["prompts-person.yaml"], help="YAML lists of prompts, one file for each "
        "dataset, the last for all that follow; a path, or a name in prompts/")
    add("--prompt", nargs="+", default=["image of a person"], help="one for each dataset, the last for all that follow")
    add("--use_random_seed", type=int, choices=[0, 1], default=0, help="1: seeds below 2^15 drawn from --seed")
    add("--start_seed_gen", type=int, default=6000, help="first seed")
    add("--count_gen", type=int, default=20, help="seeds")
    add("--scales", default="0,0.8,1.0,1.2", help="slider values, with commas; where the first is negative: "
        "--scales=-1,0,1")
    add("--skips", type=int, nargs="+", default=[10], help="the LoRA acts from the step after this one, counted from "
        "0 (-1: from the first); each value is a run of its own. Real images: from this step")
    add("--output_folder_gen", default="output/eval/image", help="folder of images")
    add("--sample_batch_size", type=int, default=4, help="seeds sampled at once")
    add("--image_format", choices=["jpg", "png"], default="jpg", help="of single images")
    add = parser.add_argument_group("real images").add_argument
    add("--semantic_lora_path", help="LoRA of the edit")
    add("--semantic_cfg_scale", type=float, default=0.75, help="w of v_c + w (v_s - v_c)")
    add("--real_mix", choices=["replace", "add"], default="replace", help="v_s without the content LoRA, as in the "
        "original, or with it")
    add("--start_sigma", type=float, default=1.0, help="noise level that sampling starts from; below 1 the image "
        "itself is part of the start")
    parser.set_defaults(guidance_scale=3.5, learning_rate=2e-3, adam_weight_decay=1e-2)
    return parser


def parse_pairedit_args(description, argv=None):
    """The checked arguments of one of this recipe's programs. ValueError names the flag or file."""
    words = named_config(sys.argv[1:] if argv is None else argv)
    args = make_pairedit_parser(description).parse_args(words)
    args.given = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    run.check_optimizer_args(args)
    check_least(args, train_iteration=1, save_per_steps=1, train_start=0, train_count=1, resolution=16, rank=1, seed=0,
                train_batch_size=1, gradient_accumulation_steps=1, logging_steps=1, num_inference_steps=1, cfg_eta=0,
                learning_rate=0, max_grad_norm=0, count_gen=1, start_seed_gen=0, sample_batch_size=1,
                max_sequence_length=1, device=0, lr_warmup_steps=0)
    if args.end_step is None:
        args.end_step = args.num_inference_steps - 1
    if not 0 <= args.start_step <= args.end_step < args.num_inference_steps:
        raise ValueError(f"--start_step {args.start_step}, --end_step {args.end_step}: give indices 0 to "
                         f"{args.num_inference_steps - 1} of the {args.num_inference_steps} steps, the first not above "
                         "the last")
    if not 0 < args.lora_alpha < math.inf:
        raise ValueError(f"--lora_alpha {args.lora_alpha}: give more than 0")
    if any(not 0 < scale < math.inf for scale in args.noise_scales):
        raise ValueError(f"--noise_scales {args.noise_scales}: give numbers above 0")
    if not 0 < args.start_sigma <= 1:
        raise ValueError(f"--start_sigma {args.start_sigma}: give more than 0, at most 1")
    if args.max_sequence_length > 512:
        raise ValueError(f"--max_sequence_length {args.max_sequence_length}: give 1 to 512")
    try:
        args.scales = [float(scale) + 0.0 for scale in str(args.scales).split(",")]  # + 0.0: -0 is 0
    except ValueError as error:
        raise ValueError(f"--scales {args.scales}: write numbers with commas, such as 0,0.8,1.0,1.2") from error
    if not all(map(math.isfinite, args.scales)):
        raise ValueError(f"--scales {args.scales}: give finite numbers")
    if len({f"{scale:.2f}" for scale in args.scales}) < len(args.scales):
        raise ValueError("--scales: two values are equal to two decimals, which stand in file names; leave one out")
    if len(set(args.datasets)) < len(args.datasets):
        raise ValueError(f"--datasets {' '.join(args.datasets)}: a name is given twice")
    for name in (*args.datasets, args.config_name):
        if Path(name).name != name:
            raise ValueError(f"--datasets and --config_name are parts of file names, not paths as {name}; the folder "
                             "is --datasets_folder")
    if VARIANTS[args.python_name] in ("real", "text") and args.noise_scales != [1.0]:
        raise ValueError(f"--noise_scales: {args.python_name} has none; leave it out")
    flux.check_model(args.pretrained_model_name_or_path)
    placement.check_placement_args(args)
    choose_gpu(args.device)
    args.objective = VARIANTS[args.python_name]
    args.base_model_id = flux.model_id(args.pretrained_model_name_or_path)
    return args


def named_config(argv):
    """--c NAME as --config <this recipe>/config/NAME.yaml. ValueError naming those that are there."""
    argv = list(argv)
    for i, word in enumerate(argv):
        if word == "--c" or word.startswith("--c="):
            name = word[4:] if "=" in word else "".join(argv[i + 1:i + 2])
            path = CONFIGS / f"{name}.yaml"
            if not path.is_file():
                raise ValueError(f"--c {name}: {CONFIGS.name}/ has no {path.name}; it has "
                                 f"{', '.join(sorted(file.stem for file in CONFIGS.glob('*.yaml')))}")
            argv[i:i + (1 if "=" in word else 2)] = ["--config", str(path)]
            return argv
    return argv


def choose_gpu(index):
    """Let a single process use GPU `index`; several processes are placed by their launcher."""
    if "LOCAL_RANK" in os.environ or not torch.cuda.is_available():
        return
    if index >= torch.cuda.device_count():
        raise ValueError(f"--device {index}: this machine has GPUs 0 to {torch.cuda.device_count() - 1}")
    os.environ["ACCELERATE_TORCH_DEVICE"] = f"cuda:{index}"
    torch.cuda.set_device(index)


def run_as(main, parse_args, argv=()):
    """Entry point of the programs that are only names: `argv` before the command line's own words."""
    sys.exit(run_main(lambda: main(parse_args([*sys.argv[1:], *argv]))))


def brief(value):
    """A number with one decimal, as the original writes it, or with as many as it has."""
    return f"{value:.1f}" if round(value, 1) == value else f"{value:g}"


@dataclass
class Task:
    """One LoRA to train, or to generate with. position: of its dataset in --datasets. images: pairs of paths, of a real
    image the same path twice, of a text slider none."""

    dataset: str
    position: int
    noise_scale: float
    version: int
    images: list
    image_id: str | None = None

    def name(self, args):
        """The LoRA's name, as the original writes it."""
        if self.image_id:
            return f"{self.dataset}_{self.image_id}_v{args.python_name}_{args.config_name}_v{self.version}"
        return (f"{self.dataset}_v{args.python_name}_{brief(args.cfg_eta)}eta_{brief(self.noise_scale)}ns_"
                f"{args.train_method}_{args.config_name}_v{self.version}")

    def folder(self, args):
        return Path(args.output_folder, self.dataset, self.name(args))

    def file(self, args, step, is_second=False):
        """The LoRA after `step` steps; is_second: the content LoRA beside a semantic one."""
        what = (f"{self.dataset}_{self.image_id}" if self.image_id else
                f"{self.dataset}_{brief(args.cfg_eta)}eta_{brief(self.noise_scale)}ns")
        return self.folder(args) / (f"{what}_{args.num_inference_steps}inf_{step}epoch{'_0' * is_second}.safetensors")


def plan_tasks(args, check_images=True):
    """Every LoRA of this command, in order: datasets, image ids, noise scales, versions. Reads the images once, unless
    check_images is off: ValueError names the one that is missing, unreadable or of another size than its partner."""
    tasks = []
    for position, dataset in enumerate(args.datasets):
        folder = Path(args.datasets_folder, dataset)
        if args.objective == "text":
            groups = [(None, [])]
        elif args.objective == "real":
            if not args.image_ids:
                raise ValueError("--image_ids: name the images to train, files in the source folder without extension")
            paths = {image_id: find_image(folder / args.source_folder, image_id) for image_id in args.image_ids}
            groups = [(image_id, [(path, path)]) for image_id, path in paths.items()]
        else:
            groups = [(None, find_pairs(folder, args.source_folder, args.target_folder) if check_images else [])]
        for image_id, images in groups:
            if check_images:
                check_pairs(images, args.resolution)
            tasks += [Task(dataset, position, scale, version, images, image_id) for scale in args.noise_scales
                      for version in range(args.train_start, args.train_start + args.train_count)]
    names = [task.folder(args) for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError("--noise_scales or --image_ids: a value is given twice")
    return tasks


def check_new(tasks, args):
    """Refuse folders that hold an earlier run, unless this one goes on with it: nothing is overwritten."""
    for task in tasks:
        folder = task.folder(args)
        if not args.resume_from_checkpoint and any([*folder.glob("*.safetensors"), *folder.glob("checkpoint-*")]):
            raise ValueError(f"{folder} holds an earlier run; add --resume_from_checkpoint latest, or give another "
                             "--config_name or --output_folder")


def is_finished(task, args, settings):
    """True if the LoRA of this task is finished. ValueError where its folder holds LoRAs that were trained in another
    way than `settings` say: going on would mix them, or write over them."""
    for file in task.folder(args).glob("*.safetensors"):
        stored = (read_settings(file) or {}).get("slider", {})
        stored = {"images": settings["images"]} | stored  # which early LoRA files do not state
        if differing := sorted(key for key in settings if stored.get(key) != settings[key]):
            raise ValueError(f"{file} was trained with other options ({', '.join(differing)}); restore these, or give "
                             "another --config_name or --output_folder")
    return task.file(args, args.train_iteration).exists()


def resume(task, args, identity):
    """run.resume of one task. ValueError where a new run would write over sliders of an earlier one."""
    step, state = run.resume(args, identity)
    sliders = sorted(task.folder(args).glob("*epoch.safetensors"))
    if state is None and sliders:  # a content LoRA alone is of a run that was killed while it saved for the first time
        raise ValueError(f"{sliders[0]} is of an earlier run without a sound checkpoint, and a new run would write "
                         "over it; take the folder away, or give another --config_name or --output_folder")
    return step, state


def make_settings(args, task, prompts):
    """What sampling, and whoever finds the LoRA, needs to know of its training; JSON-safe, stored in its file."""
    names = ["objective", "rank", "lora_alpha", "train_method", "cfg_eta", "start_step", "end_step", "fm_target",
             "num_inference_steps", "guidance_scale", "max_sequence_length", "resolution", "seed", "learning_rate",
             "adam_weight_decay", "adam_beta1", "adam_beta2", "optimizer", "lr_scheduler", "train_batch_size",
             "gradient_accumulation_steps", "vae_encode_mode"]
    return {name: getattr(args, name) for name in names} | {
        "dataset": task.dataset, "noise_scale": task.noise_scale, "version": task.version, "prompts": list(prompts),
        "prompt": prompts[0], "base_model": args.base_model_id, "images": fingerprint(task.images)}


def text_prompts(args, position):
    """(target, positive, negative) prompt of the text slider at a place of --datasets. ValueError where one lacks."""
    lists = [args.target_prompt, args.positive_prompt, args.negative_prompt]
    if any(len(prompts) != len(args.datasets) for prompts in lists):
        raise ValueError(f"--target_prompt, --positive_prompt and --negative_prompt: give one of each for each of the "
                         f"{len(args.datasets)} --datasets; there are {', '.join(str(len(p)) for p in lists)}")
    return tuple(prompts[position] for prompts in lists)


def choose_loras(tasks, args):
    """[(task, LoRA file, name of its folder of images)] of generation: what each task trains, or --trained_lora_path
    once for all the tasks of the same images, whatever they would train. ValueError where it is not named."""
    if not args.use_trained_lora_path:
        return [(task, task.file(args, args.train_iteration), task.name(args)) for task in tasks]
    if not args.trained_lora_path:
        raise ValueError("--use_trained_lora_path 1 needs --trained_lora_path")
    file = Path(args.trained_lora_path)
    return [(task, file, f"{task.image_id}_{file.stem}" if task.image_id else file.stem)
            for task in {(task.dataset, task.image_id): task for task in tasks}.values()]


def choose_seeds(args):
    """The seeds of generation: --count_gen different ones."""
    if args.use_random_seed:
        if args.count_gen > RANDOM_SEEDS:
            raise ValueError(f"--count_gen {args.count_gen}: there are {RANDOM_SEEDS} random seeds")
        return item_rng(args.seed, 0, 0).choice(RANDOM_SEEDS, args.count_gen, replace=False).tolist()
    return list(range(args.start_seed_gen, args.start_seed_gen + args.count_gen))


def choose_prompts(args, position, seeds):
    """The prompt of every seed, for the dataset at this place: --prompt, or drawn from --prompts_file by the seed."""
    if not args.use_prompts_file:
        return [last_repeats(args.prompt, position)] * len(seeds)
    name = last_repeats(args.prompts_file, position)
    path = Path(name) if Path(name).is_file() else PROMPTS / name
    try:
        prompts = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError, OSError) as error:
        raise ValueError(f"--prompts_file {name}: {error}; write a YAML list of prompts") from error
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(f"--prompts_file {name}: write a YAML list of prompts")
    return [str(prompts[item_rng(args.seed, 0, seed).integers(len(prompts))]) for seed in seeds]


def last_repeats(values, position):
    """values[position], or the last one."""
    return values[min(position, len(values) - 1)]
