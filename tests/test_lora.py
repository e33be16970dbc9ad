"""The LoRA and its file: stock diffusers reads it, and nothing that does not fit is loaded."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxKontextPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from utils import flux, lora

SETTINGS = {"start_noise": [0.25, 0.5], "prompt": "Klar – 清晰", "guidance_scale": 1.0}
KINDS = {
    "plain": {}, "alpha": {"alpha": 3.0}, "rslora": {"use_rslora": True, "alpha": 3.0},
    "dora": {"use_dora": True, "alpha": 3.0}, "dropout": {"dropout": 0.5, "alpha": 6.0},
    "ends": {"layers": "x_embedder,proj_out,attn.to_q"},
}


def randomise(transformer, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora.parameters(transformer):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def predict(transformer, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    z, control = (torch.randn(1, 16, 4, 6, generator=generator) for _ in range(2))
    text = flux.TextEmbeds(torch.randn(1, 5, 16, generator=generator), torch.randn(1, 16, generator=generator))
    transformer.eval()
    return flux.predict_velocity(transformer, z, torch.tensor([0.6]), control, text.to("cpu", dtype), 1.0)


@pytest.fixture(scope="module")
def stock_pipe(tiny_model):
    return FluxKontextPipeline.from_pretrained(tiny_model)


@pytest.mark.parametrize("kind", KINDS)
def test_stock_diffusers_loads_the_file_and_reproduces_the_prediction(tiny_pipe, stock_pipe, tmp_path, kind):
    base = predict(tiny_pipe.transformer)
    lora.attach(tiny_pipe.transformer, rank=4, **KINDS[kind])
    randomise(tiny_pipe.transformer)
    trained = predict(tiny_pipe.transformer)
    assert (trained - base).abs().max() > 1e-2
    lora.save(tiny_pipe.transformer, tmp_path, SETTINGS)
    stock_pipe.load_lora_weights(str(tmp_path))
    try:
        torch.testing.assert_close(predict(stock_pipe.transformer), trained, rtol=0, atol=1e-5)
    finally:
        stock_pipe.unload_lora_weights()


@pytest.mark.parametrize("kind", KINDS)
def test_our_own_loading_reproduces_the_prediction_too(tiny_pipe, tiny_model, tmp_path, kind):
    lora.attach(tiny_pipe.transformer, rank=4, **KINDS[kind])
    randomise(tiny_pipe.transformer)
    path = lora.save(tiny_pipe.transformer, tmp_path, SETTINGS)
    fresh = flux.load_models(tiny_model, "cpu", torch.float32)
    lora.load(fresh, path)
    torch.testing.assert_close(predict(fresh.transformer), predict(tiny_pipe.transformer), rtol=0, atol=1e-5)


def test_weight_0_is_the_base_model_and_weight_is_the_scale(tiny_pipe, tiny_lora):
    base = predict(tiny_pipe.transformer)
    lora.load(tiny_pipe, tiny_lora, weight=0.0)
    torch.testing.assert_close(predict(tiny_pipe.transformer), base)
    tiny_pipe.set_adapters("restoration", 1.0)
    full = predict(tiny_pipe.transformer)
    tiny_pipe.set_adapters("restoration", 0.5)
    half = predict(tiny_pipe.transformer)
    assert (full - half).abs().max() > 1e-3 and (half - base).abs().max() > 1e-3


def test_settings_ride_under_a_key_of_their_own_beside_diffusers_header(tiny_pipe, tmp_path):
    lora.attach(tiny_pipe.transformer, rank=4, alpha=3.0)
    path = lora.save(tiny_pipe.transformer, tmp_path, SETTINGS)
    assert path == tmp_path / "pytorch_lora_weights.safetensors"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]  # nothing left of the writing
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert json.loads(header[lora.SETTINGS_KEY]) == SETTINGS == lora.read_settings(path)
    config = json.loads(header["lora_adapter_metadata"])
    assert config["transformer.r"] == 4 and config["transformer.lora_alpha"] == 3.0
    layers = config["transformer.target_modules"]
    assert layers == sorted(layers)  # a set's order changes from process to process
    assert all(key.startswith("transformer.") for key in config)  # a foreign key here breaks stock loading


def test_stock_loading_does_not_depend_on_our_settings(tiny_lora, stock_pipe, tmp_path):
    path = lora.find_file(tiny_lora)
    with safe_open(path, "pt") as file:
        header = {key: value for key, value in file.metadata().items() if key != lora.SETTINGS_KEY}
    save_file(load_file(path), tmp_path / lora.LORA_FILE, metadata=header)
    predictions = []
    for folder in (tiny_lora, tmp_path):
        stock_pipe.load_lora_weights(str(folder))
        predictions.append(predict(stock_pipe.transformer))
        stock_pipe.unload_lora_weights()
    assert torch.equal(*predictions)
    assert lora.read_settings(tmp_path) is None


def test_equal_runs_write_equal_bytes(tiny_model, tmp_path):
    files = []
    for run in range(2):
        torch.manual_seed(run)
        transformer = flux.load_models(tiny_model, "cpu", torch.float32).transformer
        lora.attach(transformer, rank=4, layers="attn.to_v,attn.to_q,proj_out,attn.to_k")
        files.append(lora.save(transformer, tmp_path / str(run), SETTINGS).read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_fresh_lora_changes_nothing(tiny_pipe, use_dora):
    base = predict(tiny_pipe.transformer)
    lora.attach(tiny_pipe.transformer, rank=4, alpha=8, use_dora=use_dora)
    torch.testing.assert_close(predict(tiny_pipe.transformer), base, rtol=0, atol=1e-6)
    tensors = lora.state_dict(tiny_pipe.transformer)
    assert all((value == 0).all() for name, value in tensors.items() if "lora_B" in name)
    assert all(value.std() > 0 for name, value in tensors.items() if "lora_A" in name)


def test_masters_are_fp32_on_a_bf16_base_and_only_they_train(tiny_model):
    transformer = flux.load_models(tiny_model, "cpu", torch.bfloat16).transformer
    parameters = lora.attach(transformer, rank=4)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    trained = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert len(trained) == len(parameters) and all("lora_" in name for name in trained)
    frozen = {parameter.dtype for name, parameter in transformer.named_parameters() if name not in trained}
    assert frozen == {torch.bfloat16}


def test_the_seed_alone_draws_a_and_the_global_state_stays(tiny_model):
    drawn = []
    for seed, before in ((0, 1), (0, 2), (5, 1)):
        transformer = flux.load_models(tiny_model, "cpu", torch.float32).transformer
        torch.manual_seed(before)
        state = torch.get_rng_state()
        lora.attach(transformer, rank=4, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(lora.state_dict(transformer))
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert any(not torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0])


def test_default_layers_all_exist_and_alpha_defaults_to_the_rank(tiny_pipe):
    lora.attach(tiny_pipe.transformer, rank=4)
    adapted = {name for name, _ in tiny_pipe.transformer.named_modules() if name.endswith(".lora_A")}
    for layer in lora.DEFAULT_LAYERS:
        assert any(name.endswith(f"{layer}.lora_A") for name in adapted), layer
    config = tiny_pipe.transformer.peft_config["default"]
    assert config.lora_alpha == config.r == 4


def test_an_unknown_layer_is_refused_with_names_that_exist(tiny_pipe):
    with pytest.raises(ValueError, match="--lora_layers attn.to_x.*attn.add_k_proj") as error:
        lora.attach(tiny_pipe.transformer, rank=4, layers="attn.to_q, attn.to_x")
    assert "\n" not in str(error.value)
    assert not getattr(tiny_pipe.transformer, "peft_config", None)


def test_a_layer_name_matches_whole_names_only(tiny_pipe):
    with pytest.raises(ValueError, match="--lora_layers to_"):
        lora.attach(tiny_pipe.transformer, rank=4, layers="to_")


@pytest.mark.parametrize(("name", "value"), [
    ("rank", 0), ("rank", -4), ("lora_alpha", 0.0), ("lora_alpha", -1.0), ("lora_alpha", float("nan")),
    ("lora_alpha", float("inf")), ("lora_dropout", 1.0), ("lora_dropout", -0.1), ("ema_decay", 0.0),
    ("ema_decay", 1.0),
])
def test_impossible_lora_numbers_are_refused_by_name(name, value):
    args = SimpleNamespace(rank=4, lora_layers=None, lora_alpha=None, lora_dropout=0.0, ema_decay=0.999)
    lora.check_lora_args(args)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=f"--{name} {value}"):
        lora.check_lora_args(args)


def test_state_dict_round_trip(tiny_model):
    first, second = (flux.load_models(tiny_model, "cpu", torch.float32).transformer for _ in range(2))
    lora.attach(first, rank=4, use_dora=True)
    lora.attach(second, rank=4, use_dora=True, seed=9)
    randomise(first)
    lora.load_state_dict(second, lora.state_dict(first))
    for a, b in zip(lora.parameters(first), lora.parameters(second), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layers", ["attn.to_q", "attn.to_q,attn.to_k,attn.to_v"])
def test_state_of_other_layers_is_refused(tiny_model, layers):
    first, second = (flux.load_models(tiny_model, "cpu", torch.float32).transformer for _ in range(2))
    lora.attach(first, rank=4, layers=layers)
    lora.attach(second, rank=4, layers="attn.to_q,attn.to_k")
    with pytest.raises(ValueError, match="LoRA weights do not fit"):
        lora.load_state_dict(second, lora.state_dict(first))


def test_averaged_holds_the_moving_average_inside_and_restores_the_weights(tiny_pipe):
    parameters = lora.attach(tiny_pipe.transformer, rank=4)
    ema = lora.make_ema(parameters, decay=0.999)
    expected = [parameter.detach().clone() for parameter in parameters]
    for step in range(1, 4):
        randomise(tiny_pipe.transformer, seed=step)
        ema.step(parameters)
        # the first step of n counts as n = 0: diffusers starts at (1 + n) / (10 + n) with n = steps - 1
        decay = 0.0 if step == 1 else step / (9 + step)
        expected = [decay * mean + (1 - decay) * now.detach() for mean, now in zip(expected, parameters, strict=True)]
    trained = [parameter.detach().clone() for parameter in parameters]
    with lora.averaged(ema, parameters):
        for parameter, mean in zip(parameters, expected, strict=True):
            torch.testing.assert_close(parameter.detach(), mean)
        assert any(not torch.equal(a, b) for a, b in zip(parameters, trained, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(parameters, trained, strict=True))


def test_averaged_restores_the_weights_after_an_error_and_does_nothing_without_ema(tiny_pipe):
    parameters = lora.attach(tiny_pipe.transformer, rank=4)
    ema = lora.make_ema(parameters, decay=0.5)
    randomise(tiny_pipe.transformer)
    trained = [parameter.detach().clone() for parameter in parameters]
    with pytest.raises(KeyboardInterrupt), lora.averaged(ema, parameters):
        assert not torch.equal(parameters[0], trained[0])
        raise KeyboardInterrupt
    assert all(torch.equal(a, b) for a, b in zip(parameters, trained, strict=True))
    with lora.averaged(None, parameters):
        assert torch.equal(parameters[0], trained[0])


# --- files that do not fit


@pytest.fixture
def changed(tiny_lora, tmp_path):
    """Writes the tiny LoRA with changed tensors; returns the file's path."""
    source = lora.find_file(tiny_lora)

    def write(change, keep_header=True):
        tensors = load_file(source)
        with safe_open(source, "pt") as file:
            header = file.metadata()
        change(tensors)
        save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "changed.safetensors",
                  metadata=header if keep_header else None)
        return tmp_path / "changed.safetensors"

    return write


