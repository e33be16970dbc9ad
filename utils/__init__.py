import logging

# peft imports bitsandbytes, which then asks for a kernel that only 4-bit models on a CPU would use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
