"""LoRA files: conversions keep the effect, as this project and stock diffusers read it, and every fault is named."""

import json
import math
import re
import sys

import pytest
import torch
from diffusers import FluxKontextPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import test_deg_lora_flux_kontext as restoration
from scripts import lora_tool
from tests.test_lora import FAULTS, first_key, predict, randomise
from tests.test_lora import changed as changed  # a fixture
from utils import flow_matching as fm
from utils import lora, lora_files, restore, session
from utils.parse import run_main

SETTINGS = restore.STOCK_SETTINGS | {"start_noise": [0.5, 0.5], "guidance_scale": 1.0, "prompt": "Klar – 清晰"}
# A regular expression for peft: layers of double blocks alone, whose tiny kohya layers diffusers' converter takes.
DOUBLE = r"transformer_blocks\.0\.(attn\.(to_q|to_k|add_v_proj|to_add_out)|ff\.net\.0\.proj|norm1\.linear)"
CONFIGS = {
    "rank 16, alpha 4": {"r": 16, "lora_alpha": 4},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 3, "rank_pattern": {"attn.to_q": 2, "proj_mlp": 6},
                 "alpha_pattern": {"attn.to_k": 5.0, "ff.net.2": 1.0}},
    "patterns of rslora": {"r": 4, "lora_alpha": 3, "alpha_pattern": {"attn.to_k": 5.0}, "use_rslora": True},
}


def save_lora(transformer, folder, layers=None, settings=SETTINGS, seed=1, **config):
    transformer.add_adapter(LoraConfig(target_modules=layers or lora.DEFAULT_LAYERS, **{"r": 4} | config))
    randomise(transformer, seed)
    return lora.save(transformer, folder, settings)


def dense(pairs):
    return {module: scale * b.double() @ a.double() for module, (a, b, scale) in pairs.items()}


def peft_effects(transformer):
    """What peft itself adds to the weights."""
    return {f"transformer.{name}": module.get_delta_weight("default").detach().double()
            for name, module in transformer.named_modules() if hasattr(module, "get_delta_weight")}


def assert_same_effect(actual, expected, atol=1e-6):
    assert actual.keys() == expected.keys()
    for module in expected:
        torch.testing.assert_close(actual[module], expected[module], rtol=0, atol=atol)


@pytest.fixture
def tool(monkeypatch, capsys):
    """Runs the command line; returns the exit code and what was printed, errors too."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lora_tool", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            run_main(lora_tool.main)
        printed = capsys.readouterr()
        return stop.value.code, printed.out + printed.err

    return run


@pytest.fixture(scope="module")
def stock_pipe(tiny_model):
    return FluxKontextPipeline.from_pretrained(tiny_model)


@pytest.fixture
def stock_prediction(stock_pipe):
    """Loads a file with stock diffusers and predicts."""

    def run(path):
        stock_pipe.load_lora_weights(str(path.parent), weight_name=path.name)
        return predict(stock_pipe.transformer)

    yield run
    stock_pipe.unload_lora_weights()


@pytest.fixture
def text_lora(tiny_model, tmp_path):
    """File with a LoRA on the transformer and on CLIP as stock diffusers saves it, and CLIP's output with it."""
    pipe = FluxKontextPipeline.from_pretrained(tiny_model)
    pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=DOUBLE, init_lora_weights=False))
    pipe.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=3, init_lora_weights=False,
                                             target_modules=["q_proj", "v_proj", "out_proj", "fc1"]))
    from diffusers.training_utils import _collate_lora_metadata

    parts = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
    FluxKontextPipeline.save_lora_weights(
        tmp_path, **{f"{name}_lora_layers": get_peft_model_state_dict(model) for name, model in parts.items()},
        **_collate_lora_metadata(parts))
    return tmp_path / lora.LORA_FILE, read_clip(pipe)


@torch.no_grad()
def read_clip(pipe):
    return pipe.text_encoder(torch.tensor([[1, 5, 2]])).last_hidden_state


# --- inspect


def test_inspect_names_targets_rank_alpha_scale_size_and_settings(tool, tiny_pipe, tmp_path):
    path = save_lora(tiny_pipe.transformer, tmp_path, ["attn.to_q", "x_embedder"], r=16, lora_alpha=4)
    code, text = tool("inspect", tmp_path)
    parameters = 2 * 16 * (32 + 32) + 16 * (64 + 32)
    for words in (f"{path.stat().st_size:,} bytes, diffusers layout\n", "3 layers, 0 of them in the text encoder",
                  "1 x transformer.single_transformer_blocks.*.attn.to_q", "1 x transformer.x_embedder", "rank: 16\n",
                  "alpha: header {'transformer': 4}, tensors none; scale 0.25", f"{parameters:,} parameters, float32",
                  '"start_noise": [0.5, 0.5]'):
        assert words in text
    assert code == 0


