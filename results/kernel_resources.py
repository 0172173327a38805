"""What the kernels that a step launches take of GPUs, read off compiled code: no GPU needed.

    python results/kernel_resources.py                  # all; the results replace the file's rows
    python results/kernel_resources.py --target sm_90   # a minute each

Writes kernel_resources.csv. The compilers are those inside the triton package.
"""

import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))  # whose modules lie above this script

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from cli import Parser, UsageError, read_csv, run_script, write_csv  # noqa: E402
from data import load_shapes  # noqa: E402
from kernels.functions import DTYPES, INTERPRETED, Target  # noqa: E402
from kernels.step import FusedStep  # noqa: E402
from kernels.verify import kernel_name, record_launches  # noqa: E402
from runtime import Runtime  # noqa: E402
from schedule import RECIPES  # noqa: E402
from trainer import Trainer  # noqa: E402

# Shared memory, in KB, that one program may have. T4; A100; RTX 30; RTX 40; H100; B200; RTX 50;
# MI300; RX 7900.
SHARED_KB = {
    "sm_75": 64, "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99,
    "gfx942": 64, "gfx1100": 64,
}  # fmt: skip
TARGETS = tuple(SHARED_KB)
COLUMNS = (
    "kernel", "dtype", "target", "warps", "registers", "spilled_bytes", "shared_bytes",
    "shared_limit", "matrix_instructions", "wgmma", "instructions",
)  # fmt: skip
TYPES = {
    torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8", torch.bool: "*i1",
    **{dtype: f"*{name}" for dtype, name in DTYPES.items()},
}  # fmt: skip


def target_of(name, dtype):
    return Target(dtype, int(name[3:]) if name[:2] == "sm" else name)


def half_dtype(target):
    """bf16, and fp16 before sm_80, which has no bf16."""
    return torch.float16 if target == "sm_75" else torch.bfloat16


def compile_for(target, kernel, args, constants):
    """A recorded launch, compiled as it would be on a target of TARGETS."""
    signature, constexprs, attrs = {}, {}, {}
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    for i, name in enumerate(kernel.arg_names):
        if i >= len(args):
            signature[name], constexprs[name] = "constexpr", constants[name]
        elif torch.is_tensor(args[i]):
            signature[name] = TYPES[args[i].dtype]
            if args[i].data_ptr() % 16 == 0:
                attrs[i,] = [["tt.divisibility", 16]]
        elif args[i] == 1 and not kernel.params[i].do_not_specialize:
            signature[name], constexprs[name] = "constexpr", 1
        else:
            signature[name] = "fp32" if isinstance(args[i], float) else "i32"
    gpu = GPUTarget("cuda", int(target[3:]), 32) if target[:2] == "sm" else None
    gpu = gpu or GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
    return triton.compile(ASTSource(kernel, signature, constexprs, attrs), gpu, options)


def measure(compiled):
    """Registers and spilled bytes of a thread, and instructions, by the names of COLUMNS."""
    if "amdgcn" in compiled.asm:
        assembly = compiled.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        code = re.findall(r"^\t([vs]_\w+|ds_\w+|global_\w+|buffer_\w+)", assembly, re.M)
        spilled, is_matrix = 4 * spilled, re.compile(r"v_(mfma|wmma)").match
    else:
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            run = lambda *command: subprocess.run([*command, cubin], capture_output=True, text=True)
            usage = run(tools / "cuobjdump", "-res-usage")
            listing = run(tools / "nvdisasm", "-c").stdout
        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr))
        registers, spilled = int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])
        code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", listing)
        is_matrix = re.compile(r"U?T?C?[HQIO]G?MMA").match
    return {
        "registers": registers, "spilled_bytes": spilled,
        "matrix_instructions": sum(map(bool, map(is_matrix, code))),
        "instructions": sum(op != "NOP" for op in code),
    }  # fmt: skip


def launches(recipe, dtype=torch.float32, target=None, aux=False):
    """(kernel, programs, args, constants) of every launch of a step, with a second loss or not."""
    recipe, runtime = replace(RECIPES[recipe], batch_size=1), Runtime("cpu", "fp32", "torch")
    step = FusedStep(Trainer(recipe, load_shapes(1, 1), runtime, 1), target or Target(dtype))
    return record_launches(step, 1, aux)


def rows(targets=TARGETS, kernels=("",), dtypes=("half", "fp32")):
    """A dict of COLUMNS for every kernel whose name contains one of `kernels`."""
    for target in targets:
        for dtype in (half_dtype(target) if name == "half" else torch.float32 for name in dtypes):
            seen = []
            arguments = "long", dtype, target_of(target, dtype)
            steps = [*launches(*arguments), *launches(*arguments, aux=True)]
            for kernel, _, args, constants in steps:
                name = kernel_name(kernel) + " cls" * (constants.get("Q") == 1)
                if name in seen or not any(part in name for part in kernels):
                    continue
                seen.append(name)
                compiled = compile_for(target, kernel, args, constants)
                yield {
                    "kernel": name, "dtype": DTYPES[dtype], "target": target,
                    "warps": compiled.metadata.num_warps,
                    "shared_bytes": compiled.metadata.shared,
                    "shared_limit": 1024 * SHARED_KB[target],
                    "wgmma": compiled.asm.get("ptx", "").count("wgmma.mma_async"),
                    **measure(compiled),
                }  # fmt: skip


def main():
    parser = Parser(description="Compile the kernels for GPUs and list what they take.")
    parser.add_argument("--target", choices=TARGETS, action="append", help="one, or several")
    targets, path = parser.parse_args().target or TARGETS, RESULTS / "kernel_resources.csv"
    if INTERPRETED:
        raise UsageError("kernels are to be compiled; unset TRITON_INTERPRET")
    for recipe in RECIPES:
        print(f"recipe {recipe}: {len(launches(recipe))} launches a step")
    for target in targets:
        found = [{**dict.fromkeys(COLUMNS), **row} for row in rows([target])]
        kept = [row for row in read_csv(path) if row["target"] != target] if path.exists() else []
        write_csv(path, sorted(kept + found, key=lambda row: TARGETS.index(row["target"])))
        spilled = [f"{r['kernel']} {r['dtype']} {r['spilled_bytes']}" for r in found]
        print(target, ", ".join(line for line in spilled if not line.endswith(" 0")), flush=True)


if __name__ == "__main__":
    run_script(main)
