"""Block offload, checkpoint offload and selective checkpointing: the same gradients to the bit, in less memory."""

import contextlib
import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tests.conftest import equal, take_gradients
from utils import flux, lora, offload, speed
from utils.checkpointing import CHECKPOINTING, enable_checkpointing
from utils.offload import BlockOffload

SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def make_transformer(layers=2, single_layers=3, use_dora=False):
    """A frozen tiny transformer with a LoRA that does something."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=layers, num_single_layers=single_layers, num_attention_heads=2,
        attention_head_dim=16, axes_dims_rope=(4, 6, 6), joint_attention_dim=16, pooled_projection_dim=16,
        guidance_embeds=True).requires_grad_(False)
    lora.attach(transformer, 4, use_dora=use_dora)
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.parameters(transformer):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return transformer


def predict(transformer, seed=2):
    generator = torch.Generator().manual_seed(seed)
    z, control = (torch.randn(2, 16, 4, 6, generator=generator) for _ in range(2))
    text = flux.TextEmbeds(torch.randn(2, 5, 16, generator=generator), torch.randn(2, 16, generator=generator))
    return flux.predict_velocity(transformer, z, torch.tensor([0.6, 0.9]), control, text, 1.0)


def gradients(transformer, micro_steps=2):
    """LoRA gradients accumulated over differing batches; none are left in the model."""
    for seed in range(micro_steps):
        predict(transformer, seed).square().mean().backward()
    return take_gradients(transformer)


def blocks_of(transformer):
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def card_bytes(blocks):
    """Bytes of the block offload's buffers that are on the device now."""
    return sum(card.untyped_storage().nbytes() for _, card in blocks.buffers.values())


@pytest.fixture(scope="module")
def reference():
    transformer = make_transformer()
    return {"gradients": gradients(transformer), "prediction": predict(transformer).detach()}


# --- block offload


@pytest.mark.parametrize("resident", [0, 1, 4, 5])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_gradients_with_offloaded_blocks_are_the_same_to_the_bit_over_steps_and_accumulation(reference, mode, resident):
    transformer = make_transformer()
    enable_checkpointing(transformer, mode)
    BlockOffload(transformer, "cpu", resident)
    for _ in range(2):
        assert equal(gradients(transformer), reference["gradients"])
    with torch.no_grad():  # validation between steps
        for _ in range(2):
            assert torch.equal(predict(transformer), reference["prediction"])
    assert equal(gradients(transformer), reference["gradients"])


def test_two_graphs_in_one_backward_have_the_same_gradients():
    def both(transformer):
        (predict(transformer, 0).square().mean() + predict(transformer, 1).square().mean()).backward()
        return [parameter.grad for parameter in lora.parameters(transformer)]

    plain, offloaded = make_transformer(), make_transformer()
    enable_checkpointing(offloaded, "full")
    BlockOffload(offloaded, "cpu")
    assert equal(both(offloaded), both(plain))


@pytest.mark.parametrize("mode", ["none", "full"])
def test_at_most_two_blocks_are_on_the_device_and_each_one_when_it_computes(mode):
    transformer = make_transformer(3, 4)
    enable_checkpointing(transformer, mode)
    blocks = BlockOffload(transformer, "cpu")
    sizes = [host.nbytes for host, _ in blocks.buffers.values()]
    largest = max(a + b for a, b in zip(sizes, sizes[1:], strict=False))
    seen = {"forward": [], "backward": []}

    def look(phase, index):
        assert blocks.buffers[index][1].untyped_storage().nbytes() == sizes[index]
        assert card_bytes(blocks) <= largest
        seen[phase].append(index)

    for index, block in enumerate(blocks_of(transformer)):
        block.register_forward_pre_hook(lambda *_, i=index: look("forward", i))
        block.attn.to_q.lora_B["default"].weight.register_hook(lambda _, i=index: look("backward", i))
    gradients(transformer, 1)
    assert seen["forward"][:7] == list(range(7)) and seen["backward"] == list(range(7))[::-1]
    assert largest < sum(sizes) / 2


