"""Less memory on the GPU: frozen weights of the blocks, and what gradient checkpointing keeps, in host memory.

Both copy on a stream of their own, one block ahead of the computation, and the host never waits for the GPU. On a CPU
the same code runs, where streams do nothing."""

import weakref

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

ALIGNMENT = 256  # bytes; what GEMM kernels want
LEAST_BYTES = 2**24  # smaller checkpoints (timestep embeddings, rows of AdaLN tables) are not worth a copy
CHECKPOINTS_AHEAD = 2  # a block's image tokens and its text tokens


class BlockOffload:
    """Keeps the frozen weights of a FLUX transformer's blocks in host memory. At most two of them are on `device` at a
    time, the one that computes and the one that comes next, besides `resident` evenly spread ones that stay there.
    LoRA parameters and everything outside the blocks stay on the device too.

    A block's weights are views of one buffer, whose storage is emptied and filled again while all tensors on it, also
    those that autograd saved, live on (as in FSDP2). Weights are never copied back: they do not change. So results and
    gradients equal those of the plain model to the bit. A linear layer whose weights are not there raises. A step of n
    blocks copies 2 (n - 2).

    Attach the LoRA first; a transformer that does not fit the device comes on the CPU. Compile `block.forward`, not the
    block: a compiled block would trace these hooks. ValueError for `resident` out of range."""

    def __init__(self, transformer, device, resident=0):
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        if not 0 <= resident <= len(blocks):
            raise ValueError(f"{resident} blocks cannot stay on the GPU: the transformer has {len(blocks)}")
        self.device = torch.device(device)
        self.backend = torch.get_device_module(self.device)
        self.side = self.backend.Stream()
        self.present, self.arrived, self.current = set(), {}, None
        kept = {len(blocks) * i // resident for i in range(resident)}
        self.buffers = {}  # {block's index: (weights in host memory, the same bytes on the device)}
        for index, block in enumerate(blocks):
            block.to(self.device)
            if index not in kept:
                self.buffers[index] = self.move_out(block)
                block.register_forward_pre_hook(lambda *_, index=index: self.enter(index, 1))
                block.register_forward_hook(lambda _, args, outputs, index=index: self.watch(index, outputs))
        for module in transformer.children():
            if module not in (transformer.transformer_blocks, transformer.single_transformer_blocks):
                module.to(self.device)
        ignore_frozen(transformer)

    def move_out(self, block):
        """Put the block's frozen weights into one buffer in host memory; their tensors become views of another one on
        the device, which has no storage yet."""
        frozen = [parameter for parameter in block.parameters() if not parameter.requires_grad]
        parts = [part for parameter in frozen for part in storages(parameter)]
        ends, size = [], 0
        for part in parts:
            ends.append(size + part.nbytes)
            size = -(-ends[-1] // ALIGNMENT) * ALIGNMENT
        host, card = page_locked(size, self.device), torch.empty(size, dtype=torch.uint8, device=self.device)
        for part, end in zip(parts, ends, strict=True):
            place = slice(end - part.nbytes, end)
            host[place].copy_(part.detach().reshape(-1).view(torch.uint8))
            part.data = card[place].view(part.dtype).view(part.shape)
        card.untyped_storage().resize_(0)
        return host, card

    def enter(self, index, direction):
        """Before block `index` computes: have its weights, let go of those that have been used, and fetch the next.
        direction: 1 forward, -1 backward. Recomputation in backward finds its block here already."""
        if index == self.current:
            return
        self.current = index
        following = self.following(index, direction)
        for other in self.present - {index, following}:
            self.let_go(other)
        self.fetch(index)
        self.arrived[index].wait()
        self.fetch(following)

    def following(self, index, direction):
        """The block after `index`. A forward pass that records a graph turns at the last block, a backward pass at the
        first; one without a graph starts again at the first."""
        order = list(self.buffers)
        place = order.index(index) + direction
        if direction > 0 and place == len(order) and not torch.is_grad_enabled():
            return order[0]
        return order[place] if 0 <= place < len(order) else order[place - 2 * direction if len(order) > 1 else 0]

    def fetch(self, index):
        if index not in self.present:
            self.present.add(index)
            host, card = self.buffers[index]
            card.untyped_storage().resize_(host.nbytes)  # memory of the computing stream, so it is the one to wait for
            self.side.wait_stream(self.backend.current_stream())
            with self.backend.stream(self.side):
                card.copy_(host, non_blocking=True)
                self.arrived[index] = self.backend.Event()
                self.arrived[index].record(self.side)

    def let_go(self, index):
        self.arrived[index].wait()  # where it was fetched and then not used
        self.buffers[index][1].untyped_storage().resize_(0)
        self.present.remove(index)

    def watch(self, index, outputs):
        """After the block's forward: be called again before its backward."""
        for output in outputs:
            if output.requires_grad:
                output.register_hook(lambda _: self.enter(index, -1))


def ignore_frozen(model):
    """Keep frozen weights out of DistributedDataParallel's broadcast at its start: every rank has read the same file,
    offloaded weights are not there, and torchao's cannot be sent. Call it when the LoRA is attached."""
    names = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def storages(tensor):
    """The tensors that hold a weight's bytes: itself, or a quantised one's parts."""
    if is_traceable_wrapper_subclass(tensor):
        return [part for name in tensor.__tensor_flatten__()[0] for part in storages(getattr(tensor, name))]
    return [tensor]


def page_locked(size, device):
    """`size` bytes of host memory, page-locked where `device` is a GPU. torch's own allocator of such memory rounds up
    to a power of two, so that the 648 MiB of a double block would take 1 GiB."""
    memory = torch.empty(size, dtype=torch.uint8)
    if device.type == "cuda":
        cudart = torch.cuda.cudart()
        if int(cudart.cudaHostRegister(memory.data_ptr(), size, 0)):
            raise ValueError("the system refuses to lock enough host memory for block offload; let more blocks stay on "
                             "the GPU, or raise the limit (ulimit -l)")
        # Before it is freed: CUDA would refuse to lock what comes to lie there next. The process's end does without.
        weakref.finalize(memory.untyped_storage(), cudart.cudaHostUnregister, memory.data_ptr()).atexit = False
    return memory


class CheckpointOffload:
    """Saved-tensor hooks that keep large tensors on `device` in page-locked host memory until backward wants them.
    Meant around a checkpointed block, whose saved tensors are its inputs (see utils/checkpointing.py)."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.backend = torch.get_device_module(self.device)
        self.side = self.backend.Stream()
        self.latest = lambda: None

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor):
        if tensor.device.type != self.device.type or tensor.nbytes < LEAST_BYTES:
            return tensor
        self.side.wait_stream(self.backend.current_stream())
        with self.backend.stream(self.side):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            host.copy_(tensor.detach(), non_blocking=True)
        self.lend(tensor, self.side)
        checkpoint = Checkpoint(host, self.latest())
        self.latest = weakref.ref(checkpoint)
        return checkpoint

    def unpack(self, checkpoint):
        if isinstance(checkpoint, torch.Tensor):
            return checkpoint
        self.fetch(checkpoint)
        checkpoint.arrived.wait()
        card, checkpoint.card, checkpoint.is_used = checkpoint.card, None, True
        self.lend(card, self.backend.current_stream())
        ahead, earlier = 0, checkpoint.earlier
        while earlier and ahead < CHECKPOINTS_AHEAD:
            if not earlier.is_used:
                self.fetch(earlier)
                ahead += 1
            earlier = earlier.earlier
        return card

    def fetch(self, checkpoint):
        if checkpoint.card is None:
            with self.backend.stream(self.side):
                checkpoint.card = checkpoint.host.to(self.device, non_blocking=True, copy=True)
                checkpoint.arrived = self.backend.Event()
                checkpoint.arrived.record(self.side)

    def lend(self, tensor, stream):
        """Tell the GPU's allocator that `stream` reads a tensor made on another one."""
        if tensor.is_cuda:
            tensor.record_stream(stream)


class Checkpoint:
    """One tensor in host memory, and the one that was saved before it, which backward wants after it."""

    def __init__(self, host, earlier):
        self.host, self.earlier = host, earlier
        self.card, self.is_used = None, False
