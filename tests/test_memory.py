"""What the memory planner counts is what there is, and what it chooses fits."""

import argparse
import gc
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from utils import flux, lora, losses, memory, placement, quantise, run
from utils.checkpointing import enable_checkpointing
from utils.memory import GIB, Job, Plan

SMALL = {"num_layers": 3, "num_single_layers": 3, "num_attention_heads": 4, "attention_head_dim": 32, "in_channels": 64,
         "axes_dims_rope": [8, 12, 12], "joint_attention_dim": 48, "pooled_projection_dim": 32, "guidance_embeds": True}
SMALL_VAE = memory.KONTEXT_VAE | {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4}
SIZES = ((64, 128), (96, 64))


TINY = SMALL | {"num_layers": 1, "num_single_layers": 1}


def small(**changes):
    return replace(Job(SMALL, SMALL_VAE, SIZES, batch=2, text_tokens=24, rank=4), **changes)


SMALL_JOB, TINY_JOB = small(), small(config=TINY)  # what is counted for a job is kept with it


def forward(transformer, job):
    level, image, text = torch.zeros(job.batch), job.image_tokens, job.text_tokens
    return transformer(
        hidden_states=torch.zeros(job.batch, image, 64), timestep=level, guidance=level,
        encoder_hidden_states=torch.zeros(job.batch, text, 48), pooled_projections=torch.zeros(job.batch, 32),
        txt_ids=torch.zeros(text, 3), img_ids=torch.zeros(image, 3), return_dict=False)[0]


@pytest.fixture(scope="module")
def kontext():
    """FLUX.1-Kontext-dev at 1024 px with a reference of the same size."""
    return Job(memory.KONTEXT, memory.KONTEXT_VAE, ((1024, 1024),) * 2)


@pytest.fixture(scope="module")
def kontext_512():
    return Job(memory.KONTEXT, memory.KONTEXT_VAE, ((512, 512),) * 2)


# --- counts


def test_tokens_are_text_and_16_px_squares_of_target_and_references():
    assert small().tokens == 24 + 4 * 8 + 6 * 4


