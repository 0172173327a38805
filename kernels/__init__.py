"""Faster spellings of what vit.py says in plain PyTorch, and the one place where a spelling is chosen."""

from kernels import cpu, plain


def choose(name, device, dtype):
    """The forward function (model, images) -> logits for --kernels `name`: auto, triton or torch; and None or a reason.

    `device` is a torch.device, `dtype` the working dtype, torch.float32 or torch.bfloat16. The reason says why it is plain
    PyTorch where Triton was to be had.
    """
    if name == "auto" and device.type == "cpu":
        cpu.keep_freed_memory()
        return cpu.forward, None
    if name == "torch" or (name == "auto" and device.type != "cuda"):  # "cuda" is ROCm's name too
        return plain.forward, None
    try:
        from kernels import gpu, functions  # Triton is not on every platform
    except ImportError as error:
        return plain.forward, f"no Triton here ({error})"
    if device.type != "cuda" and not functions.INTERPRETED:
        return plain.forward, f"Triton does not compile for {device.type}; with TRITON_INTERPRET=1 its interpreter runs the kernels, slowly"
    reason = gpu.check(device, dtype)
    return (plain.forward if reason else gpu.forward), reason
