"""A complete Qwen-Image pipeline of random weights, for the tests, the bench and the example: the classes of the real
one, so small that a step takes milliseconds on a CPU. It knows nothing; `make_colour_codec` lets its autoencoder at
least carry colours."""

import json

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
                  "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
# Every word of the pipelines' two templates is one token, as in the real vocabulary, so that the 34 and 64 tokens that
# they cut off are the same ones.
WORDS = """system user assistant Describe the image by detailing the color, shape, size, texture, quantity, text,
spatial relationships of the objects and background: Describe the key features of the input image (color, shape, size,
texture, objects, background), then explain how the user's text instruction should alter or modify the image. Generate
a new image that meets the user's requirements while maintaining consistency with the original input where
appropriate."""
COLOURS = 3
SQUARE_PX = 8  # of the autoencoder: 8 pixels a latent
CONSTANT = 1000.0  # beside it a colour changes the norm of its channels by less than 1e-5


def make_tokenizer():
    """A Qwen2Tokenizer whose vocabulary is all bytes and the words of the templates."""
    bytelevel = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"), bytelevel])
    words = WORDS.split()
    bpe.train_from_iterator([*words, *(" " + word for word in words)], trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=sorted(bytelevel.alphabet()), min_frequency=1, show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    vocab = model["vocab"] | {token: len(model["vocab"]) + i for i, token in enumerate(SPECIAL_TOKENS)}
    return Qwen2Tokenizer(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]],
                          extra_special_tokens=SPECIAL_TOKENS[1:])


def make_text_encoder(tokenizer, hidden=16):
    """A Qwen2.5-VL with one layer each for text and vision."""
    special = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS), strict=True))
    text = {"vocab_size": len(tokenizer), "hidden_size": hidden, "intermediate_size": hidden, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096,
            "bos_token_id": None, "eos_token_id": special["<|endoftext|>"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [hidden // 8, hidden // 16,
                                                                                              hidden // 16]}}
    vision = {"depth": 1, "hidden_size": hidden, "intermediate_size": hidden, "num_heads": 2, "out_hidden_size": hidden,
              "fullatt_block_indexes": [0]}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=special["<|image_pad|>"],
        video_token_id=special["<|video_pad|>"], vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"]))


def make_tiny_pipeline(width=32, layers=1, is_edit=False, seed=0):
    """A QwenImagePipeline, or QwenImageEditPipeline, with random weights. width: of the transformer, in heads of 16."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    text_encoder = make_text_encoder(tokenizer)
    vae = AutoencoderKLQwenImage(base_dim=8, num_res_blocks=1)
    transformer = QwenImageTransformer2DModel(num_layers=layers, attention_head_dim=16, num_attention_heads=width // 16,
                                              joint_attention_dim=text_encoder.config.text_config.hidden_size,
                                              axes_dims_rope=(4, 6, 6))
    scheduler = FlowMatchEulerDiscreteScheduler(  # as of Qwen/Qwen-Image
        base_image_seq_len=256, base_shift=0.5, max_image_seq_len=8192, max_shift=0.9, shift=1.0, shift_terminal=0.02,
        use_dynamic_shifting=True)
    parts = dict(scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer)
    if is_edit:
        images = Qwen2VLImageProcessor(min_pixels=28**2, max_pixels=4 * 28**2)
        parts["processor"] = Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor())
    pipe = (QwenImageEditPipeline if is_edit else QwenImagePipeline)(**parts)
    for model in (vae, text_encoder, transformer):
        model.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def make_colour_codec(vae):
    """Set the weights of a tiny AutoencoderKLQwenImage so that its latents are the mean colours of 8 x 8 pixels, all
    the other channels 0, and decoding paints them: exact for whatever is flat in these squares.

    A constant beside the colours c and their negatives makes each norm a fixed factor, which the gain takes back, and
    silu(c) - silu(-c) = c makes the two activations that remain linear; residual branches are zero."""
    for parameter in vae.parameters():
        parameter.zero_()
    kept = range(1 + 2 * COLOURS)
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d) and module.stride == (2, 2):
            for i in kept:
                module.weight[i, i, :2, :2] = 1 / 4
        elif type(module).__name__ == "QwenImageResample" and module.mode.startswith("upsample"):
            for i in kept:
                module.resample[1].weight[i, i, 1, 1] = 1
        elif type(module).__name__ == "QwenImageResidualBlock" and not isinstance(module.conv_shortcut,
                                                                                   torch.nn.Identity):
            for i in kept:
                module.conv_shortcut.weight[i, i] = 1
    for half in (vae.encoder, vae.decoder):
        half.conv_in.bias[0] = CONSTANT
        half.norm_out.gamma.fill_(CONSTANT / half.norm_out.scale)
        for i in range(COLOURS):
            half.conv_in.weight[1 + i, i, -1, 1, 1], half.conv_in.weight[1 + COLOURS + i, i, -1, 1, 1] = 1, -1
            half.conv_out.weight[i, 1 + i, -1, 1, 1], half.conv_out.weight[i, 1 + COLOURS + i, -1, 1, 1] = 1, -1
    for convolution in (vae.quant_conv, vae.post_quant_conv):
        for i in range(COLOURS):
            convolution.weight[i, i] = 1
    vae.quant_conv.bias[vae.config.z_dim:] = -30  # the logarithm of the variance
    vae.register_to_config(latents_mean=[0.0] * vae.config.z_dim, latents_std=[0.5] * vae.config.z_dim)
