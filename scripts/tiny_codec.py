"""The embedded model's autoencoder: a lapped linear transform, fitted in minutes, inside a stock diffusers class.

After minutes of training a convolutional autoencoder is still far below a linear transform of its rate, and most
classes cannot hold one: AutoencoderKL and AutoencoderTiny enlarge by repeating pixels, so whatever follows, their
decoders answer constant latents with a constant image and weaken all that varies with the grid's own period.
AutoencoderKLHunyuanImage enlarges by sub-pixel convolution. With its residual branches at zero it is linear, but for
the last normalisation, which `linear_output` gets round; latents of 8 functions of 6 x 6 pixels, taken every 4 rows and
2 columns, then reproduce photographs better than 4 x 4 principal components do."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanImage

LATENTS, LATENT_PX = 16, 4
FUNCTIONS = LATENTS // 2  # a latent's channels are the functions at its left, then at its right pair of columns
SUBPIXELS = 12  # a 2 x 2 cell's values, in the class's own order (row, column, colour)
WIDTHS = (96, 32, 32)  # channels at full, half and quarter size
GROUP = WIDTHS[0] // 32  # channels per group of the last normalisation, whose 32 groups the class fixes
PEDESTAL = 32.0
LOG_VARIANCE = -1e4  # far below what diffusers' Gaussian clamps to: the encoder is deterministic


def unshuffle(images):
    """(B, C, H, W) -> (B, 4 C, H / 2, W / 2); channel (2 row + column) * C + c, as HunyuanImageDownsample orders it."""
    batch, channels, height, width = images.shape
    cells = images.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return cells.permute(0, 3, 5, 1, 2, 4).reshape(batch, 4 * channels, height // 2, width // 2)


def shuffle(cells):
    """The inverse of `unshuffle`."""
    batch, channels, height, width = cells.shape
    images = cells.reshape(batch, 2, 2, channels // 4, height, width).permute(0, 3, 4, 1, 5, 2)
    return images.reshape(batch, channels // 4, 2 * height, 2 * width)


class LappedTransform(torch.nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <-> latents (B, 16, H / 4, W / 4), by three linear convolutions."""

    def __init__(self):
        super().__init__()
        self.analysis = torch.nn.Parameter(torch.zeros(FUNCTIONS, SUBPIXELS, 3, 3))  # at half size, every second row
        self.synthesis = torch.nn.Parameter(torch.zeros(4 * SUBPIXELS, LATENTS, 3, 3))  # latents to half size
        self.overlap = torch.nn.Parameter(torch.zeros(SUBPIXELS, SUBPIXELS, 3, 3))  # at half size

    @torch.no_grad()
    def init(self, crops):
        """Start from the principal components of 4 x 2 pixel blocks of `crops` (N, 3, H, W)."""
        halves = unshuffle(crops)
        blocks = torch.cat([halves[..., 0::2, :], halves[..., 1::2, :]], 1).movedim(1, 3).flatten(0, 2)
        components = torch.linalg.eigh(torch.cov(blocks.T.double()))[1][:, -FUNCTIONS:].T.float()
        rows = components.split(SUBPIXELS, 1)
        for row in range(2):
            self.analysis[:, :, 1 + row, 1] = rows[row]
            for column in range(2):
                into = (2 * row + column) * SUBPIXELS
                latents = slice(column * FUNCTIONS, (column + 1) * FUNCTIONS)
                self.synthesis[into : into + SUBPIXELS, latents, 1, 1] = rows[row].T
        self.overlap[:, :, 1, 1] = torch.eye(SUBPIXELS)
        return self

    def encode(self, images):
        values = F.conv2d(unshuffle(images), self.analysis, stride=(2, 1), padding=1)
        return torch.cat([values[..., 0::2], values[..., 1::2]], 1)

    def decode(self, latents):
        cells = shuffle(F.conv2d(latents, self.synthesis, padding=1))
        return shuffle(F.conv2d(cells, self.overlap, padding=1))

    def forward(self, images):
        return self.decode(self.encode(images))

    @torch.no_grad()
    def equalise(self, crops):
        """Scale the functions by spread^(-1/2): half way to white, so that noise added to the latents hides fine
        detail first, as it does in pixels, and yet an error in it counts."""
        latents = self.encode(crops)
        spread = latents.unflatten(1, (2, FUNCTIONS)).std((0, 1, 3, 4))
        self.analysis.mul_(spread.rsqrt()[:, None, None, None])
        self.synthesis.mul_(spread.sqrt().repeat(2)[None, :, None, None])
        return self


