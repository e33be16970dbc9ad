"""AdaLN tables: what modulates FLUX's norms, looked up instead of computed.

The inputs of these layers are the noise level, the guidance and the pooled text, never the image, and no LoRA is on
them. With one prompt and one guidance their outputs are therefore a function of the noise level alone. `build` computes
it once for every level and takes the layers away: 3,279.7 M of FLUX.1's 11,901.4 M parameters never sit on the card.
A level has 344 vectors of 3072 numbers: 2.11 MB in bf16, on the CPU; a step copies one such row per image.

In bf16 the levels are few, even where sigma is continuous: the transformer rounds the sigma it is told to its own
dtype, and bf16 has 128 numbers an octave. `every_sigma` lists them, so any schedule, shift and density is covered.

The rows travel in place of the time embedding, as an argument of every block. No block keeps state between forward and
backward, which gradient checkpointing and torch.compile rely on.
"""

import torch

from utils import flow_matching as fm

BF16_ONE = 0x3F80  # bits of 1.0
MODULES = ["norm1", "norm1_context", "norm", "norm_out", "time_text_embed"]  # whose parameters `build` takes away


def every_sigma(settings):
    """Every bf16 number, ascending, that a model with these settings can be told in training, validation (positions
    from 1/1000) and sampling (up to 1000 steps). For FLUX.1, 0.26 GB of table an octave: 2.6 GB with start noise 1,
    4.4 GB with continuous sigmas."""
    reaches_zero = settings["train_sigmas"] == "continuous" and not settings["bridge_noise"]
    smallest = (fm.SMALLEST_POSITION if reaches_zero else 1 / fm.TABLE_SIZE) * (settings["start_noise"][0] or 1)
    below = torch.tensor(smallest).bfloat16().view(torch.int16).item() - 1  # smallest is rounded: one number to spare
    return torch.arange(below, BF16_ONE + 1, dtype=torch.int16).view(torch.bfloat16).tolist()


def obstacle(dtype, prompts, lora_layers=None, train_text_encoder=False):
    """Why a run cannot have tables, in one line with the cure, or None. dtype: of the frozen weights. prompts: all that
    are used, also in validation. lora_layers: comma text or None."""
    if dtype != torch.bfloat16:
        return "AdaLN tables need bf16: in fp32 there are too many noise levels; use --mixed_precision bf16"
    if train_text_encoder:
        return "AdaLN tables need a fixed text: --train_text_encoder changes it every step; leave one of them out"
    if len(set(prompts)) > 1:
        return (f"AdaLN tables hold one prompt, and this run has {len(set(prompts))}, counting --validation_prompt and "
                "the empty one of caption dropout; use one --instance_prompt or no tables")
    for layer in (lora_layers or "").split(","):
        if layer.strip().rpartition(".")[2] in ("linear", "linear_1", "linear_2"):  # FLUX names no other layers so
            return f"AdaLN tables replace --lora_layers {layer.strip()}; leave that layer out, or use no tables"
    return None


def norms(transformer):
    """The norms whose `linear` becomes a look-up, in the order of the table."""
    for block in transformer.transformer_blocks:
        yield from (block.norm1, block.norm1_context)
    for block in transformer.single_transformer_blocks:
        yield block.norm
    yield transformer.norm_out


def parameters(transformer):
    """The parameters that `build` takes away, as (name, parameter); also of a model on the meta device."""
    for module in (*norms(transformer), transformer.time_text_embed):
        yield from module.named_parameters()


def timesteps(sigma, dtype):
    """The timesteps that FluxTransformer2DModel.forward makes of noise levels, rounded to its dtype."""
    return torch.as_tensor(sigma, dtype=torch.float32).to(dtype) * 1000


