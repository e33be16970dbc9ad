"""Text to image and editing, against the stock pipeline."""

import pytest
import torch
from diffusers import FluxKontextPipeline
from PIL import Image

from tests.conftest import photograph
from tests.test_restore import make_settings, photo_tensor
from utils import flux
from utils.generate import generate


@pytest.mark.parametrize("is_edit", [False, True], ids=["text to image", "edit"])
def test_generated_images_equal_stock_kontexts(tiny_model, tiny_pipe, is_edit):
    height, width = 48, 64
    stock = FluxKontextPipeline.from_pretrained(tiny_model)
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        image=Image.fromarray(photograph("astronaut", (height, width))) if is_edit else None, prompt="a cat",
        height=height, width=width, max_area=height * width, _auto_resize=False, num_inference_steps=3,
        guidance_scale=1.7, max_sequence_length=16, generator=torch.Generator().manual_seed(3), output_type="pt").images
    text = flux.encode_prompts(tiny_model, ["a cat"], "cpu", torch.float32, 16)["a cat"]
    references = [photo_tensor("astronaut", (height, width))] if is_edit else []
    ours = generate(tiny_pipe, text, references, make_settings(), 3, height, width, [3])
    torch.testing.assert_close((ours + 1) / 2, expected, rtol=0, atol=1e-5)


def test_every_seed_has_its_own_image_and_every_reference_its_say(tiny_model, tiny_pipe):
    text = flux.encode_prompts(tiny_model, ["a cat"], "cpu", torch.float32, 16)["a cat"]
    references = [photo_tensor("astronaut", (40, 50)), photo_tensor("coffee", (64, 32))]
    images = generate(tiny_pipe, text, references, make_settings(), 2, 40, 52, [1, 2, 1])
    assert images.shape == (3, 3, 40, 52)  # neither side is a multiple of 16
    torch.testing.assert_close(images[0], images[2])
    assert not torch.allclose(images[0], images[1])
    for fewer in ([], references[:1], references[1:], references[::-1]):
        assert not torch.allclose(generate(tiny_pipe, text, fewer, make_settings(), 2, 40, 52, [1]), images[:1])
