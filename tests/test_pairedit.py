"""PairEdit: each variant's losses by hand, gradients where they belong, exact resume, sliders and real images."""

import csv
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from recipes.pairedit import (
    adapters,
    example,
    gen_image_script,
    gen_real_image_script,
    generate,
    generate_real_image,
    import_legacy,
    options,
    pairs,
    pictures,
    sampling,
    train,
)
from recipes.pairedit.objectives import CONTENT, SEMANTIC, VARIANTS, adapters_of, pair_passes, text_target
from tests.conftest import read_summary, run_on_two_processes
from utils import flux, lora, restore

pytestmark = pytest.mark.usefixtures("models_load_once")
SIDE = 32
RECIPE = Path(options.__file__).parent
PAIR_VARIANTS = ["train_image", "train_image_wocontent", "train_image_wocfg", "train_image_fm", "train_image_sliders"]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A dataset "warm" of two pairs, 40 x 48 px."""
    folder = tmp_path_factory.mktemp("datasets")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        source = rng.integers(40, 200, (40, 48, 3), dtype=np.uint8)
        for part, image in (("source", source), ("target", np.clip(source * (1.2, 1, 0.7), 0, 255).astype(np.uint8))):
            (folder / "warm" / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / "warm" / part / f"{name}.png")
    return folder


@pytest.fixture
def command(tiny_model, datasets, tmp_path):
    """command(**options) -> words of a command line of any program of the recipe."""
    def make(**given):
        values = {"pretrained_model_name_or_path": tiny_model, "datasets_folder": datasets, "datasets": "warm",
                  "output_folder": tmp_path / "models", "output_folder_gen": tmp_path / "images", "resolution": SIDE,
                  "max_sequence_length": 8, "num_inference_steps": 4, "train_iteration": 4, "save_per_steps": 2,
                  "rank": 2, "skips": 1, "count_gen": 2, "scales": "0,0.5,1", "logging_steps": 1, "seed": 3,
                  "image_format": "png"} | given
        return [word for name, value in values.items() if value is not None
                for word in (f"--{name}", *(value if isinstance(value, list) else str(value).split("\n")))]
    return make


def run_training(words):
    return train.main(train.parse_args([str(word) for word in words]))


def lora_files(folder):
    return {path.name: load_file(path) for path in sorted(folder.rglob("*epoch*.safetensors"))}


def assert_equal(first, second):
    assert first.keys() == second.keys() and first
    for name in first:
        assert first[name].keys() == second[name].keys()
        for key in first[name]:
            assert torch.equal(first[name][key], second[name][key]), (name, key)


# --- objectives


@pytest.fixture
def drawn():
    generator = torch.Generator().manual_seed(0)
    source, target, noise = torch.randn(3, 2, 4, 6, 6, generator=generator)
    return source, target, torch.tensor([0.25, 0.75]), noise


@pytest.mark.parametrize(("variant", "expected"), {
    "full": lambda a, b, s, e: [(a + s * 2 * e, 2 * e), (a + s * 2 * e, 2 * e + 3 * (a - b))],
    "wocontent": lambda a, b, s, e: [(a + s * 2 * e, 2 * e + 3 * (a - b))],
    "wocfg": lambda a, b, s, e: [(a + s * 2 * e, 2 * e), (b + s * 2 * e, 2 * e)],
    "fm": lambda a, b, s, e: [((1 - s) * a + s * 2 * e, 2 * e - a),
                              ((1 - s) * a + s * 2 * e, 2 * e - a + 3 * (a - b))],
    "sliders": lambda a, b, s, e: [((1 - s) * b + s * 2 * e, 2 * e - b), ((1 - s) * a + s * 2 * e, 2 * e - a)],
    "real": lambda a, b, s, e: [((1 - s) * a + s * 2 * e, 2 * e - a)],
}.items())
def test_every_variant_shows_and_asks_what_the_table_says(drawn, variant, expected):
    source, target, sigma, noise = drawn
    passes = pair_passes(variant, source, target, sigma, noise, noise_scale=2, eta=3)
    wanted = expected(source, target, sigma.view(2, 1, 1, 1), noise)
    assert len(passes) == len(wanted)
    for made, (latents, velocity) in zip(passes, wanted, strict=True):
        torch.testing.assert_close(made.latents, latents)
        torch.testing.assert_close(made.target, velocity)
        assert made.learns in made.active and set(made.active) <= set(adapters_of(variant))


def test_the_semantic_loss_asks_for_a_drift_of_eta_towards_the_target(drawn):
    """x - sigma v of the semantic target is z_A + sigma eta (z_B - z_A)."""
    source, target, sigma, noise = drawn
    made = pair_passes("full", source, target, sigma, noise, eta=4)[1]
    sigma = sigma.view(2, 1, 1, 1)
    torch.testing.assert_close(made.latents - sigma * made.target, source + sigma * 4 * (target - source))


def test_fm_target_noise_leaves_the_image_out(drawn):
    source, target, sigma, noise = drawn
    made = [pair_passes("fm", source, target, sigma, noise, fm_target=name) for name in ("velocity", "noise")]
    for one, other in zip(*made, strict=True):
        torch.testing.assert_close(other.target - one.target, source)
        assert torch.equal(one.latents, other.latents)


def test_a_text_sliders_target_has_the_positive_norm_and_the_guided_direction():
    neutral, positive, negative = torch.randn(3, 2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    target = text_target(neutral, positive, negative, eta=2)
    guided = neutral + 2 * (positive - negative)
    torch.testing.assert_close(target.flatten(1).norm(dim=1), positive.flatten(1).norm(dim=1))
    torch.testing.assert_close(F.cosine_similarity(target.flatten(1), guided.flatten(1)), torch.ones(2))


# --- gradients


def step_of(tiny_pipe, name, command, seeds=(5,), **given):
    """(losses, {adapter: gradients}) of one training step of a variant on random latents, and what it was given."""
    args = train.parse_args([str(word) for word in command(python_name=name, **given)])
    args.noise_scale = args.noise_scales[0]
    transformer = tiny_pipe.transformer.train()
    names = adapters_of(args.objective)
    trained = adapters.attach(transformer, names, args.rank, args.lora_alpha, args.train_method)
    adapters.reset(transformer, names, args.train_method, range(len(names)))
    for parameter in (p for group in trained.values() for p in group):  # B zero would hide half of the gradients
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
    mean = torch.randn(2, 2, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    text = flux.TextEmbeds(torch.randn(3 if args.objective == "text" else 1, 8, 16), torch.randn(
        3 if args.objective == "text" else 1, 16))
    sigmas = restore.noise_levels(tiny_pipe.vae, tiny_pipe.scheduler, args.num_inference_steps, SIDE, SIDE)
    losses = train.training_step(tiny_pipe, trained, (mean, 0.1 * torch.ones_like(mean)), text, sigmas, list(seeds),
                                 torch.Tensor.backward, args)
    return losses, {n: [p.grad for p in trained[n]] for n in names}, (mean, text, sigmas, trained, args)


@pytest.mark.parametrize("name", PAIR_VARIANTS + ["train_image_real"])
def test_each_loss_is_the_mean_squared_error_computed_by_hand(tiny_pipe, command, name):
    scale = 1.0 if name == "train_image_real" else 1.5
    losses, _, (mean, text, sigmas, trained, args) = step_of(tiny_pipe, name, command, cfg_eta=3, noise_scales=scale)
    draw = torch.Generator().manual_seed(5)
    pair = int(torch.randint(2, (), generator=draw))
    sigma = torch.tensor([sigmas[int(torch.randint(0, 4, (), generator=draw))]])
    noise = torch.randn(16, 4, 4, generator=draw)[None]
    source, target = mean[pair, :1], mean[pair, 1:]
    s, e, eta = sigma.view(1, 1, 1, 1), scale * noise, 3
    preserved, flowing = source + s * e, (1 - s) * source + s * e
    both = {CONTENT: 1.0, SEMANTIC: 1.0}
    by_hand = {
        "train_image": {"content": ({CONTENT: 1.0}, preserved, e),
                        "semantic": (both, preserved, e + eta * (source - target))},
        "train_image_wocontent": {"semantic": ({SEMANTIC: 1.0}, preserved, e + eta * (source - target))},
        "train_image_wocfg": {"content": ({CONTENT: 1.0}, preserved, e), "semantic": (both, target + s * e, e)},
        "train_image_fm": {"content": ({CONTENT: 1.0}, flowing, e - source),
                           "semantic": (both, flowing, e - source + eta * (source - target))},
        "train_image_sliders": {"positive": ({SEMANTIC: 1.0}, (1 - s) * target + s * e, e - target),
                                "negative": ({SEMANTIC: -1.0}, flowing, e - source)},
        "train_image_real": {"content": ({CONTENT: 1.0}, flowing, e - source)},
    }[name]
    assert losses.keys() == by_hand.keys()
    for loss, (active, latents, velocity) in by_hand.items():
        adapters.activate(tiny_pipe.transformer, active)
        with torch.no_grad():
            prediction = flux.predict_velocity(tiny_pipe.transformer, latents, sigma, [], text, 3.5)
        torch.testing.assert_close(losses[loss], ((prediction - velocity) ** 2).mean())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_the_semantic_pass_never_reaches_the_content_lora(tiny_pipe, command, checkpointing):
    """The content LoRA's gradients of a whole step are those of its own pass alone, and likewise the semantic's."""
    if checkpointing:
        tiny_pipe.transformer.enable_gradient_checkpointing()
    _, gradients, (mean, text, sigmas, trained, args) = step_of(tiny_pipe, "train_image", command)
    draw = torch.Generator().manual_seed(5)
    pair = int(torch.randint(2, (), generator=draw))
    sigma = torch.tensor([sigmas[int(torch.randint(0, 4, (), generator=draw))]])
    noise = torch.randn(16, 4, 4, generator=draw)[None]
    source, target = mean[pair, :1], mean[pair, 1:]
    tiny_pipe.transformer.disable_gradient_checkpointing()
    for each in pair_passes("full", source, target, sigma, noise, 1.0, args.cfg_eta):
        adapters.activate(tiny_pipe.transformer, each.active, trained[each.learns])
        prediction = flux.predict_velocity(tiny_pipe.transformer, each.latents, sigma, [], text, 3.5)
        alone = torch.autograd.grad(F.mse_loss(prediction, each.target), trained[each.learns])
        for gradient, expected in zip(gradients[each.learns], alone, strict=True):
            torch.testing.assert_close(gradient, expected)
            assert gradient.abs().max() > 0


@pytest.mark.parametrize("method", ["xattn", "xattn-strict"])
def test_methods_other_than_full_train_a_alone_over_orthonormal_columns(tiny_pipe, command, method):
    _, gradients, (*_, trained, _) = step_of(tiny_pipe, "train_image_wocontent", command, train_method=method)
    assert all(gradient is not None for gradient in gradients[SEMANTIC])
    for key, parameter in tiny_pipe.transformer.named_parameters():
        if "lora_B" in key:
            assert parameter.grad is None
            torch.testing.assert_close(parameter.T @ parameter, torch.eye(2))
            assert method == "xattn" or key.rpartition(".lora_B")[0].endswith(("to_k", "to_v", "k_proj", "v_proj"))


def test_a_fresh_lora_changes_nothing(tiny_pipe):
    z, text = torch.randn(1, 16, 4, 4), flux.TextEmbeds(torch.randn(1, 8, 16), torch.randn(1, 16))
    with torch.no_grad():
        base = sampling.predict(tiny_pipe, z, 0.5, text, 3.5)
        for i, method in enumerate(adapters.METHODS):
            adapters.attach(tiny_pipe.transformer, [f"lora{i}"], 2, 1.0, method)
            adapters.reset(tiny_pipe.transformer, [f"lora{i}"], method, [i])
            adapters.activate(tiny_pipe.transformer, {f"lora{i}": 1.0})
            assert torch.equal(sampling.predict(tiny_pipe, z, 0.5, text, 3.5), base), method


def test_on_flux_the_lora_is_on_266_layers():
    from utils.memory import KONTEXT, meta_transformer

    layers = adapters.LAYERS
    parameters = lora.attach(meta_transformer(KONTEXT), 16, 1.0, layers=layers, adapter=SEMANTIC)
    assert len(parameters) == 2 * 266 and sum(p.numel() for p in parameters) == 26_148_864


# --- runs


@pytest.mark.parametrize("name", [*PAIR_VARIANTS, "train_image_real", "slider_text"])
def test_a_resumed_run_equals_a_straight_run_to_the_bit(command, tmp_path, sigterm_in_step, name):
    given = {"python_name": name, "image_ids": "a" if name == "train_image_real" else None, "train_count": 2,
             "gradient_accumulation_steps": 2, "train_batch_size": 2, "vae_encode_mode": "sample"}
    if name == "slider_text":
        given |= {"target_prompt": "a", "positive_prompt": "b", "negative_prompt": "c", "train_method": "xattn"}
    assert not run_training(command(**given))
    undo = sigterm_in_step(train, 5)  # in the middle of the third step of the first version
    again = given | {"output_folder": tmp_path / "again"}
    assert run_training(command(**again)) == 128 + 15
    undo()
    assert not run_training(command(**again, resume_from_checkpoint="latest"))
    straight, resumed = lora_files(tmp_path / "models"), lora_files(tmp_path / "again")
    resumed = {key: value for key, value in resumed.items() if "3epoch" not in key}  # where it was stopped
    assert_equal(straight, resumed)
    assert len(straight) == 2 * len(adapters_of(VARIANTS[name]))  # of versions in folders of their own, the last ones


def test_two_processes_train_on_the_same_numbers_as_one_with_the_whole_batch(command, tmp_path):
    run_on_two_processes("-m", "recipes.pairedit.train",
                         *command(gradient_accumulation_steps=2, output_folder=tmp_path / "two"))
    run_training(command(train_batch_size=2, gradient_accumulation_steps=2, output_folder=tmp_path / "one"))
    one, two = lora_files(tmp_path / "one"), lora_files(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 4
    for name in one:
        assert all(torch.allclose(one[name][key], two[name][key], atol=2e-6) for key in one[name])
    state = json.loads(next((tmp_path / "two").rglob("checkpoint-4/state.json")).read_text())
    assert state["identity"]["processes"] == 2


def test_versions_noise_scales_and_datasets_are_runs_of_their_own(command, tmp_path, datasets):
    shutil.copytree(datasets / "warm", datasets / "cold", dirs_exist_ok=True)
    run_training(command(datasets=["warm", "cold"], noise_scales=["1", "2.5"], train_start=3, train_count=2,
                         train_iteration=2))
    folders = sorted(path.name for path in (tmp_path / "models").glob("*/*"))
    assert folders == sorted(f"{name}_vtrain_image_4.0eta_{scale}ns_full_base_v{version}" for name in ("warm", "cold")
                             for scale in ("1.0", "2.5") for version in (3, 4))
    of = "warm_vtrain_image_4.0eta_{0}ns_full_base_v{1}/warm_4.0eta_{0}ns_4inf_2epoch.safetensors"
    first, second, other = (load_file(tmp_path / "models" / "warm" / of.format(scale, version))
                            for scale, version in (("1.0", 3), ("1.0", 4), ("2.5", 3)))
    key = next(iter(first))
    assert not torch.equal(first[key], second[key]) and not torch.equal(first[key], other[key])


def test_a_second_run_never_writes_over_the_first(command):
    run_training(command(train_iteration=2))
    with pytest.raises(ValueError, match="holds an earlier run; add --resume_from_checkpoint latest"):
        run_training(command(train_iteration=2))


def test_a_finished_run_is_left_alone_when_resumed(command, tmp_path, capsys):
    run_training(command(train_iteration=2))
    told = read_summary(capsys.readouterr().out)
    assert [Path(told[name]).stat().st_size > 0 for name in ("slider", "content LoRA")] == [True, True]
    words = shlex.split(told["here"])
    assert words[:3] == ["python", "-m", "recipes.pairedit.generate"]
    assert generate.parse_args(words[3:]).trained_lora_path == told["slider"]
    before = {path: path.read_bytes() for path in (tmp_path / "models").rglob("*") if path.is_file()}
    run_training(command(train_iteration=2, resume_from_checkpoint="latest"))
    assert "is there already" in capsys.readouterr().out
    assert before == {path: path.read_bytes() for path in (tmp_path / "models").rglob("*") if path.is_file()}


def test_two_values_that_round_alike_are_two_loras(command, tmp_path):
    run_training(command(noise_scales=["1", "1.04"], train_iteration=1))
    assert len(list((tmp_path / "models" / "warm").iterdir())) == 2
    with pytest.raises(ValueError, match="a value is given twice"):
        run_training(command(noise_scales=["2", "2.0"]))


@pytest.mark.parametrize("changed", [{"seed": 4}, {"learning_rate": 0.1}, {"train_prompt": "cold"}])
def test_nothing_is_resumed_or_called_finished_with_other_options(command, tmp_path, changed):
    run_training(command(train_iteration=2))
    before = {path: path.read_bytes() for path in (tmp_path / "models").rglob("*epoch*")}
    for iterations in (2, 4):
        with pytest.raises(ValueError, match="trained with other options .*(seed|learning_rate|prompt)"):
            run_training(command(train_iteration=iterations, resume_from_checkpoint="latest", **changed))
    next((tmp_path / "models").rglob("state.safetensors")).write_bytes(b"broken")
    with pytest.raises(ValueError, match="trained with other options"):
        run_training(command(train_iteration=4, resume_from_checkpoint="latest", **changed))
    assert before == {path: path.read_bytes() for path in (tmp_path / "models").rglob("*epoch*")}


@pytest.fixture
def other_pairs(datasets, tmp_path):
    """The datasets with one more bright pixel in a target."""
    shutil.copytree(datasets, tmp_path / "other_pairs")
    path = tmp_path / "other_pairs" / "warm" / "target" / "b.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[20, 20] = 255
    Image.fromarray(pixels).save(path)
    return tmp_path / "other_pairs"


def test_a_lora_of_other_pairs_is_neither_finished_nor_written_over(command, tmp_path, other_pairs):
    run_training(command(train_iteration=2))
    before = {path: path.read_bytes() for path in (tmp_path / "models").rglob("*epoch*")}
    shutil.rmtree(next((tmp_path / "models").rglob("checkpoint-2")))
    for iterations in (2, 4):
        with pytest.raises(ValueError, match=r"trained with other options \(images\)"):
            run_training(command(train_iteration=iterations, datasets_folder=other_pairs,
                                 resume_from_checkpoint="latest"))
    assert before == {path: path.read_bytes() for path in (tmp_path / "models").rglob("*epoch*")}


def test_a_lora_that_states_no_images_is_resumed_but_not_without_its_checkpoint(command, tmp_path, monkeypatch):
    save = adapters.save
    monkeypatch.setattr(adapters, "save", lambda model, name, path, settings: save(
        model, name, path, {key: value for key, value in settings.items() if key != "images"}))
    run_training(command(train_iteration=2))
    monkeypatch.undo()
    run_training(command(train_iteration=4, resume_from_checkpoint="latest"))
    before = {path: path.read_bytes() for path in (tmp_path / "models").rglob("*epoch*")}
    shutil.rmtree(next((tmp_path / "models").rglob("checkpoint-4")))
    with pytest.raises(ValueError, match="2epoch.safetensors is of an earlier run without a sound checkpoint"):
        run_training(command(train_iteration=6, resume_from_checkpoint="latest"))
    assert before == {path: path.read_bytes() for path in (tmp_path / "models").rglob("*epoch*")}


@pytest.fixture
def no_network_loads(monkeypatch):
    """no_network_loads(): from here on the text encoders and the transformer must stay where they are."""
    def forbid():
        for name in ("encode_prompts", "load_models"):
            monkeypatch.setattr(flux, name, lambda *args, **where: pytest.fail("a network was loaded"))
    return forbid


def test_what_earlier_runs_say_is_asked_before_any_model_loads(command, no_network_loads, capsys):
    run_training(command(train_iteration=2, train_count=2))
    no_network_loads()
    run_training(command(train_iteration=2, train_count=2, resume_from_checkpoint="latest"))
    assert capsys.readouterr().out.count("is there already") == 2
    with pytest.raises(ValueError, match="trained with other options"):
        run_training(command(train_iteration=2, train_start=2, train_count=2, seed=4, resume_from_checkpoint="latest"))
    with pytest.raises(ValueError, match="it differs in adam_epsilon"):
        run_training(command(train_iteration=4, adam_epsilon=1e-3, resume_from_checkpoint="latest"))


def test_where_the_slider_is_the_content_lora_is_too(command, tmp_path, monkeypatch):
    """The slider is written last: killed in between, the run is not taken for finished."""
    save, written = adapters.save, []

    def save_one(model, name, path, settings):
        if written and path.parent == written[0].parent:
            raise KeyboardInterrupt
        written.append(path)
        return save(model, name, path, settings)

    monkeypatch.setattr(adapters, "save", save_one)
    with pytest.raises(KeyboardInterrupt):
        run_training(command(train_iteration=2))
    monkeypatch.setattr(adapters, "save", save)
    left = [path.name for path in (tmp_path / "models").rglob("*epoch*")]
    assert left == ["warm_4.0eta_1.0ns_4inf_2epoch_0.safetensors"]
    run_training(command(train_iteration=2, resume_from_checkpoint="latest"))
    assert len(list((tmp_path / "models").rglob("*epoch*"))) == 2


def test_fewer_steps_than_were_made_are_refused(command):
    run_training(command(train_iteration=4))
    with pytest.raises(ValueError, match="is at step 4 already, and this command asks for 3"):
        run_training(command(train_iteration=3, resume_from_checkpoint="latest"))


@pytest.mark.parametrize("options", [{"memory": "offload"}, {"memory": "full"}, {"gradient_checkpointing": ""}])
def test_placement_changes_no_bit_of_the_loras(command, tmp_path, options):
    run_training(command(train_iteration=2, train_count=2))
    words = [word for word in command(train_iteration=2, train_count=2, output_folder=tmp_path / "placed", **options)
             if word != ""]
    run_training(words)
    one, two = lora_files(tmp_path / "models"), lora_files(tmp_path / "placed")
    assert_equal(one, two)


def test_orthonormal_columns_stay_so_at_the_full_rank_and_a_larger_rank_is_refused(command, tmp_path):
    run_training(command(train_method="xattn", rank=32, train_iteration=2, python_name="train_image_wocontent"))
    tensors = load_file(next((tmp_path / "models").rglob("*_2epoch.safetensors")))
    for key in (key for key in tensors if "lora_B" in key):
        torch.testing.assert_close(tensors[key].T @ tensors[key], torch.eye(32))
    with pytest.raises(ValueError, match="--rank 64: --train_method xattn takes orthonormal columns, at most 32"):
        run_training(command(train_method="xattn", rank=64, output_folder=tmp_path / "other"))


@pytest.mark.parametrize(("option", "value"), [
    ("cfg_eta", 2), ("noise_scales", 2), ("start_step", 2), ("end_step", 1), ("train_prompt", "warm"), ("seed", 4),
    ("guidance_scale", 1), ("train_method", "xattn"), ("rank", 4), ("lora_alpha", 4), ("learning_rate", 1e-3),
    ("fm_target", "noise"), ("resolution", 48), ("vae_encode_mode", "sample"), ("num_inference_steps", 5),
    ("train_batch_size", 2), ("gradient_accumulation_steps", 2), ("max_grad_norm", 0.01), ("lr_scheduler", "cosine"),
    ("adam_weight_decay", 0.5),
])
def test_every_training_option_changes_the_lora(command, tmp_path, option, value):
    common = {"train_iteration": 2, "python_name": "train_image_fm", "lr_warmup_steps": 0}
    run_training(command(**common))
    run_training(command(**common | {option: value, "output_folder": tmp_path / "other"}))
    one, two = (load_file(next(folder.rglob("*_2epoch.safetensors"))) for folder in (tmp_path / "models",
                                                                                     tmp_path / "other"))
    assert any(one[key].shape != two[key].shape or not torch.equal(one[key], two[key]) for key in one.keys() & two)


def test_the_lora_file_tells_sampling_what_it_was_trained_with(command, tmp_path):
    run_training(command(train_iteration=2, guidance_scale=2.5, train_prompt="a face"))
    file = next((tmp_path / "models").rglob("*_2epoch.safetensors"))
    settings = lora.read_settings(file)
    assert (settings["guidance_scale"], settings["prompt"], settings["references"]) == (2.5, "a face", 0)
    assert settings["slider"]["cfg_eta"] == 4 and settings["slider"]["resolution"] == SIDE


def test_stock_flux_pipeline_reads_the_slider_and_paints_as_we_do(command, tmp_path, tiny_model):
    """diffusers' own FluxPipeline with the LoRA active all along equals the slide with nothing skipped."""
    from diffusers import FluxPipeline

    run_training(command(train_iteration=2, learning_rate=0.05))
    file = next((tmp_path / "models").rglob("*_2epoch.safetensors"))
    stock = FluxPipeline.from_pretrained(tiny_model)
    stock.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="slider")
    stock.set_adapters("slider", 0.7)
    noise = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    made = stock("a face", height=SIDE, width=SIDE, num_inference_steps=4, guidance_scale=3.5, output_type="latent",
                 max_sequence_length=8, latents=flux.pack(noise)).images
    pipe = flux.load_models(tiny_model, "cpu", torch.float32)
    adapters.load(pipe, file, SEMANTIC)
    text = flux.encode_prompts(tiny_model, ["a face"], "cpu", torch.float32, 8)["a face"]
    sigmas = restore.noise_levels(pipe.vae, pipe.scheduler, 4, SIDE, SIDE)
    ours = sampling.slide(pipe, noise, sigmas, text, 3.5, [0, 0.7], start_index=0)
    torch.testing.assert_close(flux.pack(ours[1]), made, rtol=1e-4, atol=1e-5)
    assert not torch.equal(ours[0], ours[1])


