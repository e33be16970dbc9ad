"""The LoRAs that ship beside the embedded model restore what they were trained for, on photographs they never saw."""

import pytest
import torch

from bench.restoration import DegradedSet, set_seed, tune, tuning_photos
from my_dataset.dataset_deg_paired import DEGRADATION_STREAM, item_rng, to_tensor
from my_dataset.degradations import make_degrader
from my_dataset.scored_pairs import denoise_bilateral, denoise_nlm
from scripts.make_tiny_kontext import heldout_crops, mean_psnr
from tests.conftest import PROJECT_ROOT
from utils import flux, lora
from utils.restore import STOCK_SETTINGS, choose_start_noise
from utils.tiles import Tiling, restore_tiled, round_trip_tiled
from utils.validation import default_steps

ASSETS = PROJECT_ROOT / "assets"


def to_batch(images):
    return torch.stack([to_tensor(image) for image in images])


@pytest.mark.parametrize(("name", "preset", "over_vae", "over_classical"), [
    ("tiny-kontext-deg-lora", "heavy", 2.5, 0.5),
    ("tiny-kontext-old-photo-lora", "old_photo", 1.0, 0.5),
])
def test_a_shipped_lora_beats_the_input_through_the_vae_and_tuned_filters(name, preset, over_vae, over_classical):
    file, model = lora.find_file(ASSETS / name), str(ASSETS / "tiny-kontext")
    assert file.stat().st_size < 10e6 and (file.parent / "README.md").is_file()
    settings = lora.read_settings(file)
    assert settings.keys() == STOCK_SETTINGS.keys() and settings["base_model"] == "tiny-kontext"
    text = flux.encode_prompts(model, [settings["prompt"]], "cpu", torch.float32, settings["max_sequence_length"])
    pipe = flux.load_models(model, "cpu", torch.float32)
    lora.load(pipe, file)

    degrade = make_degrader(preset=preset)
    clean = heldout_crops(128, 4)
    degraded = [degrade(image, item_rng(set_seed(preset, 0), 0, i, DEGRADATION_STREAM))[0]
                for i, image in enumerate(clean)]
    targets, controls = to_batch(clean), to_batch(degraded).split(1)
    tiling = Tiling(settings["resolution"])
    restored = [restore_tiled(pipe, control, text[settings["prompt"]], settings, default_steps(settings), 0,
                              choose_start_noise(settings), tiling) for control in controls]
    score = mean_psnr(torch.cat(restored), targets)
    through_vae = torch.cat([round_trip_tiled(pipe.vae, control, tiling) for control in controls])
    assert score > mean_psnr(through_vae, targets) + over_vae
    tuned = tune(DegradedSet(preset, "", degrade), tuning_photos(None, []), 0)  # as the benchmark does
    for method, row in ((denoise_nlm, "nlm"), (denoise_bilateral, "bilateral")):
        filtered = to_batch([method(image, **tuned[row]) for image in degraded])
        assert score > mean_psnr(filtered, targets) + over_classical