def test_a_sound_file_passes_with_and_without_our_header(tiny_pipe, tiny_lora, changed):
    lora.check(tiny_lora, tiny_pipe.transformer)
    lora.check(changed(lambda tensors: None, keep_header=False), tiny_pipe.transformer)


@pytest.mark.parametrize("name", ["", "nothing.safetensors", "folder"])
def test_a_missing_file_is_named_with_the_cure(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}.*no such LoRA file.*{lora.LORA_FILE}"):
        lora.find_file(tmp_path / name)


def test_a_pickle_is_never_opened(tmp_path):
    path = tmp_path / "pytorch_lora_weights.bin"
    path.write_bytes(b"\x80\x04")
    with pytest.raises(ValueError, match="only .safetensors"):
        lora.find_file(path)


def first_key(tensors, part="lora_A"):
    return next(name for name in sorted(tensors) if part in name)


def rename(tensors, old, new):
    tensors[new] = tensors.pop(old)


FAULTS = {
    "another model's layer": (lambda t: rename(t, first_key(t), "transformer.blocks.9.attn.lora_A.weight"),
                              "blocks.9.attn.*does not belong"),
    "a unet's key": (lambda t: rename(t, first_key(t), first_key(t).replace("transformer.", "unet.", 1)),
                     "does not belong"),
    "a key without lora": (lambda t: t.update({"transformer.norm.weight": torch.zeros(3)}), "does not belong"),
    "half a pair": (lambda t: t.pop(first_key(t)), "lora_B without its partner"),
    "the other half": (lambda t: t.pop(first_key(t, "lora_B")), "lora_A without its partner"),
    "another width": (lambda t: t.update({first_key(t): torch.zeros(4, 999)}), "shapes .*999"),
    "two ranks": (lambda t: t.update({first_key(t): t[first_key(t)][:2]}), "shapes"),
    "one dimension": (lambda t: t.update({first_key(t): torch.zeros(4)}), "shapes"),
    "no dimension": (lambda t: t.update({first_key(t, "lora_B"): torch.tensor(1.0)}), "shapes"),
    "NaN": (lambda t: t[first_key(t)].view(-1)[3].fill_(float("nan")), "lora_A.* NaN or infinity"),
    "infinity": (lambda t: t[first_key(t, "lora_B")].view(-1)[0].fill_(float("inf")), "lora_B.* NaN or infinity"),
    "alpha twice": (lambda t: t.update({first_key(t).replace("lora_A.weight", "alpha"): torch.tensor(4.0)}),
                    "states alpha twice"),
    "nothing": (lambda t: t.clear(), "no LoRA weights"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_does_not_fit_is_refused_by_name(tiny_pipe, changed, fault):
    change, words = FAULTS[fault]
    path = changed(change)
    with pytest.raises(ValueError, match=f"^{path}.*{words}") as error:
        lora.load(tiny_pipe, path)
    assert "\n" not in str(error.value)
    assert not getattr(tiny_pipe.transformer, "peft_config", None)  # refused before anything was attached


def test_a_file_with_alpha_tensors_and_no_header_passes(tiny_pipe, changed):
    path = changed(lambda t: t.update({first_key(t).replace("lora_A.weight", "alpha"): torch.tensor(4.0)}),
                   keep_header=False)
    lora.check(path, tiny_pipe.transformer)


@pytest.mark.parametrize("size", [0, 7, 300, -100])
def test_a_truncated_file_is_refused_by_name(tiny_pipe, tiny_lora, tmp_path, size):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(lora.find_file(tiny_lora).read_bytes()[:size])
    with pytest.raises(ValueError, match=f"^{path} is not a complete safetensors file") as error:
        lora.load(tiny_pipe, path)
    assert "\n" not in str(error.value)


def test_settings_that_are_not_json_are_refused_by_name(tiny_lora, tmp_path):
    path = tmp_path / "odd.safetensors"
    save_file(load_file(lora.find_file(tiny_lora)), path, metadata={lora.SETTINGS_KEY: "{"})
    with pytest.raises(ValueError, match=f"^{path}"):
        lora.read_settings(path)


def test_a_lora_file_has_the_permissions_of_any_new_file(tiny_pipe, tmp_path):
    lora.attach(tiny_pipe.transformer, 2)
    (tmp_path / "plain").touch()
    assert lora.save(tiny_pipe.transformer, tmp_path, SETTINGS).stat().st_mode == (tmp_path / "plain").stat().st_mode


def step_gradients(pipe, dtype, autocast):
    """(loss, all LoRA gradients as one vector) of one training step on bf16 or fp32 models."""
    generator = torch.Generator().manual_seed(2)
    z, control, velocity = (torch.randn(2, 16, 8, 8, generator=generator) for _ in range(3))
    text = flux.TextEmbeds(torch.randn(2, 5, 16, generator=generator),
                           torch.randn(2, 16, generator=generator)).to("cpu", dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prediction = flux.predict_velocity(pipe.transformer, z, torch.tensor([0.25, 0.75]), control, text, 1.0)
    loss = (prediction.float() - velocity).square().mean()
    loss.backward()
    return loss.item(), torch.cat([p.grad.double().flatten() for p in lora.parameters(pipe.transformer)])


def test_explicit_bf16_is_as_close_to_fp32_as_autocast_and_never_widens_an_activation(tiny_model, monkeypatch):
    """The usual way is autocast around a bf16 model whose LoRA peft gives fp32 activations."""
    results, widened = {}, []
    for name, dtype, autocast in (("fp32", torch.float32, False), ("autocast", torch.bfloat16, True),
                                  ("ours", torch.bfloat16, False)):
        pipe = flux.load_models(tiny_model, "cpu", dtype)
        if name == "autocast":
            monkeypatch.setattr(lora, "compute_in_input_dtype", lambda model: None)
        parameters = lora.attach(pipe.transformer, rank=8)
        monkeypatch.undo()
        randomise(pipe.transformer)
        if name == "ours":
            for module in pipe.transformer.modules():
                if isinstance(module, torch.nn.Linear):
                    module.register_forward_pre_hook(lambda m, inputs: widened.append(inputs[0].dtype))
        results[name] = step_gradients(pipe, dtype, autocast)
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in parameters)
    assert set(widened) == {torch.bfloat16}
    loss, gradient = results["fp32"]

    def errors(name):
        other_loss, other = results[name]
        return abs(other_loss - loss) / loss, ((other - gradient).norm() / gradient.norm()).item()

    (plain_loss, plain), (our_loss, ours) = errors("autocast"), errors("ours")
    assert 0 < ours < 1.5 * plain and our_loss < max(1.5 * plain_loss, 2**-9)


def test_attached_fp32_loras_compute_as_pefts_own(tiny_pipe, monkeypatch):
    lora.attach(tiny_pipe.transformer, rank=4)
    randomise(tiny_pipe.transformer)
    ours = predict(tiny_pipe.transformer)
    for module in tiny_pipe.transformer.modules():
        module.__dict__.pop("forward", None)
        module.__dict__.pop("cast_input_dtype_enabled", None)
    assert torch.equal(predict(tiny_pipe.transformer), ours)


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_predicts_the_same_without_a_lora_layer(tiny_pipe, tiny_model, tmp_path, kind, weight):
    from peft.tuners.lora import LoraLayer

    lora.attach(tiny_pipe.transformer, rank=4, **KINDS[kind])
    randomise(tiny_pipe.transformer)
    path = lora.save(tiny_pipe.transformer, tmp_path, SETTINGS)
    pipe = flux.load_models(tiny_model, "cpu", torch.float32)
    base, names = predict(pipe.transformer), list(pipe.transformer.state_dict())
    lora.load(pipe, path, weight)
    expected = predict(pipe.transformer)
    lora.merge(pipe.transformer)
    torch.testing.assert_close(predict(pipe.transformer), expected, rtol=0, atol=1e-5)
    assert (expected - base).abs().max() > 1e-2
    assert list(pipe.transformer.state_dict()) == names and not hasattr(pipe.transformer, "peft_config")
    assert not any(isinstance(module, LoraLayer) for module in pipe.transformer.modules())


def test_bf16_weights_with_a_lora_merged_in_are_the_fp32_sums_rounded_once(tiny_pipe, tiny_model, tiny_lora):
    """The prediction may be further from fp32's than the unmerged one's by what the two roundings differ."""
    pipe = flux.load_models(tiny_model, "cpu", torch.bfloat16)
    lora.load(pipe, tiny_lora)
    lora.load(tiny_pipe, tiny_lora)
    expected = predict(tiny_pipe.transformer)

    def error():
        return (predict(pipe.transformer, torch.bfloat16).float() - expected).norm() / expected.norm()

    unmerged = error()
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    a, b = (part["restoration"].weight.float() for part in (layer.lora_A, layer.lora_B))
    exact = layer.base_layer.weight.float() + b @ a
    lora.merge(pipe.transformer)
    assert torch.equal(pipe.transformer.transformer_blocks[0].attn.to_q.weight, exact.bfloat16())
    assert {parameter.dtype for parameter in pipe.transformer.parameters()} == {torch.bfloat16}
    assert 0 < error() < 1.5 * unmerged
