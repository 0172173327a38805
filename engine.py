"""The training step, the evaluation pass and the choice of pictures to show, which the scripts share."""

import copy
import os
import platform
import sys

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F

import kernels
from augment import Augmenter, Normalize
from cli import RunError, UsageError, first_line
from ranks import Ranks
from recipe import build_model, build_optimizer, build_schedule

EVALUATION_BATCH = 1000  # one value everywhere: in bf16 the last bits of a logit may depend on the batch it came in


class Runtime:
    """Where and how the model runs: a device, a dtype for activations and a spelling of the forward pass.

    `device` is auto, cpu, cuda or mps; `precision` auto, fp32 or bf16; `kernels_name` auto, triton or torch. With
    `torchrun`, a process that torchrun started joins the others. Raises UsageError for a device that is not there, and
    for triton where it does not run.
    """

    def __init__(self, device="auto", precision="auto", kernels_name="auto", torchrun=False):
        present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        if device == "auto":
            device = next(name for name, there in present.items() if there)
        if not present[device]:
            raise UsageError(f"--device {device}: this machine, or this build of torch, has none")
        self.device = torch.device(device)
        if torchrun and device == "cuda":
            torch.cuda.set_device(own_gpu())
        self.ranks = Ranks(self.device if torchrun else None)
        if precision == "auto":
            precision = "bf16" if has_bf16_matrices(self.device) else "fp32"
        self.precision = precision
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        if self.device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, in convolutions too
        self.forward, reason = kernels.choose(kernels_name, self.device, self.dtype)
        self.triton = self.forward.__module__ == "kernels.gpu"
        if reason and kernels_name == "triton":
            raise UsageError(f"--kernels triton: {first_line(reason)}")
        if reason:
            print(f"kernels: {first_line(reason)}; the network runs in plain PyTorch", file=sys.stderr)

    def logits(self, model, images):
        """Normalised float32 pictures (B, 3, S, S) to float32 logits (B, num_classes).

        Weights stay float32; a spelling casts them to the working dtype on their way in, and gradients on the way back.
        """
        return self.forward(model, images.to(self.dtype)).float()

    def describe(self):
        """The device, as a person knows it, with precision and spelling."""
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            threads = torch.get_num_threads()
            name = f"{platform.processor() or platform.machine()}, {threads} thread{'s' * (threads > 1)}"
        ranks = f", {self.ranks.world} ranks" if self.ranks.world > 1 else ""
        return f"{self.device.type} ({name}), {self.precision}, {self.forward.__module__}.{self.forward.__name__}{ranks}"


def versions():
    """Of Python and the packages that a run's numbers depend on."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": numpy.__version__}
    try:
        import triton  # not on every platform, and needed by none of the code that runs without it

        found["triton"] = triton.__version__
    except ImportError:
        pass
    return found


def own_gpu():
    """The number of the GPU that is this process's own; torchrun tells its processes apart."""
    number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= count:
        raise UsageError(f"torchrun started {number + 1} or more processes here, and this machine has {count} GPUs")
    return number