@pytest.mark.parametrize(("layout", "words"), [
    ("comfyui", ["comfyui layout", "1 x transformer.transformer_blocks.*.attn.to_q", "tensors [1.0]; scale 0.25"]),
    ("kohya", ["kohya layout", "1 x lora_unet_double_blocks_*_img_attn_qkv", "[3.0]; scale 0.25", "rank: 12\n"]),
])
def test_inspect_reads_the_other_layouts(tool, tiny_pipe, tmp_path, layout, words):
    path = save_lora(tiny_pipe.transformer, tmp_path, "transformer_blocks.0.attn.to_[qkv]", lora_alpha=1)
    assert tool("convert", path, "--to", layout, "--output", tmp_path / "out.safetensors")[0] == 0
    _, text = tool("inspect", tmp_path / "out.safetensors")
    assert all(word in text for word in [*words, "header none"])


def test_inspect_sees_dora_and_the_text_encoder(tool, tiny_pipe, text_lora, tmp_path):
    _, text = tool("inspect", text_lora[0])
    assert "4 of them in the text encoder" in text and "DoRA" not in text and "sampling settings: none" in text
    save_lora(tiny_pipe.transformer, tmp_path / "dora", use_dora=True)
    assert ", DoRA\n" in tool("inspect", tmp_path / "dora")[1]


# --- check


def test_a_sound_file_passes_and_the_full_size_is_the_default(tool, tiny_model, tiny_lora):
    code, text = tool("check", tiny_lora, "--pretrained_model_name_or_path", tiny_model)
    assert code == 0 and text.count("\n") == 1 and "is sound" in text
    code, text = tool("check", tiny_lora)
    assert code == 2 and "the model's layer is 3072 x 3072" in text and "--pretrained_model_name_or_path" in text


def test_a_full_size_lora_is_sound_by_default(tool, tmp_path):
    pairs = {"transformer.single_transformer_blocks.37.attn.to_q": (torch.ones(1, 3072), torch.ones(3072, 1), 1.0)}
    lora_files.write(tmp_path / "a.safetensors", pairs, "diffusers")
    assert tool("check", tmp_path / "a.safetensors")[0] == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_one_line_and_code_2(tool, changed, tiny_model, fault):
    change, words = FAULTS[fault]
    path = changed(change)
    code, text = tool("check", path, "--pretrained_model_name_or_path", tiny_model)
    assert code == 2 and re.search(words, text)
    assert all(line.startswith(str(path)) for line in text.splitlines())


def test_all_faults_are_listed(tool, changed, tiny_model):
    def break_three(tensors):
        keys = sorted(tensors)
        tensors[keys[0]][0, 0] = math.nan
        tensors["unet.x.lora_A.weight"] = torch.zeros(4, 4)
        del tensors[keys[-1]]

    _, text = tool("check", changed(break_three), "--pretrained_model_name_or_path", tiny_model)
    assert len(text.splitlines()) == 3
    assert all(words in text for words in ("NaN", "does not belong", "without its partner"))