@pytest.mark.parametrize("layers", [None, "proj_mlp"])
def test_activations_are_the_storages_that_autograd_saves_each_counted_once(layers):
    job, saved = small(layers=layers) if layers else SMALL_JOB, {}
    transformer = memory.meta_transformer(SMALL, rank=4, layers=layers)
    weights = {parameter.untyped_storage()._cdata for parameter in transformer.parameters()}

    def pack(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with memory.gpu_kernels(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        prediction = memory.meta_forward(transformer, job.batch, job.image_tokens, job.text_tokens)
    saved[prediction.untyped_storage()._cdata] = prediction.untyped_storage()
    assert memory.step_bytes(job, "none", False)[0] == sum(s.nbytes() for key, s in saved.items() if key not in weights)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_few_blocks_multiplied_equal_the_whole_model(checkpointing, monkeypatch):
    few = memory.step_bytes(SMALL_JOB, checkpointing, False)
    monkeypatch.setattr(memory, "for_all_blocks", lambda count, config, layers=None: count(config))
    assert few == memory.step_bytes(small(), checkpointing, False)


def test_layers_of_one_block_are_counted_on_the_whole_model():
    job = small(layers="transformer_blocks.1.attn.to_q,single_transformer_blocks.2.proj_mlp")
    assert memory.lora_size(job)[0] == 4 * (2 * 128 + 128 + 4 * 128)


@pytest.mark.parametrize(("checkpointing", "use_dora"), [
    ("none", False), ("selective", False), ("full", False), ("none", True), ("full", True)])
def test_peak_is_within_two_percent_of_what_a_real_step_allocates(checkpointing, use_dora, monkeypatch):
    """PyTorch's own record of the CPU allocator; RMSNorm keeps there what the GPU's kernel keeps."""
    from diffusers import FluxTransformer2DModel

    job = small(config=TINY, weight_bytes=4, sizes=((128, 256), (128, 256)), use_dora=use_dora)
    transformer = FluxTransformer2DModel.from_config(TINY).requires_grad_(False).train()
    lora.attach(transformer, job.rank, use_dora=use_dora)
    enable_checkpointing(transformer, checkpointing)
    for parameter in lora.parameters(transformer):
        parameter.grad = torch.zeros_like(parameter)
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps=None: memory.FusedRMSNorm.apply(x, weight))
    peak = allocated_peak(lambda: forward(transformer, job).float().square().mean().backward())
    assert memory.step_bytes(job, checkpointing, False)[1] == pytest.approx(peak, rel=0.02)


def allocated(work):
    """Bytes that the CPU's allocator has given out during work(), after each change; its result lives to the end.

    All that work() makes must die with its result, and does so inside the profile: the profiler remembers a block's
    address until it sees it freed, and would take a later block at the same address for this one.
    """
    work()  # what the first call makes and keeps
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = work()
        with torch.profiler.record_function("the result dies"):
            del result
            gc.collect()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    lives = itertools.takewhile(lambda event: event.name() != "the result dies", events)
    return list(itertools.accumulate(event.nbytes() for event in lives if event.name() == "[memory]"))


def allocated_peak(work):
    return max(allocated(work))


def test_live_bytes_count_a_storage_once_and_forget_it_when_it_is_freed():
    with memory.LiveBytes() as live:
        a = torch.empty(100, 4, device="meta")
        b = a[:50].t()
        c = a + 1
        assert live.live == live.peak == 3200
        del a, c
        assert live.live == 1600 and b.shape == (4, 50)
        del b
        assert live.live == 0 and live.peak == 3200


def test_selective_checkpointing_keeps_attentions_results_beyond_full(kontext):
    more = memory.step_bytes(kontext, "selective", False)[0] - memory.step_bytes(kontext, "full", False)[0]
    rows = 57 * kontext.tokens
    assert 0 <= more - rows * (3072 * 2 + 24 * 4) < 57 * 256  # besides, the kernel's random state


def test_full_checkpointing_keeps_one_block_input_per_block_and_offload_few(kontext):
    block = kontext.tokens * 3072 * 2
    held = memory.step_bytes(kontext, "full", False)[0]
    assert 57 * block < held < 59 * block
    assert memory.step_bytes(kontext, "full", True)[0] < 6 * block


def test_weights_of_flux_are_two_bytes_per_parameter_and_tables_take_the_adaln_layers_away(kontext):
    assert memory.transformer_bytes(kontext)[0] == 2 * 11_901_408_320
    assert memory.transformer_bytes(kontext, adaln_tables=True)[0] == 2 * (11_901_408_320 - 3_279_710_208)


def test_whole_small_model_has_the_bytes_that_are_predicted():
    plain = memory.meta_transformer(SMALL)
    assert memory.transformer_bytes(SMALL_JOB)[0] == sum(parameter.nbytes for parameter in plain.parameters())
    for job in (SMALL_JOB, small(use_dora=True)):
        with_lora = memory.meta_transformer(SMALL, rank=4, use_dora=job.use_dora)
        assert memory.lora_size(job)[0] == sum(parameter.numel() for parameter in lora.parameters(with_lora))


@pytest.mark.parametrize(("rank", "parameters"), [(4, 13_541_376), (64, 216_662_016)])
def test_lora_of_flux_has_the_known_number_of_parameters(kontext, rank, parameters):
    assert memory.lora_size(replace(kontext, rank=rank)) == (parameters, 8 * parameters)


def test_dora_adds_a_number_for_every_row_of_every_layer(kontext):
    rows = 19 * (10 * 3072 + 2 * 4 * 3072) + 38 * (3 * 3072 + 4 * 3072)  # attention and feed-forward
    assert memory.lora_size(replace(kontext, use_dora=True))[0] == memory.lora_size(kontext)[0] + rows


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_8_bit_weights_take_the_predicted_bytes_whole_and_unpacked(precision):
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    from utils.offload import storages
    from utils.quantise import keep_packed

    rows, columns = 256, 1024
    kind = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[precision]
    model = torch.nn.Sequential(torch.nn.Linear(columns, rows, dtype=torch.bfloat16)).requires_grad_(False)
    quantize_(model, kind(set_inductor_config=False))
    parts = storages(model[0].weight.data)
    assert sum(part.nbytes for part in parts) == memory.linear_bytes(rows, columns, precision, 2)
    keep_packed(model)
    x = torch.zeros(1, columns, dtype=torch.bfloat16, requires_grad=True)
    x.grad = torch.zeros_like(x)
    peak = allocated_peak(lambda: model(x).sum().backward())
    assert peak == pytest.approx(2 * rows * columns, rel=0.05)  # as predict has it: one weight in bf16


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(192, 320), (64, 100)])  # 960 scales and 100, of 256 a group
def test_nf4_weights_take_the_predicted_bytes(rows, columns, double_quant):
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(rows, columns, dtype=torch.bfloat16)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
    parts = [packed, state.absmax, state.code]
    if double_quant:
        parts += [state.offset, state.state2.absmax, state.state2.code]
    assert memory.linear_bytes(rows, columns, "nf4", 2, double_quant) == sum(part.nbytes for part in parts)


