"""The training step of a Trainer as Triton kernels over preallocated buffers.

Read `FusedStep.step`, then `gradient` and `update_weights`. There is no autograd, no random number
and no value of the host in these two: images are augmented for a whole epoch ahead, by the code
that PyTorch runs; lr and momentum come from a table on the device, at the row of a counter on the
device that the step itself advances. So each of the two is a CUDA graph, replayed.

Gradients of activations are those of the *sum* of losses. The sum over partial gradients, in fp32,
divides by the batch size.
"""

import subprocess
import sys

import torch
from torch import nn
from triton.errors import TritonError

from augment import augment
from cli import RunError, UsageError, first_line
from kernels import attention, head, mlp, muon, stem, update
from kernels.functions import EPS, INTERPRETED, NUM_HPARAMS, Target, split
from kernels.matmul_stem import MatmulStem
from kernels.self_test import self_test
from optim import COEFFICIENTS, AdamW, Muon, average_weight, build_optimizers
from vit import MLP, Attention, Block, Conv1x1, ScaledDotProductAttention, Stem, ViT
from vit import count_parameters

AUGMENT_BATCH = 5000  # images, which bounds the memory that augmentation takes for a moment
# The modules that the kernels compute together.
MODULES = (ViT, Stem, MatmulStem, Block, Attention, ScaledDotProductAttention, MLP, Conv1x1)
MODULES += (nn.Conv2d, nn.GELU, nn.LayerNorm, nn.Linear, nn.ModuleList)
MAX_CLASSES = 256  # the kernel of the head keeps its whole matrix on chip
# What compiling and running kernels raises: Triton, its C compiler, its cache, CUDA, no memory;
# Triton's driver asserts that it finds libcuda.so, and imports what the compiler has made.
KERNEL_ERRORS = (TritonError, subprocess.CalledProcessError, OSError, RuntimeError)
KERNEL_ERRORS += (AssertionError, ImportError)


def checked_step(trainer):
    """Return the FusedStep of a Trainer, or None where the kernels cannot be trusted.

    Then a line on stderr says why. Raises UsageError instead where the user asks for the kernels,
    and RunError where the GPU is of no use any more.
    """
    runtime = trainer.runtime
    step = None
    reason = why_not_implemented(trainer.model, trainer.recipe)
    if reason is None:
        try:
            step = FusedStep(trainer)
            reason = test_once(step, runtime)
        except KERNEL_ERRORS as error:
            reason = why_kernels_failed(error, runtime.device)

    # All ranks train by the same implementation.
    failures = torch.zeros(1, device=runtime.device)
    if reason:
        failures += 1
    if runtime.ranks.all_reduce_sum(failures).item() == 0:
        return step
    reason = reason or "they fail on another rank"
    if runtime.kernels == "triton":
        raise UsageError(f"--kernels triton: {reason}")
    print(f"kernels: {reason}; the network runs in plain PyTorch", file=sys.stderr)
    return None


def why_not_implemented(model, recipe):
    """Return a line about what of a network and its optimizers the kernels do not compute, or None.

    It is for whoever changes vit.py or optim.py: the kernels would train what stood there before.
    """
    for module in model.modules():
        if type(module) not in MODULES:
            return f"they do not know the module {type(module).__name__}"
        if type(module) is nn.GELU and module.approximate != "none":
            return f"they do not compute {module}"
        if type(module) is nn.LayerNorm and module.eps != EPS.value:
            return f"they do not compute {module}"
    for optimizer in build_optimizers(recipe, model):
        if type(optimizer) not in (AdamW, Muon):
            return f"they do not know the optimizer {type(optimizer).__name__}"
        if type(optimizer) is Muon:
            for p, num_chunks in muon_params(optimizer):
                rows, columns = matrix_size(p, num_chunks)
                if min(rows, columns) > muon.SIDE:
                    return f"Muon has a {rows}x{columns} matrix, both sides more than {muon.SIDE}"
    num_classes = model.config["num_classes"]
    if num_classes > MAX_CLASSES:
        return f"{num_classes} classes are more than {MAX_CLASSES}"
    for name in ("image_size", "patch_size", "channels", "dim", "dim_head", "mlp_dim"):
        size = model.config[name]
        if size & (size - 1):
            return f"{name} is {size}, not a power of two"
    return None