def has_bf16_matrices(device):
    """Whether the device multiplies bf16 matrices in hardware; where it emulates, bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, so they may go: then fp32
        return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return False


def check_batch(recipe, dataset):
    """Raise UsageError where a batch is more than there are training pictures."""
    count = len(dataset.train_images)
    if recipe.batch_size > count:
        raise UsageError(f"batches of {recipe.batch_size} are larger than the {count:,} training pictures of {dataset.name}; --set batch_size={count} would fit")


class Trainer:
    """One run's moving parts: model, optimizer, schedule, augmentation, and the generator behind every random choice.

    `step` is one update. `epoch` is one pass in random order, the last partial batch kept. `averaged` is the model to
    evaluate; its weights and `state_dict` are all that another process needs to go on at the next step with the same bits.
    """

    # Of the running epoch: its number from 0, the pictures' order (None between epochs), steps made, and their sums; of the
    # run: steps made.
    POSITION = "running", "order", "done", "loss", "correct", "steps"

    def __init__(self, recipe, dataset, runtime, seed):
        self.recipe, self.dataset, self.runtime = recipe, dataset, runtime
        self.model = model = build_model(recipe, dataset.num_classes, seed, runtime.device)
        self.normalize = Normalize(dataset.mean, dataset.std, runtime.device)
        runtime.ranks.agree(model.parameters())
        self.count = len(dataset.train_images)
        self.steps_per_epoch = -(-self.count // recipe.batch_size)
        self.schedule = build_schedule(recipe, self.steps_per_epoch)
        self.generator = torch.Generator(runtime.device).manual_seed(seed)
        self.augment = Augmenter(recipe.augmentation, self.normalize, self.count, self.generator, recipe.epochs)
        self.optimizer = build_optimizer(recipe, model, triton=runtime.triton)
        self.averaged, self.steps = copy.deepcopy(model) if recipe.averaged_share else model, 0
        self.graphs = StepGraphs(self.update, self.generator) if runtime.triton and runtime.device.type == "cuda" else None
        self.running, self.order, self.done, self.loss, self.correct = 0, None, 0, 0, 0
        # How many of the running epoch's steps had a finite loss and, parameter by parameter, a gradient of finite norm: one
        # whose square overflows would stand in AdamW's mean of squares for ever. Counted on the device.
        self.good = torch.zeros(1 + len(list(model.parameters())), dtype=torch.int64, device=runtime.device)

    def step(self, indices, epoch, lr, momentum):
        """Update on the training pictures at `indices` (B,): summed cross entropy and number correct, on the device.

        Both are to be read before the next step: with a CUDA graph, it writes its own in their place.
        """
        self.optimizer.prepare(lr, momentum)
        results = self.graphs(indices, epoch) if self.graphs else self.update(indices, epoch)
        self.steps += 1
        if self.averaged is not self.model:
            newest = min(1.0, 1 / (self.recipe.averaged_share * self.steps))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.averaged.parameters()), list(self.model.parameters()), newest)
        return results

    def update(self, indices, epoch):
        """A step's work on the device, on this rank's part of it; `epoch` is a number or, in a graph, a tensor ()."""
        first, last = self.runtime.ranks.bounds(len(indices))
        part = slice(first, max(last, first + 1))  # a rank without a picture takes one that does not count
        draws = self.augment.draw(indices, epoch, self.dataset.train_images.shape[-1])  # for all ranks, on each the same
        own = indices[part]
        images, labels = self.augmented(own, draws.of(part)), self.dataset.train_labels[own]
        logits = self.runtime.logits(self.model, images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        self.optimizer.zero_grad()
        loss.backward()
        parameters = list(self.model.parameters())
        gradients = [p.grad for p in parameters]
        loss, correct = loss.detach() * (last - first), (logits.detach().argmax(1) == labels)[: last - first].sum()
        loss, correct = self.runtime.ranks.add_up_step(gradients, loss, correct, (last - first) / len(indices))
        self.good += torch.stack([loss, *torch._foreach_norm(gradients)]).isfinite()  # (1 + number of parameters,)
        if self.recipe.l1:  # the gradient of l1 * sum |w| is l1 * sign(w); its value is not part of the loss told
            torch._foreach_add_(gradients, torch._foreach_sign(parameters), alpha=self.recipe.l1)
        self.optimizer.step()
        return loss, correct

    def augmented(self, indices, draws):
        """The training pictures at `indices` (b,), with what was drawn for them: (b, 3, S, S), normalised."""
        pictures = self.dataset.train_images
        if self.runtime.triton:
            from kernels.augment import augment  # Triton is not on every platform

            return augment(self.augment, pictures, indices, draws, self.runtime.dtype)
        return self.augment.apply(pictures.index_select(0, indices), draws)

    def epoch(self, epoch, steps, after_step=lambda done: None):
        """Up to `steps` updates of one pass, epoch counted from 0: mean cross entropy and accuracy in percent.

        Goes on within the epoch where `load_state_dict` says so. Raises RunError for a loss, gradient or weight that is
        not finite, on a CPU after the step that made it; elsewhere the host waits for the device once, at the end.
        """
        if self.order is None:
            self.order = torch.randperm(self.count, generator=self.generator, device=self.runtime.device)
            self.running, self.done, self.loss, self.correct = epoch, 0, 0, 0
        self.good.fill_(self.done)
        for indices in self.order.split(self.recipe.batch_size)[self.done : steps]:
            lr, momentum = self.schedule(epoch * self.steps_per_epoch + self.done)
            batch_loss, batch_correct = self.step(indices, epoch, lr, momentum)
            self.loss, self.correct, self.done = self.loss + batch_loss, self.correct + batch_correct, self.done + 1
            if self.runtime.device.type == "cpu":
                self.check_finite()
            after_step(self.done)
        self.check_finite()
        self.order = None
        seen = min(self.done * self.recipe.batch_size, self.count)
        return self.loss.item() / seen, 100 * self.correct.item() / seen

    def check_finite(self):
        """Raise RunError that names the first step of the running epoch, and its tensor, that was not finite."""
        good, (names, weights) = self.good.tolist(), zip(*self.model.named_parameters())
        if min(good) < self.done:
            made = min(good)
            culprit = ["the loss", *(f"the gradient of {name}" for name in names)][good.index(made)]
        else:
            made = self.done - 1
            finite = torch.stack(torch._foreach_norm(weights)).isfinite().tolist()
            culprit = None if all(finite) else f"what it made of {names[finite.index(False)]}"
        if culprit:
            step = self.running * self.steps_per_epoch + made
            place = f"step {step + 1}, in epoch {self.running + 1} at rate {self.schedule(step)[0]:.4g}"
            raise RunError(f"{place}: {culprit} is not finite; the rate is too high, or the data is not finite")

    def state_dict(self):
        """Tensors and plain values; raises RunError, as `epoch` does, where they are no state to keep."""
        if self.order is not None:
            self.check_finite()
        random = {"generator": self.generator.get_state(), "flipped_first": self.augment.flipped_first}
        learned = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {**{name: getattr(self, name) for name in self.POSITION}, **random, **learned}

    def load_state_dict(self, state):
        """Take up a `state_dict`, wherever its tensors are."""

        def here(value):
            return value.to(self.runtime.device) if torch.is_tensor(value) else value

        for name in self.POSITION:
            setattr(self, name, here(state[name]))
        self.augment.flipped_first = here(state["flipped_first"])
        self.generator.set_state(state["generator"])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


class StepGraphs:
    """`update(indices, epoch)` on CUDA as one graph replay, a graph for each batch size: the host only says which pictures.

    The first steps of a size run as ever, which compiles the kernels; then one is recorded. Where recording fails, every
    step runs as ever, and one line says so. What `update` returns is overwritten by the next replay.
    """

    EAGER_STEPS = 3

    def __init__(self, update, generator):
        self.update, self.generator = update, generator
        self.seen, self.recorded, self.failed = {}, {}, False

    def __call__(self, indices, epoch):
        size = len(indices)
        if size not in self.recorded:
            self.seen[size] = self.seen.get(size, 0) + 1
            if self.failed or self.seen[size] <= self.EAGER_STEPS:
                return self.update(indices, epoch)
            try:
                self.recorded[size] = self.record(indices)
            except Exception as error:  # CUDA's reasons have no type of their own
                print(f"CUDA graph: not recorded ({first_line(error)}); every kernel is launched by itself", file=sys.stderr)
                self.failed = True
                return self.update(indices, epoch)
        graph, inputs, results = self.recorded[size]
        inputs[0].copy_(indices)
        inputs[1].fill_(epoch)
        graph.replay()
        return results

    def record(self, indices):
        """A graph, the tensors that it reads and those that it writes; nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)  # each replay draws on where the last one ended
        inputs = indices.clone(), torch.zeros((), dtype=torch.int64, device=indices.device)
        torch.cuda.synchronize(indices.device)
        # With several ranks, a thread of NCCL's asks the driver questions all the while, which "global" takes for a mistake.
        with torch.cuda.graph(graph, capture_error_mode="thread_local" if dist.is_available() and dist.is_initialized() else "global"):
            results = self.update(*inputs)
        return graph, inputs, results


