"""The suggested start noise against the ratio it is defined by."""

import pytest
import torch

from scripts import suggest_start_noise as script


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


def test_command_suggests_more_noise_for_more_damage(tiny_model, photos, monkeypatch, capsys):
    common = ["--pretrained_model_name_or_path", tiny_model, "--hr_root", str(photos / "train"), "--resolution", "32",
              "--max_images", "4", "--seed", "3", "--degradation_types", "noise"]
    printed = []
    for level in ("0.02", "0.5"):
        monkeypatch.setattr("sys.argv", ["suggest_start_noise", *common, "--noise_level", level])
        script.main()
        printed.append(capsys.readouterr().out)
    weak, strong = (float(text.split("median ")[1].split(",")[0]) for text in printed)
    assert weak < strong
    assert "--start_noise " in printed[0]
    assert printed[1].startswith("4 images")


def test_command_refuses_no_images_by_name(tiny_model, photos):
    with pytest.raises(ValueError, match="^--max_images 0: give 1 or more"):
        script.parse_args(["--pretrained_model_name_or_path", tiny_model, "--hr_root", str(photos), "--max_images",
                           "0"])