def test_once(step, runtime):
    """Return None, or what self_test says; a Runtime tests kernels of the same sizes only once."""
    sizes = tuple(step.model.config.items())
    key = (sizes, step.recipe.batch_size, step.recipe.optimizer, len(step.rows))
    if INTERPRETED or key in runtime.tested_kernels:  # the interpreter has no hardware to test
        return None
    print("kernels  compiling and checking, for a minute the first time", flush=True)
    reason = self_test(step)
    if reason is None:
        runtime.tested_kernels.add(key)
    return reason


def why_kernels_failed(error, device):
    """Return a line about an exception of KERNEL_ERRORS.

    Raises RunError if it has made the GPU useless for this process, as an illegal access does.
    """
    reason = f"they do not run on this device: {first_line(error)}"
    if isinstance(error, subprocess.CalledProcessError) or "C compiler" in reason:
        return f"{reason}; Triton needs gcc and Python.h (apt install gcc python3-dev)"
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            raise RunError(f"the Triton kernels failed ({reason}); try --kernels torch") from None
    return reason


class FusedStep:
    """The step of a Trainer whose tensors are on one device.

    Parameters of its model, and of its averaged model, become views of one flat tensor each.
    Nothing that a kernel reads is ever replaced, only copied into.
    """

    def __init__(self, trainer, target=None):
        self.recipe = trainer.recipe
        self.dataset = trainer.dataset
        self.normalize = trainer.normalize
        self.steps_per_epoch = trainer.steps_per_epoch
        self.ranks = trainer.runtime.ranks
        self.model = trainer.model
        self.totals = trainer.totals
        self.device = trainer.dataset.train_images.device
        self.target = target or Target.of(self.device, trainer.runtime.dtype)

        self.param = flatten(self.model)
        self.exp_avg = torch.zeros_like(self.param)
        self.exp_avg_sq = torch.zeros_like(self.param)
        self.grad = torch.zeros(len(self.param) + 2, device=self.device)  # and loss sum, correct
        self.average = None
        if trainer.averaged_model is not trainer.model:
            self.average = flatten(trainer.averaged_model)

        self.epoch = 0
        self.next_step = None  # the step whose number the counter has
        self.counter = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.hparams = torch.zeros(self.steps_per_epoch, NUM_HPARAMS.value, device=self.device)
        self.graphs = {}
        self.allocate()
        self.assign_optimizers()

    # --- the step ---

    def begin_epoch(self, epoch, plan, lrs, momenta):
        """Augment this rank's images by the plan of an epoch; lrs and momenta have one a step."""
        rows = plan.at(self.rows)
        self.labels.copy_(self.dataset.train_labels[rows.indices])
        for first in range(0, len(self.rows), AUGMENT_BATCH):
            part = rows.at(slice(first, first + AUGMENT_BATCH))
            images = self.dataset.train_images[part.indices]
            images = augment(images, part, self.recipe, self.normalize)
            inside = self.pixels[first : first + AUGMENT_BATCH, :, 1:-1, 1:-1]
            inside.copy_(images.to(self.target.dtype))

        # Columns in the order of functions.MUON_LR and those after it; n counts all steps.
        table = []
        n = epoch * self.steps_per_epoch
        for lr, momentum in zip(lrs, momenta):
            n += 1
            adamw_lr = lr * self.recipe.adamw_lr_scale
            correction1 = 1 - momentum**n
            correction2 = 1 - self.recipe.beta2**n
            table.append([lr, momentum, 1 - momentum, adamw_lr, correction1, correction2])
        self.hparams[: len(table)].copy_(torch.tensor(table))
        self.epoch = epoch
        self.next_step = None

    def step(self, i):
        """Train on batch i of the epoch's plan; adds to the trainer's totals."""
        if i != self.next_step:
            self.counter.fill_(i)
        first = i * self.recipe.batch_size
        size = min(self.recipe.batch_size, len(self.dataset.train_images) - first)
        self.run(self.gradient, size)
        # Outside the graphs, where the process group notices a rank that is lost.
        self.ranks.all_reduce_sum(self.grad)
        self.run(self.update_weights)
        if self.average is not None:
            n = self.epoch * self.steps_per_epoch + i + 1
            self.average.lerp_(self.param, average_weight(self.recipe, n))
        self.next_step = i + 1

    def gradient(self, size):
        """Launch forward and backward for this rank's images of a batch of `size`."""
        num_images, tiles = self.batches[size]
        heads = self.model.config["heads"]
        blocks = list(enumerate(self.model.blocks))
        target = self.target
        x = self.x
        z = self.z
        dx = self.dx
        dz = self.dz

        # x[i] goes into block i, z[i] from its attention half to its MLP half.
        stem.forward(self, x[0], num_images)
        for i, block in blocks:
            weights = block.attention.parameters()
            attention.forward(x[i], weights, heads, z[i], num_images, target)
            mlp.forward(z[i], block.mlp, x[i + 1], num_images, target)

        # Loss, and the way back. A gradient of weights is partial: a row a program.
        head.forward_backward(self, x[-1], dx[-1], num_images)
        for i, block in reversed(blocks):
            partial = self.partials["mlp", i]
            mlp.backward(z[i], block.mlp, dx[i + 1], dz[i], partial, num_images, target)
            weights = block.attention.parameters()
            partial = self.partials["attention", i]
            attention.backward(x[i], weights, heads, dz[i], dx[i], partial, num_images, target)
        stem.backward(self, dx[0], num_images)

        # The gradient. Those of all ranks are added: one of them has L1's.
        l1 = self.recipe.l1 if self.ranks.rank == 0 else 0.0
        update.reduce(self, tiles, 1 / size, l1)

    def update_weights(self):
        """Launch the optimizers, on the gradient of all ranks."""
        if self.recipe.optimizer == "muon":
            muon.update(self)
        update.adamw(self)

    def run(self, function, *args):
        """Call a function that launches kernels; later calls replay what the first launched."""
        if INTERPRETED:
            function(*args)
            return
        key = (function.__name__, *args)
        if key in self.graphs:
            self.graphs[key].replay()
        else:
            function(*args)  # makes this step, and compiles its kernels; the capture runs nothing
            self.graphs[key] = self.capture(function, *args)

    def capture(self, function, *args):
        """Return a CUDA graph of what a function launches; nothing of it runs."""
        graph = torch.cuda.CUDAGraph()
        # NCCL has a thread that asks the driver about events, which the mode "global" forbids.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            function(*args)
        return graph

    # --- state by name ---

    def named(self, flat):
        """Return {name of a parameter: its view of a flat tensor}."""
        views = {}
        start = 0
        for name, p in self.model.named_parameters():
            views[name] = flat[start : start + p.numel()].view(p.shape)
            start += p.numel()
        return views

    def named_state(self):
        """Return the optimizers' averages, views: {"exp_avg": {name: view}, "exp_avg_sq": ...}.

        exp_avg_sq has the parameters of AdamW alone.
        """
        exp_avg_sq = self.named(self.exp_avg_sq)
        for name in self.muon_names:
            del exp_avg_sq[name]
        return {"exp_avg": self.named(self.exp_avg), "exp_avg_sq": exp_avg_sq}

    # --- buffers and tables ---

    def allocate(self):
        """Make the buffers of an epoch's images and of a batch's activations and gradients."""
        config = self.model.config
        S = config["image_size"]
        T = config["channels"] + 1
        C = config["dim"]
        num_patches = (S // config["patch_size"]) ** 2
        full = self.recipe.batch_size
        N = len(self.dataset.train_images)

        # This rank's rows of an epoch's plan. The last batch may be smaller than others.
        rows = []
        counts = {}  # size of a batch -> images of it on this rank
        for first in range(0, N, full):
            size = min(full, N - first)
            start, stop = self.ranks.shard(size)
            rows.append(torch.arange(first + start, first + stop))
            counts[size] = stop - start
        self.rows = torch.cat(rows).to(self.device)
        self.batch_size = len(rows[0])
        B = max(counts.values())

        # Inputs of an epoch. The kernels read pixels in a margin of zeros.
        self.pixels = self.buffer(len(self.rows), config["in_channels"], S + 2, S + 2)
        self.labels = torch.zeros_like(self.dataset.train_labels[self.rows])

        # Partial gradients, in one tensor: the kernel that sums them takes it as a whole.
        shapes = self.partial_shapes(B)
        sizes = [num_rows * columns for num_rows, columns in shapes.values()]
        self.partial = torch.zeros(sum(sizes), device=self.device)
        pieces = self.partial.split(sizes)
        self.partials = {name: p.view(shapes[name]) for name, p in zip(shapes, pieces)}

        # Activations and their gradients; the last block computes the CLS token alone.
        # The gradient of the first block's input is fp32: it is a partial one of pos_embedding.
        self.a = self.buffer(B, num_patches, T - 1)  # conv2, before its GELU
        self.x = [self.buffer(B, T, C)]
        self.z = []
        self.dx = [self.partials["embedding"].view(B, T, C)]
        self.dz = []
        for i in range(config["depth"]):
            num_tokens = 1 if i == config["depth"] - 1 else T
            self.x.append(self.buffer(B, num_tokens, C))
            self.z.append(self.buffer(B, num_tokens, C))
            self.dx.append(self.buffer(B, num_tokens, C))
            self.dz.append(self.buffer(B, num_tokens, C))

        self.batches = {}  # size of a batch -> its images on this rank, table of update.reduce
        for size, count in counts.items():
            self.batches[size] = (count, self.reduce_tiles(count))

    def buffer(self, *shape):
        return torch.zeros(shape, dtype=self.target.storage, device=self.device)

    def partial_shapes(self, num_images):
        """Return rows and columns of the partial gradients, in the order of the parameters.

        A backward kernel has a row for each of its programs, the embedding for each image.
        """
        model = self.model
        programs, _ = split(num_images)
        tokens = model.pos_embedding.shape[1]
        shapes = {}
        shapes["embedding"] = (num_images, model.pos_embedding.numel())
        stem_programs = stem.num_programs(num_images, model.stem.proj.weight.shape[1])
        convs = count_parameters(model.stem.conv1) + count_parameters(model.stem.conv2)
        shapes["convs"] = (stem_programs, convs)
        shapes["proj"] = (programs, count_parameters(model.stem.proj))
        for i, block in enumerate(model.blocks):
            is_last = i == len(model.blocks) - 1
            num_tokens = num_images if is_last else num_images * tokens
            shapes["attention", i] = (programs, count_parameters(block.attention))
            shapes["mlp", i] = (mlp.num_programs(num_tokens), count_parameters(block.mlp))
        # After the parameters come the sum of losses and the number of correct predictions.
        shapes["head"] = (programs, count_parameters(model.norm) + count_parameters(model.head) + 2)
        return shapes

    def reduce_tiles(self, num_images):
        """Return the table of update.reduce: (tiles, 5), int64.

        A tile is some columns of partial gradients: where they begin in self.partial, rows,
        distance of rows, columns, and where their sums go in self.grad.
        """
        # The CLS token lies in front, at the first position: it has the same gradient.
        shapes = self.partial_shapes(num_images)
        rows, stride = shapes["embedding"]
        C = self.model.config["dim"]
        segments = [(0, rows, stride, C, 0)]
        end = C
        for name, (rows, columns) in shapes.items():
            offset = self.partials[name].storage_offset()
            segments.append((offset, rows, columns, columns, end))
            end += columns

        tiles = []
        for offset, rows, stride, columns, goal in segments:
            for c in range(0, columns, update.COLUMNS):
                width = min(update.COLUMNS, columns - c)
                tiles.append([offset + c, rows, stride, width, goal + c])
        return torch.tensor(tiles, device=self.device)

    def assign_optimizers(self):
        """Make the tables of Muon's matrices and of AdamW's blocks of parameters."""
        *muons, adamw = build_optimizers(self.recipe, self.model)
        num_chunks = {}  # of Muon's parameters: q, k and v are three matrices
        for optimizer in muons:
            num_chunks.update(muon_params(optimizer))
        decays = {}
        for group in adamw.param_groups:
            for p in group["params"]:
                decays[p] = group["weight_decay"] > 0

        self.muon_names = []
        matrices = []  # offset, rows, columns
        blocks = []  # first offset, end, whether it decays
        start = 0
        for name, p in self.model.named_parameters():
            end = start + p.numel()
            if p in num_chunks:
                self.muon_names.append(name)
                rows, columns = matrix_size(p, num_chunks[p])
                for i in range(start, end, rows * columns):
                    matrices.append([i, rows, columns])
            else:
                for i in range(start, end, update.BLOCK):
                    blocks.append([i, min(i + update.BLOCK, end), decays[p]])
            start = end
        self.matrices = torch.tensor(matrices, dtype=torch.int32, device=self.device)
        self.blocks = torch.tensor(blocks, dtype=torch.int32, device=self.device)
        self.coefficients = torch.tensor(COEFFICIENTS, device=self.device)


def muon_params(optimizer):
    """Yield (parameter, number of matrices stacked in it) of a Muon."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            yield p, group["num_chunks"]


def matrix_size(p, num_chunks):
    """Return rows and columns of each of the matrices that are stacked in a parameter."""
    return len(p) // num_chunks, p.numel() // len(p)


def flatten(model):
    """Return a flat float32 tensor of which the model's parameters become views."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    start = 0
    for p in model.parameters():
        p.data = flat[start : start + p.numel()].view(p.shape)
        start += p.numel()
    return flat