@torch.no_grad()
def predict(runtime, model, normalize, images, tta=False):
    """float32 logits (N, num_classes) of uint8 pictures (N, 3, S, S); `tta` averages them with the mirrored pictures'.

    Ranks take batches in turn, the same batches that one process takes, and every rank gets all logits.
    """
    was_training, ranks = model.training, runtime.ranks
    model.eval()
    parts = []
    for i, batch in enumerate(images.split(EVALUATION_BATCH)):
        if i % ranks.world != ranks.rank:
            parts.append(torch.zeros(len(batch), model.sizes["num_classes"], device=images.device))
            continue
        batch = normalize(batch)
        logits = runtime.logits(model, batch)
        parts.append((logits + runtime.logits(model, batch.flip(3))) / 2 if tta else logits)
    model.train(was_training)
    return ranks.add_up(torch.cat(parts))  # to a logit the other ranks add zeros


def score(logits, labels):
    """Mean cross entropy and accuracy in percent of logits (N, num_classes) against labels (N,)."""
    return F.cross_entropy(logits, labels).item(), 100 * (logits.argmax(1) == labels).sum().item() / len(labels)


def balanced_choice(labels, wanted, count):
    """Places (n <= count,) of pictures that are `wanted` (N,; bool), taken in turn from each of `labels` (N,), first come first."""
    places = wanted.nonzero()[:, 0]
    turn = torch.zeros_like(places)
    for label in labels[places].unique():
        of_class = labels[places] == label
        turn[of_class] = torch.arange(int(of_class.sum()), device=places.device)
    order = (turn * (labels.max() + 1) + labels[places]).argsort()  # first of every class, second of every class, ...
    return places[order[:count]]
