"""Losses on decoded pixels: zero where they must be, aligned crops, gradients, and the weights' file."""

from types import SimpleNamespace

import pytest
import torch

from tests.conftest import photograph
from utils import flow_matching as fm
from utils import flux, losses


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """VGG16's convolutions with random weights, as torchvision's checkpoint names them (the classifier is not read)."""
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    weights = {f"features.{name}": value for name, value in make_layers(cfgs["D"]).state_dict().items()}
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def modules(vgg_file):
    return {kind: losses.make_perceptual_loss(kind, vgg_file) for kind in ("vgg", "lpips", "gradient")}


def photo(name="astronaut", size=(64, 64)):
    return torch.from_numpy(photograph(name, size).copy()).movedim(-1, 0)[None].float() / 127.5 - 1


def noisy(image, seed=0):
    return (image + 0.3 * torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))).clamp(-1, 1)


@pytest.mark.parametrize("kind", ["vgg", "lpips", "gradient"])
def test_every_loss_is_zero_on_equal_images_and_positive_on_others(modules, kind):
    pair = torch.cat([photo("astronaut"), photo("chelsea")])
    assert modules[kind](pair, pair).tolist() == [0, 0]
    values = modules[kind](torch.cat([pair[:1], noisy(pair[1:])]), pair)
    assert values.shape == (2,) and values[0] == 0 and values[1] > 1e-3


@pytest.mark.parametrize("kind", ["vgg", "lpips", "gradient"])
def test_gradients_flow_to_the_restored_image_and_to_no_weight(modules, kind):
    target = photo()
    restored = (1.5 * noisy(target)).requires_grad_()  # beyond [-1, 1] too
    modules[kind](restored, target).sum().backward()
    assert restored.grad.isfinite().all() and restored.grad.abs().sum() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in modules[kind].parameters())