def test_double_quantisation_is_4_13_bits_a_weight_and_saves_three_eighths_of_one_on_flux(kontext):
    bits = 8 * memory.linear_bytes(3072, 12288, "nf4", 2) / (3072 * 12288)
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)
    single = memory.transformer_bytes(replace(kontext, double_quant=False), "nf4", True)[0]
    assert single - memory.transformer_bytes(kontext, "nf4", True)[0] == pytest.approx(0.373 / 8 * 8.55e9, rel=0.01)
    assert quantise.NF4["bnb_4bit_use_double_quant"] and Job.double_quant


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "prodigy", "schedule_free"])
def test_optimizers_keep_the_predicted_bytes(optimizer):
    args = SimpleNamespace(learning_rate=1e-4, scale_lr=False, optimizer=optimizer.removesuffix("8bit"),
                           use_8bit_adam=optimizer == "adamw8bit", adam_beta1=0.9, adam_beta2=0.99,
                           adam_weight_decay=0.0, adam_epsilon=1e-8, prodigy_beta3=None, prodigy_decouple=True,
                           prodigy_use_bias_correction=True, prodigy_safeguard_warmup=True, lr_warmup_steps=0)
    weights = [torch.nn.Parameter(torch.randn(count)) for count in (1000, 4096, 10_000)]  # 8 bits begin at 4096
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    made = run.make_optimizer(weights, args, 1)
    run.set_optimizer_mode(made, training=True)
    made.step()
    for weight in weights:
        state = sum(value.nbytes for name, value in made.state[weight].items()
                    if isinstance(value, torch.Tensor) and value.numel() > 1 and "qmap" not in name)  # one for all
        assert state == memory.state_bytes(optimizer, weight.numel())