# --- sampling


@pytest.fixture
def slid(tiny_pipe):
    """(pipe with random content and semantic LoRAs, start, sigmas, text)."""
    names = [CONTENT, SEMANTIC]
    adapters.attach(tiny_pipe.transformer, names, 2, 2.0, "full")
    for i, parameter in enumerate(p for n, p in tiny_pipe.transformer.named_parameters() if "lora_" in n):
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    text = flux.TextEmbeds(torch.randn(1, 8, 16), torch.randn(1, 16))
    sigmas = restore.noise_levels(tiny_pipe.vae, tiny_pipe.scheduler, 4, SIDE, SIDE)
    return tiny_pipe, torch.randn(2, 16, 4, 4), sigmas, text


def walk(pipe, z, sigmas, text, velocity):
    with torch.no_grad():
        for i in range(len(sigmas) - 1):
            z = z + (sigmas[i + 1] - sigmas[i]) * velocity(z, i)
    return z


def test_a_slide_equals_one_walk_for_every_weight_with_the_lora_from_its_step_on(slid):
    pipe, start, sigmas, text = slid
    made = sampling.slide(pipe, start, sigmas, text, 3.5, [0, 0.5, 1.2], start_index=2)
    for weight, result in zip([0, 0.5, 1.2], made, strict=True):
        def velocity(z, i, weight=weight):
            adapters.activate(pipe.transformer, {SEMANTIC: weight} if weight and i >= 2 else {})
            return sampling.predict(pipe, z, sigmas[i], text, 3.5)
        torch.testing.assert_close(result, walk(pipe, start, sigmas, text, velocity))
    assert (made[1] - made[0]).abs().max() > 1e-3
    late = sampling.slide(pipe, start, sigmas, text, 3.5, [0, 1.0], start_index=4)
    assert torch.equal(late[0], late[1])


