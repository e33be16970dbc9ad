"""The model card beside a trained LoRA, and its upload."""

import shlex
from pathlib import Path

from utils.parse import read_metrics

KONTEXT_LICENCE = "https://huggingface.co/black-forest-labs/FLUX.1-Kontext-dev/blob/main/LICENSE.md"


def check_card(folder):
    """ValueError where the README.md of an --output_dir is of no training run: the card would take its place."""
    card = Path(folder, "README.md")
    if card.exists() and not Path(folder, "args.json").exists():
        raise ValueError(f"{card} would be written over, and was not made here; name another --output_dir, or move it "
                         "away")


def write_model_card(args, settings, images, is_paired):
    """Write output_dir/README.md of a restoration LoRA; returns its path. images: how many, or what they were.
    is_paired: whether they were stored with their degraded partners."""
    damage = f"with degradations `{args.degradation_preset or args.degradation_types}` made on the fly"
    damage = "on stored pairs" if is_paired else damage
    model = f"/path/to/{folder_name(args.base_model_id)}"
    return write_card(
        args, settings, f"Restoration LoRA for {args.base_model_id}",
        f"Restores photographs; trained on {images}{' images' * isinstance(images, int)} for {args.max_train_steps} "
        f"steps, seed {args.seed}, {damage}.",
        restore_command(model, Path(args.output_dir).name),
        "Means over held-out images; psnr_vae: the autoencoder's round trip, the ceiling.",
        "image-to-image", ["image-restoration"])


def write_dreambooth_card(args, settings, images):
    """Write output_dir/README.md of a subject or edit LoRA; returns its path."""
    is_edit = settings["references"] > 0
    model = f"/path/to/{folder_name(args.base_model_id)}"
    return write_card(
        args, settings, f"{'Edit' if is_edit else 'Subject'} LoRA for {args.base_model_id}",
        f"Trained on {images} images {'with their references ' * is_edit}for {args.max_train_steps} steps, seed "
        f"{args.seed}.",
        generate_command(model, Path(args.output_dir).name, settings),
        "Means over held-out images; psnr_input: doing nothing; psnr_vae: the autoencoder's ceiling." if is_edit else
        "nearest_instance: distance of generated images to the nearest training image, as thumbnails, in 8-bit levels; "
        "step 0 is the base model.",
        "image-to-image" if is_edit else "text-to-image", ["image-editing" if is_edit else "dreambooth"])


def restore_command(model, lora):
    """Shell command that restores with the LoRA."""
    return f"""python test_deg_lora_flux_kontext.py --pretrained_model_name_or_path {shlex.quote(model)} \\
    --lora {shlex.quote(lora)} --input photo.jpg --output restored"""


def generate_command(model, lora, settings):
    """Shell command that generates, or edits, with the LoRA."""
    image = " --image photo.jpg" if settings["references"] else ""
    return f"""python -m scripts.test_kontext_withlora --pretrained_model_name_or_path {shlex.quote(model)} \\
    --lora {shlex.quote(lora)}{image} --prompt {shlex.quote(settings["prompt"])} --output generated"""


def write_card(args, settings, title, about, command, about_scores, pipeline_tag, tags):
    """Write output_dir/README.md: title, what the LoRA does, the command to use it, validation numbers and pictures;
    returns its path."""
    from huggingface_hub import ModelCard, ModelCardData

    folder = Path(args.output_dir)
    results = [row for row in read_metrics(folder / "metrics.jsonl")
               if any(key.startswith("validation/") for key in row)]
    text = f"""# {title}

{about}
The settings that sampling needs are stored in the file and read back.

```bash
{command}
```

| setting | value |
|---|---|
{table_rows(settings.items())}
"""
    if results:
        names = [key for key in results[-1] if key.startswith("validation/")]
        text += f"\n## Validation\n{about_scores}\n\n"
        text += f"| step | {' | '.join(name.split('/')[1] for name in names)} |\n|{'---|' * (len(names) + 1)}\n"
        text += table_rows([row["step"], *("" if row.get(name) is None else f"{row[name]:.4g}" for name in names)]
                           for row in results)
    picture = f"validation/step-{results[-1]['step'] if results else args.max_train_steps:06d}.png"
    if (folder / picture).is_file():
        text += f"\n\n![validation]({picture})\n"
    text += f"\n## Licence\nThe base model's: for FLUX.1-Kontext-dev the [non-commercial licence]({KONTEXT_LICENCE}).\n"
    data = ModelCardData(license="other", license_link=KONTEXT_LICENCE, base_model=args.base_model_id,
                         library_name="diffusers", pipeline_tag=pipeline_tag,
                         instance_prompt=args.instance_prompt or settings["prompt"],
                         tags=[pipeline_tag, *tags, "diffusers", "lora", "flux", "flux-kontext", "template:sd-lora"])
    path = folder / "README.md"
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(path)
    return path


def folder_name(model_id):
    return model_id.rpartition("/")[2]


def table_rows(rows):
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)


def push_to_hub(args):
    """Upload the LoRA, card, metrics and validation pictures; returns the repository's id."""
    from huggingface_hub import create_repo, upload_folder

    repository = create_repo(args.hub_model_id or Path(args.output_dir).resolve().name, exist_ok=True,
                             token=args.hub_token).repo_id
    upload_folder(repo_id=repository, folder_path=args.output_dir, token=args.hub_token,
                  commit_message="End of training",
                  allow_patterns=["*.safetensors", "README.md", "metrics.jsonl", "validation/*.png"],
                  ignore_patterns=["checkpoint-*", "latent_cache/*"])
    return repository
