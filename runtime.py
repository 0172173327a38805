"""Where a training computes: its device, precision and implementation, and its ranks.

    torchrun --nproc-per-node=8 train.py

Every rank holds the whole dataset and makes the same plan of an epoch; it trains on its shard of
every batch. So all ranks hold the same weights, and their number changes rounding only.
"""

import contextlib
import ctypes
import datetime
import importlib.metadata
import os
import platform
import sys

import numpy
import torch
import torch.distributed as dist

from augment import tta_views
from cli import ProgressBar, UsageError, first_line
from kernels.matmul_stem import MatmulStem

EVAL_BATCH_SIZE = 1000  # fixed, as the last bits of a logit may depend on the batch in bf16
# The parameters of mallopt(3), as glibc numbers them.
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Ranks:
    """The processes that train together: this one is `rank` of `world_size`."""

    def __init__(self, rank=0, world_size=1):
        self.rank = rank
        self.world_size = world_size

    def shard(self, count):
        """Return (start, stop) of this rank's share of `count` items, which may be empty."""
        start = count * self.rank // self.world_size
        stop = count * (self.rank + 1) // self.world_size
        return start, stop

    def all_reduce_sum(self, tensor):
        """Sum a tensor over ranks, in place; returns it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensors):
        """Copy rank 0's tensors to all ranks, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def broadcast_object(self, value):
        """Return rank 0's value, which others wait for."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def leave(self):
        """Leave the process group. After an error no rank does: NCCL would wait for the others."""
        if dist.is_initialized():
            dist.destroy_process_group()


def join_ranks(device):
    """Join the process group of torchrun, if it has started this process, as a Ranks.

    Raises UsageError for more ranks than GPUs, and for variables that torchrun did not set so.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Ranks()
    try:
        if device.type == "cuda":
            local_rank = int(os.environ["LOCAL_RANK"])
            count = torch.cuda.device_count()
            if local_rank >= count:
                raise UsageError(f"torchrun started more ranks than {count} GPUs")
            torch.cuda.set_device(local_rank)
        backend = "nccl" if device.type == "cuda" else "gloo"
        # The others wait while rank 0 downloads and decodes.
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    except (KeyError, ValueError) as error:
        message = f"RANK, WORLD_SIZE and the like are not as torchrun sets them: {error}"
        raise UsageError(message) from None
    return Ranks(dist.get_rank(), dist.get_world_size())


class Runtime:
    """Device, precision and implementation of the network, and the ranks.

    The arguments are the choices of --device, --precision and --kernels. With `distributed`, a
    process that torchrun started joins the others. Raises UsageError for what the machine cannot
    do.
    """

    def __init__(self, device="auto", precision="auto", kernels="auto", distributed=False):
        self.device = find_device(device)
        self.ranks = join_ranks(self.device) if distributed else Ranks()
        if precision == "auto":
            precision = "bf16" if supports_bf16_matmul(self.device) else "fp32"
        self.precision = precision
        self.dtype = DTYPES[precision]

        self.kernels = kernels
        self.tested_kernels = set()  # the kernels that kernels.step has compared with PyTorch
        self.uses_matmul_stem = kernels == "auto" and self.device.type == "cpu"

    def finds_triton(self):
        """Return whether a training is to use the Triton kernels: on a GPU, if they can run.

        Raises UsageError if the user asks for them and they cannot.
        """
        if self.kernels == "torch" or (self.kernels == "auto" and self.device.type != "cuda"):
            return False
        reason = why_no_triton(self.device)
        if reason and self.kernels == "triton":
            raise UsageError(f"--kernels triton: {reason}")
        if reason:
            print(f"kernels: {reason}; the network runs in plain PyTorch", file=sys.stderr)
            self.kernels = "torch"  # the next training need not say so again
        return reason is None

    def prepare(self, model):
        """Give a ViT the fastest modules for this device, in place; parameters stay the same."""
        if self.uses_matmul_stem:
            model.stem = MatmulStem(model.stem)

    def logits(self, model, images):
        """Return float32 logits of normalized float32 images (B, 3, S, S).

        Weights stay float32; they are cast to the working dtype on the way in, gradients on the way
        back.
        """
        return self.forward(model, self.cast_weights(model), images)

    def cast_weights(self, model):
        """Return the weights of a model in the working dtype, by name."""
        return {name: p.to(self.dtype) for name, p in model.named_parameters()}

    def forward(self, model, weights, images):
        """Return float32 logits of normalized float32 images, by weights in the working dtype."""
        return torch.func.functional_call(model, weights, images.to(self.dtype)).float()

    @torch.no_grad()
    def predict(self, model, normalize, images, tta="none"):
        """Return float32 logits (N, K) of uint8 images (N, 3, S, S), averaged over tta_views."""
        was_training = model.training
        model.eval()
        weights = self.cast_weights(model)
        parts = []
        with ProgressBar("evaluating", len(images)) as progress:
            for i, batch in enumerate(images.split(EVAL_BATCH_SIZE)):
                if i % self.ranks.world_size == self.ranks.rank:
                    views = tta_views(normalize(batch), tta)
                    logits = sum(self.forward(model, weights, view) for view in views)
                    parts.append(logits / len(views))
                else:  # another rank's batch
                    num_classes = model.config["num_classes"]
                    parts.append(torch.zeros(len(batch), num_classes, device=batch.device))
                progress.update(min((i + 1) * EVAL_BATCH_SIZE, len(images)))
        model.train(was_training)
        return self.ranks.all_reduce_sum(torch.cat(parts))

    def describe(self):
        """Return device, precision and ranks, as a line."""
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            name = f"{platform.machine()}, {torch.get_num_threads()} threads"
        line = f"{self.device.type} ({name}), {self.precision}"
        if self.ranks.world_size > 1:
            line += f", {self.ranks.world_size} ranks"
        return line


def find_device(name):
    """Return the torch.device of a --device; raises UsageError if it is not available."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name == "auto":
        name = available[0]
    if name not in available:
        raise UsageError(f"--device {name}: not available here, or not in this torch")
    return torch.device(name)


def why_no_triton(device):
    """Return None where the Triton kernels can run, else a line that says why not."""
    try:
        import triton  # not on every platform
    except ImportError as error:
        return f"Triton is missing ({first_line(error)})"
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        return f"Triton does not compile for {device.type}; TRITON_INTERPRET=1 interprets"
    return None


def supports_bf16_matmul(device):
    """Return whether the device multiplies bf16 matrices; emulated bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    # Private functions of torch, so they may go: then fp32.
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        function = getattr(torch.cpu, probe, None)
        if function is not None and function():
            return True
    return False


def versions():
    """Return the versions that a run's numbers depend on, by name."""
    found = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
    }
    # Triton is not on every platform. Its import would take half a second.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["triton"] = importlib.metadata.version("triton")
    return found


def tune_process(device):
    """Set what belongs to the whole process: a script does so, a library leaves it to its user.

    On a CPU glibc keeps freed memory, where there is a glibc. By default it returns large blocks to
    the system at once, and every step would fault tens of megabytes in again: a quarter of its
    time. On a GPU fp32 means fp32 in convolutions too, not TF32, and their gradients have the same
    bits each time.
    """
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    elif device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**28)