@pytest.mark.parametrize("mix", ["replace", "add"])
def test_an_edit_is_the_content_velocity_moved_towards_the_semantic_one(slid, mix):
    pipe, start, sigmas, text = slid
    made = sampling.edit(pipe, start, sigmas, text, 3.5, [0, 0.8], 1, mix, 0.75)

    def velocity(z, i, weight):
        adapters.activate(pipe.transformer, {CONTENT: 1.0})
        content = sampling.predict(pipe, z, sigmas[i], text, 3.5)
        if not weight or i < 1:
            return content
        adapters.activate(pipe.transformer, {SEMANTIC: weight} | ({CONTENT: 1.0} if mix == "add" else {}))
        return 0.25 * content + 0.75 * sampling.predict(pipe, z, sigmas[i], text, 3.5)

    for weight, result in zip([0, 0.8], made, strict=True):
        expected = walk(pipe, start, sigmas, text, lambda z, i, weight=weight: velocity(z, i, weight))
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_the_schedule_is_stock_flux_own(tiny_pipe):
    """mu 0.63 at 1024 tokens: sigma 0.772, 0.653 and 0.065 at indices 10, 14 and 27 of 28 (the spec's figures)."""
    sigmas = restore.noise_levels(tiny_pipe.vae, tiny_pipe.scheduler, 28, 512, 512)
    assert [sigmas[k] for k in (0, 10, 14, 27)] == pytest.approx([1.0, 0.772, 0.653, 0.065], abs=6e-4)