def test_state_of_a_whole_lora_is_the_sum_over_its_tensors():
    job = small(optimizer="adamw8bit", rank=32)
    sizes = [parameter.numel() for parameter in lora.parameters(memory.meta_transformer(SMALL, rank=32))]
    assert min(sizes) == 4096 and max(sizes) > 4096
    assert memory.lora_size(job) == (sum(sizes), sum(2 * size + 8 * -(-size // 256) for size in sizes))


def test_moving_average_and_ddp_buckets_hold_each_lora_parameter_once_more(tmp_path):
    """DDP's buckets are tensors beside the gradients: Accelerate leaves gradient_as_bucket_view off."""
    from accelerate import DistributedDataParallelKwargs

    weight = torch.nn.Parameter(torch.zeros(200, 300))
    shadows = lora.make_ema([weight], 0.9).shadow_params
    assert sum(shadow.nbytes for shadow in shadows) == 4 * weight.numel()

    def step(wrap):
        model = wrap(torch.nn.Linear(300, 200, bias=False))
        model(torch.zeros(1, 300)).sum().backward()
        return model

    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        options = DistributedDataParallelKwargs().to_kwargs()
        alone = allocated(lambda: step(lambda model: model))[-1]
        wrapped = allocated(lambda: step(lambda model: torch.nn.parallel.DistributedDataParallel(model, **options)))[-1]
    finally:
        torch.distributed.destroy_process_group()
    assert alone == pytest.approx(2 * weight.nbytes, abs=1024)  # the weight and its gradient
    assert wrapped - alone == pytest.approx(weight.nbytes, abs=1024)
    plain = memory.predict(TINY_JOB, Plan())
    parameters = memory.lora_size(TINY_JOB)[0]
    for change, part in (({"use_ema": True}, "LoRA: moving average"),
                         ({"distributed": True}, "LoRA: gradients once more, in DDP's buckets")):
        parts = memory.predict(replace(TINY_JOB, **change), Plan())
        assert parts[part] == 4 * parameters and sum(parts.values()) == sum(plain.values()) + 4 * parameters


SMALL_CLIP = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
              "projection_dim": 64, "vocab_size": 500, "eos_token_id": 499}


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_clip_lora_adds_its_weights_its_graph_and_its_lora(use_dora):
    from transformers import CLIPTextConfig, CLIPTextModel

    job = small(config=TINY, clip_config=SMALL_CLIP, weight_bytes=4, use_dora=use_dora)
    clip = CLIPTextModel(CLIPTextConfig.from_dict(SMALL_CLIP)).requires_grad_(False).train()
    weights = sum(parameter.nbytes for parameter in clip.parameters())
    sizes = [parameter.numel() for parameter in lora.attach(clip, 4, layers=lora.CLIP_LAYERS, use_dora=use_dora)]
    assert memory.lora_size(job)[0] == memory.lora_size(replace(job, clip_config=None))[0] + sum(sizes)
    graph = allocated(lambda: clip(torch.zeros(job.batch, 77, dtype=torch.long)).pooler_output)[-1]
    assert memory.clip_bytes(job) - weights == pytest.approx(graph, rel=0.02)
    assert memory.predict(job, Plan())["CLIP with what its graph keeps"] == memory.clip_bytes(job)


def test_clip_of_flux_has_its_known_size(kontext):
    """CLIP-L, whose sizes are transformers' defaults but for these."""
    config = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
    job = replace(kontext, clip_config=config)
    assert 2 * 123_060_480 < memory.clip_bytes(job) < 2 * 123_060_480 + 32 * 2**20
    assert memory.lora_size(job)[0] - memory.lora_size(kontext)[0] == 12 * 4 * 2 * 16 * 768


def test_vae_of_flux_has_84_million_parameters_and_its_work_grows_with_the_image(kontext, kontext_512):
    weights, peak, crops = memory.vae_bytes(kontext)
    assert weights == 2 * 83_819_683 and crops == 0
    assert peak == pytest.approx(4 * memory.vae_bytes(kontext_512)[1], rel=0.02)


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    """VGG16's convolutions with random weights, as torchvision's checkpoint names them."""
    from torchvision.models.vgg import cfgs, make_layers

    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save({f"features.{name}": value for name, value in make_layers(cfgs["D"]).state_dict().items()}, path)
    return path


def real_crop(module):
    """A function that decodes a crop of 64 px on the CPU, with a graph, and compares it."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_config(SMALL_VAE).eval().requires_grad_(False)
    latents, target = torch.zeros(1, 16, 8, 8, requires_grad=True), torch.zeros(1, 3, 64, 64)
    latents.grad = torch.zeros_like(latents)
    return lambda: module(flux.decode(vae, latents), target)


def crop_job(module, batch=1):
    return replace(TINY_JOB, batch=batch, weight_bytes=4, perceptual=module, decode_px=64)


@pytest.mark.parametrize("kind", ["vgg", "lpips"])
def test_each_image_of_a_perceptual_loss_keeps_the_graph_of_a_real_crop(kind, vgg_file):
    module = losses.make_perceptual_loss(kind, vgg_file)
    weights, graph = sum(value.nbytes for value in module.state_dict().values()), allocated(real_crop(module))[-1]
    jobs = [crop_job(module.to("meta"), batch) for batch in (1, 2)]
    one, two = (memory.vae_bytes(job)[2] for job in jobs)
    assert two - one == pytest.approx(graph, rel=1e-3) and one > graph
    parts = memory.predict(jobs[0], Plan())
    assert parts["weights of the perceptual loss"] == weights and parts["crops of the perceptual loss"] == one


def test_peak_of_a_perceptual_loss_is_that_of_a_real_crop_but_for_scratch_of_convolutions():
    module = losses.GradientLoss()
    compare = real_crop(module)
    assert memory.vae_bytes(crop_job(module))[2] == pytest.approx(allocated_peak(lambda: compare().sum().backward()),
                                                                  rel=0.1)


def test_a_perceptual_loss_without_crops_is_counted_on_the_whole_image():
    whole, crop = (memory.vae_bytes(small(perceptual=losses.GradientLoss(), decode_px=px))[2] for px in (0, 64))
    assert whole > 1.5 * crop
    assert memory.vae_bytes(small(decode_px=64))[2] == 0


def test_parts_add_up_and_grow_with_batch_and_rank():
    plan = Plan("full", "int8", True)
    total = sum(memory.predict(TINY_JOB, plan).values())
    assert replace(plan, parts=memory.predict(TINY_JOB, plan)).total == total
    for more in ({"batch": 3}, {"rank": 8}):
        assert sum(memory.predict(replace(TINY_JOB, **more), plan).values()) > total


@pytest.mark.parametrize(("precision", "gib"), [("bf16", 21.5), ("int8", 13.5), ("nf4", 9.6)])
def test_predictions_are_within_a_tenth_of_the_design_notes_estimate(precision, gib, kontext):
    """Full checkpointing, AdaLN tables, 1024 px with reference, rank 16."""
    parts = memory.predict(kontext, Plan("full", precision, True))
    assert (sum(parts.values()) - memory.MARGIN) / GIB == pytest.approx(gib, rel=0.1)


# --- choices


@pytest.mark.parametrize(("gib", "checkpointing", "precision", "tables", "offload"), [
    (140, "none", "bf16", False, False), (48, "selective", "bf16", False, False), (24, "full", "bf16", True, False),
    (16, "full", "int8", True, False), (12, "full", "nf4", True, False), (8, "full", "bf16", True, True)])
def test_auto_takes_the_fastest_that_fits_lossless_first(kontext, gib, checkpointing, precision, tables, offload):
    plan = memory.choose(kontext, gib * GIB)
    assert (plan.checkpointing, plan.base_precision, plan.adaln_tables, plan.offload_blocks) == (
        checkpointing, precision, tables, offload)
    assert plan.total <= gib * GIB


def test_every_plan_before_the_chosen_one_would_not_fit(kontext):
    chosen = memory.choose(kontext, 16 * GIB)
    for plan in memory.candidates("auto"):
        if plan == replace(chosen, parts=None):
            return
        assert sum(memory.predict(kontext, plan).values()) > 16 * GIB
    pytest.fail("the chosen plan is no candidate")


def test_lossless_offloads_blocks_where_auto_would_quantise_and_keeps_as_many_as_fit(kontext):
    plan = memory.choose(kontext, 14 * GIB, "lossless")
    assert plan.base_precision == "bf16" and plan.offload_blocks and plan.resident_blocks > 0
    block = memory.transformer_bytes(kontext, "bf16", plan.adaln_tables)[2]
    assert plan.total <= 14 * GIB < plan.total + block
    assert "blocks in host memory but for" in plan.in_words()


@pytest.mark.parametrize("level", list(memory.LEVELS))
def test_every_level_gives_what_its_name_says(level):
    plan = memory.choose(TINY_JOB, 100 * GIB, level)
    expected = {"selective": Plan("selective"), "full": Plan("full"), "int8": Plan(base_precision="int8"),
                "fp8": Plan(base_precision="fp8"), "nf4": Plan(base_precision="nf4")}.get(level, Plan())
    if level == "offload":
        expected = Plan("full", "bf16", True, True, resident_blocks=2)
    assert replace(plan, parts=None) == expected


@pytest.mark.parametrize("shards", [2, 8])
def test_a_split_transformer_needs_its_part_two_blocks_and_what_is_no_block(shards, kontext):
    plan = memory.choose(kontext, 48 * GIB, fixed={"shards": shards})
    total, rest, block, _ = memory.transformer_bytes(kontext, "bf16", plan.adaln_tables)
    assert plan.parts["transformer"] == total // shards + rest + memory.BLOCKS_IN_USE * block < total
    assert f"transformer split over {shards} GPUs" in plan.in_words()
    assert (plan.checkpointing == "none") == (shards == 8)  # what the others hold makes room for all activations


def test_a_split_transformer_is_neither_quantised_nor_in_host_memory(kontext):
    assert all(plan.base_precision == "bf16" and not plan.offload_blocks
               for plan in memory.candidates("auto", fixed={"shards": 4}))
    with pytest.raises(ValueError, match="--memory int8 does not go with other flags, which demand shards 4"):
        memory.choose(kontext, 48 * GIB, "int8", fixed={"shards": 4})


def test_without_tables_none_are_chosen(kontext):
    plan = memory.choose(kontext, 24 * GIB, tables_possible=False)
    assert not plan.adaln_tables and plan.base_precision == "int8"


def test_what_other_flags_have_settled_is_kept_or_refused(kontext):
    assert memory.choose(kontext, 140 * GIB, fixed={"checkpointing": "full"}).checkpointing == "full"
    assert memory.choose(kontext, 140 * GIB, fixed={"adaln_tables": True}).adaln_tables
    with pytest.raises(ValueError, match="--memory fastest does not go with .* checkpointing full"):
        memory.choose(kontext, 140 * GIB, "fastest", fixed={"checkpointing": "full"})


@pytest.mark.parametrize(("level", "gib", "batch", "cure"), [
    ("fastest", 30, 1, "--memory full would fit"), ("full", 16, 1, "--memory int8 would fit"),
    ("auto", 8, 4, "--train_batch_size 2 would fit"), ("auto", 4, 1, "--resolution 512 would fit")])
def test_what_cannot_fit_is_refused_in_one_line_with_what_would(kontext, level, gib, batch, cure):
    with pytest.raises(ValueError, match=rf"--memory {level}: [\d.]+ GiB predicted at 1024 x 1024 px") as refusal:
        memory.choose(kontext if batch == 1 else replace(kontext, batch=batch), gib * GIB, level)
    assert cure in str(refusal.value) and "\n" not in str(refusal.value)


def test_where_nothing_would_help_the_refusal_says_so():
    with pytest.raises(ValueError, match="nothing smaller fits either; free memory"):
        memory.choose(small(config=TINY, batch=1), GIB)


def test_a_level_that_is_demanded_may_use_the_margin(kontext):
    needed = memory.choose(kontext, 140 * GIB, "fastest", tables_possible=False).total
    assert memory.choose(kontext, needed - memory.MARGIN, "fastest", tables_possible=False)
    with pytest.raises(ValueError):
        memory.choose(kontext, needed - memory.MARGIN - 1, "fastest", tables_possible=False)


def test_description_has_a_line_per_part_and_says_that_it_is_predicted(kontext):
    plan = memory.choose(kontext, 12 * GIB)
    first, *parts = memory.describe(plan, 12 * GIB)
    assert "full checkpointing, nf4 weights, AdaLN tables" in first and "of 12.00 GiB predicted" in first
    assert len(parts) == sum(size > 0 for size in plan.parts.values())


# --- a run


def arguments(*flags, model="no/such/folder"):
    parser = argparse.ArgumentParser()
    memory.add_memory_args(parser)
    return SimpleNamespace(**vars(parser.parse_args(flags)), pretrained_model_name_or_path=model, revision=None,
                           cache_dir=None, train_batch_size=1, max_sequence_length=16, rank=4, lora_layers=None,
                           lora_dropout=0.0, optimizer="adamw", use_8bit_adam=False, use_ema=False, use_dora=False,
                           gradient_checkpointing=False, adaln_tables=None, base_precision=None, bnb_options=None,
                           perceptual_loss=None, perceptual_weights=None)


def test_on_a_cpu_auto_changes_nothing_reads_nothing_and_says_nothing(capsys):
    assert memory.plan_run(arguments(), torch.device("cpu"), torch.float32, SIZES) == Plan()
    assert memory.plan_run(arguments("--memory", "full"), torch.device("cpu"), torch.float32, SIZES) == Plan("full")
    assert capsys.readouterr().out == ""


def test_memory_limit_bounds_plan_and_allocator_of_a_gpu(tiny_model, monkeypatch, capsys):
    held_to = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def hold(share, device):
        assert isinstance(device, int), "PyTorch wants an index"
        held_to.append(share)

    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", hold)
    args = arguments("--memory_limit", "8", model=tiny_model)
    args.perceptual_loss = "gradient"
    plan = memory.plan_run(args, torch.device("cuda"), torch.bfloat16, SIZES, decode_px=32)
    assert "of 8.00 GiB predicted" in capsys.readouterr().out and plan.parts["crops of the perceptual loss"] > 0
    assert held_to == [pytest.approx((8 - 0.7) / 80)]
    with pytest.raises(ValueError, match="--memory_limit 0.5: give GiB of a GPU"):
        memory.plan_run(arguments("--memory_limit", "0.5"), torch.device("cuda"), torch.bfloat16, SIZES)


def test_every_flag_that_takes_memory_reaches_the_planner(tiny_model, vgg_file, monkeypatch):
    jobs = []
    monkeypatch.setattr(memory, "gpu_bytes", lambda device, limit=None: 100 * GIB)
    monkeypatch.setattr(memory, "choose", lambda job, *rest: jobs.append(job) or Plan(parts={}))

    def job(train_text_encoder=False, **flags):
        args = arguments(model=tiny_model)
        vars(args).update(flags, shards=1, attention_backend="auto")
        placement.plan(args, torch.device("cpu"), torch.bfloat16, SIZES, ["p"], train_text_encoder)
        return jobs.pop()

    plain = job()
    assert (plain.use_dora, plain.optimizer, plain.use_ema, plain.distributed, plain.double_quant, plain.clip_config,
            plain.perceptual) == (False, "adamw", False, False, True, None, None)
    assert job(use_dora=True).use_dora and job(use_ema=True).use_ema
    assert job(use_8bit_adam=True).optimizer == "adamw8bit" and job(optimizer="prodigy").optimizer == "prodigy"
    assert job(train_text_encoder=True).clip_config["hidden_size"] == 16
    assert job(bnb_options=quantise.NF4).double_quant and not job(bnb_options={"load_in_4bit": True}).double_quant
    perceptual = job(perceptual_loss="lpips", perceptual_weights=vgg_file).perceptual
    assert {weight.device.type for weight in perceptual.state_dict().values()} == {"meta"}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert job().distributed
