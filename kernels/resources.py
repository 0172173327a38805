"""What every kernel takes of a GPU, read off the compiled code: no GPU is needed.

Registers a thread, spilled bytes a thread, shared memory a program, matrix instructions and all instructions, for the
network's own sizes. The compilers are those inside the triton package; needs TRITON_INTERPRET to be unset.
"""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import adamw, attention, augment, mlp, muon, stem

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# What lies in memory; all else is fp32.
KINDS = {
    **dict.fromkeys(("x_ptr", "z_ptr", "dz_ptr", "dx_ptr", "images_ptr"), "working dtype"),
    **dict.fromkeys(("indices_ptr", "offsets_ptr", "corners_ptr"), "*i64"),
    **dict.fromkeys(("flipped_ptr", "warped_ptr", "cut_ptr"), "*i1"),
    "pictures_ptr": "*u8",
    "layout_ptr": "*i32",
}
REALS = {"scale", "decay", "beta2", "eps"}  # numbers that are no counts
COLUMNS = "kernel", "dtype", "target", "registers", "spilled_bytes", "shared_bytes", "matrix_instructions", "instructions"


def cases(dtype):
    """(name, kernel, constants) of every kernel, for the network of vit.py at its standard sizes."""

    def like(*shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    half_block = attention.constants(like(1, 33, 64), like(192, 64), 4, 1e-5)
    yield "attention forward", attention.forward_kernel, half_block
    yield "attention backward", attention.backward_kernel, half_block
    yield "mlp forward", mlp.forward_kernel, mlp.constants(like(33, 64), like(64, 64), 1e-5)
    yield "mlp backward", mlp.backward_kernel, mlp.constants(like(33, 64), like(64, 64), 1e-5)
    weights = like(1, 3, 32, 32), like(32, 32, 2, 2), like(64, 256)
    yield "stem forward", stem.forward_kernel, stem.forward_constants(*weights)
    yield "stem backward", stem.backward_kernel, stem.backward_constants(*weights)
    for recipe, steps in (("default", {"BORDER": "reflect", "WARP": False, "CUT": 0}), ("original", {"BORDER": "wrap", "WARP": True, "CUT": 8})):
        yield f"augment {recipe}", augment.augment_kernel, {"FLIP": True, "S": 32, "PIXELS": 1024, **steps}
    if dtype == torch.float32:  # parameters are in no other
        yield "adamw", adamw.adamw_kernel, {"BLOCK": adamw.BLOCK}
        yield "muon", muon.muon_kernel, {"STEPS": len(muon.COEFFICIENTS), "SIDE": 64, "CHUNK": muon.CHUNK, "PRODUCTS": "tf32x3", **muon.OPTIONS}


def compile_for(kernel, constants, dtype_name, target):
    """`kernel` compiled for a target of TARGETS, as a launch would compile it."""
    if "PRODUCTS" in constants and target.startswith("gfx"):
        constants = {**constants, "PRODUCTS": "ieee"}
    if "DTYPE" in kernel.arg_names:
        constants = {**constants, "DTYPE": dtype_name}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            kind = KINDS.get(name, "*fp32")
            signature[name] = f"*{dtype_name}" if kind == "working dtype" else kind
        else:
            signature[name] = "fp32" if name in REALS else "i32"
    options = {name: value for name, value in constants.items() if name in ("num_warps", "num_stages")}
    constexprs = {name: value for name, value in constants.items() if name not in options}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    return triton.compile(ASTSource(kernel, signature, constexprs, aligned), target=TARGETS[target], options=options)


def measure(compiled, target):
    """A compiled kernel's registers, spilled bytes, shared bytes and instructions, by name."""
    found = {"shared_bytes": compiled.metadata.shared}
    if target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])
        code = re.findall(r"^\t([vs]_\w+|ds_\w+|global_\w+|buffer_\w+)", assembly, re.M)
        found["registers"], found["spilled_bytes"] = number("vgpr_count"), 4 * number("vgpr_spill_count")
        found["matrix_instructions"], found["instructions"] = sum("mfma" in op for op in code), len(code)
        return found
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
        code = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    number = lambda name: int(re.search(rf"\b{name}:(\d+)", usage.stdout + usage.stderr)[1])
    operations = [op for op in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", code) if op != "NOP"]
    # A kernel has a stack for the registers that it spills; those of sin and cos, which keep a table there, for 32 bytes more.
    found["registers"], found["spilled_bytes"] = number("REG"), number("STACK") + number("LOCAL")
    found["matrix_instructions"] = sum(op in ("HGMMA", "HMMA") for op in operations)
    found["instructions"] = len(operations)
    return found


def rows(targets=TARGETS):
    """A dict of COLUMNS for every kernel, dtype and target, one at a time."""
    for dtype_name, dtype in DTYPES.items():
        for name, kernel, constants in cases(dtype):
            for target in targets:
                yield {"kernel": name, "dtype": dtype_name, "target": target, **measure(compile_for(kernel, constants, dtype_name, target), target)}