# --- programs


def test_generation_writes_a_file_for_every_seed_and_scale_and_one_noise_serves_all_scales(command, tmp_path):
    run_training(command(train_iteration=2))
    generate.main(generate.parse_args([str(word) for word in command(train_iteration=2, skips=["1", "2"],
                                                                     start_seed_gen=7, prompt="image of a person")]))
    folder = tmp_path / "images" / "warm" / "warm_vtrain_image_4.0eta_1.0ns_full_base_v1" / "origin"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    tail = "image_of_a_person"
    assert names == {f"{seed}/{seed}_warm_skip{skip}_2epoch_scale{scale:.2f}_{tail}.png" for seed in (7, 8)
                     for skip in (1, 2) for scale in (0, 0.5, 1)} | {
        f"{seed}_warm_skip{skip}_2epoch_0.00-1.00_{tail}.jpg" for seed in (7, 8) for skip in (1, 2)} | {
        "settings_2epoch.json"}

    def pixels(seed, skip, scale):
        return np.asarray(Image.open(folder / f"{seed}/{seed}_warm_skip{skip}_2epoch_scale{scale:.2f}_{tail}.png"))

    assert np.array_equal(pixels(7, 1, 0), pixels(7, 2, 0)) and not np.array_equal(pixels(7, 1, 0), pixels(8, 1, 0))


