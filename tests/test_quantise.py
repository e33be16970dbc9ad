"""8-bit and 4-bit bases: half the bytes or less, nearly the same gradients, the same LoRA file."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import PROJECT_ROOT, equal, take_gradients
from utils import flux, lora, offload, quantise
from utils.checkpointing import enable_checkpointing
from utils.offload import BlockOffload, ignore_frozen

PACKED = ["int8", "fp8"]
SCALE_BYTES = {"int8": 5, "fp8": 4}  # a row: an fp32 scale, and for int8 a zero point that is 0


def load(path, precision="bf16", dtype=torch.float32, **lora_options):
    """A transformer with a LoRA that does something, on a base of the given precision."""
    transformer = flux.load_models(path, "cpu", dtype, base_precision=precision).transformer
    lora.attach(transformer, 4, **lora_options)
    randomise(transformer)
    return transformer


def randomise(transformer):
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.parameters(transformer):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def predict(transformer, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    z, control = (torch.randn(1, 16, 4, 6, generator=generator) for _ in range(2))
    text = flux.TextEmbeds(torch.randn(1, 5, 16, generator=generator), torch.randn(1, 16, generator=generator))
    return flux.predict_velocity(transformer, z, torch.tensor([0.6]), control, text.to("cpu", dtype), 1.0)


def gradients(transformer, dtype=torch.float32):
    predict(transformer, dtype).float().square().mean().backward()
    return take_gradients(transformer)


def base_linears(transformer):
    """{name: linear layer} of all frozen ones, without the LoRA's."""
    return {name: layer for name, layer in lora.linear_layers(transformer).items() if not layer.weight.requires_grad}


# --- packing


@pytest.mark.parametrize("precision", PACKED)
def test_the_blocks_linears_take_a_byte_a_weight_and_the_rest_stays_as_it_is(tiny_model, precision):
    plain = base_linears(load(tiny_model, dtype=torch.bfloat16))
    packed = base_linears(load(tiny_model, precision, torch.bfloat16))
    assert packed.keys() == plain.keys()
    in_blocks = {name for name in plain if "transformer_blocks" in name}
    assert any("proj_out" in name for name in in_blocks) and "proj_out" in plain.keys() - in_blocks
    for name, layer in packed.items():
        if name in in_blocks:
            rows, columns = layer.weight.shape
            codes, *scales = offload.storages(layer.weight)
            assert codes.nbytes == rows * columns == plain[name].weight.nbytes / 2
            assert sum(part.nbytes for part in scales) == SCALE_BYTES[precision] * rows
            torch.testing.assert_close(layer.weight.dequantize(), plain[name].weight, rtol=0.07, atol=0.01)
        else:
            assert torch.equal(layer.weight, plain[name].weight)


@pytest.mark.parametrize("precision", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_gradients_point_where_those_of_the_plain_base_do(tiny_model, precision, dtype):
    plain, packed = (torch.cat([gradient.flatten() for gradient in gradients(load(tiny_model, kind, dtype), dtype)])
                     for kind in ("bf16", precision))
    assert torch.nn.functional.cosine_similarity(plain, packed, dim=0) > 0.99
    assert not torch.equal(plain, packed)


@pytest.mark.parametrize("precision", PACKED)
def test_training_on_a_packed_base_lowers_the_loss(tiny_model, precision):
    transformer = load(tiny_model, precision)
    base = [part for layer in base_linears(transformer).values() for part in offload.storages(layer.weight)]
    before = [part.clone() for part in base]
    goal = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(3))
    optimizer = torch.optim.AdamW(lora.parameters(transformer), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = (predict(transformer) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and losses == sorted(losses, reverse=True)
    assert equal(base, before)


def test_the_lora_file_does_not_depend_on_the_base(tiny_model, tmp_path):
    files = {}
    for precision in ("bf16", *PACKED):
        transformer = flux.load_models(tiny_model, "cpu", torch.float32, base_precision=precision).transformer
        lora.attach(transformer, 4)
        files[precision] = lora.save(transformer, tmp_path / precision, {}).read_bytes()
    assert files["int8"] == files["fp8"] == files["bf16"]
    transformer = load(tiny_model, "int8")
    path = lora.save(transformer, tmp_path / "trained", {})
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}
    pipe = flux.load_models(tiny_model, "cpu", torch.float32)
    lora.load(pipe, path)
    torch.testing.assert_close(predict(pipe.transformer), predict(transformer), rtol=0, atol=0.02)


# --- backward


@pytest.mark.parametrize("precision", PACKED)
def test_a_packed_layer_is_the_linear_layer_with_its_unpacked_weight(tiny_model, precision):
    layer = base_linears(load(tiny_model, precision))["transformer_blocks.0.attn.to_q"]
    found = []
    for run in (layer, lambda x: torch.nn.functional.linear(x, layer.weight.dequantize(), layer.bias)):
        x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(4), requires_grad=True)
        y = run(x)
        y.square().sum().backward()
        found.append((y, x.grad))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("precision", PACKED)
def test_no_unpacked_weight_is_saved_for_backward(tiny_model, precision):
    transformer = load(tiny_model, precision)
    shapes = {tuple(layer.weight.shape) for name, layer in base_linears(transformer).items() if "blocks" in name}
    shapes |= {shape[::-1] for shape in shapes}

    def unpacked():
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
            predict(transformer)
        lora_shapes = {tuple(p.shape) for p in lora.parameters(transformer)}
        return [tensor for tensor in saved if type(tensor) is torch.Tensor and tensor.itemsize > 1
                and tuple(tensor.shape) in shapes - lora_shapes]

    assert not unpacked()
    for layer in base_linears(transformer).values():
        layer.__dict__.pop("forward", None)  # torchao's own way
    assert unpacked()