def test_a_step_copies_all_but_two_blocks_twice_and_never_back(monkeypatch):
    copies = []
    transformer = make_transformer(3, 4)
    enable_checkpointing(transformer, "full")
    blocks = BlockOffload(transformer, "cpu")
    host_before = [host.clone() for host, _ in blocks.buffers.values()]
    fetch = blocks.fetch
    monkeypatch.setattr(blocks, "fetch", lambda i: (i in blocks.present or copies.append(i), fetch(i)))
    gradients(transformer, 1)
    assert copies == [0, 1, 2, 3, 4, 5, 6, 4, 3, 2, 1, 0]
    copies.clear()
    gradients(transformer, 1)
    assert copies == [2, 3, 4, 5, 6, 4, 3, 2, 1, 0]  # a step starts where the last one ended
    copies.clear()
    with torch.no_grad():
        predict(transformer)
        predict(transformer)
    assert copies == [2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6, 0]  # without a graph the first comes after the last
    assert equal(host_before, [host for host, _ in blocks.buffers.values()])


def test_resident_blocks_stay_and_are_spread_evenly():
    transformer = make_transformer(3, 4)
    weights = [block.attn.to_q.base_layer.weight.detach().clone() for block in blocks_of(transformer)]
    blocks = BlockOffload(transformer, "cpu", resident=3)
    assert list(blocks.buffers) == [1, 3, 5, 6]
    for index in (0, 2, 4):
        assert torch.equal(blocks_of(transformer)[index].attn.to_q.base_layer.weight, weights[index])
    with pytest.raises(ValueError, match="8 blocks cannot stay on the GPU: the transformer has 7"):
        BlockOffload(make_transformer(3, 4), "cpu", resident=8)


def test_a_linear_layer_without_its_weights_raises_and_the_lora_stays():
    transformer = make_transformer()
    adapters = {id(p): p.data_ptr() for p in lora.parameters(transformer)}
    BlockOffload(transformer, "cpu")
    layer = transformer.single_transformer_blocks[1].attn.to_q
    with pytest.raises(RuntimeError, match="storage of size 0|not allocated"):
        torch.nn.functional.linear(torch.zeros(1, 32), layer.base_layer.weight)
    assert {id(p): p.data_ptr() for p in lora.parameters(transformer)} == adapters
    assert lora.state_dict(transformer)  # checkpoints and files are written while blocks are away


def test_without_the_hook_in_backward_the_weights_are_missing(monkeypatch):
    monkeypatch.setattr(BlockOffload, "watch", lambda *_: None)
    transformer = make_transformer()
    BlockOffload(transformer, "cpu")
    with pytest.raises(RuntimeError, match="storage of size 0|not allocated"):
        gradients(transformer, 1)


def test_dora_and_a_lora_in_the_last_blocks_alone_train_on_offloaded_blocks():
    for plain in (make_transformer(use_dora=True), make_transformer()):
        if not any("magnitude" in name for name, _ in plain.named_parameters()):
            for parameter in plain.transformer_blocks.parameters():
                parameter.requires_grad_(False)
        offloaded = copy.deepcopy(plain)
        BlockOffload(offloaded, "cpu")
        assert equal(gradients(offloaded), gradients(plain))
        assert equal(gradients(offloaded), gradients(plain))


def test_compiled_blocks_are_offloaded_without_graph_breaks(reference):
    transformer = make_transformer(1, 1)
    expected = gradients(make_transformer(1, 1))
    enable_checkpointing(transformer, "full")
    BlockOffload(transformer, "cpu")
    for block in blocks_of(transformer):
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    assert equal(gradients(transformer), expected)
    torch.compiler.reset()


def test_host_memory_is_unlocked_when_it_is_freed(monkeypatch):
    calls = []
    cudart = SimpleNamespace(cudaHostRegister=lambda pointer, size, flags: calls.append(("lock", pointer)) or 0,
                             cudaHostUnregister=lambda pointer: calls.append(("unlock", pointer)))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    memory = offload.page_locked(1000, torch.device("cuda"))
    view, pointer = memory[10:20], memory.data_ptr()
    del memory
    gc.collect()
    assert calls == [("lock", pointer)]  # a view of it lives
    del view
    gc.collect()
    assert calls == [("lock", pointer), ("unlock", pointer)]
    offload.page_locked(8, torch.device("cpu"))
    cudart.cudaHostRegister = lambda *_: 2
    with pytest.raises(ValueError, match="refuses to lock enough host memory"):
        offload.page_locked(1000, torch.device("cuda"))
    gc.collect()
    assert len(calls) == 2  # what was not locked is not unlocked


