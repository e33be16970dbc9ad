"""The model card says what was trained and how well, without the hub; the upload takes what belongs there."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from utils import card, restore

SETTINGS = restore.STOCK_SETTINGS | {"start_noise": [0.25, 0.5], "prompt": "Restore | this: photograph"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run's folder and its arguments; any use of the network fails."""
    def refuse(*args, **kwargs):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    folder = tmp_path / "my-lora"
    (folder / "validation").mkdir(parents=True)
    rows = [{"step": 0, "validation/psnr": 20.1, "validation/ssim": 0.5, "validation/psnr_input": 24.0},
            {"step": 5, "loss/flow": 0.3},
            {"step": 10, "validation/psnr": 27.654321, "validation/ssim": None, "validation/psnr_input": 24.0,
             "validation/lpips": 0.123456}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.new("RGB", (8, 8)).save(folder / "validation" / "step-000010.png")
    return SimpleNamespace(
        output_dir=str(folder), base_model_id="black-forest-labs/FLUX.1-Kontext-dev", max_train_steps=10, seed=3,
        degradation_types="downsample,noise", degradation_preset=None, instance_prompt="Restore | this: photograph",
        hub_model_id=None, hub_token="hf_secret")


def test_the_card_has_numbers_picture_licence_and_the_command(run):
    card.write_model_card(run, SETTINGS, 77, False)
    loaded = ModelCard.load(f"{run.output_dir}/README.md")
    assert "77 images for 10 steps, seed 3" in loaded.text and "downsample,noise" in loaded.text
    assert "| step | psnr | ssim | psnr_input | lpips |" in loaded.text
    assert "| 10 | 27.65 |  | 24 | 0.1235 |" in loaded.text  # what was not finite stays empty
    assert "| 0 | 20.1 | 0.5 | 24 |  |" in loaded.text  # so does what an earlier part of the run did not measure
    assert "(validation/step-000010.png)" in loaded.text
    assert "non-commercial licence" in loaded.text and card.KONTEXT_LICENCE in loaded.text
    assert "--lora my-lora" in loaded.text and "/path/to/FLUX.1-Kontext-dev" in loaded.text
    for name in SETTINGS:
        assert f"| {name} | " in loaded.text
    assert "TODO" not in loaded.content and "[More Information" not in loaded.content


def test_the_card_names_a_preset_in_place_of_types(run):
    run.degradation_types, run.degradation_preset = None, "old_photo"
    card.write_model_card(run, SETTINGS, 77, False)
    assert "degradations `old_photo`" in ModelCard.load(f"{run.output_dir}/README.md").text


def test_the_card_says_whether_the_damage_was_made_or_stored(run):
    for is_paired, words in ((False, "`downsample,noise` made on the fly."), (True, "on stored pairs.")):
        card.write_model_card(run, SETTINGS, 77, is_paired)
        assert f"seed 3, {'with degradations ' * (not is_paired)}{words}\n" in ModelCard.load(
            f"{run.output_dir}/README.md").text


def test_the_cards_header_is_valid_and_complete(run):
    card.write_model_card(run, SETTINGS, 77, False)
    data = ModelCard.load(f"{run.output_dir}/README.md").data
    assert data.license == "other" and data.license_link == card.KONTEXT_LICENCE
    assert data.base_model == run.base_model_id and data.library_name == "diffusers"
    assert data.pipeline_tag == "image-to-image" and data.instance_prompt == "Restore | this: photograph"
    assert {"lora", "flux", "flux-kontext", "image-restoration", "diffusers"} <= set(data.tags)


def test_every_row_of_a_table_has_the_columns_of_its_head(run):
    card.write_model_card(run, SETTINGS | {"prompt": "plain"}, 77, False)
    width = None
    for line in ModelCard.load(f"{run.output_dir}/README.md").text.splitlines():
        if not line.startswith("|"):
            width = None
            continue
        width = width or line.count("|")
        assert line.count("|") == width, line


def test_no_path_of_this_machine_and_no_secret_is_on_the_card(run):
    card.write_model_card(run, SETTINGS, 77, False)
    content = ModelCard.load(f"{run.output_dir}/README.md").content
    assert run.output_dir not in content and "hf_secret" not in content


def test_a_run_without_validation_has_a_card_without_a_table(run, tmp_path):
    (tmp_path / "my-lora" / "metrics.jsonl").write_text('{"step": 10, "loss/flow": 0.1}\n')
    (tmp_path / "my-lora" / "validation" / "step-000010.png").unlink()
    card.write_model_card(run, SETTINGS, 77, False)
    text = ModelCard.load(f"{run.output_dir}/README.md").text
    assert "## Validation" not in text and "validation/" not in text and "## Licence" in text


@pytest.fixture
def hub(monkeypatch):
    """Stands for the hub; holds what it was asked."""
    asked = {}

    def create_repo(repo_id, **options):
        asked["create"] = (repo_id, options)
        return SimpleNamespace(repo_id=f"someone/{repo_id.rpartition('/')[2]}")

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: asked.update(upload=options))
    return asked


@pytest.mark.parametrize(("hub_model_id", "created"), [(None, "my-lora"), ("someone/other", "someone/other")])
def test_push_creates_the_repository_and_uploads_to_what_the_hub_answered(run, hub, hub_model_id, created):
    run.hub_model_id = hub_model_id
    repository = card.push_to_hub(run)
    assert hub["create"] == (created, {"exist_ok": True, "token": "hf_secret"})
    assert repository == hub["upload"]["repo_id"] == f"someone/{created.rpartition('/')[2]}"
    assert hub["upload"]["folder_path"] == run.output_dir and hub["upload"]["token"] == "hf_secret"


def test_push_uploads_the_result_and_neither_checkpoints_nor_caches(run, hub):
    from huggingface_hub.utils import filter_repo_objects

    card.push_to_hub(run)
    wanted = ["pytorch_lora_weights.safetensors", "README.md", "metrics.jsonl", "validation/step-000010.png"]
    others = ["args.json", "checkpoint-10/pytorch_lora_weights.safetensors", "checkpoint-10/state.json",
              "unreadable.txt",
              "latent_cache/0a.safetensors", "logs/events.out.tfevents", "checkpoint-10.tmp/state.safetensors"]
    uploaded = filter_repo_objects(wanted + others, allow_patterns=hub["upload"]["allow_patterns"],
                                   ignore_patterns=hub["upload"]["ignore_patterns"])
    assert list(uploaded) == wanted
