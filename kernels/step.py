"""The training step on a GPU: launches over preallocated buffers. Read `FusedStep.launch`.

There is no autograd, no random number and no value of the host in it: images are augmented for a
whole epoch ahead, as in PyTorch; lr and momentum come from a table on the device, at the row of a
counter on the device that the step itself advances. So a step is one CUDA graph, replayed.
trainer.Trainer.torch_step is the reference.

Gradients of activations are those of the *sum* of losses, a static loss scale for fp16, whose range
of values docs/kernels.md has. The sum over partial gradients, in fp32, divides by the batch size.
"""

import torch

from augment import augment
from kernels import attention, head, mlp, muon, stem, update
from kernels.functions import Target, split
from kernels.graph import GraphedFunction
from schedule import COEFFICIENTS, build_optimizers

AUGMENT_BATCH = 5000  # images, which bounds the memory that augmentation takes for a moment


class FusedStep:
    """The step of a Trainer whose tensors are on one device.

    Parameters of its model, and of its averaged model, become views of one flat tensor each.
    Nothing that a kernel reads is ever replaced, only copied into.
    """

    def __init__(self, trainer, target=None):
        self.trainer, self.recipe, self.dist = trainer, trainer.recipe, trainer.runtime.dist
        self.model, self.totals = trainer.model, trainer.totals
        self.finite_counts, self.dataset = trainer.finite_counts, trainer.dataset
        self.device = device = self.dataset.train_images.device
        self.target = target or Target.of(device, trainer.runtime.dtype)
        self.param, has_average = flatten(self.model), trainer.averaged_model is not self.model
        self.average = flatten(trainer.averaged_model) if has_average else self.param
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.param), torch.zeros_like(self.param)
        self.grad = torch.zeros(len(self.param) + 2, device=device)  # and sum of losses, correct
        self.counter, self.next_step = torch.zeros(1, dtype=torch.int32, device=device), None
        self.hparams = torch.zeros(trainer.steps_per_epoch, 6, device=device)
        self.aux_weight = torch.zeros(1, device=device)
        self.coefficients = torch.tensor(COEFFICIENTS, device=device)
        self.allocate(self.recipe.batch_size, len(self.dataset.train_images))
        self.assign_optimizers()
        self.run = GraphedFunction(self.launch, device)

    def launch(self, key):
        """Launch all kernels of a step on this rank's images of a batch.

        `key` is the size of the batch, and whether there is a second loss: then the last block
        computes all tokens.
        """
        size, aux = key
        num_images, tiles = self.batches[key]
        partials, recipe, args = self.partials, self.recipe, (num_images, self.target)
        (x, z, dx, dz), blocks = self.activations[aux], list(enumerate(self.model.blocks))

        stem.forward(self, x[0], num_images)
        for i, block in blocks:
            weights = list(block.attention.parameters()), block.attention.heads
            attention.forward(x[i], *weights, z[i], *args)
            mlp.forward(block.mlp, z[i], x[i + 1], *args)
        head.forward_backward(self, x[-1], dx[-1], num_images)
        for i, block in reversed(blocks):
            mlp.backward(block.mlp, z[i], dx[i + 1], dz[i], partials["mlp", i], *args)
            weights = list(block.attention.parameters()), block.attention.heads
            attention.backward(x[i], *weights, dz[i], dx[i], partials["attention", i], *args)
        stem.backward(self, dx[0], num_images)
        update.reduce(self, tiles, 1 / size, recipe.l1 * (self.dist.rank == 0))
        self.dist.all_reduce_sum(self.grad)
        if recipe.optimizer == "muon":
            muon.step(self)
        update.adamw(self)

    def begin_epoch(self, plan, lrs, momenta):
        """Augment this rank's images by the EpochPlan of trainer.epoch; copy lrs and momenta."""
        trainer, dataset, recipe, rows = self.trainer, self.dataset, self.recipe, plan.at(self.rows)
        self.labels.copy_(dataset.train_labels[rows.indices])
        self.targets.copy_(trainer.targets[rows.indices])
        for i in range(0, len(self.rows), AUGMENT_BATCH):
            part = rows.at(slice(i, i + AUGMENT_BATCH))
            images = augment(dataset.train_images[part.indices], part, recipe, trainer.normalize)
            inside = self.pixels[i : i + AUGMENT_BATCH, :, 1:-1, 1:-1]
            inside.copy_(images.to(self.target.dtype))
        n = trainer.epoch * trainer.steps_per_epoch + 1 + torch.arange(len(lrs)).double()
        lr, momentum = torch.tensor([lrs, momenta], dtype=torch.float64)
        window = (recipe.weight_avg_frac * n).clamp(min=1)  # steps of the average, if there is one
        corrections = 1 - momentum**n, 1 - recipe.beta2**n
        weight = (self.average is not self.param) / window
        columns = lr, momentum, lr * recipe.adamw_lr_scale, *corrections, weight
        self.hparams[: len(lrs)].copy_(torch.stack(columns, 1))
        self.aux_weight.fill_(trainer.aux_weight)
        self.next_step = None

    def step(self, i):
        """Train on batch i of the plan."""
        if i != self.next_step:
            self.counter.fill_(i)
        size = self.recipe.batch_size
        size = min(size, len(self.dataset.train_images) - i * size)
        self.run((size, self.trainer.aux_weight > 0))
        self.next_step = i + 1

    def state_dict(self):
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    def load_state_dict(self, state):
        self.exp_avg.copy_(state["exp_avg"])
        self.exp_avg_sq.copy_(state["exp_avg_sq"])

    # --- buffers and tables ---

    def allocate(self, full, N):
        """Buffers for batches of `full` of N images, and the last one, which may be smaller."""
        config = self.model.config
        S, T, C = config["image_size"], config["channels"] + 1, config["dim"]
        buffer = lambda *shape: torch.zeros(shape, dtype=self.target.storage, device=self.device)
        sizes = [min(full, N - first) for first in range(0, N, full)]
        shards = {size: self.dist.shard(size) for size in {*sizes}}
        rows = [torch.arange(*shards[size]) + i * full for i, size in enumerate(sizes)]
        self.rows = torch.cat(rows).to(self.device)  # of an epoch's plan, this rank's
        counts = {size: stop - start for size, (start, stop) in shards.items()}
        self.batch_size, B = counts[sizes[0]], max(counts.values())
        tables = self.dataset.train_labels, self.trainer.targets
        self.labels, self.targets = (torch.zeros_like(x[self.rows]) for x in tables)
        # The kernels read pixels in a margin of zeros.
        self.pixels = buffer(len(self.rows), config["in_channels"], S + 2, S + 2)
        self.a = buffer(B, S * S // config["patch_size"] ** 2, T - 1)  # conv2, before its GELU
        shapes = self.partial_shapes(B, self.recipe.aux_weight > 0)
        numels = [rows * columns for rows, columns in shapes.values()]
        pieces = torch.zeros(sum(numels), device=self.device).split(numels)
        self.partials = {k: piece.view(shapes[k]) for k, piece in zip(shapes, pieces)}
        x, z, dx, dz = ([buffer(B, T, C) for _ in self.model.blocks] for _ in range(4))
        # The gradient of the first block's input is fp32: it is a partial one of pos_embedding.
        x, dx = [buffer(B, T, C), *x], [self.partials["embedding"].view(B, T, C), *dx]
        cls_only = lambda tensors: [*tensors[:-1], tensors[-1].flatten(0, 1)[:B, None]]  # (B, 1, C)
        self.activations = {True: (x, z, dx, dz), False: tuple(map(cls_only, (x, z, dx, dz)))}
        modes = {False, self.recipe.aux_weight > 0}
        self.batches = {
            (size, aux): (count, self.reduce_tiles(count, aux))
            for size, count in counts.items() for aux in modes
        }  # fmt: skip

    def partial_shapes(self, B, aux):
        """Rows and columns of the partial gradients of B images, in the order of parameters."""
        model, (programs, _) = self.model, split(B)
        tokens = model.pos_embedding.shape[1]
        numel = lambda *modules: sum(p.numel() for m in modules for p in m.parameters())
        shapes = {"embedding": (B, model.pos_embedding.numel())}
        shapes["conv1"] = programs * model.config["patch_size"] ** 2, numel(model.stem.conv1)
        shapes["stem"] = programs, numel(model.stem.conv2, model.stem.proj)
        for i, block in enumerate(model.blocks):
            shapes["attention", i] = programs, numel(block.attention)
            rows = B * tokens if aux or i < len(model.blocks) - 1 else B
            shapes["mlp", i] = mlp.num_programs(rows), numel(block.mlp)
        shapes["head"] = programs, numel(model.norm, model.head) + 2
        return shapes

    def reduce_tiles(self, count, aux):
        """The table of update.reduce for `count` images."""
        shapes, C = self.partial_shapes(count, aux), self.model.config["dim"]
        segments, end = [(0, *shapes["embedding"], C, 0)], C  # CLS token: row 0 of positions
        for name, (rows, columns) in shapes.items():
            segments.append((self.partials[name].storage_offset(), rows, columns, columns, end))
            end += columns
        tiles = [
            [offset + c, rows, stride, min(update.COLUMNS, columns - c), target + c]
            for offset, rows, stride, columns, target in segments
            for c in range(0, columns, update.COLUMNS)
        ]
        return torch.tensor(tiles, device=self.device)

    def assign_optimizers(self):
        """Which parameters are Muon's, and the tables of both optimizers."""
        *muons, adamw = build_optimizers(self.recipe, self.model)
        decay = {p: bool(g["weight_decay"]) for g in adamw.param_groups for p in g["params"]}
        num_chunks = {}
        for optimizer in muons:
            num_chunks |= zip(optimizer.param_groups[0]["params"], optimizer.num_chunks)
        self.is_muon = [p in num_chunks for p in self.model.parameters()]
        matrices, blocks, N, size, end = [], [], len(self.param), update.BLOCK, 0
        counts = [[N, N + 1, 0]]  # the loss
        for p in self.model.parameters():
            start, end = end, end + p.numel()
            counts.append([start, end, 0])
            if p in num_chunks:
                rows, columns = len(p) // num_chunks[p], p.numel() // len(p)
                matrices += [[i, rows, columns] for i in range(start, end, rows * columns)]
            else:
                blocks += [[i, min(i + size, end), decay[p]] for i in range(start, end, size)]
        table = lambda rows: torch.tensor(rows, dtype=torch.int32, device=self.device)
        self.matrices, self.blocks = table(matrices), table(counts + blocks)


def flatten(model):
    """A flat float32 tensor of which the model's parameters become views."""
    params = list(model.parameters())
    flat = torch.cat([p.detach().flatten() for p in params])
    for p, piece in zip(params, flat.split([p.numel() for p in params])):
        p.data = piece.view(p.shape)
    return flat