def test_distributed_data_parallel_leaves_absent_weights_alone(reference, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(torch.distributed.utils, "_sync_params_and_buffers",
                        lambda group, tensors, *_: sent.extend(tensors))
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        transformer = make_transformer()
        enable_checkpointing(transformer, "full")
        BlockOffload(transformer, "cpu")
        parallel = torch.nn.parallel.DistributedDataParallel(transformer)
        for seed in range(2):
            predict(parallel, seed).square().mean().backward()
        assert equal(sent, [parameter.detach() for parameter in lora.parameters(transformer)])
        assert equal([p.grad for p in lora.parameters(transformer)], reference["gradients"])
    finally:
        torch.distributed.destroy_process_group()


# --- streams: a device whose second stream does its copies as late as events allow


class LateDevice:
    """Stands for torch.cuda. Copies on a side stream are put off until the computing stream waits for them, and what
    they are to fill holds NaN until then: a wait left out shows. `log` is the order of things."""

    def __init__(self):
        self.log, self.compute, self.active = [], LateStream(self, "compute"), None

    def Stream(self):
        return LateStream(self, "side")

    def Event(self):
        return LateEvent(self)

    def current_stream(self):
        return self.active or self.compute

    @contextlib.contextmanager
    def stream(self, stream):
        self.active = stream
        with PutOff(stream):
            yield
        self.active = None


class LateStream:
    def __init__(self, device, name):
        self.device, self.name, self.queue, self.done, self.may_write = device, name, [], 0, False

    def wait_stream(self, other):
        self.device.log.append(f"{self.name} waits for {other.name}")
        self.may_write = True


class LateEvent:
    def __init__(self, device):
        self.device = device

    def record(self, stream):
        self.stream, self.position = stream, len(stream.queue)

    def wait(self):
        while self.stream.done < self.position:
            self.stream.queue[self.stream.done]()
            self.stream.done += 1


class PutOff(TorchDispatchMode):
    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            target, source = args[:2]
            assert self.stream.may_write, "the side stream writes into memory that the computing stream may still read"
            self.stream.may_write = False
            target.detach().view(torch.uint8).fill_(255)  # NaN in every float dtype
        elif func is torch.ops.aten._to_copy.default:
            source = args[0]
            target = torch.full_like(source, torch.nan)
        else:
            return func(*args, **(kwargs or {}))
        self.stream.device.log.append("copy")

        def finish():
            assert target.untyped_storage().nbytes(), "copied into memory that was let go of"
            target.detach().copy_(source)

        self.stream.queue.append(finish)
        return target


@pytest.fixture
def late_device(monkeypatch):
    device = LateDevice()
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    monkeypatch.setattr(offload, "LEAST_BYTES", 512)
    return device


def test_computation_waits_for_its_copies_and_copies_for_the_memory(late_device, reference):
    transformer = make_transformer()
    enable_checkpointing(transformer, "offload")
    BlockOffload(transformer, "cpu")
    for _ in range(2):
        assert equal(gradients(transformer), reference["gradients"])
    assert late_device.log.count("copy") > 40


def test_a_block_that_was_fetched_and_not_used_goes_after_its_copy_has_come(late_device):
    blocks = BlockOffload(make_transformer(), "cpu")
    blocks.enter(0, 1)
    blocks.enter(4, -1)  # block 1 is on its way
    assert blocks.present == {3, 4}
    blocks.enter(3, -1)


def test_a_wait_left_out_shows_in_the_gradients(late_device, reference, monkeypatch):
    monkeypatch.setattr(LateEvent, "wait", lambda _: None)
    transformer = make_transformer()
    BlockOffload(transformer, "cpu")
    assert not equal(gradients(transformer), reference["gradients"])


def test_the_next_block_is_fetched_before_this_one_computes(late_device):
    transformer = make_transformer()
    BlockOffload(transformer, "cpu")
    for index, block in enumerate(blocks_of(transformer)):
        block.attn.register_forward_pre_hook(lambda *_, i=index: late_device.log.append(i))
    with torch.no_grad():
        predict(transformer)
    order = [entry for entry in late_device.log if entry == "copy" or isinstance(entry, int)]
    assert order == ["copy", "copy", 0, "copy", 1, "copy", 2, "copy", 3, "copy", 4]


def test_the_checkpoints_of_the_block_before_are_fetched_before_this_one_is_recomputed(late_device):
    transformer = make_transformer()
    enable_checkpointing(transformer, "offload")
    loss = predict(transformer).square().mean()
    for index, block in enumerate(blocks_of(transformer)):
        block.attn.register_forward_pre_hook(lambda *_, i=index: late_device.log.append(i))
    late_device.log.clear()
    loss.backward()
    assert late_device.log == ["copy"] * 4 + [4, "copy", "copy", 3, "copy", "copy", 2, "copy", "copy", 1, 0]


# --- checkpointing


@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_gradients_of_every_checkpointing_are_the_same_to_the_bit(reference, monkeypatch, mode):
    monkeypatch.setattr(offload, "LEAST_BYTES", 512)
    transformer = make_transformer()
    enable_checkpointing(transformer, mode)
    for _ in range(2):
        assert equal(gradients(transformer), reference["gradients"])


@pytest.mark.parametrize("mode", ["selective", "offload"])
def test_compiled_blocks_have_the_same_gradients_with_checkpoints_that_keep_attention_or_leave_the_device(
        monkeypatch, mode):
    monkeypatch.setattr(offload, "LEAST_BYTES", 512)
    monkeypatch.setattr(speed, "BACKEND", "aot_eager")
    expected = gradients(make_transformer(1, 1))
    transformer = make_transformer(1, 1)
    enable_checkpointing(transformer, mode)
    speed.compile_blocks(transformer)
    for _ in range(2):
        assert equal(gradients(transformer), expected)
    torch.compiler.reset()


def test_none_switches_checkpointing_off_again():
    transformer = make_transformer()
    enable_checkpointing(transformer, "full")
    enable_checkpointing(transformer, "none")
    assert not transformer.is_gradient_checkpointing


class Census(TorchDispatchMode):
    """Counts attention's runs, and the bytes of all results, views of weights aside, that are still alive."""

    def __init__(self, transformer):
        super().__init__()
        self.attention, self.made = 0, []
        self.weights = {parameter.untyped_storage()._cdata for parameter in transformer.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        self.attention += func is SDPA
        for tensor in tree_iter(results):
            if isinstance(tensor, torch.Tensor):
                self.made.append((StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes()))
        return results

    def alive(self):
        gc.collect()
        return sum({ref.cdata: size for ref, size in self.made
                    if not ref.expired() and ref.cdata not in self.weights}.values())


def test_selective_keeps_less_than_none_and_more_than_full_and_runs_attention_once():
    kept, attention = {}, {}
    for mode in ("none", "selective", "full"):
        transformer = make_transformer()
        enable_checkpointing(transformer, mode)
        with Census(transformer) as census:
            loss = predict(transformer).square().mean()
            kept[mode] = census.alive()
            assert census.attention == 5
            loss.backward()
        attention[mode] = census.attention
    assert attention == {"none": 5, "selective": 5, "full": 10}
    assert kept["none"] > 4 * kept["selective"] and kept["selective"] > 1.2 * kept["full"]


def test_offload_leaves_no_large_block_input_on_the_device(monkeypatch):
    monkeypatch.setattr(offload, "LEAST_BYTES", 512)
    transformer = make_transformer()
    saved = []
    plain_pack = offload.CheckpointOffload.pack
    monkeypatch.setattr(offload.CheckpointOffload, "pack",
                        lambda self, tensor: saved.append((tensor.nbytes, plain_pack(self, tensor))) or saved[-1][1])
    enable_checkpointing(transformer, "offload")
    predict(transformer)
    moved = [size for size, kept in saved if not isinstance(kept, torch.Tensor)]
    stayed = [size for size, kept in saved if isinstance(kept, torch.Tensor)]
    assert len(moved) == 10 and min(moved) >= 512  # image and text tokens of five blocks
    assert len(stayed) >= 5 and max(stayed) < 512


def test_host_memory_of_checkpoints_is_free_after_backward(monkeypatch):
    monkeypatch.setattr(offload, "LEAST_BYTES", 512)
    transformer = make_transformer()
    enable_checkpointing(transformer, "offload")
    loss = predict(transformer).square().mean()
    gc.collect()
    assert sum(type(thing) is offload.Checkpoint for thing in gc.get_objects()) == 10
    loss.backward()
    del loss
    gc.collect()
    assert not any(type(thing) is offload.Checkpoint for thing in gc.get_objects())
