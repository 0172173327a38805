"""Where a run computes: its device, precision and implementation, and its processes.

    torchrun --nproc-per-node=8 train.py
    torchrun --nproc-per-node=8 --max-restarts=3 train.py --save-every 50    # survives lost ranks

Every rank holds the whole dataset and makes the same plan of an epoch; it trains on its shard of
every batch. So all ranks hold the same weights, and their number changes rounding only.
"""

import atexit
import contextlib
import ctypes
import datetime
import os
import platform
import sys

import numpy
import torch
import torch.distributed as dist

from augment import tta_views
from cli import ProgressBar, RunError, UsageError, first_line

EVAL_BATCH_SIZE = 1000  # fixed, as the last bits of a logit may depend on the batch in bf16
TIMEOUT = datetime.timedelta(seconds=25)  # a dead rank is noticed at once, a hung one now


class Distributed:
    """This process among those of torchrun: `rank` of `world_size`, or 0 of 1 without torchrun."""

    def __init__(self, device=None):
        launched = device is not None and "TORCHELASTIC_RUN_ID" in os.environ
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        values = [int(os.environ[name]) for name in names] if launched else (0, 1, 0)
        self.rank, self.world_size, self.local_rank = values
        self.group = None
        if self.world_size > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            with self.dist_errors():
                # A restart may reuse the store, with addresses of dead ranks in it.
                store, *_ = next(dist.rendezvous("env://"))
                attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
                store = dist.PrefixStore(f"attempt {attempt}", store)
                ranks = {"rank": self.rank, "world_size": self.world_size}
                dist.init_process_group(backend, store=store, **ranks)
                # The default group keeps its long timeout, for downloads.
                self.group = dist.new_group(timeout=TIMEOUT)
            atexit.register(dist.destroy_process_group)
        if self.rank:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (rank 0 prints)

    @contextlib.contextmanager
    def dist_errors(self):
        """Re-raise errors of torch.distributed as RunError."""
        try:
            yield
        except RuntimeError as error:
            reason = first_line(error).rpartition("] ")[2].partition(". ")[0]
            rank = f"rank {self.rank} of {self.world_size}"
            raise RunError(f"{rank} lost another: {reason}") from None

    def collective(self, function, *args, **kwargs):
        """Call a function of torch.distributed, if there are several ranks."""
        if self.world_size > 1:
            with self.dist_errors():
                function(*args, **kwargs)

    def shard(self, count):
        """(start, stop) of this rank's share of `count` items; may be empty."""
        return count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size

    def all_reduce_sum(self, tensor):
        """Sum over ranks, in place."""
        self.collective(dist.all_reduce, tensor, group=self.group)
        return tensor

    def all_reduce_list(self, tensors):
        """Sum a list of tensors over ranks, in place, in one all_reduce."""
        if self.world_size > 1:
            flat = self.all_reduce_sum(torch.cat([t.flatten() for t in tensors]))
            pieces = flat.split([t.numel() for t in tensors])
            torch._foreach_copy_(tensors, [p.view(t.shape) for p, t in zip(pieces, tensors)])

    def broadcast_parameters(self, tensors):
        """Copy rank 0's tensors to all ranks: machines may differ in the last bits of an init."""
        for tensor in tensors:
            self.collective(dist.broadcast, tensor.detach(), 0, group=self.group)

    def broadcast_object(self, value):
        """Rank 0's plain value."""
        values = [value]
        self.collective(dist.broadcast_object_list, values)
        return values[0]

    @contextlib.contextmanager
    def local_main_first(self):
        """Run the block on one rank of each machine first; the others find what it has cached."""
        if self.local_rank:
            self.collective(dist.barrier)
        yield
        if not self.local_rank:
            self.collective(dist.barrier)

    def launch_command(self):
        """How a user starts a script with as many ranks."""
        if self.world_size == 1:
            return "python"
        return f"torchrun --nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}"


