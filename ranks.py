"""One run in several processes, one for each GPU: torchrun starts them, and torch.distributed adds up what they find.

    torchrun --nproc-per-node=8 train.py
    torchrun --nproc-per-node=8 --max-restarts=3 train.py --save-every 50      # goes on by itself when a rank dies

Every rank holds the whole data set and draws the same order and the same augmentation from its own copy of one generator;
it works on its part of every batch alone. So the ranks hold the same weights, and how many there are changes rounding only.
"""

import atexit
import contextlib
import datetime
import os
import sys

import torch
import torch.distributed as dist

from cli import RunError, first_line

PATIENCE = datetime.timedelta(seconds=25)  # for a rank that is alive and silent; that one has died is noticed at once


class Ranks:
    """This process among those of its run: `rank` of `world`, which is 0 of 1 unless `device` is given and torchrun started it."""

    def __init__(self, device=None):
        joined = device is not None and "TORCHELASTIC_RUN_ID" in os.environ
        self.rank, self.world, self.local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")) if joined else (0, 1, 0)
        if self.world > 1:
            with self.talking():
                # A restarted job may be given the store it had, with addresses of the dead in it: a prefix sets them apart.
                store, *_ = next(dist.rendezvous("env://"))
                store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
                dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=self.rank, world_size=self.world)
                self.group = dist.new_group(timeout=PATIENCE)  # the first one's own patience is for downloads
            atexit.register(dist.destroy_process_group)  # gloo's threads must be gone before the interpreter is
        if self.rank:
            sys.stdout = open(os.devnull, "w")

    @contextlib.contextmanager
    def talking(self):
        """Tell what torch.distributed raises as a RunError."""
        try:
            yield
        except RuntimeError as error:
            raise RunError(f"rank {self.rank} of {self.world} has lost another: {first_line(error).partition('. ')[0]}") from None

    def bounds(self, count):
        """Where this rank's part of `count` things begins and ends."""
        return count * self.rank // self.world, count * (self.rank + 1) // self.world

    def add_up(self, tensor):
        """The sum of the ranks' tensors, in place."""
        if self.world > 1:
            with self.talking():
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def add_up_step(self, gradients, loss, correct, weight):
        """One all-reduce a step: `gradients`, in place, each rank's times its `weight`; returns the sums of the other two, ()."""
        if self.world == 1:
            return loss, correct
        torch._foreach_mul_(gradients, weight)
        flat = self.add_up(torch.cat([*(g.flatten() for g in gradients), loss.view(1), correct.view(1)]))
        *pieces, loss, correct = flat.split([*(g.numel() for g in gradients), 1, 1])
        torch._foreach_copy_(gradients, [piece.view(g.shape) for piece, g in zip(pieces, gradients)])
        return loss.view(()), correct.view(())

    def agree(self, tensors):
        """Make the tensors, in place, rank 0's on every rank: two machines may compute them to other last bits."""
        if self.world > 1:
            with self.talking():
                for tensor in tensors:
                    dist.broadcast(tensor.detach(), 0, group=self.group)

    def share(self, value):
        """Rank 0's value, a plain one, on every rank."""
        if self.world > 1:
            values = [value]
            with self.talking():
                dist.broadcast_object_list(values)
            (value,) = values
        return value

    @contextlib.contextmanager
    def in_turn(self):
        """Run the block on one rank of every machine, then on the others, which find what that one has fetched or decoded."""
        if self.local_rank:
            self.meet()
        yield
        if not self.local_rank:
            self.meet()

    def meet(self):
        """Wait for the others."""
        if self.world > 1:
            with self.talking():
                dist.barrier()

    def launcher(self):
        """How a user starts train.py as it was started."""
        return "python" if self.world == 1 else f"torchrun --nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}"


def job():
    """The name of the torchrun job that this process belongs to, the same after a restart, or None; and whether it is one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name is None:
        return None, False
    # A job without an id of its own is one agent, the parent of its ranks, on each machine.
    return (f"agent-{os.getppid()}" if name == "none" else name), int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0
