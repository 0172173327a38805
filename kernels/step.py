"""The training step on a GPU: launches over preallocated buffers. Read `FusedStep.launch`.

There is no autograd, no random number and no value of the host in it: rows of the epoch's plan,
lr and momentum come from tables on the device, at the row of a counter on the device that the step
itself advances. So a step is one CUDA graph, replayed. trainer.Trainer.torch_step is the reference.

fp16: gradients of activations are those of the *sum* of losses, a static loss scale of the batch
size that costs nothing, for the sum over partial gradients, in fp32, divides in any case. Dlogits
of an image are in [-1, 1] whatever the batch. After 20 epochs of recipes default and original on
CIFAR-10 no gradient was above 2.5 and no activation above 790, of 65504, and 0.06 % of gradients at
most, the smallest, became 0: their relative error was that of rounding, 2e-4. A gradient that
overflows all the same makes those of parameters infinite, which the run reports, and stops.
"""

import copy
import dataclasses
import functools
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from augment import EpochPlan, Normalize
from cli import first_line
from kernels import attention, head, mlp, muon, stem, update, verify
from kernels import functions as fn
from kernels.augment import augment, kernel_plan
from kernels.graph import GraphedFunction
from schedule import COEFFICIENTS, RECIPES, build_optimizers
from vit import ViT, build_model


