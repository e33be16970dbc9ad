"""The suggested start noise against the ratio it is defined by."""

import subprocess
import sys

import pytest
import torch

from scripts import suggest_start_noise as script
from tests.conftest import PROJECT_ROOT


def test_equal_latents_need_no_noise_and_damage_as_strong_as_unit_noise_half():
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    assert script.matching_start_noise(latents, latents) == 0
    assert script.matching_start_noise(latents, latents + 1) == pytest.approx(0.5)


@pytest.mark.parametrize("contrast", [0.3, 1, 2])
def test_noisy_latents_at_the_suggestion_have_the_damage_s_signal_to_noise_ratio(contrast):
    generator = torch.Generator().manual_seed(1)
    target, damage, noise = (torch.randn(1, 16, 64, 64, generator=generator) for _ in range(3))
    target, damage = contrast * target, 0.6 * damage
    k = script.matching_start_noise(target, target + damage)
    left = target.square().mean() / damage.square().mean()
    assert ((1 - k) * target).square().mean() / (k * noise).square().mean() == pytest.approx(left.item(), rel=0.02)


def test_suggestion_is_the_median_and_the_bridge_where_the_damage_is_slight():
    assert script.suggest([0.2, 0.31, 0.9]) == 0.31
    assert script.suggest([0.01, 0.05, 0.5]) == 0


def run(*options):
    command = [sys.executable, "-m", "scripts.suggest_start_noise", *options]
    return subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True)


def test_command_suggests_more_noise_for_more_damage(tiny_model, photos):
    common = ["--pretrained_model_name_or_path", tiny_model, "--hr_root", str(photos / "train"), "--resolution", "32",
              "--max_images", "4", "--seed", "3", "--degradation_types", "noise"]
    results = [run(*common, "--noise_level", level) for level in ("0.02", "0.5")]
    assert [result.returncode for result in results] == [0, 0], results[1].stderr
    weak, strong = (float(result.stdout.split("median ")[1].split(",")[0]) for result in results)
    assert weak < strong
    assert "--start_noise " in results[0].stdout
    assert results[1].stdout.startswith("4 images")


def test_command_refuses_no_images_in_one_line(tiny_model, photos):
    result = run("--pretrained_model_name_or_path", tiny_model, "--hr_root", str(photos), "--max_images", "0")
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].endswith("--max_images 0: give 1 or more")
