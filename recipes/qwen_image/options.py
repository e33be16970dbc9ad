"""The options of training, and the YAML files they are read from: those of the published trainer work as they are."""

import argparse
import sys

import configargparse
from accelerate.utils import is_wandb_available

from recipes.qwen_image import qwen
from recipes.qwen_image.image_datasets.dataset import add_data_args
from utils import flow_matching as fm
from utils import flux, lora, quantise, run
from utils.parse import OmegaConfParser, check_least, make_parser, without_nulls

DATA_SECTION = "data_config"
DATA_KEYS = ("img_dir", "control_dir", "img_size", "caption_type", "caption_dropout_rate", "random_ratio", "repeats",
             "max_pixels", "num_workers", "train_batch_size")
ALIASES = {"path": "img_dir", "num_workers": "dataloader_num_workers"}  # of options with two names


class QwenConfigParser(OmegaConfParser):
    """Also reads the keys below `data_config`, as the options of the same names. An option that stands twice, in either
    place and by either of its names, has one value. overrides: of split_overrides, which win over the file's."""

    reserved = ("config", "set")

    def __init__(self, overrides):
        super().__init__()
        self.overrides = overrides

    def read(self, stream):
        values = super().read(stream)
        section = values.pop(DATA_SECTION, {})
        if not isinstance(section, dict):
            raise configargparse.ConfigFileParserException(f"{stream.name}: {DATA_SECTION}: write its keys below it")
        section = without_nulls(section)
        for key in [*section, *(key for place, key, _ in self.overrides if place == DATA_SECTION)]:
            if key not in DATA_KEYS:
                raise configargparse.ConfigFileParserException(
                    f"{stream.name}: {DATA_SECTION} has no {key}; it has {', '.join(DATA_KEYS)}")
        said = {}  # option: (key of the file, value)
        for place, pairs in (("", values), (f"{DATA_SECTION}.", section)):
            for key, value in pairs.items():
                other, first = said.setdefault(ALIASES.get(key, key), (place + key, value))
                if first != value:
                    raise configargparse.ConfigFileParserException(
                        f"{stream.name}: {other} is {first}, and {place}{key} {value}; make them agree")
        chosen = {option: value for option, (_, value) in said.items()}
        for place, key, value in self.overrides:
            chosen[ALIASES.get(key, key) if place in ("", DATA_SECTION) else f"{place}.{key}"] = value
        return without_nulls(chosen)


def split_overrides(argv):
    """(words, overrides): every `--set PLACE.KEY=VALUE` taken out of the command line, as (place or "", key, value).
    ValueError where one is none."""
    words, overrides, argv = [], [], list(argv)
    while argv:
        word = argv.pop(0)
        if word != "--set" and not word.startswith("--set="):
            words.append(word)
            continue
        pair = word.removeprefix("--set=") if word != "--set" else "".join(argv[:1])
        argv = argv[1:] if word == "--set" else argv
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise ValueError(f"--set {pair}: write KEY=VALUE, such as --set data_config.img_size=512")
        place, _, key = name.rpartition(".")
        overrides.append((place, key, value))
    return words, overrides