@pytest.mark.parametrize("precision", PACKED)
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_offloaded_and_checkpointed_blocks_on_a_packed_base_have_the_same_gradients_to_the_bit(tiny_model, precision,
                                                                                               mode):
    expected = gradients(load(tiny_model, precision))
    transformer = load(tiny_model, precision)
    enable_checkpointing(transformer, mode)
    blocks = BlockOffload(transformer, "cpu")
    moved = sum(host.nbytes for host, _ in blocks.buffers.values())
    plain = sum(host.nbytes for host, _ in BlockOffload(load(tiny_model), "cpu").buffers.values())
    assert moved < 0.5 * plain  # codes and scales alone travel
    assert equal(gradients(transformer), expected) and equal(gradients(transformer), expected)


def test_a_block_on_a_packed_base_compiles_without_graph_breaks(tiny_model):
    expected, transformer = gradients(load(tiny_model, "fp8")), load(tiny_model, "fp8")
    block = transformer.single_transformer_blocks[0]
    block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    assert equal(gradients(transformer), expected)
    torch.compiler.reset()


def test_nf4_blocks_are_offloaded_with_the_same_gradients_to_the_bit(tiny_model):
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def nf4():
        """What diffusers makes of the blocks on a GPU."""
        transformer = flux.load_models(tiny_model, "cpu", torch.float32).transformer
        for name, layer in base_linears(transformer).items():
            if "transformer_blocks" in name:
                packed = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None,
                                                    compute_dtype=torch.float32, quant_type="nf4")
                packed.load_state_dict(layer.state_dict())
                transformer.set_submodule(name, packed.requires_grad_(False).to("cpu"))
        transformer.is_loaded_in_4bit = True
        lora.attach(transformer, 4)
        randomise(transformer)
        return transformer

    expected, transformer = gradients(nf4()), nf4()
    enable_checkpointing(transformer, "full")
    blocks = BlockOffload(transformer, "cpu")
    assert sum(host.nbytes for host, _ in blocks.buffers.values()) < 0.3 * sum(
        host.nbytes for host, _ in BlockOffload(load(tiny_model), "cpu").buffers.values())
    assert equal(gradients(transformer), expected) and equal(gradients(transformer), expected)


@pytest.mark.parametrize("precision", PACKED)
def test_dora_trains_on_a_packed_base(tiny_model, precision):
    found = gradients(load(tiny_model, precision, use_dora=True))
    assert all(torch.isfinite(gradient).all() for gradient in found) and any(gradient.any() for gradient in found)


@pytest.mark.parametrize("precision", PACKED)
def test_distributed_data_parallel_takes_a_packed_base_that_is_ignored(tiny_model, tmp_path, precision):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        transformer = load(tiny_model, precision)
        with pytest.raises((NotImplementedError, AssertionError)):  # torchao's tensors cannot be flattened
            torch.nn.parallel.DistributedDataParallel(transformer)
        expected = gradients(load(tiny_model, precision))
        ignore_frozen(transformer)
        predict(torch.nn.parallel.DistributedDataParallel(transformer)).square().mean().backward()
        assert equal([parameter.grad for parameter in lora.parameters(transformer)], expected)
    finally:
        torch.distributed.destroy_process_group()


# --- options


def options(**values):
    return SimpleNamespace(**({"base_precision": None, "bnb_quantization_config_path": None} | values))


def test_what_a_machine_without_cuda_cannot_do_is_refused_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--base_precision nf4: .*CUDA GPU only.*--base_precision int8"):
        quantise.check_quantisation_args(options(base_precision="nf4"))
    file = tmp_path / "nf4.json"
    file.write_text('{"load_in_4bit": true}')
    with pytest.raises(ValueError, match="--bnb_quantization_config_path: .*CUDA GPU only"):
        quantise.check_quantisation_args(options(bnb_quantization_config_path=str(file)))
    for precision in (None, "bf16", *PACKED):
        args = options(base_precision=precision)
        quantise.check_quantisation_args(args)
        assert args.bnb_options is None


def test_with_cuda_nf4_is_bitsandbytes_and_two_ways_of_quantising_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = options(base_precision="nf4")
    quantise.check_quantisation_args(args)
    config = quantise.pipeline_config("nf4", args.bnb_options, torch.bfloat16).quant_mapping["transformer"]
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype is torch.bfloat16
    file = tmp_path / "nf4.json"
    file.write_text('{"load_in_8bit": true}')
    args = options(bnb_quantization_config_path=str(file))
    quantise.check_quantisation_args(args)
    assert args.bnb_options == {"load_in_8bit": True}
    with pytest.raises(ValueError, match="--base_precision int8 and --bnb_quantization_config_path both quantise"):
        quantise.check_quantisation_args(options(base_precision="int8", bnb_quantization_config_path=str(file)))


def test_the_options_of_the_command_line_have_the_documented_choices(capsys):
    from utils.parse import make_parser

    parser = make_parser("")
    quantise.add_quantisation_args(parser)
    assert parser.parse_args([]).base_precision is None  # what --memory chooses
    for precision in ("bf16", "int8", "fp8", "nf4"):
        assert parser.parse_args(["--base_precision", precision]).base_precision == precision
    with pytest.raises(SystemExit):
        parser.parse_args(["--base_precision", "int2"])


def test_diffusers_import_of_torchao_says_nothing():
    done = subprocess.run([sys.executable, "-c", "import utils, diffusers.quantizers.auto"],
                          cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
