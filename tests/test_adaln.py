"""AdaLN tables against the plain transformer, which computes what they look up."""

import copy
import re
import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel

from utils import adaln, flux, lora, restore
from utils import flow_matching as fm

GUIDANCE = 3.5
LEVELS = [0.137, 0.9, 1.0, 0.5, 0.4, 0.3, 0.2]  # few, as BLAS rounds products of more rows than 8 differently
SIGMAS = torch.tensor([0.137, 0.9, 0.137])  # of one batch: mixed, one of them twice


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(scope="module")
def original():
    """A transformer with three blocks of each kind, frozen; the session's is copied, never changed."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=64, num_layers=3, num_single_layers=3, num_attention_heads=2, attention_head_dim=16,
        axes_dims_rope=(4, 6, 6), joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=True,
    ).eval().requires_grad_(False)


def pooled(dtype=torch.float32):
    return normal(1, 16, seed=2, dtype=dtype)


def with_lora(transformer, layers=None):
    """The transformer with a LoRA that does something."""
    lora.attach(transformer, rank=4, layers=layers)
    for i, parameter in enumerate(lora.parameters(transformer)):
        parameter.data.copy_(0.1 * normal(*parameter.shape, seed=i))
    return transformer


def tabled(original, sigmas=LEVELS, dtype=torch.float32):
    transformer = copy.deepcopy(original).to(dtype)
    adaln.build(transformer, sigmas, GUIDANCE, pooled(dtype), "cpu", dtype)
    return transformer


def predict(transformer, sigma=SIGMAS, references=(), dtype=torch.float32, guidance=GUIDANCE):
    batch = len(sigma)
    text = flux.TextEmbeds(normal(1, 5, 16, seed=1, dtype=dtype), pooled(dtype)).expand(batch)
    references = [normal(batch, 16, *size, seed=9) for size in references]
    return flux.predict_velocity(transformer, normal(batch, 16, 6, 8), sigma, references, text, guidance)


def loss_and_gradients(transformer, **inputs):
    predict(transformer, **inputs).float().square().mean().backward()
    return [parameter.grad for parameter in lora.parameters(transformer)]


def replaced_parameters(transformer):
    """(name, parameter) of the layers that tables replace, by their names in the whole transformer."""
    gone = {id(parameter) for _, parameter in adaln.parameters(transformer)}
    return [(name, parameter) for name, parameter in transformer.named_parameters() if id(parameter) in gone]


@pytest.mark.parametrize("references", [(), [(6, 8)], [(4, 6), (6, 8)]], ids=len)
@torch.no_grad()
def test_velocities_are_the_plain_transformers_to_the_bit(original, references):
    plain = predict(original, references=references)
    assert torch.equal(predict(tabled(original), references=references), plain)
    assert not torch.equal(plain[0], plain[2])  # same sigma, other latents
    assert not torch.equal(predict(original, torch.tensor([0.137, 0.137, 0.137]), references)[1], plain[1])


@torch.no_grad()
def test_a_table_of_all_thousand_levels_is_the_same_to_fp32_rounding(original):
    transformer = tabled(original, [i / 1000 for i in range(1, 1001)])
    for sigma in (SIGMAS, SIGMAS[:1], torch.tensor([0.001, 1.0])):
        torch.testing.assert_close(predict(transformer, sigma), predict(original, sigma), rtol=0, atol=4e-6)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("references", [(), [(6, 8)]], ids=len)
def test_lora_gradients_are_the_plain_transformers_to_the_bit(original, references, checkpointing):
    gradients = []
    for transformer in (copy.deepcopy(original), tabled(original)):
        with_lora(transformer).train()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        gradients.append(loss_and_gradients(transformer, references=references))
    assert len(gradients[0]) > 20 and all(gradient.abs().max() > 0 for gradient in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_two_forward_passes_before_their_backward_keep_their_own_rows(original):
    gradients = []
    for transformer in (copy.deepcopy(original), tabled(original)):
        with_lora(transformer).train().enable_gradient_checkpointing()
        losses = [predict(transformer, torch.tensor([sigma, 1])).square().mean() for sigma in (0.9, 0.2)]
        sum(losses).backward()
        gradients.append([parameter.grad for parameter in lora.parameters(transformer)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compiled_blocks_are_whole_graphs_that_serve_every_block_and_row(original):
    torch._dynamo.reset()
    plain, compiled = (with_lora(model, "attn.to_q") for model in (copy.deepcopy(original), tabled(original)))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled.enable_gradient_checkpointing()
    compiled.train()
    for block in (*compiled.transformer_blocks, *compiled.single_transformer_blocks):
        block.compile(backend=counter, fullgraph=True)
    loss_and_gradients(compiled, sigma=torch.tensor([0.5, 0.4, 0.3]), references=[(6, 8)])
    assert counter.frame_count == 4  # not 6: of each kind the first alone has inputs of its own (gradient, strides)
    compiled.zero_grad()
    with torch._dynamo.config.patch(error_on_recompile=True):
        gradients = [loss_and_gradients(transformer, references=[(6, 8)]) for transformer in (plain, compiled)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_in_bf16_outputs_and_gradients_are_as_near_to_fp32_as_the_plain_transformers(original):
    with torch.no_grad():
        exact = predict(original)
    errors, gradients = [], [loss_and_gradients(with_lora(copy.deepcopy(original)))]
    for transformer in (copy.deepcopy(original).bfloat16(), tabled(original, LEVELS, torch.bfloat16)):
        with torch.no_grad():
            errors.append((predict(transformer, dtype=torch.bfloat16) - exact).norm())
        gradients.append(loss_and_gradients(with_lora(transformer), dtype=torch.bfloat16))
    assert 0 < errors[1] <= 1.5 * errors[0]
    for exact, plain, ours in zip(*gradients, strict=True):
        assert (ours - exact).norm() <= 1.5 * (plain - exact).norm()


def settings(**changes):
    return restore.STOCK_SETTINGS | changes


@pytest.mark.parametrize(("changes", "levels"), [
    ({}, 1279), ({"train_sigmas": "continuous", "start_noise": [0.1, 1.0]}, 2556),
    ({"train_sigmas": "continuous", "start_noise": [0.0, 0.0], "bridge_noise": 0.1}, 1279),
], ids=["grid", "continuous", "bridge"])
def test_every_sigma_that_is_drawn_or_sampled_has_a_row_in_bf16(original, changes, levels):
    changed = settings(**changes)
    sigmas = adaln.every_sigma(changed)
    assert len(sigmas) == levels and sigmas == sorted(set(sigmas)) and sigmas[-1] == 1
    table = adaln.build(copy.deepcopy(original).bfloat16(), sigmas, GUIDANCE, pooled(), "cpu", torch.bfloat16)
    assert 0.9 * levels < len(table.row_of) <= levels
    smallest = fm.SMALLEST_BRIDGE_POSITION if changed["bridge_noise"] else 0.0
    draw = partial(fm.draw_position, train_sigmas=changed["train_sigmas"], smallest=smallest)
    extreme = SimpleNamespace(clamp=lambda lo, hi: torch.tensor(1.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.training_utils.compute_density_for_timestep_sampling", lambda *a, **k: extreme)
        lowest = draw(None)
    generator = torch.Generator().manual_seed(0)
    lo, hi = changed["start_noise"]
    drawn = [lowest, *(draw(generator, mu=mu) for mu in (None, 1.15) for _ in range(500))]
    k = lo + (hi - lo) * torch.rand(len(drawn), generator=generator)
    k[0] = lo
    table.select(torch.tensor(drawn) * torch.where(k == 0, 1, k), GUIDANCE)
    scheduler = restore.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    for steps in (1, 4, 28, 1000):
        for tokens in (16, 4096):
            for noise in {lo, hi}:
                table.select(torch.tensor(restore.schedule(changed, steps, tokens, scheduler, noise)[1][:-1]), GUIDANCE)
    assert len(table.rows) == 1000


@torch.no_grad()
def test_a_continuous_sigma_is_told_to_both_as_the_same_bf16_number(original):
    sigma = normal(24, seed=4).sigmoid()
    plain = predict(copy.deepcopy(original).bfloat16(), sigma, dtype=torch.bfloat16)
    ours = predict(tabled(original, adaln.every_sigma(settings()), torch.bfloat16), sigma, dtype=torch.bfloat16)
    torch.testing.assert_close(ours, plain, rtol=0.02, atol=0.02)
    others = predict(tabled(original, [1.0], torch.bfloat16), torch.ones(24), dtype=torch.bfloat16)
    assert (others - plain).abs().flatten(1).amax(1).min() > 0.02  # at another level it would show


@torch.no_grad()
def test_sampling_with_tables_equals_sampling_without(original):
    text = flux.TextEmbeds(normal(1, 5, 16, seed=1), pooled())
    start, control, noise = normal(2, 16, 4, 4), normal(2, 16, 4, 4, seed=3), [normal(2, 16, 4, 4, seed=7)] * 3
    bridge = settings(start_noise=[0.0, 0.0], bridge_noise=0.2, guidance_scale=GUIDANCE)
    results = [restore.sample_latents(SimpleNamespace(transformer=transformer, scheduler=None), start, control,
                                      text.expand(2), bridge, 4, 0.0, noise)
               for transformer in (original, tabled(original, [1.0, 0.75, 0.5, 0.25]))]
    assert torch.equal(*results)


def test_the_parameters_are_gone(original):
    transformer = tabled(original)
    taken = [parameter for _, parameter in adaln.parameters(original)]
    assert original.num_parameters() - transformer.num_parameters() == sum(p.numel() for p in taken) > 0
    assert not any("norm1" in name or "time_text" in name or "norm_out" in name
                   for name, _ in transformer.named_parameters())


def test_of_full_size_flux_3280_million_of_11901_million_parameters_go():
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    assert transformer.num_parameters() == 11_901_408_320
    assert sum(parameter.numel() for _, parameter in adaln.parameters(transformer)) == 3_279_710_208
    outputs = sum(norm.linear.out_features for norm in adaln.norms(transformer))
    assert outputs == 344 * 3072 == 1_056_768  # 2.11 MB in bf16


def test_layers_come_to_the_device_one_by_one_and_none_stays(original):
    transformer, alive = copy.deepcopy(original), []

    def only_this_one_lives(module, inputs, index):
        assert [i for i, linear in enumerate(alive) if linear() is not None] == list(range(index, len(alive)))

    for i, norm in enumerate(adaln.norms(transformer)):
        alive.append(weakref.ref(norm.linear))
        norm.linear.register_forward_pre_hook(partial(only_this_one_lives, index=i))
    embedding = weakref.ref(transformer.time_text_embed)
    adaln.build(transformer, [1.0], GUIDANCE, pooled(), "cpu", torch.float32)
    assert len(alive) == 10 and not any(linear() for linear in alive) and embedding() is None


@pytest.mark.parametrize("attach_first", [False, True], ids=["tables first", "LoRA first"])
def test_a_step_writes_the_same_lora_file_with_and_without_tables(original, tmp_path, attach_first):
    files = []
    for has_tables in (False, True):
        transformer = copy.deepcopy(original)
        for do in sorted(["attach", "build"], reverse=not attach_first):
            if do == "attach":
                lora.attach(transformer, rank=4)
            elif has_tables:
                adaln.build(transformer, LEVELS, GUIDANCE, pooled(), "cpu", torch.float32)
        optimizer = torch.optim.AdamW(lora.parameters(transformer), lr=1e-2)
        for _ in range(2):
            loss_and_gradients(transformer)
            optimizer.step()
        files.append(lora.save(transformer, tmp_path / str(has_tables), settings()))
        reopened = tabled(original) if has_tables else copy.deepcopy(original)
        assert not list(lora.faults(files[-1], reopened))
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_table_is_neither_state_nor_buffer(original):
    transformer = tabled(original)
    assert not list(transformer.buffers())  # nothing for DistributedDataParallel to broadcast
    assert transformer.state_dict().keys() == original.state_dict().keys() - dict(replaced_parameters(original)).keys()


def test_behind_distributed_data_parallel_gradients_are_the_same(original, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        alone, inner = (with_lora(tabled(original)) for _ in range(2))
        wrapped = torch.nn.parallel.DistributedDataParallel(inner)
        expected = loss_and_gradients(alone, references=[(6, 8)])
        predict(wrapped, references=[(6, 8)]).square().mean().backward()
        assert all(torch.equal(a, p.grad) for a, p in zip(expected, lora.parameters(inner), strict=True))
    finally:
        torch.distributed.destroy_process_group()


def test_a_step_reads_nothing_back_from_the_device(original):
    """On the meta device there is nothing to read: .item(), .tolist() and .cpu() raise."""
    transformer = with_lora(tabled(original)).train().to("meta")
    transformer.time_text_embed.device = torch.device("meta")
    for norm in adaln.norms(transformer):
        norm.linear.vectors = norm.linear.vectors.to("meta")
    z, text = torch.empty(3, 16, 6, 8, device="meta"), flux.TextEmbeds(
        torch.empty(3, 5, 16, device="meta"), torch.empty(3, 16, device="meta"))
    for parameter in lora.parameters(transformer):
        parameter.requires_grad_()
    flux.predict_velocity(transformer, z, SIGMAS, z, text, GUIDANCE).mean().backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in lora.parameters(transformer))
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        flux.predict_velocity(transformer, z, SIGMAS.to("meta"), z, text, GUIDANCE)


@torch.no_grad()
def test_a_transformer_without_guidance_embedding_takes_any_guidance(original):
    bare = FluxTransformer2DModel.from_config(original.config | {"guidance_embeds": False}).eval()
    assert torch.equal(predict(tabled(bare), guidance=1.0), predict(bare, guidance=2.0))


def test_a_sigma_or_guidance_without_a_table_is_one_line(original):
    transformer = tabled(original, [1.0, 0.5])
    with pytest.raises(ValueError, match="sigma 0.75 is none of the 2 noise levels of the AdaLN tables"):
        predict(transformer, torch.tensor([0.5, 0.75]))
    with pytest.raises(ValueError, match="guidance 1: the AdaLN tables were made for 3.5"):
        predict(transformer, torch.tensor([0.5]), guidance=1.0)


def test_a_forward_pass_never_uses_a_former_batchs_rows(original):
    transformer = tabled(original)
    inputs = {"hidden_states": normal(1, 4, 64), "timestep": torch.ones(1), "guidance": torch.ones(1),
              "encoder_hidden_states": normal(1, 5, 16), "pooled_projections": pooled(),
              "txt_ids": torch.zeros(5, 3), "img_ids": torch.zeros(4, 3)}
    adaln.select(transformer, torch.ones(1), GUIDANCE)
    transformer(**inputs)
    with pytest.raises(RuntimeError, match="adaln.select before each forward pass"):
        transformer(**inputs)


def test_several_prompts_and_a_lora_on_these_layers_are_refused(original):
    with pytest.raises(ValueError, match="one prompt, and 2 were given"):
        adaln.build(copy.deepcopy(original), [1.0], GUIDANCE, pooled().expand(2, -1), "cpu", torch.float32)
    for layer in ("norm.linear", "timestep_embedder.linear_1"):
        transformer = copy.deepcopy(original)
        lora.attach(transformer, rank=4, layers=f"attn.to_q,{layer}")
        with pytest.raises(ValueError, match="layers that have a LoRA"):
            adaln.build(transformer, [1.0], GUIDANCE, pooled(), "cpu", torch.float32)


@pytest.mark.parametrize(("options", "words"), [
    ({"dtype": torch.float32}, "need bf16.*--mixed_precision bf16"),
    ({"prompts": ["a", "b", "a"]}, "one prompt, and this run has 2.*--instance_prompt"),
    ({"train_text_encoder": True}, "--train_text_encoder changes it"),
    ({"lora_layers": "attn.to_q, norm1.linear"}, "replace --lora_layers norm1.linear"),
    ({"lora_layers": "norm_out.linear"}, "norm_out.linear"), ({"lora_layers": "linear_2"}, "linear_2"),
], ids=str)
def test_what_tables_cannot_do_is_said_in_one_line(options, words):
    reason = adaln.obstacle(**{"dtype": torch.bfloat16, "prompts": ["a"]} | options)
    assert re.search(words, reason) and "\n" not in reason


def test_everything_else_can_have_tables(original):
    assert adaln.obstacle(torch.bfloat16, ["a", "a"]) is None
    assert adaln.obstacle(torch.bfloat16, ["a"], ",".join([*lora.DEFAULT_LAYERS, "proj_out", "x_embedder"])) is None
    replaced = {name.rpartition(".")[0] for name, _ in replaced_parameters(original)}
    for name, module in original.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert (adaln.obstacle(torch.bfloat16, ["a"], name) is not None) == (name in replaced)