class Table(torch.nn.Module):
    """In the place of time_text_embed: returns the rows that were selected for the batch, (B, vectors, D).

    values: (levels, vectors, D) on the CPU, no buffer: neither moved, saved nor broadcast. Not pinned, as PyTorch pins
    by powers of two; a batch's rows are gathered into a pinned block of their own."""

    def __init__(self, values, levels, guidance_scale, device):
        super().__init__()
        self.values, self.guidance_scale, self.device = values, guidance_scale, torch.device(device)
        self.row_of = {level: row for row, level in enumerate(levels)}
        self.rows = None

    def select(self, sigma, guidance_scale):
        """Send the rows of `sigma` (B,) on their way to the device. Nothing waits for it if sigma is on the CPU."""
        if self.guidance_scale not in (None, guidance_scale):
            raise ValueError(f"guidance {guidance_scale:g}: the AdaLN tables were made for {self.guidance_scale:g}")
        levels = timesteps(sigma, self.values.dtype).tolist()
        if missing := [level for level in levels if level not in self.row_of]:
            raise ValueError(f"sigma {missing[0] / 1000:.6g} is none of the {len(self.row_of)} noise levels of the "
                             "AdaLN tables; build them with it")
        rows = self.values.new_empty(len(levels), *self.values.shape[1:], pin_memory=self.device.type == "cuda")
        torch.index_select(self.values, 0, torch.tensor([self.row_of[level] for level in levels]), out=rows)
        self.rows = rows.to(self.device, non_blocking=True)

    def forward(self, *conditions):
        rows, self.rows = self.rows, None  # never a former batch's
        if rows is None:
            raise RuntimeError("AdaLN tables: call adaln.select before each forward pass, as predict_velocity does")
        return rows


class LookUp(torch.nn.Module):
    """In the place of a norm's linear layer: (B, vectors, D) -> (B, D * the number of its own vectors).

    A tensor says which, as a number would make torch.compile build every block anew; no buffer, or DDP would broadcast
    it every step."""

    def __init__(self, vectors):
        super().__init__()
        self.vectors = vectors

    def forward(self, rows):
        return rows.index_select(1, self.vectors).flatten(1)


@torch.no_grad()
def build(transformer, sigmas, guidance_scale, pooled, device, dtype):
    """Replace the modulation layers of `transformer` by look-ups in a table for the noise levels `sigmas`; returns the
    Table. Best before the model is moved to `device`: the layers go there one by one, and none stays.

    sigmas: floats in (0, 1]. pooled: (1, P), the one prompt's. dtype: of the weights and the computation. The model
    must be used on `device` afterwards. ValueError for several prompts or a LoRA on these layers."""
    if len(pooled) != 1:
        raise ValueError(f"AdaLN tables hold one prompt, and {len(pooled)} were given")
    if any("lora_" in name for name, _ in parameters(transformer)):
        raise ValueError("AdaLN tables replace layers that have a LoRA here; leave norms and time_text_embed out of it")
    levels = timesteps(sigmas, dtype).unique()
    has_guidance = transformer.config.guidance_embeds
    guidance = [timesteps([guidance_scale], dtype).expand(len(levels)).to(device)] * has_guidance
    pooled = pooled.to(device, dtype).expand(len(levels), -1)
    embedding = transformer.time_text_embed.to(device)(levels.to(device), *guidance, pooled)

    width = transformer.inner_dim
    sizes = [norm.linear.out_features // width for norm in norms(transformer)]
    values = torch.empty(len(levels), sum(sizes), width, dtype=dtype)
    first = 0
    for norm, size in zip(norms(transformer), sizes, strict=True):
        modulation = norm.linear.to(device)(norm.silu(embedding))
        values[:, first : first + size] = modulation.unflatten(1, (size, width)).cpu()
        norm.silu, norm.linear = torch.nn.Identity(), LookUp(torch.arange(first, first + size, device=device))
        first += size
    table = Table(values, levels.tolist(), guidance_scale if has_guidance else None, device)
    transformer.time_text_embed = table
    return table


def select(transformer, sigma, guidance_scale):
    """Tell a transformer with tables, also behind DistributedDataParallel, the noise levels (B,) of its next forward
    pass. Without tables nothing happens."""
    table = getattr(getattr(transformer, "module", transformer), "time_text_embed", None)
    if isinstance(table, Table):
        table.select(sigma, guidance_scale)