def test_vgg_is_the_sum_over_four_blocks_of_the_features_mean_difference(modules, vgg_file):
    from torchvision.models.vgg import cfgs, make_layers

    features = make_layers(cfgs["D"]).eval()
    features.load_state_dict({name.removeprefix("features."): value for name, value in
                              torch.load(vgg_file, weights_only=True).items()})
    target, restored = photo(), noisy(photo())

    def normalise(image):
        from torchvision.transforms.functional import normalize, resize

        image = normalize((image + 1) / 2, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        return resize(image, [224, 224], antialias=False)

    with torch.no_grad():
        expected = sum((features[:end](normalise(restored)) - features[:end](normalise(target))).abs().mean()
                       for end in (4, 9, 16, 23))
        torch.testing.assert_close(modules["vgg"](restored, target)[0], expected)


def test_gradient_loss_is_the_ramps_slope():
    ramp = torch.linspace(0, 1, 9).expand(1, 3, 5, 9)  # 1/8 a pixel to the right, 0 downwards
    loss = losses.GradientLoss()
    torch.testing.assert_close(loss(ramp, torch.zeros_like(ramp)), torch.tensor([1 / 8]))
    torch.testing.assert_close(loss(ramp.transpose(-1, -2), torch.zeros(1, 3, 9, 5)), torch.tensor([1 / 8]))
    assert loss(ramp + 0.7, ramp).item() == pytest.approx(0, abs=1e-6)  # brightness is not its business


# --- the weights' file


@pytest.mark.parametrize("kind", ["vgg", "lpips"])
def test_a_missing_weight_file_is_named_with_the_cure(tmp_path, kind):
    path = tmp_path / "absent.pth"
    for call in (lambda: losses.make_perceptual_loss(kind, str(path)),
                 lambda: losses.check_perceptual_args(perceptual_args(perceptual_loss=kind,
                                                                      perceptual_weights=str(path)))):
        with pytest.raises(ValueError, match=f"vgg16-397923af.pth.*{path}.*--perceptual_weights.*gradient") as error:
            call()
        assert "\n" not in str(error.value)


def test_without_a_name_the_weights_are_looked_for_in_torchs_cache(tmp_path, monkeypatch, vgg_file):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = tmp_path / "checkpoints" / losses.VGG16_FILE
    with pytest.raises(ValueError, match=str(cached)):
        losses.make_perceptual_loss("vgg")
    cached.parent.mkdir()
    cached.symlink_to(vgg_file)
    assert losses.weight_file() == cached
    losses.make_perceptual_loss("gradient")  # needs none


def not_vgg(path, kind):
    if kind == "text":
        path.write_text("<html>not found</html>")
    elif kind == "empty":
        path.touch()
    else:
        from torchvision import models

        with torch.device("meta"):
            shapes = getattr(models, kind)(weights=None).features.state_dict()
        torch.save({f"features.{name}": torch.zeros(value.shape) for name, value in shapes.items()}, path)
    return path


@pytest.mark.parametrize("kind", ["alexnet", "vgg11", "text", "empty"])
@pytest.mark.parametrize("loss", ["vgg", "lpips"])
def test_a_file_that_holds_no_vgg16_is_refused_by_name(tmp_path, kind, loss):
    path = not_vgg(tmp_path / "weights.pth", kind)
    with pytest.raises(ValueError, match=f"^{path}") as error:
        losses.make_perceptual_loss(loss, path)
    assert "\n" not in str(error.value)


def perceptual_args(**changes):
    args = {"perceptual_loss": None, "perceptual_loss_weight": 0.1, "perceptual_max_sigma": 0.5, "perceptual_crop": 32,
            "perceptual_weights": None}
    return SimpleNamespace(**args | changes)


@pytest.mark.parametrize("changes", [
    {"perceptual_loss_weight": -0.1}, {"perceptual_loss_weight": float("nan")}, {"perceptual_max_sigma": 0.0},
    {"perceptual_max_sigma": 1.1}, {"perceptual_crop": 15}, {"perceptual_crop": -1},
])
def test_impossible_perceptual_numbers_are_refused_by_name(changes):
    losses.check_perceptual_args(perceptual_args(perceptual_loss="gradient", perceptual_crop=0))
    with pytest.raises(ValueError, match=f"--{next(iter(changes))}"):
        losses.check_perceptual_args(perceptual_args(**changes))


def test_the_bare_flag_means_vgg():
    import argparse

    parser = argparse.ArgumentParser()
    losses.add_perceptual_args(parser)
    assert parser.parse_args([]).perceptual_loss is None
    assert parser.parse_args(["--perceptual_loss"]).perceptual_loss == "vgg"
    assert parser.parse_args(["--perceptual_loss", "lpips"]).perceptual_loss == "lpips"


# --- crops


def generators(count, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


@pytest.mark.parametrize(("height", "width", "crop"), [(64, 48, 32), (64, 64, 16), (32, 64, 32), (20, 64, 32),
                                                       (64, 48, 0), (18, 22, 17)])
def test_crop_boxes_lie_inside_at_even_positions(height, width, crop):
    boxes = losses.crop_boxes(height, width, crop, generators(200))
    for top, left, rows, columns in boxes:
        assert top % 2 == left % 2 == 0 and min(top, left) >= 0
        assert top + rows <= height and left + columns <= width
        assert (rows, columns) == (min(height, crop or height), min(width, crop or width))
    if height > crop > 0:
        tops = {top for top, *_ in boxes}
        assert min(tops) == 0 and max(tops) == (height - crop) // 2 * 2  # both edges are met


def test_an_items_box_depends_on_its_own_generator():
    boxes = losses.crop_boxes(64, 64, 16, generators(4))
    assert [losses.crop_boxes(64, 64, 16, generators(1, first=i))[0] for i in range(4)] == boxes
    assert len(set(boxes)) == 4


def test_the_margin_is_dropped_but_not_at_the_images_edge():
    m = losses.MARGIN_LATENTS
    assert losses.inner_box(0, 0, 32, 32, 32, 32) == (0, 0, 32, 32)
    assert losses.inner_box(0, 0, 16, 16, 32, 32) == (0, 0, 16 - m, 16 - m)
    assert losses.inner_box(16, 16, 16, 16, 32, 32) == (16 + m, 16 + m, 32, 32)
    assert losses.inner_box(8, 0, 16, 32, 32, 32) == (8 + m, 0, 24 - m, 32)


class LinearVAE(torch.nn.Module):
    """Every latent holds its 8 x 8 pixels' values: decode(encode(x)) = x, crop by crop."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(block_out_channels=(1, 1, 1, 1), latent_channels=192, scaling_factor=0.5,
                                      shift_factor=0.25)
        self.dtype = torch.float32
        self.decoded = []

    def encode(self, images):
        return SimpleNamespace(latents=torch.nn.functional.pixel_unshuffle(images, 8))

    def decode(self, latents, return_dict):
        self.decoded.append(latents.detach())
        return (torch.nn.functional.pixel_shuffle(latents, 8),)


@pytest.fixture
def path():
    """A batch of three on the path: vae, z, velocity, sigma, pixels."""
    vae = LinearVAE()
    images = torch.cat([photo(name, (256, 192)) for name in ("astronaut", "chelsea", "coffee")])
    target, control = flux.encode(vae, images), flux.encode(vae, images.flip(-1))
    s = torch.tensor([0.2, 0.5, 0.8])
    z, sigma, velocity = fm.flow_path(target, control, torch.zeros_like(target), s, torch.zeros(3))
    return SimpleNamespace(vae=vae, z=z, velocity=velocity, sigma=[0.2, 0.5, 0.8], images=images)


def call(path, prediction, crop=16, kind="x0", max_sigma=0.5, first=0, module=None):
    boxes = losses.crop_boxes(32, 24, crop, generators(3, first))
    return losses.perceptual_loss(module or losses.GradientLoss(), path.vae, path.z, prediction, path.velocity,
                                  path.sigma, path.images, boxes, kind, max_sigma)


@pytest.mark.parametrize("kind", ["x0", "velocity"])
@pytest.mark.parametrize("crop", [0, 16, 24])
def test_the_exact_velocity_has_no_loss_wherever_the_crop_falls(path, crop, kind):
    for first in range(5):
        exact = call(path, path.velocity, crop, kind, max_sigma=1.0, first=first)
        assert exact.item() == pytest.approx(0, abs=1e-6)
        assert call(path, path.velocity + 0.1 * path.z, crop, kind, 1.0, first).item() > 1e-3


def test_pixels_one_row_off_would_be_noticed(path):
    path.images = path.images.roll(1, dims=-2)
    assert call(path, path.velocity, 16).item() > 1e-2


def test_items_above_the_largest_sigma_count_as_zero_and_are_not_decoded(path):
    prediction = torch.zeros_like(path.velocity)
    per_item = [call(SimpleNamespace(**vars(path) | {"sigma": [2.0 if j != i else path.sigma[i] for j in range(3)]}),
                     prediction, max_sigma=1.0).item() for i in range(3)]
    assert min(per_item) > 1e-3
    path.vae.decoded.clear()
    assert call(path, prediction).item() == pytest.approx(per_item[0] + per_item[1])  # sigma 0.5 is still in
    assert len(path.vae.decoded) == 2
    assert call(path, prediction, max_sigma=0.3).item() == pytest.approx(per_item[0])


def test_a_batch_without_an_item_below_the_largest_sigma_has_zero_loss(path):
    loss = call(path, path.velocity.clone().requires_grad_(), max_sigma=0.1)
    assert loss.item() == 0 and not path.vae.decoded


def test_x0_compares_the_decoded_estimate_with_the_clean_pixels(path):
    seen = []

    def module(restored, target):
        seen.append((restored, target))
        return (restored - target).abs().flatten(1).mean(1)

    path.sigma = [0.2, 9.0, 9.0]
    prediction = 0.5 * path.velocity
    loss = call(path, prediction, 0, module=module)
    restored, target = seen[0]
    torch.testing.assert_close(target, path.images[:1])
    estimate = path.z[:1] - 0.2 * prediction[:1]
    torch.testing.assert_close(restored, flux.decode(path.vae, estimate))
    torch.testing.assert_close(loss, (restored - target).abs().mean() / 3)


def test_velocity_is_the_seeds_literal_form(path):
    seen = []

    def module(restored, target):
        seen.append((restored, target))
        return (restored - target).abs().flatten(1).mean(1)

    prediction = 0.5 * path.velocity
    call(path, prediction, 0, "velocity", 1.0, module=module)
    for i, (restored, wanted) in enumerate(seen):  # vae.decode(model_pred) against vae.decode(flow_target)
        torch.testing.assert_close(restored, flux.decode(path.vae, prediction[i : i + 1]))
        torch.testing.assert_close(wanted, flux.decode(path.vae, path.velocity[i : i + 1]))
    assert len(seen) == 3


@pytest.mark.parametrize("kind", ["x0", "velocity"])
def test_gradients_reach_the_prediction_inside_the_crop_through_the_frozen_vae(tiny_pipe, kind):
    generator = torch.Generator().manual_seed(0)
    z, velocity = (torch.randn(1, 16, 32, 32, generator=generator) for _ in range(2))
    prediction = torch.zeros_like(z).requires_grad_()
    box = (8, 10, 16, 16)
    losses.perceptual_loss(losses.GradientLoss(), tiny_pipe.vae, z, prediction, velocity, [0.3],
                           photo("astronaut", (256, 256)), [box], kind).backward()
    inside = torch.zeros_like(z, dtype=torch.bool)
    inside[..., 8:24, 10:26] = True
    assert prediction.grad[inside].abs().sum() > 0 and (prediction.grad[~inside] == 0).all()
    assert all(parameter.grad is None for parameter in tiny_pipe.vae.parameters())


def test_a_bf16_prediction_gives_an_fp32_loss(path):
    assert call(path, path.velocity.bfloat16()).dtype == torch.float32


def test_making_a_loss_moves_no_global_random_state(vgg_file):
    before = torch.get_rng_state()
    for kind in ("vgg", "lpips", "gradient"):
        losses.make_perceptual_loss(kind, vgg_file)
    assert torch.equal(torch.get_rng_state(), before)