def make_qwen_parser(description, overrides=()):
    parser = make_parser(description, QwenConfigParser(overrides))
    parser.add_argument("--set", metavar="KEY=VALUE", help="override a key of the file, such as "
                        "data_config.img_size=512; repeatable. The same as the option of that name")
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, help="folder of a Qwen-Image or Qwen-Image-Edit pipeline, or "
        "its hub id")
    add("--revision", help="branch, tag or commit of the hub model")
    add("--variant", help="weight variant of the model files, such as fp16")
    add("--cache_dir", help="where hub downloads are kept")
    add("--max_sequence_length", type=int, default=1024, help="tokens of a caption, 1 to 1024")
    add("--vae_encode_mode", default="sample", choices=["mode", "sample"], help="mean of the VAE's posterior, or a "
        "draw from it")
    quantise.add_quantisation_args(parser)
    add_data_args(parser)
    add = parser.add_argument_group("memory").add_argument
    add("--quantize", action=switch, default=False, help="--base_precision fp8, where none is given")
    add("--adam8bit", action=switch, default=False, help="--use_8bit_adam, by the published trainer's name")
    add("--precompute_text_embeddings", action=switch, default=True, help="accepted: texts are always encoded before "
        "the transformer loads, or the text encoder's 16 GB would have to stay")
    add("--precompute_image_embeddings", action=switch, default=False, help="encode all images before the transformer "
        "loads; the VAE then leaves the GPU")
    add("--save_cache_on_disk", action=switch, default=False, help="keep what is encoded in --output_dir/cache, not in "
        "memory")
    add("--gradient_checkpointing", action=switch, default=True, help="less memory, about a third slower")
    group = parser.add_argument_group("flow")
    fm.add_density_args(group)
    group.add_argument("--timestep_shift", default="none", choices=["none", "resolution"], help="resolution: shift "
                       "noise levels up with the number of tokens, as stock sampling does")
    lora.add_lora_args(parser, default_layers="those of --lora_target_preset")
    parser.add_argument("--lora_target_preset", default="img_attn", choices=qwen.LORA_TARGETS, help="layers with a "
                        "LoRA: attention on the image's side, on the text's too, or all that and the feed-forward "
                        "layers")
    run.add_optimizer_args(parser)
    add = parser.add_argument_group("training").add_argument
    add("--output_dir", default="output", help="folder for all that is written")
    add("--seed", type=int, default=0, help="seed of data order, captions dropped, noise and LoRA")
    add("--train_batch_size", type=int, default=1, help="images per process and micro-step")
    add("--dataloader_num_workers", "--num_workers", type=int, default=4, help="loader processes; 0 loads in the "
        "training process")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-steps per optimizer step")
    add("--max_train_steps", type=int, default=3000, help="optimizer steps")
    add("--mixed_precision", choices=["no", "bf16"], help="default bf16 on a GPU; a CPU always trains in fp32. The "
        "LoRA stays fp32")
    add("--allow_tf32", action="store_true", help="TF32 for the fp32 matrices on a GPU")
    add("--max_grad_norm", type=float, default=1.0, help="gradient clipping norm; 0 = off")
    add("--checkpointing_steps", type=int, default=250, help="steps between checkpoints; 0 = none")
    add("--checkpoints_total_limit", type=int, help="keep at most so many checkpoints; default all")
    add("--resume_from_checkpoint", help="'latest' in --output_dir, or the path of one")
    add("--logging_steps", type=int, default=10, help="steps between read-backs of losses")
    add("--logging_dir", default="logs", help="tracker files, below --output_dir")
    add("--report_to", choices=["tensorboard", "wandb", "none"], default="tensorboard", help="metrics.jsonl is always "
        "written")
    add("--tracker_project_name", default="qwen-image-lora", help="the run's name in the tracker")
    add = parser.add_argument_group("validation").add_argument
    add("--validation_prompt", help="prompt of the images that are made while training; without it there are none")
    add("--validation_image", help="edit training: image to edit by it")
    add("--validation_steps", type=int, default=250, help="steps between validations")
    add("--num_validation_images", type=int, default=4, help="images made each time, with the seeds seed, seed + "
        "1, ...")
    add("--num_inference_steps", type=int, default=50, help="sampling steps")
    add("--true_cfg_scale", type=float, default=4.0, help="classifier-free guidance with the negative prompt ' '; 1 = "
        "off")
    parser.set_defaults(lr_warmup_steps=10, adam_weight_decay=1e-2)  # the published trainer's
    return parser


def parse_qwen_args(description, argv=None):
    """The checked arguments. ValueError names the flag."""
    words, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    parser = make_qwen_parser(description, overrides)
    has_file = any(word == "--config" or word.startswith("--config=") for word in words)
    args = parser.parse_args(words, config_file_contents=None if has_file else "{}")
    check_least(args, max_sequence_length=1, rank=1, seed=0, train_batch_size=1, dataloader_num_workers=0,
                gradient_accumulation_steps=1, max_train_steps=1, max_grad_norm=0, checkpointing_steps=0,
                checkpoints_total_limit=1, logging_steps=1, validation_steps=1, num_validation_images=1,
                num_inference_steps=2, true_cfg_scale=1, max_pixels=1, logit_std=0, adam_epsilon=0)
    if args.max_sequence_length > 1024:
        raise ValueError(f"--max_sequence_length {args.max_sequence_length}: give 1 to 1024")
    lora.check_lora_args(args)
    if args.adam8bit:
        args.use_8bit_adam = True
    run.check_optimizer_args(args)
    if args.quantize and not args.bnb_quantization_config_path:
        args.base_precision = args.base_precision or "fp8"
    quantise.check_quantisation_args(args)
    if not args.precompute_text_embeddings:
        print("--no-precompute_text_embeddings does nothing: texts are encoded before the transformer loads",
              flush=True)
    if args.report_to == "wandb" and not is_wandb_available():
        raise ValueError("--report_to wandb: it is not installed; pip install wandb, or give tensorboard")
    if args.validation_image and not (args.control_dir and args.validation_prompt):
        raise ValueError("--validation_image is for edit training with --validation_prompt; add --control_dir and "
                         "the prompt, or leave it out")
    if args.control_dir and args.validation_prompt and not args.validation_image:
        raise ValueError("--validation_prompt of edit training needs --validation_image, the image to edit")
    qwen.check_model(args.pretrained_model_name_or_path)
    args.base_model_id = flux.model_id(args.pretrained_model_name_or_path)
    run.check_output_dir(args)
    return args