def test_the_command_line_goes_before_what_the_lora_file_stores_and_that_before_the_config(command, tmp_path, capsys):
    run_training(command(train_iteration=2))
    config = tmp_path / "c.yaml"
    config.write_text("guidance_scale: 9\nnum_inference_steps: 9\n")
    words = [str(word) for word in command(train_iteration=2, num_inference_steps=None, config=config)]
    file = next((tmp_path / "models").rglob("*_2epoch.safetensors"))
    args = generate.parse_args(words)
    assert adapters.read_settings(file, args) == {
        "guidance_scale": 3.5, "num_inference_steps": 4, "max_sequence_length": 8, "resolution": SIDE}
    args = generate.parse_args([*words, "--guidance_scale=2"])
    assert adapters.read_settings(file, args)["guidance_scale"] == 2
    assert "was trained with --guidance_scale 3.5; here it is 2" in capsys.readouterr().out
    args.skips = [3]  # of 4 steps none is left
    with pytest.raises(ValueError, match="--skips 3: give -1 to 2, or the slider acts in none of the 4 steps"):
        adapters.read_settings(file, args)


def test_a_long_prompt_of_any_script_is_a_file_name(tmp_path):
    for prompt in ("一" * 200, "a/b\\c:d*" * 40, ""):
        path = pictures.write_slide(tmp_path, "warm", 1, 0, 2, [0.0], torch.zeros(1, 3, 8, 8), prompt)
        assert path.is_file() and len(path.name.encode()) < 200
    assert pictures.file_stem("a cat, " * 20 + "asleep") != pictures.file_stem("a cat, " * 20 + "awake")


def test_every_prompt_has_a_file_name_of_its_own_and_a_plain_one_that_of_the_original():
    assert pictures.file_stem("image of a person") == "image_of_a_person" and pictures.file_stem("") == ""
    prompts = ["a cat", "a cat?", "a cat!", "a, cat", "a_cat", "a cat.", "a  cat", "?", "!", ""]
    assert len({pictures.file_stem(prompt) for prompt in prompts}) == len(prompts)


def test_generation_adds_seeds_and_epochs_to_a_folder_and_refuses_to_write_over_another_runs_images(command, tmp_path):
    run_training(command(train_iteration=2, save_per_steps=1))

    def run_generation(**changes):
        words = command(**{"train_iteration": 2, "prompt": "image of a person", "count_gen": 1, **changes})
        generate.main(generate.parse_args([str(word) for word in words]))

    for changes in ({}, {}, {"start_seed_gen": 9}, {"train_iteration": 1}):
        run_generation(**changes)
    earlier = {path: path.read_bytes() for path in (tmp_path / "images").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"origin holds images that were made in another way \(stored\); give another"):
        run_generation(guidance_scale=2)
    of_step_1, of_step_2 = sorted((tmp_path / "models").rglob("*epoch.safetensors"))
    shutil.copy(of_step_1, of_step_2)
    with pytest.raises(ValueError, match=r"made in another way \(loras\)"):
        run_generation()
    assert {path: path.read_bytes() for path in (tmp_path / "images").rglob("*") if path.is_file()} == earlier


