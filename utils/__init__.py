import logging

# peft imports bitsandbytes, which then asks for a kernel that only 4-bit models on a CPU would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# diffusers imports torchao, and that has two remarks: one on files of its old formats, one for torchao's own authors.
logging.getLogger("diffusers.quantizers.torchao.torchao_quantizer").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
