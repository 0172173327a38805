"""A training run: the step, the epoch, evaluation, and checkpoints that resume to the same bits."""

import copy
import io
import math
import shutil
import time
import warnings

import torch
import torch.nn.functional as F

from augment import Normalize, augment, epoch_plan
from cli import (
    Interrupted, ProgressBar, RunError, SignalHandler, UsageError, atomic_write, first_line, sha256,
    write_csv,
)  # fmt: skip
from schedule import build_optimizers, set_lr_momentum
from vit import ViT, build_model

ROW = "{:>5} {:>10} {:>8} {:>10} {:>9} {:>9} {:>8} {:>7}"


class Trainer:
    """Model, optimizers and schedule of a run, at a position (epoch, step_in_epoch).

    Its state_dict and the weights of `averaged_model`, which is evaluated, resume to the same bits.
    `model` is for another network. Where the dataset has a teacher's logits, they replace labels.
    """

    def __init__(self, recipe, dataset, runtime, seed, model=None):
        self.recipe, self.dataset, self.runtime, self.seed = recipe, dataset, runtime, seed
        count, device = len(dataset.train_images), runtime.device
        if recipe.batch_size > count:
            raise UsageError(f"batch_size {recipe.batch_size} is more than the {count:,} images")
        self.model = model or build_model(recipe, dataset.num_classes, seed, device)
        runtime.dist.broadcast_parameters(self.model.parameters())
        self.averaged_model = copy.deepcopy(self.model) if recipe.weight_avg_frac else self.model
        self.normalize = Normalize(dataset.mean, dataset.std, device)
        self.targets, self.temperature = dataset.train_labels, 1.0
        if dataset.teacher_logits is not None:  # distillation, Hinton et al. 2015, arXiv:1503.02531
            self.temperature = recipe.temperature
            self.targets = (dataset.teacher_logits / self.temperature).softmax(1)
        self.steps_per_epoch = -(-count // recipe.batch_size)
        self.schedule = recipe.schedule(self.steps_per_epoch)
        self.epoch = self.step_in_epoch = 0
        self.aux_weight = recipe.aux_weight_of(0)
        self.totals = torch.zeros(2, device=device)  # of the epoch: loss sum, correct predictions
        # Steps of the epoch with a finite loss, and with a finite gradient norm of each parameter.
        # A gradient whose square overflows would stay in AdamW's averages for ever.
        num_counts = 1 + len(list(self.model.parameters()))
        self.finite_counts = torch.zeros(num_counts, dtype=torch.int64, device=device)
        self.fused_step = None
        if runtime.fused:
            from kernels.verify import checked_step  # Triton is not on every platform

            self.fused_step = checked_step(self)  # or None
        fused = [self.fused_step] if self.fused_step else []  # it holds the optimizers' state
        self.optimizers = fused or build_optimizers(recipe, self.model)

    def begin_epoch(self, epoch, lrs, momenta, first_step=0):
        """Draw the plan of `epoch`; lrs and momenta have one value for each of its steps."""
        N, _, _, S = self.dataset.train_images.shape
        self.plan = epoch_plan(self.recipe, N, S, self.seed, epoch, self.runtime.device)
        self.epoch, self.step_in_epoch, self.lrs, self.momenta = epoch, first_step, lrs, momenta
        self.aux_weight = self.recipe.aux_weight_of(epoch)
        self.finite_counts.fill_(first_step)
        if self.fused_step:
            self.fused_step.begin_epoch(self.plan, lrs, momenta)

    def step(self, i):
        """Train on batch i of the plan; adds to `totals`."""
        train_step = self.fused_step.step if self.fused_step else self.torch_step
        train_step(i)
        self.step_in_epoch = i + 1
        if self.runtime.device.type == "cpu":
            self.check_finite()

    def torch_step(self, i):
        """Forward, backward and update in PyTorch; the reference of kernels/step.py."""
        recipe, dataset, dist = self.recipe, self.dataset, self.runtime.dist
        batch = self.plan.at(slice(i * recipe.batch_size, (i + 1) * recipe.batch_size))
        batch_size = len(batch.indices)
        rows = batch.at(slice(*dist.shard(batch_size)))
        images = dataset.train_images.index_select(0, rows.indices)
        images = augment(images, rows, recipe, self.normalize)
        labels, targets = dataset.train_labels[rows.indices], self.targets[rows.indices]

        options = {"mean_token": True} if self.aux_weight else {}
        logits = self.runtime.logits(self.model, images, **options)
        logits, loss, total = self.losses(logits, targets)
        self.model.zero_grad()
        (total / batch_size).backward()  # unlike autograd.grad, it gives grads the params' strides,
        params = list(self.model.parameters())  # which fused optimizers take for granted
        grads = [p.grad for p in params]
        with torch.no_grad():
            stats = torch.stack([loss, (logits.argmax(1) == labels).sum()])
            dist.all_reduce_list([*grads, stats])  # one all_reduce a step
            self.totals += stats
            self.finite_counts += torch.stack([stats[0], *torch._foreach_norm(grads)]).isfinite()
            if recipe.l1:  # the gradient of the L1 norm is the sign
                torch._foreach_add_(grads, torch._foreach_sign(params), alpha=recipe.l1)
            set_lr_momentum(self.optimizers, self.lrs[i], self.momenta[i], recipe.adamw_lr_scale)
            for optimizer in self.optimizers:
                optimizer.step()
            if self.averaged_model is not self.model:
                steps = self.epoch * self.steps_per_epoch + i + 1
                weight = min(1.0, 1 / (recipe.weight_avg_frac * steps))
                torch._foreach_lerp_(list(self.averaged_model.parameters()), params, weight)

    def losses(self, logits, targets):
        """(the CLS token's logits, their loss, what to minimize) of logits (B, K) or (B, 2, K).

        Losses are sums over images. The second is an auxiliary classifier's, as in Szegedy et al.
        2014, arXiv:1409.4842.
        """
        T, logits = self.temperature, logits.flatten(1).split(self.dataset.num_classes, dim=1)
        losses = [T * F.cross_entropy(x / T, targets, reduction="sum") for x in logits]
        return logits[0], losses[0], sum(w * x for w, x in zip((1.0, self.aux_weight), losses))

    def train_epoch(self, num_steps, after_step=lambda: None):
        """Train from the present position to step `num_steps` of the epoch.

        Returns mean cross entropy and accuracy in percent. Raises RunError for a loss, gradient or
        weight that is not finite: in its step on a CPU, else at the end of the epoch.
        """
        steps = range(self.epoch * self.steps_per_epoch, (self.epoch + 1) * self.steps_per_epoch)
        lrs, momenta = zip(*map(self.schedule, steps))
        if self.step_in_epoch == 0:
            self.totals.zero_()
        self.begin_epoch(self.epoch, lrs, momenta, self.step_in_epoch)
        for i in range(self.step_in_epoch, num_steps):
            self.step(i)
            after_step()
        self.check_finite()
        self.epoch, self.step_in_epoch = self.epoch + 1, 0
        seen = min(num_steps * self.recipe.batch_size, len(self.dataset.train_images))
        loss, correct = self.totals.tolist()
        return loss / seen, 100 * correct / seen

    def check_finite(self):
        """Raise RunError that names the first step, and its tensor, that was not finite."""
        counts, (names, weights) = self.finite_counts.tolist(), zip(*self.model.named_parameters())
        step = min(counts)
        if step < self.step_in_epoch:
            names = ["the loss", *(f"the gradient of {name}" for name in names)]
            bad_tensor = names[counts.index(step)]
        else:
            finite = [*torch.stack(torch._foreach_norm(weights)).isfinite().tolist(), False]
            step, bad_tensor = self.step_in_epoch - 1, [*names, None][finite.index(False)]
        if bad_tensor:
            place = f"step {step + 1} of epoch {self.epoch + 1}, lr {self.lrs[step]:.4g}"
            raise RunError(f"{place}: {bad_tensor} is not finite; is the lr too high?")

    def state_dict(self):
        """Position, totals, weights and optimizers; raises RunError if the epoch is not finite."""
        if self.step_in_epoch:
            self.check_finite()
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        return {
            "epoch": self.epoch, "step_in_epoch": self.step_in_epoch, "totals": self.totals,
            "model": self.model.state_dict(), "optimizers": optimizers,
        }  # fmt: skip

    def load_state_dict(self, state):
        """Copy a state_dict into this trainer, from any device."""
        self.epoch, self.step_in_epoch = state["epoch"], state["step_in_epoch"]
        self.totals.copy_(state["totals"])
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def loss_and_accuracy(logits, labels):
    """Mean cross entropy, and accuracy in percent, of logits (N, num_classes)."""
    accuracy = 100 * (logits.argmax(1) == labels).sum().item() / len(labels)
    return F.cross_entropy(logits, labels).item(), accuracy


def save_checkpoint(path, model, dataset, config, epoch, test_accuracy, train_state=None):
    """Write weights and what scripts need to use them; last.pt has `train_state` to resume from."""
    ckpt = {
        "model": {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()},
        "model_config": model.config, "class_names": list(dataset.class_names),
        "mean": list(dataset.mean), "std": list(dataset.std),
        "config": config, "epoch": epoch, "test_accuracy": test_accuracy,
    }  # fmt: skip
    if train_state is not None:
        ckpt["train_state"] = train_state
    ckpt["sha256"] = sha256(ckpt)
    buffer = io.BytesIO()  # torch.save reports a full disk as a RuntimeError
    torch.save(ckpt, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_checkpoint(path, device):
    """(model in eval mode on `device`, checkpoint dict); runs no code from the file.

    Raises UsageError for a file that is missing, damaged or not a checkpoint of this project.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UsageError(f"{path}: {error.strerror}; `python train.py` writes best.pt") from None
    except Exception:  # pickle, zip and torch raise anything for a foreign file
        raise UsageError(f"{path} is not a checkpoint, or a damaged one") from None
    try:
        model = model_from_checkpoint(ckpt)
    except Exception as error:  # any value may be in any place
        reason = f"missing {error}" if isinstance(error, KeyError) else first_line(error)
        raise UsageError(f"{path} is not a valid checkpoint of this project: {reason}") from None
    return model.to(device).eval(), ckpt


def model_from_checkpoint(ckpt):
    """The model of a checkpoint dict; raises any exception where its parts do not fit."""
    if sha256({k: v for k, v in ckpt.items() if k != "sha256"}) != ckpt["sha256"]:
        raise ValueError("its sha256 does not match its content")
    weights, names, stats = ckpt["model"], ckpt["class_names"], [*ckpt["mean"], *ckpt["std"]]
    sizes = ckpt["model_config"]
    valid = {
        "sizes": sizes["depth"] <= len(weights) and sizes["image_size"] == 32,
        "weights": all(w.dtype == torch.float32 and w.isfinite().all() for w in weights.values()),
        "mean and std": len(stats) == 6 and all(0 <= value < 1 for value in stats),
        "class names": len(names) == sizes["num_classes"] and all(type(n) is str for n in names),
        "data": type(ckpt["config"]["data"]) is str,
        "epoch": type(ckpt["epoch"]) is int,
    }
    if not all(valid.values()):
        raise ValueError(f"invalid {', '.join(name for name, yes in valid.items() if not yes)}")
    with torch.device("meta"):  # sizes are held to the weights before any memory is taken
        model = ViT(**sizes)
    model.load_state_dict(weights, assign=True)
    return model


class Run:
    """A training run and its files in `run_dir`, from `ckpt` if given; last.pt is written last."""

    def __init__(self, trainer, run_dir, config, ckpt=None):
        self.trainer, self.run_dir, self.config = trainer, run_dir, config
        self.split, dist = "val" if config["val_split"] else "test", trainer.runtime.dist
        self.is_main_process, self.resumed = dist.rank == 0, ckpt is not None
        self.resume_command = f"{dist.launch_command()} train.py --resume {run_dir}"
        self.save_every = config["save_every"] or math.inf
        self.total_steps = min(trainer.schedule.total_steps, config["max_steps"] or math.inf)
        self.history, self.elapsed_before = [], 0.0
        if ckpt:
            state = ckpt["train_state"]
            trainer.averaged_model.load_state_dict(ckpt["model"])
            trainer.load_state_dict(state["trainer"])
            self.history, self.elapsed_before = list(state["history"]), 0.0 + state["seconds"]
        self.best = max((row[f"{self.split}_accuracy"] for row in self.history), default=0.0)
        self.step = trainer.epoch * trainer.steps_per_epoch + trainer.step_in_epoch
        if len(self.history) != trainer.epoch:
            raise ValueError("its history does not have a row for each epoch")

    def fit(self):
        """Train, evaluate and save every epoch; returns the history, a dict an epoch.

        Raises Interrupted after SIGINT or SIGTERM, at the end of the running step.
        """
        trainer, loss = self.trainer, f"{self.split} loss"
        columns = "epoch", "lr", "momentum", "train loss", "acc %", loss, "acc %"
        print(ROW.format(*columns, "seconds"), flush=True)
        with SignalHandler() as signals:
            if self.is_main_process and not self.resumed:
                self.save()
            while (steps := self.total_steps - trainer.epoch * trainer.steps_per_epoch) > 0:
                steps = min(trainer.steps_per_epoch, steps)
                self.history.append(self.train_and_evaluate(steps, signals))
                self.log_and_save(self.history[-1])
        if signals.signum:
            raise Interrupted(signals.signum, f"{self.run_dir} is finished")
        return self.history

    def train_and_evaluate(self, num_steps, signals):
        """The rest of the present epoch: a row of the history."""
        trainer, self.started = self.trainer, time.perf_counter() - self.elapsed_before
        epoch, self.elapsed_before = trainer.epoch, 0.0
        first_step = epoch * trainer.steps_per_epoch
        lr, momentum = trainer.schedule(first_step)
        progress = ProgressBar(f"epoch {epoch + 1}/{trainer.recipe.epochs}", num_steps)

        def status():
            i, N = trainer.step_in_epoch, len(trainer.dataset.train_images)
            loss, correct = (trainer.totals / min(i * trainer.recipe.batch_size, N)).tolist()
            left = (time.perf_counter() - self.started) / i * (self.total_steps - first_step - i)
            return f"loss {loss:.3f}, {100 * correct:.1f} %, run {left / 60:.0f} min left"

        def after_step():
            step = first_step + trainer.step_in_epoch
            progress.update(trainer.step_in_epoch, status)
            if self.is_main_process and (signals.signum or step % self.save_every == 0):
                self.save()
            if self.is_main_process and signals.signum:
                progress.clear()
                message = f"step {step} of {self.total_steps} is saved, resume with: "
                raise Interrupted(signals.signum, message + self.resume_command)

        try:
            train_loss, train_accuracy = trainer.train_epoch(num_steps, after_step)
            progress.clear()
            args = trainer.averaged_model, trainer.normalize, trainer.dataset.test_images
            logits = trainer.runtime.predict(*args)
        except RunError as error:
            if signals.signum and not self.is_main_process:
                raise Interrupted(signals.signum, "rank 0 says how to resume") from None
            raise RunError(f"{error}; last.pt is intact: {self.resume_command}") from None
        loss, accuracy = loss_and_accuracy(logits, trainer.dataset.test_labels)
        return {
            "epoch": epoch + 1, "lr": lr, "momentum": momentum,
            "train_loss": train_loss, "train_accuracy": train_accuracy,
            f"{self.split}_loss": loss, f"{self.split}_accuracy": accuracy,
            "seconds": time.perf_counter() - self.started,
        }  # fmt: skip

    def log_and_save(self, row):
        """Print a row of the history; write best.pt, history.csv and last.pt."""
        formats = ("d", ".6f", ".4f", ".4f", ".2f", ".4f", ".2f", ".2f")
        cells = [f"{value:{spec}}" for value, spec in zip(row.values(), formats)]
        print(ROW.format(*cells), flush=True)
        trainer, accuracy = self.trainer, row[f"{self.split}_accuracy"]
        if accuracy > self.best or len(self.history) == 1:
            print(f"      accuracy improved from {self.best:.2f} to {accuracy:.2f}, saving best.pt")
            self.best = accuracy
            if self.is_main_process:
                args = trainer.dataset, self.config, row["epoch"], accuracy
                save_checkpoint(self.run_dir / "best.pt", trainer.averaged_model, *args)
                with atomic_write(self.run_dir.parent.parent / "best.pt") as temporary:
                    shutil.copyfile(self.run_dir / "best.pt", temporary)
        if self.is_main_process:
            write_csv(self.run_dir / "history.csv", self.history)
            self.save()

    def save(self):
        """Write last.pt, from which the run resumes; any rank's state is every rank's."""
        trainer, mid_epoch = self.trainer, self.trainer.step_in_epoch > 0
        seconds = time.perf_counter() - self.started if mid_epoch else 0.0
        state = {"trainer": trainer.state_dict(), "history": self.history, "seconds": seconds}
        last = self.history[-1] if self.history and not mid_epoch else {}
        accuracy = last.get(f"{self.split}_accuracy")
        args = trainer.averaged_model, trainer.dataset, self.config, len(self.history), accuracy
        save_checkpoint(self.run_dir / "last.pt", *args, state)