class FusedStep:
    """The step of a Trainer whose tensors are on one device.

    Parameters of its model, and of its averaged model, become views of one flat tensor each.
    Nothing that a kernel reads is ever replaced, only copied into.
    """

    def __init__(self, trainer, target=None):
        self.trainer, self.recipe, self.dist = trainer, trainer.recipe, trainer.runtime.dist
        self.model, self.normalize = trainer.model, trainer.normalize
        self.totals, self.finite_counts = trainer.totals, trainer.finite_counts
        self.images, self.labels = trainer.dataset.train_images, trainer.dataset.train_labels
        self.device = device = self.images.device
        self.target = target or fn.Target.of(device, trainer.runtime.dtype)
        self.param, self.averaging = flatten(self.model), trainer.averaged_model is not self.model
        self.average = flatten(trainer.averaged_model) if self.averaging else self.param
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.param), torch.zeros_like(self.param)
        self.grad = torch.zeros(len(self.param) + 2, device=device)  # and sum of losses, correct
        indices = torch.zeros(len(self.images), dtype=torch.int64, device=device)
        self.plan = EpochPlan(*(column.clone() for column in kernel_plan(EpochPlan(indices))))
        self.counter, self.next_step = torch.zeros(1, dtype=torch.int32, device=device), None
        self.hparams = torch.zeros(trainer.steps_per_epoch, 6, device=device)
        self.coefficients = torch.tensor(COEFFICIENTS, device=device)
        sizes = {self.recipe.batch_size, len(self.images) % self.recipe.batch_size} - {0}
        self.allocate(max(self.shard(size)[1] for size in sizes))
        self.batches = {size: self.batch_tables(size) for size in sizes}
        self.assign_optimizers()
        self.run = GraphedFunction(self.launch, device)

    def launch(self, size):
        """Launch all kernels of a step on this rank's images of a batch of `size`."""
        batch = self.batches[size]
        images, plan, counter, recipe = self.images, self.plan, self.counter, self.recipe
        pixels, a, x, z, dx, dz = self.pixels, self.a, self.x, self.z, self.dx, self.dz
        model, partials, args = self.model, self.partials, (batch.num_images, self.target)

        augment(images, plan, self.normalize, recipe, counter, pixels, batch.row, *args)
        stem.forward(model, pixels, a, x[0], *args)
        for i, block in enumerate(model.blocks):
            attention.forward(block.attention, x[i], z[i], *args)
            mlp.forward(block.mlp, z[i], x[i + 1], *args)
        loss_args = self.labels, plan.indices, counter, dx[-1], partials["head"], batch.row
        head.forward_backward(model, x[-1], *loss_args, *args)
        for i, block in reversed(list(enumerate(model.blocks))):
            mlp.backward(block.mlp, z[i], dx[i + 1], dz[i], partials["mlp", i], *args)
            grads = partials["attention", i]
            attention.backward(block.attention, x[i], dz[i], dx[i], grads, *args)
        stem.backward(model, pixels, a, dx[0], partials["conv1"], partials["stem"], *args)
        update.reduce(self, batch.tiles, batch.scale, recipe.l1 * (self.dist.rank == 0))
        self.dist.all_reduce_sum(self.grad)
        if recipe.optimizer == "muon":
            muon.step(self, self.matrices, recipe.weight_decay, self.target)
        update.adamw(self, self.blocks, recipe.weight_decay, recipe.beta2, recipe.eps)

    def begin_epoch(self, plan, lrs, momenta):
        """Copy the EpochPlan of trainer.epoch, and lr and momentum of its steps, to the device."""
        for buffer, column in zip(self.plan, kernel_plan(plan)):
            buffer.copy_(column)
        recipe, n = self.recipe, torch.arange(len(lrs), dtype=torch.float64) + 1
        n += self.trainer.epoch * self.trainer.steps_per_epoch
        lr, momentum = torch.tensor([lrs, momenta], dtype=torch.float64)
        window = (recipe.weight_avg_frac * n).clamp(min=1)  # steps of the average
        corrections = 1 - momentum**n, 1 - recipe.beta2**n
        columns = lr, momentum, lr * recipe.adamw_lr_scale, *corrections, 1 / window
        self.hparams[: len(lrs)].copy_(torch.stack(columns, 1))
        self.next_step = None

    def step(self, i):
        """Train on batch i of the plan."""
        if i != self.next_step:
            self.counter.fill_(i)
        size = self.recipe.batch_size
        self.run(min(size, len(self.images) - i * size))
        self.next_step = i + 1

    def state_dict(self):
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def load_state_dict(self, state):
        self.exp_avg.copy_(state["exp_avg"])
        self.exp_avg_sq.copy_(state["exp_avg_sq"])

    # --- buffers and tables ---

    def shard(self, size):
        """(start, number) of this rank's images in a batch."""
        start, stop = self.dist.shard(size)
        return start, stop - start

    def allocate(self, B):
        """Activations, their gradients, and partial gradients of at most B images."""
        config = self.model.config
        S, T, C = config["image_size"], config["channels"] + 1, config["dim"]
        tokens = [T] * (config["depth"] - 1) + [1]  # in the last block of the CLS token alone

        def buffer(*shape):
            return torch.zeros(shape, dtype=self.target.storage, device=self.device)

        self.pixels = buffer(B, config["in_channels"], S + 2, S + 2)  # in a margin of zeros
        self.a = buffer(B, S * S // 4, T - 1)  # conv2, before its GELU
        self.z, self.dz = ([buffer(B, t, C) for t in tokens] for _ in range(2))
        self.x = [buffer(B, t, C) for t in (T, *tokens)]
        shapes = self.partial_shapes(B)
        flat = torch.zeros(sum(rows * width for rows, width in shapes.values()), device=self.device)
        pieces = flat.split([rows * width for rows, width in shapes.values()])
        self.partials = {k: piece.view(shapes[k]) for k, piece in zip(shapes, pieces)}
        # The gradient of the first block's input is fp32: it is a partial one of pos_embedding.
        self.dx = [self.partials["embedding"].view(B, T, C), *(buffer(B, t, C) for t in tokens)]

    def partial_shapes(self, B):
        """Rows and columns of the partial gradients of B images, in the order of parameters."""
        model, programs = self.model, fn.num_programs(B)

        def numel(*modules):
            return sum(p.numel() for module in modules for p in module.parameters())

        shapes = {"embedding": (B, model.pos_embedding.numel())}
        shapes["conv1"] = programs * model.config["patch_size"] ** 2, numel(model.stem.conv1)
        shapes["stem"] = programs, numel(model.stem.conv2, model.stem.proj)
        for i, block in enumerate(model.blocks):
            shapes["attention", i] = programs, numel(block.attention)
            num_tokens = B * self.z[i].shape[1]
            shapes["mlp", i] = mlp.num_programs(num_tokens, self.target), numel(block.mlp)
        shapes["head"] = head.num_programs(B), numel(model.norm, model.head) + 2
        return shapes

    def batch_tables(self, size):
        """What a step depends on besides the buffers, for one size of batch."""
        start, count = self.shard(size)
        C, position = self.model.pos_embedding.shape[2], self.partials["embedding"]
        segments, offset = [(0, count, position.shape[1], C, 0)], C  # CLS token: row 0 of positions
        for name, (rows, columns) in self.partial_shapes(count).items():
            begin = self.partials[name].storage_offset()
            segments.append((begin, rows, columns, columns, offset))
            offset += columns
        tiles = update.reduce_tiles(segments, self.device)
        row = self.recipe.batch_size, start
        return SimpleNamespace(num_images=count, row=row, scale=1 / size, tiles=tiles)

    def assign_optimizers(self):
        """Which parameters are Muon's, and the tables of both optimizers."""
        *muons, adamw = build_optimizers(self.recipe, self.model)
        num_chunks = {
            p: n for m in muons for p, n in zip(m.param_groups[0]["params"], m.num_chunks)
        }
        decay = {p: bool(g["weight_decay"]) for g in adamw.param_groups for p in g["params"]}
        params, device = list(self.model.parameters()), self.device
        self.is_muon = [p in num_chunks for p in params]
        self.matrices = muon.layout(params, num_chunks, device)
        self.blocks = update.adamw_blocks(params, decay, device)


def flatten(model):
    """A flat float32 tensor of which the model's parameters become views."""
    params = list(model.parameters())
    flat = torch.cat([p.detach().flatten() for p in params])
    for p, piece in zip(params, flat.split([p.numel() for p in params])):
        p.data = piece.view(p.shape)
    return flat


def is_supported(config):
    """Whether the kernels take a network of this vit.ViT.config."""
    return config == ViT(num_classes=config["num_classes"]).config and config["num_classes"] <= 256


@torch.no_grad()
def logits(model, images, dtype):
    """float32 logits (B, num_classes) of normalized float32 images (B, 3, S, S)."""
    if not is_supported(model.config):
        return model(images)
    args = len(images), fn.Target.of(images.device, dtype)
    pixels = F.pad(images, (1, 1, 1, 1)).to(args[1].storage)
    B, (C, N), L = len(images), model.stem.proj.weight.shape, model.config["channels"]
    x = pixels.new_empty(B, L + 1, C)
    stem.forward(model, pixels, pixels.new_empty(B, N, L), x, *args)
    for block in model.blocks:
        z = x.new_empty(B, 1 if block.attention.cls_only else L + 1, C)
        attention.forward(block.attention, x, z, *args)
        x = torch.empty_like(z)
        mlp.forward(block.mlp, z, x, *args)
    return model.head(model.norm(x[:, 0].float()))  # (B, 1, C) -> (B, C) -> (B, num_classes)


# --- whether the kernels are right here ---


@functools.cache
def self_test(device, dtype):
    """None, or a line that says which kernel is wrong on this device and why.

    Triton's interpreter, which has no hardware to test, is taken as right.
    """
    if device.type == "cuda":
        return wrong_kernel(device, dtype)
    no_triton = f"Triton does not compile for {device.type}; with TRITON_INTERPRET=1 it interprets"
    return None if fn.INTERPRETED else no_triton


def wrong_kernel(device, dtype):
    """None, or a line about the first kernel that is wrong or does not run.

    Runs steps of exactly the kernels that training launches, on few images, against float64: with
    one image a program, and with several. An error of 1e-4 (fp32) or 5e-2 of a result's norm tells
    a wrong kernel, or a TF32 product, from rounding; Muon, which makes much of small singular
    values, has 1e-2.
    """
    recipe = dataclasses.replace(RECIPES["long"], batch_size=4, l1=1e-4, weight_avg_frac=0.9)
    largest = fn.MAX_PROGRAMS
    try:
        for fn.MAX_PROGRAMS in (largest, 2):
            step = FusedStep(example_trainer(recipe, device, dtype))
            for name, actual, reference in verify.checks(step):
                bound = 1e-4 if dtype == torch.float32 or name[:5] == "adamw" else 5e-2
                bound = 1e-2 if name[:4] == "muon" else bound
                error = verify.relative_error(actual, reference(torch.float64))
                if not error <= bound:
                    return f"{name}: off by {error:.1e} on this device, more than {bound:.0e}"
    except Exception as error:  # errors of compilers and drivers have no common type
        return f"{kernel_name(fn.last_launched)} does not run here: {first_line(error)}"
    finally:
        fn.MAX_PROGRAMS = largest
    return None


def example_trainer(recipe, device, dtype, num_images=7):
    """What FusedStep reads of a Trainer, with random images of 10 classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (num_images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (num_images,), generator=generator)
    dataset = SimpleNamespace(train_images=images.to(device), train_labels=labels.to(device))
    model = build_model(recipe, 10, 0, device)
    num_params = len(list(model.parameters()))
    dist = SimpleNamespace(rank=0, shard=lambda n: (0, n), all_reduce_sum=lambda t: t)
    return SimpleNamespace(
        recipe=recipe, dataset=dataset, model=model, epoch=0,
        averaged_model=copy.deepcopy(model) if recipe.weight_avg_frac else model,
        normalize=Normalize((0.5,) * 3, (0.25,) * 3, device), totals=torch.zeros(2, device=device),
        finite_counts=torch.zeros(1 + num_params, dtype=torch.int64, device=device),
        steps_per_epoch=-(-num_images // recipe.batch_size),
        runtime=SimpleNamespace(dtype=dtype, dist=dist),
    )  # fmt: skip


def record_launches(recipe, dtype=torch.float32, target=None):
    """(kernel, programs, args, constants) of every launch of a step; nothing runs."""
    step = FusedStep(example_trainer(recipe, torch.device("cpu"), dtype), target)
    fn.recorded = []
    try:
        step.launch(min(step.batches))
        return fn.recorded
    finally:
        fn.recorded = None


def kernel_name(kernel):
    return f"{kernel.fn.__module__.rpartition('.')[2]} {kernel.fn.__name__.replace('_kernel', '')}"


def count_launches(recipe):
    """Names of the kernels that one step of a recipe launches, in order."""
    return [kernel_name(kernel) for kernel, *_ in record_launches(recipe)]