def test_prompts_come_from_a_file_and_seeds_from_chance(command, tmp_path):
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("- a cat\n- a dog\n- a cow\n")
    words = command(use_prompts_file=1, prompts_file=prompts, use_random_seed=1, count_gen=40)
    args = generate.parse_args([str(word) for word in words])
    seeds = options.choose_seeds(args)
    assert len(set(seeds)) == 40 and max(seeds) < 2**15 and max(seeds) > 31  # the original's 2 * 15 drew from 31
    chosen = options.choose_prompts(args, 0, seeds)
    assert set(chosen) == {"a cat", "a dog", "a cow"} and chosen == options.choose_prompts(args, 0, seeds)
    args.prompts_file = ["prompts-person.yaml"]
    assert all(prompt.endswith("person") for prompt in options.choose_prompts(args, 5, seeds))


def test_real_images_are_trained_and_edited(command, tmp_path):
    run_training(command(train_iteration=2, learning_rate=0.05))
    semantic = next((tmp_path / "models").rglob("*_2epoch.safetensors"))
    real = {"python_name": "train_image_real", "image_ids": ["a", "b"], "train_iteration": 2, "count_gen": 1,
            "semantic_lora_path": semantic}
    run_training(command(**real))
    generate_real_image.main(generate_real_image.parse_args([str(word) for word in command(**real, skips=0)]))
    folder = tmp_path / "images" / "warm" / "warm_a_vtrain_image_real_base_v1" / semantic.stem
    scales = sorted((folder / "6000").glob("*.png"))
    assert len(scales) == 3 and len(list(folder.glob("*.jpg"))) == 1
    images = [np.asarray(Image.open(path)).astype(int) for path in scales]
    assert not np.array_equal(images[0], images[2])
    with pytest.raises(ValueError, match="--start_sigma 0.05: no step is left; give 0.345 or more"):
        generate_real_image.main(generate_real_image.parse_args([str(word) for word in command(
            **real, skips=0, start_sigma=0.05, output_folder_gen=tmp_path / "none")]))
    low = command(**real, skips=0, start_sigma=0.35, output_folder_gen=tmp_path / "low")
    generate_real_image.main(generate_real_image.parse_args([str(word) for word in low]))
    low_image = np.asarray(Image.open(sorted((tmp_path / "low").rglob("*scale0.00*.png"))[0]))
    pipe = flux.load_models(command()[1], "cpu", torch.float32)
    photograph = pairs.load_square(Path(command()[3]) / "warm/source/a.png", SIDE)
    latents = flux.encode(pipe.vae, photograph)
    ceiling = np.asarray(pictures.to_pil(flux.decode(pipe.vae, latents).detach()[0].clamp(-1, 1))).astype(int)
    assert np.abs(low_image - ceiling).mean() < np.abs(images[0] - ceiling).mean()


def run_edit(words):
    generate_real_image.main(generate_real_image.parse_args([str(word) for word in words]))


def test_a_real_image_takes_prompts_from_a_file_a_named_content_lora_and_seeds_in_batches(command, tmp_path, capsys):
    run_training(command(train_iteration=2))
    semantic = next((tmp_path / "models").rglob("*_2epoch.safetensors"))
    real = {"python_name": "train_image_real", "image_ids": "a", "train_iteration": 2, "num_inference_steps": 6}
    run_training(command(**real))
    content = shutil.copy(next((tmp_path / "models").rglob("warm_a_*_2epoch.safetensors")),
                          tmp_path / "content.safetensors")
    (tmp_path / "p.yaml").write_text("- a cat\n- a dog\n")
    real |= {"semantic_lora_path": semantic, "config_name": "none", "use_trained_lora_path": 1,
             "trained_lora_path": content, "use_prompts_file": 1, "prompts_file": tmp_path / "p.yaml", "count_gen": 6}
    for size in (1, 4):
        run_edit(command(**real, sample_batch_size=size, output_folder_gen=tmp_path / f"batches{size}"))
    folder = Path("warm", "a_content", semantic.stem)
    one, four = ({path.name: np.asarray(Image.open(path)).astype(int)
                  for path in (tmp_path / f"batches{size}" / folder).rglob("*scale*.png")} for size in (1, 4))
    assert one.keys() == four.keys() and len(one) == 18
    assert {name.partition("scale")[2][5:] for name in one} == {"a_cat.png", "a_dog.png"}
    assert all(np.abs(one[name] - four[name]).max() <= 1 for name in one)
    run_edit(command(**real | {"image_ids": "b", "count_gen": 1}, output_folder_gen=tmp_path / "batches1"))
    assert {path.name for path in (tmp_path / "batches1" / "warm").iterdir()} == {"a_content", "b_content"}
    with pytest.raises(ValueError, match="holds one image, and --image_ids and --datasets name 2; name one"):
        run_edit(command(**real | {"image_ids": ["a", "b"]}))
    with pytest.raises(ValueError, match="--prompts_file nowhere.yaml"):
        run_edit(command(**real | {"prompts_file": "nowhere.yaml"}))
    with pytest.raises(ValueError, match="--use_trained_lora_path 1 needs --trained_lora_path"):
        run_edit(command(**real | {"trained_lora_path": None}))


def test_the_semantic_lora_is_compared_with_the_settings_that_are_used(command, tmp_path, capsys):
    run_training(command(train_iteration=2))
    semantic = next((tmp_path / "models").rglob("*_2epoch.safetensors"))
    real = {"python_name": "train_image_real", "image_ids": ["a", "b"], "train_iteration": 2, "count_gen": 1,
            "semantic_lora_path": semantic, "skips": 4}  # of 6 steps, more than the semantic LoRA's 4 have
    run_training(command(**real | {"num_inference_steps": 6}))
    for file in (tmp_path / "models").rglob("warm_?_6inf*.safetensors"):
        file.rename(file.with_name(file.name.replace("6inf", "28inf")))  # as the options, which default to 28, name it
    capsys.readouterr()
    run_edit(command(**real | {"num_inference_steps": None}))
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [*(f"warm_{name}_28inf_2epoch.safetensors was trained with --num_inference_steps 6; that is "
                          "taken, not 28" for name in "ab"),
                        f"{semantic.name} was trained with --num_inference_steps 4; here it is 6"]