def make_vae():
    """The diffusers class with all residual branches at zero; `install` makes it a codec."""
    vae = AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=LATENTS, block_out_channels=WIDTHS, layers_per_block=0,
        spatial_compression_ratio=LATENT_PX, sample_size=256, scaling_factor=1.0)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "norm" not in name or name.endswith("bias"):
                parameter.zero_()
    vae.register_to_config(shift_factor=0.0)
    return vae


@torch.no_grad()
def install(vae, transform):
    """Write a LappedTransform into the layers of `make_vae`. Their shortcuts, which average or repeat channels, are
    linear too: the convolutions beside them take back what those add."""
    encoder, decoder = vae.encoder, vae.decoder
    colours = range(3)
    encoder.conv_in.weight[colours, colours, 1, 1] = 1
    down = encoder.down_blocks[0]  # to half size: cells of 8 channels, of which the colours are the first 3
    cell = WIDTHS[1] // 4
    down.conv.weight[colours, colours, 1, 1] = 1
    # The shortcut gives channel i of a cell the mean of the channels i * group_size ... of the image: only i = 0 has
    # colours in it.
    down.conv.weight[0, :3, 1, 1] -= 1 / down.group_size
    used = [(2 * row + column) * cell + c for row in range(2) for column in range(2) for c in colours]
    down = encoder.down_blocks[1]  # to quarter size; the first row's channels are the means, the second's log variances
    down.conv.weight[:, used] = transform.analysis
    for channel in range(FUNCTIONS):
        members = slice(channel * down.group_size, (channel + 1) * down.group_size)
        down.conv.weight[channel, members, 1, 1] -= 1 / down.group_size
    encoder.conv_out.bias[LATENTS:] = LOG_VARIANCE

    half, full = decoder.up_blocks[1], decoder.up_blocks[3]
    for up in (half, full):  # the shortcut repeats each channel
        slots = torch.arange(len(up.conv.weight))
        up.conv.weight[slots, slots // up.repeats, 1, 1] = -1
    latents = range(0, WIDTHS[2], WIDTHS[2] // LATENTS)  # the first of each latent's copies
    for place in range(4):  # of the 2 x 2 pixels that a cell becomes
        for c in range(SUBPIXELS):
            half.conv.weight[place * WIDTHS[1] + c, latents] += transform.synthesis[place * SUBPIXELS + c]
        for group in range(6):  # twice the three colours, see linear_output
            slot = place * WIDTHS[0] + group * GROUP
            full.conv.weight[slot, :SUBPIXELS] += transform.overlap[place * 3 + group % 3]
            full.conv.bias[slot + 1], full.conv.bias[slot + 2] = PEDESTAL, -PEDESTAL
    linear_output(decoder)


def linear_output(decoder):
    """Make the decoder's last layers, GroupNorm, SiLU and a convolution, return the first channels of groups 0 to 2.

    A group holds a colour x and two constants K and -K, much larger than x. GroupNorm subtracts the group's mean,
    which is a third of x's mean over the image, and divides by a spread that is sqrt(2/3) K to a relative
    mean(x^2) / (4 K^2), 0.02 % at most. What it takes from x it takes from the constants too, so x less their half
    sum is x again. SiLU(y) - SiLU(-y) = y: groups 3 to 5 hold the same with opposite signs."""
    scale = PEDESTAL * (2 / 3) ** 0.5
    decoder.norm_out.weight.zero_()
    for group in range(6):
        colour, sign = group % 3, 1 if group < 3 else -1
        members = slice(group * GROUP, (group + 1) * GROUP)
        decoder.norm_out.weight[members] = sign * scale
        decoder.norm_out.bias[members] = sign * PEDESTAL * torch.tensor([0.0, -1.0, 1.0])
        decoder.conv_out.weight[colour, members, 1, 1] = sign * torch.tensor([1.0, -0.5, -0.5])
