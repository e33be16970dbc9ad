"""Metrics against independent references: scikit-image, plain formulas, and LPIPS written out."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from utils import metrics
from utils.utils import image_grid, to_pil, to_uint8


def make_pair(batch=2, height=24, width=31, seed=0):
    """uint8 images (B, H, W, 3), the second a noisy version of the first."""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, 256, (batch, height, width, 3))
    restored = (target + rng.normal(0, [[[[10]]]], target.shape)).clip(0, 255).round()
    return restored.astype(np.uint8), target.astype(np.uint8)


def to_images(array):
    return torch.from_numpy(array).movedim(-1, 1).float() / 127.5 - 1


def rgb_to_y(array):
    return 16 + array.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255


def test_psnr_equals_scikit_image_per_image_in_rgb_and_luma():
    restored, target = make_pair()
    rgb = metrics.psnr(to_images(restored), to_images(target))
    y = metrics.psnr_y(to_images(restored), to_images(target))
    for i in range(2):
        assert rgb[i].item() == pytest.approx(peak_signal_noise_ratio(target[i], restored[i]), abs=1e-4)
        reference = peak_signal_noise_ratio(rgb_to_y(target[i]), rgb_to_y(restored[i]), data_range=255)
        assert y[i].item() == pytest.approx(reference, abs=1e-4)
    assert rgb[0] != rgb[1]


def test_ssim_equals_scikit_image_with_the_gaussian_window_of_the_paper():
    restored, target = make_pair()
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    rgb = metrics.ssim(to_images(restored), to_images(target))
    y = metrics.ssim_y(to_images(restored), to_images(target))
    for i in range(2):
        reference = structural_similarity(target[i], restored[i], channel_axis=2, **options)
        assert rgb[i].item() == pytest.approx(reference, abs=1e-5)
        reference = structural_similarity(rgb_to_y(target[i]), rgb_to_y(restored[i]), **options)
        assert y[i].item() == pytest.approx(reference, abs=1e-5)


def test_luma_of_black_and_white_is_16_and_235():
    white = torch.tensor([0.0, 255.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert metrics.luma(white).flatten().tolist() == pytest.approx([16, 235])


def test_metrics_see_8_bit_values_and_uint8_survives_the_tensor():
    _, target = make_pair()
    images = to_images(target)
    below_rounding = images + 0.4 / 127.5 * torch.randn(images.shape).sign()
    assert metrics.psnr(below_rounding, images).tolist() == [100, 100]
    assert (to_uint8(images) == target).all()
    assert (np.asarray(to_pil(images[0])) == target[0]).all()


def test_equal_images_give_100_dB_and_strict_json():
    images = to_images(make_pair()[1])
    values = metrics.measure(images, images)
    assert values == {"psnr": [100.0] * 2, "psnr_y": [100.0] * 2, "ssim": [1.0] * 2, "ssim_y": [1.0] * 2}
    json.dumps(values, allow_nan=False)


@pytest.mark.parametrize("size", [10, 11])
def test_ssim_below_its_window_is_refused_and_psnr_is_not(size):
    restored, target = (to_images(array) for array in make_pair(height=size))
    assert torch.isfinite(metrics.psnr(restored, target)).all()
    if size == 11:
        assert torch.isfinite(metrics.ssim(restored, target)).all()
    else:
        with pytest.raises(ValueError, match="11 px or more, got 31x10"):
            metrics.ssim(restored, target)


def write_backbone(folder, net="alex"):
    """A random torchvision backbone under torchvision's kind of name; returns its path and its features' weights."""
    import torchvision

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        build = {"alex": torchvision.models.alexnet, "squeeze": torchvision.models.squeezenet1_1}[net]
        weights = {name: value for name, value in build(weights=None).state_dict().items()
                   if name.startswith("features")}
    torch.save(weights, folder / "backbone.pth")
    digest = hashlib.sha256((folder / "backbone.pth").read_bytes()).hexdigest()[:8]
    return (folder / "backbone.pth").rename(folder / f"{net}-{digest}.pth"), weights


def lpips_by_hand(weights, heads, a, b):
    """LPIPS 0.1 over AlexNet, written out from the paper: unit-normalised features, squared, weighted, averaged."""
    import torch.nn.functional as F

    def features(images):
        x = (images - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]).view(3, 1, 1)
        for layer, stride, padding, pool in ((0, 4, 2, 0), (3, 1, 2, 1), (6, 1, 1, 1), (8, 1, 1, 0), (10, 1, 1, 0)):
            x = F.max_pool2d(x, 3, 2) if pool else x
            x = F.relu(F.conv2d(x, weights[f"features.{layer}.weight"], weights[f"features.{layer}.bias"], stride,
                                padding))
            yield x / (x.norm(dim=1, keepdim=True) + 1e-10)

    return sum((head * (fa - fb) ** 2).sum(1).mean((1, 2))
               for head, fa, fb in zip(heads, features(a), features(b), strict=True))


def test_lpips_equals_its_formula_over_the_backbone_in_the_file(tmp_path):
    path, weights = write_backbone(tmp_path)
    before = torch.get_rng_state()
    model = metrics.lpips_model(path)
    assert torch.equal(before, torch.get_rng_state())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    restored, target = (to_images(array) for array in make_pair(height=40, width=48))
    heads = [getattr(model, f"lin{i}").model[-1].weight for i in range(5)]
    expected = lpips_by_hand(weights, heads, restored, target)
    values = metrics.measure(restored, target, ["lpips"], model)["lpips"]
    assert values == pytest.approx(expected.tolist(), rel=1e-4)
    assert min(values) > 0 and metrics.lpips_distance(model, target, target).tolist() == [0, 0]
    with pytest.raises(ValueError, match="32 px or more"):
        metrics.lpips_distance(model, *(to_images(array) for array in make_pair(height=31)))


def test_lpips_reads_other_backbones_and_the_torch_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert metrics.available_metrics() == ["psnr", "ssim"]
    with pytest.raises(ValueError, match=r"put it at .*checkpoints.*alexnet-owt-7be5be79.pth.*leave lpips out"):
        metrics.lpips_model()
    path, weights = write_backbone(tmp_path, "squeeze")
    cached = tmp_path / "hub" / "checkpoints" / path.name
    cached.parent.mkdir(parents=True)
    path.rename(cached)
    monkeypatch.setitem(metrics.BACKBONES, "squeeze", path.name)
    assert metrics.available_metrics(net="squeeze") == ["psnr", "ssim", "lpips"]
    model = metrics.lpips_model(net="squeeze")
    assert torch.equal(model.net.state_dict()["slice7.12.expand3x3.weight"], weights["features.12.expand3x3.weight"])


def test_damaged_or_foreign_lpips_backbones_are_refused_by_name(tmp_path):
    path, _ = write_backbone(tmp_path, "squeeze")
    with pytest.raises(ValueError, match="not the alex backbone"):
        metrics.lpips_model(path, "alex")
    damaged = tmp_path / "alexnet-owt-7be5be79.pth"
    damaged.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="does not begin with 7be5be79"):
        metrics.lpips_model(damaged)
    (tmp_path / "text.pth").write_text("no checkpoint")
    with pytest.raises(ValueError, match="not a torchvision checkpoint"):
        metrics.lpips_model(tmp_path / "text.pth")


def test_metric_names_are_checked():
    assert metrics.parse_metrics("psnr, lpips") == ["psnr", "lpips"]
    for text in ("", "psnr,fid"):
        with pytest.raises(ValueError, match="--metrics"):
            metrics.parse_metrics(text)


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        mean, lo, hi = metrics.bootstrap_interval(rng.normal(5, 2, 50), seed=i, samples=500)
        hits += lo <= 5 <= hi
        assert lo < mean < hi
    assert 0.88 < hits / 200 < 0.99
    assert metrics.bootstrap_interval([3.0]) == (3, 3, 3)
    assert metrics.bootstrap_interval([1.0, 2, 4], seed=3) == metrics.bootstrap_interval([1.0, 2, 4], seed=3)
    with pytest.raises(ValueError, match="finite"):
        metrics.bootstrap_interval([1.0, float("nan")])


def test_bootstrap_level_and_samples_change_the_interval():
    values = np.random.default_rng(0).normal(size=30)
    _, lo, hi = metrics.bootstrap_interval(values)
    _, narrow_lo, narrow_hi = metrics.bootstrap_interval(values, level=0.5)
    assert lo < narrow_lo < narrow_hi < hi
    assert metrics.bootstrap_interval(values, samples=10) != metrics.bootstrap_interval(values, samples=2000)


def test_summary_table_is_markdown_with_one_line_per_row():
    lines = metrics.summary_table({"input": {"psnr": (20, 19, 21)}, "LoRA": {"psnr": (25.126, 24, 26)}}).split("\n")
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert "25.13 [24.00, 26.00]" in lines[3] and set(lines[1]) <= set("|- ")


def test_image_grid_holds_every_image_at_its_pixels_and_refuses_ragged_rows():
    images = to_images(make_pair(height=20, width=64)[1])
    grid = np.asarray(image_grid([[images[0], images[1]]], ["input", "target"], [["20 dB", ""]], cell_px=64))
    patches = [grid[20:40, 4:68], grid[20:40, 72:136]]
    assert all((patch == to_uint8(image)).all() for patch, image in zip(patches, images, strict=True))
    assert (grid[40:60, 4:68] < 128).any() and not (grid[40:60, 72:136] < 128).any()  # a caption, and none
    assert (grid[:20] < 128).any() and image_grid([images], ["a", "b"]).height < image_grid(
        [images], ["a", "b"], [["c", "d"]]).height
    doubled = np.asarray(image_grid([[images[0]]], ["input"], cell_px=130))
    assert (doubled[20:60:2, 5:133:2] == to_uint8(images[0])).all()
    assert image_grid([[images[0]]], ["input"], cell_px=32).width == 40
    for rows, captions in (([[images[0]]], None), ([], None), ([images], [["a"]]), ([images], [["a", "b"]] * 2)):
        with pytest.raises(ValueError, match="2 labels needs rows and captions of 2"):
            image_grid(rows, ["input", "target"], captions)


def test_metrics_import_neither_diffusers_nor_lpips():
    code = "import sys, utils.metrics; assert not {'diffusers', 'lpips', 'torchmetrics'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