def test_what_cannot_be_generated_is_refused_before_any_network_loads(command, tmp_path, no_network_loads):
    real = {"python_name": "train_image_real", "image_ids": "a", "train_iteration": 2, "count_gen": 1}
    run_training(command(**real))
    content = next((tmp_path / "models").rglob("*_2epoch.safetensors"))
    foreign, junk = tmp_path / "foreign.safetensors", tmp_path / "junk.pt"
    lora.write_file(foreign, {key: value[:, :-1] if "lora_A" in key else value
                              for key, value in load_file(content).items()}, {"format": "pt"})
    junk.write_bytes(b"junk")
    no_network_loads()
    for file, message in ((foreign, "was it trained for another model"), (junk, "not a plain dict of weights")):
        with pytest.raises(ValueError, match=message):
            words = command(use_trained_lora_path=1, trained_lora_path=file)
            generate.main(generate.parse_args([str(word) for word in words]))
        with pytest.raises(ValueError, match=message):
            run_edit(command(**real, semantic_lora_path=file))
        with pytest.raises(ValueError, match=message):
            run_edit(command(**real, semantic_lora_path=content, use_trained_lora_path=1, trained_lora_path=file))
    with pytest.raises(ValueError, match="--start_sigma 0.05: no step is left"):
        run_edit(command(**real, semantic_lora_path=content, start_sigma=0.05))
    with pytest.raises(ValueError, match="needs multiples of 16 pixels"):
        run_edit(command(**real | {"resolution": 40}, semantic_lora_path=content))


def test_a_slider_of_the_original_is_imported_and_gives_the_same_velocity(tiny_pipe, tiny_model, tmp_path):
    transformer, state, rank = tiny_pipe.transformer, {}, 3
    z, text = torch.randn(1, 16, 4, 4), flux.TextEmbeds(torch.randn(1, 8, 16), torch.randn(1, 16))
    weights = {}
    for name, module in transformer.named_modules():
        if any(name.endswith(layer) for layer in adapters.LAYERS):
            down, up = torch.randn(rank, module.in_features), torch.randn(module.out_features, rank)
            key = "lora_unet_" + name.replace(".", "_")
            state |= {f"{key}.lora_down.weight": down.half(), f"{key}.lora_up.weight": up.half(),
                      f"{key}.alpha": torch.tensor(1.0)}
            weights[name] = up.half().float() @ down.half().float() / rank
    torch.save(state, tmp_path / "elf.pt")
    import_legacy.main(import_legacy.parse_args([
        str(tmp_path / "elf.pt"), "--output", str(tmp_path / "elf.safetensors"), "--pretrained_model_name_or_path",
        tiny_model]))
    results = []
    with torch.no_grad():
        for file in ("elf.pt", "elf.safetensors"):
            adapters.load(tiny_pipe, tmp_path / file, SEMANTIC)
            adapters.activate(transformer, {SEMANTIC: 0.5})
            results.append(sampling.predict(tiny_pipe, z, 0.5, text, 3.5))
        transformer.delete_adapters(SEMANTIC)
        transformer.unload_lora()
        for name, change in weights.items():
            transformer.get_submodule(name).weight += 0.5 * change
        expected = sampling.predict(tiny_pipe, z, 0.5, text, 3.5)
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


@pytest.mark.parametrize(("state", "message"), [
    ({"lora_unet_nowhere.lora_down.weight": torch.zeros(1, 1)}, "does not belong to this transformer"),
    ({}, "holds no LoRA weights"),
    ({"lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight": torch.zeros(1, 32)}, "without its partner"),
    ({"lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight": torch.zeros(1, 31),
      "lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight": torch.zeros(32, 1)}, "layer is 32 x 32"),
    ({"lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight": torch.full((1, 32), float("nan"))}, "holds NaN"),
    (Evil(), "nothing else is read from a .pt file"),
], ids=["foreign", "empty", "half", "shape", "nan", "code"])
def test_a_pt_file_that_does_not_fit_or_runs_code_is_refused_in_one_line(tiny_pipe, tmp_path, capsys, state, message):
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=message):
        adapters.load(tiny_pipe, tmp_path / "bad.pt", SEMANTIC)
    assert "ran" not in capsys.readouterr().out


# --- configs and names


def test_every_shipped_config_is_read_with_every_key_and_the_command_line_wins(tiny_model):
    configs = sorted(path.stem for path in options.CONFIGS.glob("*.yaml"))
    assert {"train_image", "train_image_real", "slider_text", "embedded"} <= set(configs)
    for name in configs:
        args = options.parse_pairedit_args("", ["--c", name, "--pretrained_model_name_or_path", tiny_model,
                                                f"--train_iteration={17}"])
        assert args.train_iteration == 17
        assert args.python_name == (name if name in VARIANTS else "train_image")


def test_variant_configs_differ_from_the_full_one_in_the_variant_alone():
    from omegaconf import OmegaConf

    full = OmegaConf.to_container(OmegaConf.load(options.CONFIGS / "train_image.yaml"))
    for name in PAIR_VARIANTS:
        assert OmegaConf.to_container(OmegaConf.load(options.CONFIGS / f"{name}.yaml")) == full | {"python_name": name}


def test_every_program_of_the_original_is_there_in_a_dozen_lines(command, monkeypatch):
    names = [*VARIANTS, "train_image_script", "train_image_real_script", "generate_image", "gen_image_script",
             "gen_real_image_script", "gen_image_real_script"]
    for name in names:
        lines = (RECIPE / f"{name}.py").read_text().splitlines()
        assert len(lines) <= 12
        assert name not in VARIANTS or any(f'"--python_name", "{name}"' in line for line in lines)
    assert gen_image_script.main is generate.main and gen_real_image_script.main is generate_real_image.main


def test_the_entry_points_words_win(command, monkeypatch):
    seen = {}
    monkeypatch.setattr("sys.argv", ["x", *[str(word) for word in command()]])
    with pytest.raises(SystemExit) as exit:
        options.run_as(lambda args: seen.update(vars(args)), train.parse_args, ["--python_name", "train_image_fm"])
    assert exit.value.code == 0 and seen["objective"] == "fm"