def test_pickles_cut_files_and_missing_ones_are_named(tool, tiny_lora, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\x80\x04")
    (tmp_path / "cut.safetensors").write_bytes(lora.find_file(tiny_lora).read_bytes()[:300])
    for name, words in (("a.bin", "only .safetensors"), ("cut.safetensors", "not a complete"), ("no", "no such LoRA")):
        code, text = tool("check", tmp_path / name)
        assert code == 2 and words in text and text.count("\n") == 1


def test_clip_layers_are_legal_with_and_without_text_model(tiny_pipe, text_lora, tmp_path):
    path, _ = text_lora
    lora.check(path, tiny_pipe.transformer)
    old = {key.replace("text_encoder.", "text_encoder.text_model."): value for key, value in load_file(path).items()}
    save_file(old, tmp_path / "old.safetensors")
    lora.check(tmp_path / "old.safetensors", tiny_pipe.transformer)


@pytest.mark.parametrize(("change", "words"), [
    (lambda t: t.pop(first_key(t, "text_encoder")), "lora_B without its partner"),
    (lambda t: t.update({first_key(t, "text_encoder"): torch.zeros(3, 16)}), "shapes"),
    (lambda t: t.update({first_key(t, "text_encoder"): torch.tensor(1.0)}), "shapes"),
    (lambda t: t.update({"text_encoder.encoder.layers.0.norm.lora_A.weight": torch.zeros(2, 2)}), "does not belong"),
    (lambda t: t.update({"transformer.x_embedder.lora_C.weight": torch.zeros(2, 2)}), "lora_C.weight does not belong"),
    (lambda t: [t.pop(key) for key in list(t) if "transformer_blocks" in key], "no LoRA weights for a transformer"),
    (lambda t: t.update({"lora_unet_img_in.alpha": torch.tensor(1.0)}), "kohya.*convert"),
])
def test_faults_of_clip_layers_and_foreign_layouts(tiny_pipe, text_lora, tmp_path, change, words):
    tensors = load_file(text_lora[0])
    change(tensors)
    save_file(tensors, tmp_path / "changed.safetensors")
    with pytest.raises(ValueError, match=words):
        lora.check(tmp_path / "changed.safetensors", tiny_pipe.transformer)


# --- convert: effects


@pytest.mark.parametrize("layout", lora_files.LAYOUTS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_layout_keeps_the_effect_and_the_settings(tool, tiny_pipe, tmp_path, kind, layout):
    path = save_lora(tiny_pipe.transformer, tmp_path, **CONFIGS[kind])
    expected = peft_effects(tiny_pipe.transformer)
    assert_same_effect(dense(lora_files.read(path)), expected)
    out, back = tmp_path / "out.safetensors", tmp_path / "back.safetensors"
    assert tool("convert", path, "--to", layout, "--output", out)[0] == 0
    assert_same_effect(dense(lora_files.read(out)), expected)
    assert tool("convert", out, "--to", "diffusers", "--output", back)[0] == 0
    assert_same_effect(dense(lora_files.read(back)), expected)
    assert lora.read_settings(out) == lora.read_settings(back) == SETTINGS
    assert not list(tmp_path.glob(".*"))  # nothing left of the writing


@pytest.mark.parametrize("layout", ["comfyui", "kohya"])
def test_rank_16_with_alpha_4_comes_back_as_that_bit_for_bit(tiny_pipe, tmp_path, layout):
    path = save_lora(tiny_pipe.transformer, tmp_path, r=16, lora_alpha=4)
    lora_files.write(tmp_path / "there.safetensors", lora_files.read(path), layout)
    lora_files.write(tmp_path / "back.safetensors", lora_files.read(tmp_path / "there.safetensors"), "diffusers")
    before, after = load_file(path), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    with safe_open(tmp_path / "back.safetensors", "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (16, 4)


@pytest.mark.parametrize("layers", [["attn.to_q", "proj_mlp", "proj_out", "x_embedder"], None])
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("layout", ["diffusers", "comfyui"])
def test_stock_diffusers_reads_both_peft_layouts(tiny_pipe, stock_prediction, tmp_path, layout, kind, layers):
    path = save_lora(tiny_pipe.transformer, tmp_path, layers, **CONFIGS[kind])
    out = tmp_path / "out.safetensors"
    lora_files.write(out, lora_files.read(path), layout)
    torch.testing.assert_close(stock_prediction(out), predict(tiny_pipe.transformer), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_stock_diffusers_reads_kohya_keys_of_double_blocks(tiny_pipe, stock_prediction, tmp_path, kind):
    path = save_lora(tiny_pipe.transformer, tmp_path, DOUBLE, **CONFIGS[kind])
    out = tmp_path / "out.safetensors"
    lora_files.write(out, lora_files.read(path), "kohya")
    torch.testing.assert_close(stock_prediction(out), predict(tiny_pipe.transformer), rtol=0, atol=1e-5)


def full_size_lora(parts, rank=2, scale=0.25):
    """Random LoRA on FLUX.1's own layers whose names match the regular expression `parts`."""
    torch.manual_seed(0)
    shapes = {f"transformer.{name}": module.weight.shape
              for name, module in lora_files.weightless_transformer().named_modules()
              if isinstance(module, torch.nn.Linear) and re.fullmatch(parts, name)}
    return {name: (torch.randn(rank, columns), torch.randn(rows, rank).T.contiguous().T, scale)
            for name, (rows, columns) in shapes.items()}


@pytest.mark.parametrize("parts", [
    r"(single_)?transformer_blocks\.7\..*", r"single_transformer_blocks\.0\.(attn\.to_v|proj_mlp)",
    r"single_transformer_blocks\.37\.attn\.to_q", r"transformer_blocks\.18\.attn\.add_k_proj"])
def test_diffusers_own_converter_gives_full_size_kohya_layers_the_same_effect(tmp_path, parts):
    pairs = full_size_lora(parts)
    assert pairs
    lora_files.write(tmp_path / "k.safetensors", pairs, "kohya")
    state = FluxKontextPipeline.lora_state_dict(str(tmp_path), weight_name="k.safetensors")
    modules = {key.partition(".lora_")[0] for key in state}
    assert modules >= pairs.keys()
    for module in modules:
        a, b = state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"]
        if module not in pairs:  # fused with one that has a LoRA: no effect
            assert not b.any()
            continue
        ours_a, ours_b, scale = pairs[module]
        torch.testing.assert_close(b @ a[:, :99], scale * ours_b @ ours_a[:, :99], rtol=0, atol=1e-6)
    assert lora_files.read(tmp_path / "k.safetensors").keys() == pairs.keys()


def test_kohya_files_of_other_trainers_share_one_a_for_q_k_and_v(tmp_path):
    a, b = torch.randn(4, 32), torch.randn(7 * 32, 4)
    save_file({"lora_unet_single_blocks_3_linear1.lora_down.weight": a.half(),
               "lora_unet_single_blocks_3_linear1.lora_up.weight": b.half(),
               "lora_unet_single_blocks_3_linear1.alpha": torch.tensor(2.0)}, tmp_path / "k.safetensors")
    effects = dense(lora_files.read(tmp_path / "k.safetensors"))
    block = "transformer.single_transformer_blocks.3"
    stacked = torch.cat([effects[f"{block}.{part}"] for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")])
    torch.testing.assert_close(stacked, 0.5 * b.half().double() @ a.half().double())


@pytest.mark.parametrize("layout", lora_files.LAYOUTS)
def test_the_text_encoder_comes_along_and_stock_diffusers_reads_it(tiny_model, text_lora, tmp_path, layout):
    path, expected = text_lora
    out = tmp_path / "out.safetensors"
    pairs = lora_files.read(path)
    lora_files.write(out, pairs, layout)
    if layout != "diffusers":  # the only names of CLIP layers that ComfyUI knows
        text = [key for key in load_file(out) if "_te" in key or key.startswith("text_")]
        known = ("lora_te1_text_model_encoder_layers_0_", "text_encoder.text_model.encoder.layers.0.")
        assert text and all(key.startswith(known) for key in text)
    assert_same_effect(dense(lora_files.read(out)), dense(pairs))
    pipe = FluxKontextPipeline.from_pretrained(tiny_model)
    assert (read_clip(pipe) - expected).abs().max() > 1e-2
    pipe.load_lora_weights(str(tmp_path), weight_name=out.name)
    torch.testing.assert_close(read_clip(pipe), expected, rtol=0, atol=1e-5)


# --- convert: ComfyUI's names


def comfyui_names():
    """{diffusers' layer: (layer of the original FLUX, offset of its rows in units of 3072)}, as ComfyUI maps them."""
    names = {"x_embedder": ("img_in", 0), "context_embedder": ("txt_in", 0), "proj_out": ("final_layer.linear", 0),
             "norm_out.linear": ("final_layer.adaLN_modulation.1", None)}
    for ours, theirs in (("timestep", "time_in"), ("text", "vector_in"), ("guidance", "guidance_in")):
        names[f"time_text_embed.{ours}_embedder.linear_1"] = (f"{theirs}.in_layer", 0)
        names[f"time_text_embed.{ours}_embedder.linear_2"] = (f"{theirs}.out_layer", 0)
    double = {"attn.to_q": ("img_attn.qkv", 0), "attn.to_k": ("img_attn.qkv", 1), "attn.to_v": ("img_attn.qkv", 2),
              "attn.add_q_proj": ("txt_attn.qkv", 0), "attn.add_k_proj": ("txt_attn.qkv", 1),
              "attn.add_v_proj": ("txt_attn.qkv", 2), "attn.to_out.0": ("img_attn.proj", 0),
              "attn.to_add_out": ("txt_attn.proj", 0), "norm1.linear": ("img_mod.lin", 0),
              "norm1_context.linear": ("txt_mod.lin", 0), "ff.net.0.proj": ("img_mlp.0", 0),
              "ff.net.2": ("img_mlp.2", 0), "ff_context.net.0.proj": ("txt_mlp.0", 0),
              "ff_context.net.2": ("txt_mlp.2", 0)}
    single = {"attn.to_q": ("linear1", 0), "attn.to_k": ("linear1", 1), "attn.to_v": ("linear1", 2),
              "proj_mlp": ("linear1", 3), "proj_out": ("linear2", 0), "norm.linear": ("modulation.lin", 0)}
    for i in range(19):
        names |= {f"transformer_blocks.{i}.{k}": (f"double_blocks.{i}.{v}", row) for k, (v, row) in double.items()}
    for i in range(38):
        names |= {f"single_transformer_blocks.{i}.{k}": (f"single_blocks.{i}.{v}", row)
                  for k, (v, row) in single.items()}
    return names


def test_comfyui_knows_every_key_that_a_lora_on_all_layers_of_flux_exports(tmp_path):
    pairs = full_size_lora(".*", rank=1)
    assert len(pairs) == 19 * 14 + 38 * 6 + 10
    lora_files.write(tmp_path / "c.safetensors", pairs, "comfyui")
    known = {f"transformer.{name}{end}" for name in comfyui_names()
             for end in (".lora_A.weight", ".lora_B.weight", ".alpha")}
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        assert set(file.keys()) == known  # nothing is lost either
        assert "lora_adapter_metadata" not in (file.metadata() or {})


def test_comfyui_adds_kohya_layers_to_the_right_rows(tmp_path):
    pairs = full_size_lora(r"(single_)?transformer_blocks\.(2|5)\..*")
    lora_files.write(tmp_path / "k.safetensors", pairs, "kohya")
    tensors, names = load_file(tmp_path / "k.safetensors"), comfyui_names()
    assert {key.partition(".")[0] for key in tensors} == {
        "lora_unet_" + names[module.removeprefix("transformer.")][0].replace(".", "_") for module in pairs}
    for module, (a, b, scale) in pairs.items():
        layer, row = names[module.removeprefix("transformer.")]
        key = f"lora_unet_{layer.replace('.', '_')}"
        up, down = tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]
        effect = tensors[f"{key}.alpha"].item() / len(down) * up[3072 * row:][: len(b)] @ down[:, :50]
        torch.testing.assert_close(effect, scale * b @ a[:, :50], rtol=0, atol=1e-6)


def test_layers_that_a_reader_would_drop_are_refused_by_name(tool, tiny_pipe, tmp_path):
    path = save_lora(tiny_pipe.transformer, tmp_path, ["x_embedder", "attn.to_q", "norm_out.linear"])
    code, text = tool("convert", path, "--to", "kohya", "--output", tmp_path / "o.safetensors")
    assert code == 2 and "transformer.norm_out.linear, transformer.x_embedder" in text and "--to comfyui" in text
    with pytest.raises(ValueError, match="no name for transformer.transformer_blocks.19.attn.to_q; use --to diffusers"):
        lora_files.write(tmp_path / "o.safetensors", {
            "transformer.transformer_blocks.19.attn.to_q": (torch.ones(1, 2), torch.ones(2, 1), 1.0)}, "comfyui")
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize("command", [["convert", "--to", "comfyui"], ["resize", "--rank", "1"], ["average"]])
def test_dora_is_refused_in_one_line(tool, tiny_pipe, tmp_path, command):
    path = save_lora(tiny_pipe.transformer, tmp_path, use_dora=True)
    code, text = tool(*command, path, "--output", tmp_path / "o.safetensors")
    assert code == 2 and "is a DoRA" in text and "merge" in text and text.count("\n") == 1


@pytest.mark.parametrize(("key", "tensor", "words"), [
    ("lora_unet_double_blocks_99_img_mlp_0.lora_down.weight", torch.zeros(1, 4), "no complete pair"),
    ("transformer.x_embedder.lora_A.weight", torch.tensor(1.0), "no complete pair"),
    ("transformer.x_embedder.lora_A.weight", torch.full((4, 64), math.inf), "NaN or infinity"),
    ("unet.x.lora_A.weight", torch.ones(4, 64), "no layer of FLUX.1 in the names of diffusers"),
    ("lora_unet_final_layer_adaLN_modulation_1.lora_A.weight", torch.ones(4, 8), "in the names of kohya"),
    ("lora_unet_single_blocks_1_linear1.lora_A.weight", torch.ones(4, 8), "32 rows"),
])
def test_files_that_cannot_be_read_are_named(tmp_path, key, tensor, words):
    path = tmp_path / "odd.safetensors"
    save_file({key: tensor} | ({key.replace("lora_A", "lora_B"): torch.ones(32, 4)} if "lora_A" in key else {}), path)
    with pytest.raises(ValueError, match=f"^{path}.*{words}"):
        lora_files.read(path)
    save_file({}, path)
    with pytest.raises(ValueError, match="holds no LoRA weights"):
        lora_files.read(path)


# --- convert: how to sample in ComfyUI


def manual_sigmas(notes):
    """As ComfyUI's ManualSigmas reads its text."""
    return [float(x) for x in re.findall(r"[-+]?(?:\d*\.*\d+)", re.search(r'ManualSigmas "(.*?)"', notes)[1])]


@pytest.mark.parametrize("changes", [
    {}, {"start_noise": [0.25, 0.5]}, {"start_noise": [0.25, 1.0]}, {"train_sigmas": [1.0, 0.75, 0.5, 0.25]},
    {"timestep_shift": "resolution", "resolution": 512}, {"start_noise": [0.3, 0.3]}, {"start_noise": [0.75, 0.75]}])
def test_the_notes_sigmas_are_the_ones_that_this_project_samples_with(changes):
    settings = SETTINGS | changes
    notes, k = lora_files.sampling_notes(settings), restore.choose_start_noise(settings)
    mu = fm.resolution_mu(1024) if "timestep_shift" in changes else None
    steps = 28 if settings["start_noise"][1] == 1 else 4  # what the validation of a training takes
    expected = [k * s for s in fm.sampling_positions(steps, settings["train_sigmas"], mu)]
    assert manual_sigmas(notes) == pytest.approx(expected, abs=1e-6)
    assert 'prompt "Klar – 清晰"' in notes and "FluxGuidance 1," in notes and "VAE-encoded degraded image" in notes
    assert ("512 x 512" in notes) == bool(mu)
    if found := re.search(r"KSampler, scheduler simple, steps (\d+), denoise ([\d.]+)", notes):
        # ComfyUI's simple schedule of int(steps / denoise) steps, without shift, of which the last ones run
        steps, denoise = int(found[1]), float(found[2])
        start = steps / int(steps / denoise)
        lo, hi = settings["start_noise"]
        assert denoise == pytest.approx(k) and lo - 0.01 <= start <= hi + 0.01
        assert "max_shift 0 and base_shift 0" in notes
    assert bool(found) == (not mu and "train_sigmas" not in changes)


def test_reference_latents_follow_the_settings():
    assert "ReferenceLatent with" in lora_files.sampling_notes(SETTINGS)
    assert "no ReferenceLatent" in lora_files.sampling_notes(SETTINGS | {"reference_tokens": False})


def test_the_notes_say_that_a_bridge_cannot_be_sampled_with_ordinary_samplers():
    notes = lora_files.sampling_notes(SETTINGS | {"start_noise": [0.0, 0.0]})
    assert "cannot" in notes and "start from zeros" in notes and "KSampler" not in notes
    assert manual_sigmas(notes) == [1, 0]


def test_stock_sampling_and_unknown_settings_need_no_notes():
    assert lora_files.sampling_notes(restore.STOCK_SETTINGS) is lora_files.sampling_notes(None) is None


@pytest.mark.parametrize(("layout", "noted"), [("comfyui", True), ("kohya", True), ("diffusers", False)])
def test_notes_lie_beside_files_for_other_programs(tool, tiny_lora, tmp_path, layout, noted):
    _, text = tool("convert", tiny_lora, "--to", layout, "--output", tmp_path / "new" / "a.safetensors")
    notes = tmp_path / "new" / "a.sampling.md"
    assert notes.exists() == noted == ("ManualSigmas" in text)
    assert not noted or notes.read_text(encoding="utf-8") in text


# --- merge


@pytest.mark.parametrize("config", [{"lora_alpha": 3}, {"lora_alpha": 3, "use_dora": True}])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_a_merged_folder_is_a_stock_pipeline_equal_to_base_and_lora(tool, tiny_pipe, tiny_model, tmp_path, weight,
                                                                    config):
    path = save_lora(tiny_pipe.transformer, tmp_path, **config)
    tiny_pipe.transformer.set_adapters("default", weight)
    code, _ = tool("merge", path, "--pretrained_model_name_or_path", tiny_model, "--output", tmp_path / "m",
                   "--weight", weight, "--dtype", "fp32")
    merged = FluxKontextPipeline.from_pretrained(tmp_path / "m")
    assert code == 0 and not hasattr(merged.transformer, "peft_config")
    torch.testing.assert_close(predict(merged.transformer), predict(tiny_pipe.transformer), rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "m" / restore.SETTINGS_FILE).read_text(encoding="utf-8")) == SETTINGS


def test_a_merged_model_is_sampled_as_its_lora_was(tool, tiny_model, tiny_lora, tmp_path, capsys):
    tool("merge", tiny_lora, "--pretrained_model_name_or_path", tiny_model, "--output", tmp_path / "m")
    args = restoration.parse_args(["--pretrained_model_name_or_path", str(tmp_path / "m"), "--input", str(tmp_path),
                                   "--output", str(tmp_path / "out")])
    settings, steps, start_noise = session.resolve_settings(args)
    assert settings == lora.read_settings(tiny_lora) and (steps, start_noise) == (4, 0.5)
    assert "warning" not in capsys.readouterr().err


def test_a_hub_model_without_network_is_one_line(tool, tiny_lora):
    code, text = tool("check", tiny_lora, "--pretrained_model_name_or_path", "nobody/nothing")
    assert code == 2 and "nobody/nothing could not be fetched" in text and text.count("\n") == 1


def test_the_text_encoder_is_merged_too(tiny_model, text_lora, tmp_path):
    path, expected = text_lora
    lora_files.merge(path, tiny_model, tmp_path / "m")
    assert not (tmp_path / "m" / restore.SETTINGS_FILE).exists()  # the file states none
    merged = FluxKontextPipeline.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(read_clip(merged), expected, rtol=0, atol=1e-5)


def test_merge_writes_bf16_unless_told_otherwise(tool, tiny_model, tiny_lora, tmp_path):
    tool("merge", tiny_lora, "--pretrained_model_name_or_path", tiny_model, "--output", tmp_path / "m")
    (weights,) = (tmp_path / "m" / "transformer").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16}


def test_merge_refuses_a_folder_with_something_in_it_and_a_lora_that_does_not_fit(tool, changed, tiny_model, tiny_lora,
                                                                                   tmp_path, monkeypatch):
    monkeypatch.setattr(lora_files.flux, "load_pipeline", None)  # refused before anything is loaded
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").touch()
    model = ["--pretrained_model_name_or_path", tiny_model]
    for lora_file, folder, extra, words in (
            (tiny_lora, "m", [], "is not empty"), (tiny_lora, "n", ["--weight", "nan"], "--weight nan"),
            (changed(FAULTS["another width"][0]), "n", [], "shapes")):
        code, text = tool("merge", lora_file, *model, "--output", tmp_path / folder, *extra)
        assert code == 2 and words in text
    assert [file.name for file in (tmp_path / "m").iterdir()] == ["mine.txt"]


# --- resize and average


@pytest.mark.parametrize("config", [{"lora_alpha": 3}, {"lora_alpha": 3, "rank_pattern": {"attn.to_q": 2}}])
def test_resize_is_the_best_approximation_of_the_dense_effect(tool, tiny_pipe, tmp_path, config):
    path = save_lora(tiny_pipe.transformer, tmp_path, ["attn.to_q", "proj_mlp", "proj_out"], r=6, **config)
    _, text = tool("resize", path, "--rank", 3, "--output", tmp_path / "small.safetensors")
    small, kept, total = dense(lora_files.read(tmp_path / "small.safetensors")), 0, 0
    for module, effect in dense(lora_files.read(path)).items():
        u, s, v = torch.linalg.svd(effect, full_matrices=False)
        torch.testing.assert_close(small[module], u[:, :3] * s[:3] @ v[:3], rtol=0, atol=1e-6)
        kept, total = kept + s[:3].square().sum(), total + s.square().sum()
    assert f"keeps {100 * (kept / total).sqrt():.2f} %" in text and kept < 0.999 * total
    with safe_open(tmp_path / "small.safetensors", "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config["transformer.r"] == config["transformer.lora_alpha"] == 3
    assert lora.read_settings(tmp_path / "small.safetensors") == SETTINGS


@pytest.mark.parametrize("rank", [0, -1, 4, 99])
def test_resize_refuses_ranks_that_shrink_nothing(tool, tiny_lora, tmp_path, rank):
    code, text = tool("resize", tiny_lora, "--rank", rank, "--output", tmp_path / "a.safetensors")
    assert code == 2 and f"--rank {rank}: the LoRA has rank 4" in text


@pytest.fixture
def two_loras(tiny_model, tmp_path):
    """Two LoRAs of different rank, alpha and layers."""
    transformers = [FluxKontextPipeline.from_pretrained(tiny_model).transformer for _ in range(2)]
    return [save_lora(transformers[0], tmp_path / "0", ["attn.to_q", "attn.to_k"], lora_alpha=3),
            save_lora(transformers[1], tmp_path / "1", ["attn.to_q", "proj_out"], seed=2, r=2, use_rslora=True)]


@pytest.mark.parametrize(("flags", "weights"), [([], [0.5, 0.5]), (["--weights", "3,1"], [0.75, 0.25])])
def test_average_is_the_weighted_mean_of_the_effects(tool, two_loras, tmp_path, flags, weights):
    assert tool("average", *two_loras, *flags, "--output", tmp_path / "mean.safetensors")[0] == 0
    first, second = (dense(lora_files.read(path)) for path in two_loras)
    mean = {module: weights[0] * first.get(module, 0) + weights[1] * second.get(module, 0)
            for module in first.keys() | second.keys()}
    assert_same_effect(dense(lora_files.read(tmp_path / "mean.safetensors")), mean)
    assert lora.read_settings(tmp_path / "mean.safetensors") == SETTINGS


def test_average_with_a_rank_is_the_best_approximation_of_the_mean(tool, two_loras, tmp_path):
    tool("average", *two_loras, "--output", tmp_path / "mean.safetensors")
    tool("average", *two_loras, "--rank", 3, "--output", tmp_path / "small.safetensors")
    expected, _ = lora_files.resize(lora_files.read(tmp_path / "mean.safetensors"), 3)
    assert_same_effect(dense(lora_files.read(tmp_path / "small.safetensors")), dense(expected))


@pytest.mark.parametrize("weights", ["1", "1,2,3", "1,x", "1,0", "1,-1", "1,nan", "inf,1"])
def test_average_refuses_weights_that_mean_nothing(tool, two_loras, tmp_path, weights):
    code, text = tool("average", *two_loras, f"--weights={weights}", "--output", tmp_path / "a.safetensors")
    assert code == 2 and f"--weights {weights}: give 2 positive numbers" in text


@pytest.mark.parametrize(("name", "value"), [("start_noise", [1.0, 1.0]), ("reference_tokens", False)])
def test_average_refuses_loras_of_different_paths(tool, tiny_lora, tmp_path, name, value):
    settings = lora.read_settings(tiny_lora) | {name: value}
    lora_files.write(tmp_path / "b.safetensors", lora_files.read(tiny_lora), "diffusers", settings)
    code, text = tool("average", tiny_lora, tmp_path / "b.safetensors", "--output", tmp_path / "c.safetensors")
    assert code == 2 and name in text and str(value) in text


def test_average_refuses_loras_of_other_models(tool, tiny_lora, tmp_path):
    pairs = {module: (torch.cat([a, a], 1), b, scale) for module, (a, b, scale) in lora_files.read(tiny_lora).items()}
    lora_files.write(tmp_path / "b.safetensors", pairs, "diffusers", lora.read_settings(tiny_lora))
    code, text = tool("average", tiny_lora, tmp_path / "b.safetensors", "--output", tmp_path / "c.safetensors")
    assert code == 2 and "another shape" in text


# --- every output


@pytest.mark.parametrize("command", [["convert", "--to", "comfyui"], ["resize", "--rank", "1"], ["average"]])
def test_the_input_is_never_overwritten_and_the_output_is_safetensors(tool, tiny_lora, command):
    path = lora.find_file(tiny_lora)
    before = path.read_bytes()
    code, text = tool(*command, tiny_lora, "--output", path)
    assert code == 2 and "is the input" in text and path.read_bytes() == before
    code, text = tool(*command, tiny_lora, "--output", path.with_suffix(".pt"))
    assert code == 2 and "name a .safetensors file" in text


def test_outputs_are_fp32_and_equal_runs_write_equal_bytes(tiny_lora, tmp_path):
    half = {key: value.bfloat16() for key, value in load_file(lora.find_file(tiny_lora)).items()}
    save_file(half, tmp_path / "half.safetensors", metadata={lora.SETTINGS_KEY: json.dumps(SETTINGS)})
    pairs = lora_files.read(tmp_path / "half.safetensors")
    for name in ("a", "b"):
        lora_files.write(tmp_path / f"{name}.safetensors", pairs, "diffusers", SETTINGS)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    written = load_file(tmp_path / "a.safetensors")
    assert all(value.dtype == torch.float32 and torch.equal(value, half[key].float()) for key, value in written.items())


def test_a_yaml_file_sets_defaults_of_a_command(tool, tiny_lora, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("rank: 2\n", encoding="utf-8")
    _, text = tool("resize", tiny_lora, "--config", config, "--output", tmp_path / "a.safetensors")
    assert "rank 2 keeps" in text
    config.write_text("rang: 2\n", encoding="utf-8")
    code, text = tool("resize", tiny_lora, "--config", config, "--rank", 2, "--output", tmp_path / "a.safetensors")
    assert code == 2 and "rang" in text