def elastic_run_id():
    """(name, restarted) of the torchrun job, or (None, False); a restart keeps the name."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name is None:
        return None, False
    # A job without an id is one agent, the parent of its ranks.
    name = f"agent-{os.getppid()}" if name == "none" else name
    return name, int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0


class Runtime:
    """Device, precision and implementation of the network, and the ranks.

    Arguments are the choices of --device, --precision and --kernels. With `distributed`, a process
    started by torchrun joins the others. Raises UsageError for what the machine cannot do.
    """

    def __init__(self, device="auto", precision="auto", kernels="auto", distributed=False):
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        available = ["cuda"] * cuda + ["mps"] * mps + ["cpu"]
        device = available[0] if device == "auto" else device
        if device not in available:
            raise UsageError(f"--device {device}: not available here, or not in this torch")
        self.device = torch.device(device)
        if distributed and device == "cuda":
            local_rank = int(os.environ.get("LOCAL_RANK", 0))
            if local_rank >= (count := torch.cuda.device_count()):
                raise UsageError(f"torchrun started more ranks than {count} GPUs")
            torch.cuda.set_device(local_rank)
        self.dist = Distributed(self.device if distributed else None)
        if device == "cuda":
            torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32 in convolutions too
        if precision == "auto":
            precision = "bf16" if supports_bf16_matmul(self.device) else "fp32"
        self.precision = precision
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        self.dtype = dtypes[precision]
        self.kernels, self.stem_as_matmul = kernels, kernels == "auto" and device == "cpu"
        self.fused = self.has_triton()  # the training step as Triton kernels
        if self.stem_as_matmul:
            tune_malloc()
        if precision == "fp16" and not self.fused:
            raise UsageError("--precision fp16 needs the Triton kernels, which scale the loss")

    def has_triton(self):
        """Whether the Triton kernels are wanted, and there; a training tests them first."""
        if self.kernels == "torch" or (self.kernels == "auto" and self.device.type != "cuda"):
            return False
        reason, device = None, self.device.type
        try:
            import triton  # not on every platform

            if device != "cuda" and not triton.knobs.runtime.interpret:
                reason = f"Triton does not compile for {device}; TRITON_INTERPRET=1 interprets"
        except ImportError as error:
            reason = f"Triton is missing ({first_line(error)})"
        if reason and self.kernels == "triton":
            raise UsageError(f"--kernels triton: {reason}")
        if reason:
            print(f"kernels: {reason}; the network runs in plain PyTorch", file=sys.stderr)
        return not reason

    def logits(self, model, images, **options):
        """float32 logits of normalized float32 images (B, 3, S, S); options are ViT.forward's.

        Weights stay float32; they are cast to the working dtype on the way in, gradients on the way
        back.
        """
        weights = {name: p.to(self.dtype) for name, p in model.named_parameters()}
        args = images.to(self.dtype), self.stem_as_matmul
        return torch.func.functional_call(model, weights, args, options).float()

    @torch.no_grad()
    def predict(self, model, normalize, images, tta="none"):
        """float32 logits (N, K) of uint8 images (N, 3, S, S), averaged over their tta_views."""
        parts, K = [], model.config["num_classes"]
        progress = ProgressBar("evaluating", len(images))
        for i, batch in enumerate(images.split(EVAL_BATCH_SIZE)):
            if i % self.dist.world_size == self.dist.rank:
                views = tta_views(normalize(batch), tta)
                parts.append(sum(self.logits(model, view) for view in views) / len(views))
            else:  # another rank's batch
                parts.append(torch.zeros(len(batch), K, device=batch.device))
            progress.update(min((i + 1) * EVAL_BATCH_SIZE, len(images)))
        progress.clear()
        return self.dist.all_reduce_sum(torch.cat(parts))

    def describe(self):
        """Device, precision, implementation and ranks, as a line."""
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            threads = torch.get_num_threads()
            name = f"{platform.processor() or platform.machine()}, {threads} threads"
        kernels = "Triton kernels" if self.fused else "PyTorch"
        ranks = f", {self.dist.world_size} ranks" * (self.dist.world_size > 1)
        return f"{self.device.type} ({name}), {self.precision}, {kernels}{ranks}"


def supports_bf16_matmul(device):
    """Whether the device multiplies bf16 matrices; emulated bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # Private functions, so they may go: then fp32.
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported") * (device.type == "cpu")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def versions():
    """Versions that a run's numbers depend on."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    found["numpy"] = numpy.__version__
    with contextlib.suppress(ImportError):
        import triton  # not on every platform

        found["triton"] = triton.__version__
    return found


def tune_malloc():
    """Make glibc keep freed memory for the rest of the process; returns False without glibc.

    By default it returns large blocks to the system at once, and every step would fault tens of
    megabytes in again: a quarter of its time.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # mallopt(3): M_MMAP_MAX = -4, M_TRIM_THRESHOLD = -1, M_TOP_PAD = -2; 1 means done.
    return all([mallopt(-4, 0), mallopt(-1, 2**31 - 1), mallopt(-2, 1 << 28)])