@pytest.mark.parametrize(("given", "message"), [
    ({"start_step": 3, "end_step": 1}, "--start_step 3, --end_step 1: give indices 0 to 3"),
    ({"end_step": 4}, "--end_step 4"),
    ({"cfg_eta": -1}, "--cfg_eta -1"),
    ({"noise_scales": 0}, "--noise_scales"),
    ({"scales": "0,much"}, "--scales 0,much: write numbers with commas"),
    ({"scales": "0,0.001,1"}, "two values are equal to two decimals"),
    ({"datasets": "/tmp/warm"}, "are parts of file names, not paths"),
    ({"python_name": "train_image_real", "image_ids": "a", "noise_scales": 2}, "--noise_scales: train_image_real has"),
    ({"lr_scheduler": "piecewise_constant"}, "needs --lr_step_rules"),
    ({"adam_beta1": 2}, "--adam_beta1 2"),
    ({"optimizer": "schedule_free", "lr_scheduler": "cosine"}, "replaces the schedule"),
    ({"max_sequence_length": 600}, "give 1 to 512"),
    ({"semantic_cfg_scale": "nan"}, "--semantic_cfg_scale nan: give a finite number"),
    ({"lora_alpha": 0}, "--lora_alpha"),
    ({"start_sigma": 0}, "--start_sigma"),
    ({"datasets": ["warm", "warm"]}, "a name is given twice"),
    ({"datasets": "nothing"}, "nothing.source: no such folder"),
    ({"c": "nothing"}, "--c nothing: config/ has no nothing.yaml; it has embedded"),
    ({"python_name": "train_image_real"}, "--image_ids: name the images"),
    ({"python_name": "train_image_real", "image_ids": "z"}, "--image_ids z: .* has no such image; it has a, b"),
    ({"python_name": "slider_text", "target_prompt": "a"}, "give one of each for each of the 1 --datasets"),
])
def test_bad_input_is_refused_before_any_model_loads(command, monkeypatch, given, message):
    monkeypatch.setattr(flux, "encode_prompts", lambda *args, **where: pytest.fail("a model was loaded"))
    with pytest.raises((ValueError, OSError), match=message):
        run_training(command(**given))


@pytest.mark.parametrize(("damage", "message"), [
    (lambda folder: (folder / "target/b.png").unlink(), "source/b.png has no partner of its name in target/"),
    (lambda folder: Image.new("RGB", (20, 20)).save(folder / "target/b.png"), "is 20x20, its source 48x40"),
    (lambda folder: (folder / "target/b.png").write_bytes(b"no image"), "target/b.png: not an image"),
    (lambda folder: [path.unlink() for path in folder.glob("*/*.png")], "no image"),
], ids=["alone", "size", "unreadable", "empty"])
def test_a_bad_pair_is_named_in_one_line(command, datasets, tmp_path, damage, message):
    shutil.copytree(datasets, tmp_path / "bad")
    damage(tmp_path / "bad" / "warm")
    with pytest.raises((ValueError, OSError), match=message):
        run_training(command(datasets_folder=tmp_path / "bad"))


def test_generation_refuses_what_it_cannot_use(command, tmp_path):
    def run_generate(**given):
        generate.main(generate.parse_args([str(word) for word in command(**given)]))

    with pytest.raises(ValueError, match="no such LoRA file"):
        run_generate()
    with pytest.raises(ValueError, match="--use_trained_lora_path 1 needs --trained_lora_path"):
        run_generate(use_trained_lora_path=1)
    with pytest.raises(ValueError, match="generate_real_image"):
        run_generate(python_name="train_image_real")
    with pytest.raises(ValueError, match="write a YAML list"):
        (tmp_path / "p.yaml").write_text("a: b\n")
        (tmp_path / "x.pt").write_bytes(b"")
        run_generate(use_trained_lora_path=1, trained_lora_path=tmp_path / "x.pt", use_prompts_file=1,
                     prompts_file=tmp_path / "p.yaml")
    with pytest.raises(ValueError, match="--semantic_lora_path"):
        generate_real_image.parse_args([str(w) for w in command(python_name="train_image_real", image_ids="a")])
    with pytest.raises(ValueError, match="content LoRA of train_image_real"):
        generate_real_image.parse_args([str(w) for w in command()])


def test_a_lora_of_another_model_is_refused(command, tmp_path, tiny_pipe):
    run_training(command(train_iteration=2))
    file = next((tmp_path / "models").rglob("*_2epoch.safetensors"))
    tensors = {key: value[:, :-1] if "lora_A" in key else value for key, value in load_file(file).items()}
    lora.write_file(tmp_path / "other.safetensors", tensors, {"format": "pt"})
    with pytest.raises(ValueError, match="was it trained for another model"):
        adapters.load(tiny_pipe, tmp_path / "other.safetensors", SEMANTIC)


def test_the_example_trains_measures_and_edits_photographs(tmp_path, monkeypatch, capsys):
    """The whole program at 32 px, 4 steps and one slider of each of two variants."""
    config = (options.CONFIGS / "embedded.yaml").read_text() + "num_inference_steps: 4\nattention_backend: native\n"
    for line in ("resolution: 96", "count_gen: 8", "skips: [10]", "scales: 0,0.2,0.4,0.6,0.8,1.0,1.2"):
        assert line in config
        config = config.replace(line, {"res": "resolution: 32", "cou": "count_gen: 2", "ski": "skips: [1]",
                                       "sca": "scales: 0,0.5,1"}[line[:3]])
    (tmp_path / "small.yaml").write_text(config)
    monkeypatch.setattr(example, "CONFIG", tmp_path / "small.yaml")
    monkeypatch.setattr(example, "REAL_OPTIONS", [*example.REAL_OPTIONS, "--train_iteration", "3", "--skips", "1"])
    evaluated, photographs = [], []
    monkeypatch.setattr(example.evaluate, "main", lambda args, run=example.evaluate.main: (
        evaluated.append(Path(args.images).name), run(args)))
    monkeypatch.setattr(example.generate_real_image, "main", lambda args, run=example.generate_real_image.main: (
        photographs.append(Path(args.semantic_lora_path).parent.name), run(args)))
    output = tmp_path / "out"
    example.main(example.parse_args(["--output", str(output), "--edits", "glow", "--train_iteration", "3", "--variants",
                                     "train_image", "train_image_sliders"]))
    table = json.loads((output / "table.json").read_text())
    assert [row["variant"] for row in table["table"]] == ["train_image", "train_image_sliders"]
    assert evaluated == [f"glow_v{name}_3.0eta_1.0ns_full_base_v1" for name in ("train_image", "train_image_sliders")]
    assert photographs == evaluated[:1]
    assert {row["photograph"] for row in table["real"]} == {"coffee", "flower"}
    assert all(len(row["share"]) == 3 and row["psnr_at_0"] > 5 for row in table["real"])
    assert (output / "real.png").is_file() and "glow, flower: PSNR at scale 0" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is not empty; name a new folder"):
        example.parse_args(["--output", str(output)])


def test_the_share_at_an_equal_strength_lies_between_two_scales(tmp_path):
    rows = [{"attribute_mean": a, "attribute_of_edit_mean": 1, "outside_change_mean": k, "gradient_correlation_mean": 1}
            for a, k in ((0, 0), (0.15, 0.1), (0.35, 0.3))]
    curve = {"measure": "edit_share", "linear": 0.9, "at_1": 0.5}
    for name, content in (("summary", rows), ("monotonicity", [curve | {"seed": "mean"}, curve | {"seed": 1}])):
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, content[0])
            writer.writeheader()
            writer.writerows(content)
    found = example.measure(tmp_path, "glow")
    assert found["kept"] == "outside_change" and found["kept_at"] == [pytest.approx(0.2), None] and found["rises"]
