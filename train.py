"""Train the channel-token ViT; ends with an evaluated best.pt.

    python train.py                                     # CIFAR-10, recipe default, best device
    python train.py --recipe original --data FOLDER     # the run to reproduce, on an image folder
    python train.py --runs 5 --seed 1                   # five seeds, then mean and std
    python train.py --resume runs/RUN                   # continue a stopped run with the same bits
    python train.py --init runs/RUN/last.pt             # a new run from the weights of another
    torchrun --nproc-per-node=8 train.py                # one run on eight GPUs

A run writes best.pt, last.pt, history.csv, config.json and curves.png to a folder under runs/;
best.pt beside runs/ is a copy of the one that was written last. last.pt, from which a run resumes,
is written after every epoch.
"""

import argparse
import copy
import dataclasses
import datetime
import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cli import Parser, ProgressBar, RunError, UsageError, add_data_arguments, add_runtime_arguments
from cli import atomic_write, positive_float, positive_int, printable, run_script, seed_int
from cli import parse_before_imports, writable_dir, writable_file, write_csv
from recipes import RECIPES, Recipe, with_overrides

# --- the flags ---

OVERRIDES = {"epochs": positive_int, "batch_size": positive_int, "max_lr": positive_float}
RESUME_FLAGS = ("resume", "data", "data_dir", "device")  # all that --resume goes with


def parse_args():
    """Return (args, names of the flags that were given)."""
    parser = Parser(description="Train the channel-token ViT; ends with an evaluated best.pt.")
    add = parser.add_argument
    add("--recipe", default="default", choices=RECIPES, help="settings, which other flags override")
    for name, type_ in OVERRIDES.items():
        values = ", ".join(f"{recipe} {getattr(r, name)}" for recipe, r in RECIPES.items())
        help = f"instead of the recipe's ({values})"
        add(f"--{name.replace('_', '-')}", type=type_, metavar="X", help=help)
    add("--set", action="append", metavar="NAME=VALUE", help="any setting of recipes.Recipe")
    add_data_arguments(parser)
    help = "evaluate on N training images, which are not trained on, instead of the test images"
    add("--val-split", type=positive_int, metavar="N", help=help)
    add_runtime_arguments(parser)
    add("--seed", type=seed_int, default=1, help="of weights, order of images and augmentation")
    add("--runs", type=positive_int, default=1, help="number of seeds, counted up from --seed")
    help = "begin with the weights of this file of train.py, instead of random ones"
    add("--init", type=Path, metavar="FILE", help=help)
    help = "continue a run, its folder or its last.pt, with the settings it began with"
    add("--resume", type=Path, metavar="RUN", help=help)
    add("--out", type=Path, default=Path("."), metavar="DIR", help="for runs/ and best.pt")
    args = parser.parse_args()
    # Parsed again without defaults, what is not None was given.
    absent = argparse.Namespace(**dict.fromkeys(vars(args)))
    given = parser.parse_args(namespace=absent)
    return args, [name for name, value in vars(given).items() if value is not None]


if __name__ == "__main__":
    parse_before_imports(parse_args)

import torch
import torch.nn.functional as F

import data
import plots
from augment import Normalize, augment, epoch_plan
from checkpoint import load_checkpoint, save_checkpoint, why_tensors_differ
from evaluate import loss_and_accuracy
from optim import average_weight, build_optimizers, build_schedule, set_lr_momentum
from runtime import Runtime, tune_process, versions
from vit import build_model

# --- the training ---


class Trainer:
    """Model, optimizers and schedule of a training.

    `averaged_model`, which is evaluated, is a running mean of the weights of `model`, or `model`
    itself where the recipe has no average.
    """

    def __init__(self, recipe, dataset, runtime, seed):
        count = len(dataset.train_images)
        self.recipe = recipe
        self.dataset = dataset
        self.runtime = runtime
        self.seed = seed
        self.normalize = Normalize(dataset.mean, dataset.std, runtime.device)
        self.steps_per_epoch = math.ceil(count / recipe.batch_size)
        self.schedule = build_schedule(recipe, self.steps_per_epoch)
        self.totals = torch.zeros(2, device=runtime.device)  # sum of losses, correct predictions

        # Of the present epoch, set by begin_epoch.
        self.epoch = None
        self.plan = None
        self.lrs = None
        self.momenta = None

        self.model = build_model(recipe, dataset.num_classes, seed, runtime.device)
        runtime.prepare(self.model)
        # Machines may differ in the last bits of an initialization.
        runtime.ranks.broadcast(self.model.parameters())
        self.averaged_model = self.model
        if recipe.weight_avg_frac:
            self.averaged_model = copy.deepcopy(self.model)

        # On a GPU, Triton kernels make the whole step and hold the optimizers' state.
        # fused_step is None where PyTorch trains.
        self.fused_step = None
        if runtime.finds_triton():
            from kernels.step import checked_step  # Triton is not on every platform

            self.fused_step = checked_step(self)
            if self.fused_step is None:
                runtime.kernels = "torch"  # they fail here: the next training need not try
        self.optimizers = []
        if self.fused_step is None:
            self.optimizers = build_optimizers(recipe, self.model)

    def begin_epoch(self, epoch, lrs=None, momenta=None):
        """Draw the plan of epoch `epoch`, counted from 0.

        lrs and momenta have a value for each of its steps; by default they are the schedule's.
        """
        if lrs is None:
            lrs = []
            momenta = []
            for i in range(self.steps_per_epoch):
                lr, momentum = self.schedule(epoch * self.steps_per_epoch + i)
                lrs.append(lr)
                momenta.append(momentum)
        count = len(self.dataset.train_images)
        size = self.dataset.train_images.shape[-1]
        device = self.runtime.device
        self.plan = epoch_plan(self.recipe, count, size, self.seed, epoch, device)
        self.epoch = epoch
        self.lrs = lrs
        self.momenta = momenta
        if self.fused_step is not None:
            self.fused_step.begin_epoch(epoch, self.plan, lrs, momenta)

    def step(self, i):
        """Train on batch i of the epoch's plan; adds its loss and correct predictions to `totals`.

        The Triton kernels are the same step, written once more: they do not see a change made here,
        and `--kernels torch` trains without them.

        Raises RunError for a loss that is not finite, on a CPU: on a GPU end_epoch does, since to
        read the loss would be to wait for the device.
        """
        if self.fused_step is not None:
            self.fused_step.step(i)
            return
        recipe = self.recipe
        dataset = self.dataset
        ranks = self.runtime.ranks

        # This rank's share of the batch, b images of the dataset, augmented as the plan says.
        batch = self.plan.at(slice(i * recipe.batch_size, (i + 1) * recipe.batch_size))
        batch_size = len(batch.indices)  # the last one is smaller
        start, stop = ranks.shard(batch_size)
        rows = batch.at(slice(start, stop))
        images = dataset.train_images.index_select(0, rows.indices)  # (b, 3, 32, 32), uint8
        images = augment(images, rows, recipe, self.normalize)  # (b, 3, 32, 32), float32
        labels = dataset.train_labels[rows.indices]  # (b,)

        # Forward and backward: gradients of the mean loss over the whole batch.
        logits = self.runtime.logits(self.model, images)  # (b, K)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        self.model.zero_grad()
        (loss / batch_size).backward()

        # One all_reduce a step sums gradients, losses and correct predictions over ranks.
        params = list(self.model.parameters())
        grads = [p.grad for p in params]
        correct = (logits.detach().argmax(1) == labels).sum()
        stats = torch.stack([loss.detach(), correct])
        if ranks.world_size > 1:
            all_reduce_list(ranks, [*grads, stats])
        self.totals += stats
        if self.runtime.device.type == "cpu" and not stats[0].isfinite():
            raise self.not_finite_error("the loss", i)

        # Update the weights, then their average.
        with torch.no_grad():
            if recipe.l1:  # the gradient of the L1 norm is the sign
                torch._foreach_add_(grads, torch._foreach_sign(params), alpha=recipe.l1)
            set_lr_momentum(self.optimizers, self.lrs[i], self.momenta[i], recipe.adamw_lr_scale)
            for optimizer in self.optimizers:
                optimizer.step()
            if recipe.weight_avg_frac:
                steps_done = self.epoch * self.steps_per_epoch + i + 1
                weight = average_weight(recipe, steps_done)
                torch._foreach_lerp_(list(self.averaged_model.parameters()), params, weight)

    def end_epoch(self):
        """Return mean cross entropy and accuracy in percent over the steps of the epoch.

        Raises RunError for a loss or a weight that is not finite.
        """
        self.check_finite()
        loss, correct = self.totals.tolist()
        self.totals.zero_()
        count = len(self.dataset.train_images)
        return loss / count, 100 * correct / count

    def check_finite(self):
        """Raise RunError if the sum of losses or a weight is not finite.

        It names the last step of the epoch; it may have happened in any step before.
        """
        last = self.steps_per_epoch - 1
        if not self.totals.isfinite().all():
            raise self.not_finite_error("the loss", last)
        for name, p in self.model.named_parameters():
            if not p.isfinite().all():
                raise self.not_finite_error(name, last)

    def not_finite_error(self, name, i):
        """Return the RunError about what is not finite after step i of the epoch."""
        place = f"epoch {self.epoch + 1}, step {i + 1}, lr {self.lrs[i]:.4g}"
        return RunError(f"{place}: {name} is not finite; is the lr too high?")

    def state_dict(self):
        """Return weights, exp_avg and exp_avg_sq: three dicts {name: tensor}.

        exp_avg_sq has the parameters of AdamW alone. They are the same whether Triton kernels or
        PyTorch train. The tensors are no copies: training changes them.
        """
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        if self.fused_step is not None:
            return {"weights": weights, **self.fused_step.named_state()}
        exp_avg = {}
        exp_avg_sq = {}
        for name, p in self.model.named_parameters():
            for optimizer in self.optimizers:
                state = optimizer.state.get(p, {})
                if "exp_avg" in state:
                    exp_avg[name] = state["exp_avg"]
                if "exp_avg_sq" in state:
                    exp_avg_sq[name] = state["exp_avg_sq"]
        return {"weights": weights, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}

    def load_state_dict(self, state, steps_done):
        """Copy a state_dict, taken after `steps_done` steps, into this trainer, from any device."""
        for key, tensors in self.state_dict().items():
            for name, tensor in tensors.items():
                tensor.copy_(state[key][name])
        for optimizer in self.optimizers:
            for values in optimizer.state.values():
                if "step" in values:  # AdamW's count
                    values["step"].fill_(steps_done)


def all_reduce_list(ranks, tensors):
    """Sum a list of tensors over ranks, in place, in one all_reduce."""
    flat = torch.cat([t.flatten() for t in tensors])
    ranks.all_reduce_sum(flat)
    pieces = flat.split([t.numel() for t in tensors])
    for tensor, piece in zip(tensors, pieces):
        tensor.copy_(piece.view(tensor.shape))


# --- a run: epochs, their log and files ---

HEAD = "{:>5} {:>10} {:>8} {:>10} {:>9} {:>9} {:>8} {:>7}"
ROW = "{:>5} {:>10.6f} {:>8.4f} {:>10.4f} {:>9.2f} {:>9.4f} {:>8.2f} {:>7.2f}"


@dataclass
class Run:
    """A training and its files; the history has a dict for each epoch that is done."""

    trainer: Trainer
    folder: Path | None  # None for other ranks than 0, which write nothing
    config: dict
    history: list

    @property
    def split(self):
        """What is evaluated: "test", or "val" for held-out training images."""
        return "val" if self.config["val_split"] else "test"


def train(run):
    """Train from epoch len(run.history) to the last; evaluate, log and save after each."""
    trainer = run.trainer
    dataset = trainer.dataset
    num_epochs = trainer.recipe.epochs
    num_steps = trainer.steps_per_epoch
    if len(run.history) == num_epochs:
        print("the run is finished; --init trains its weights on in a new run")
        return
    loss_head = f"{run.split} loss"
    heads = ["epoch", "lr", "momentum", "train loss", "acc %", loss_head, "acc %", "seconds"]
    print(HEAD.format(*heads), flush=True)

    for epoch in range(len(run.history), num_epochs):
        started = time.perf_counter()

        # Train on every image once.
        trainer.begin_epoch(epoch)
        with ProgressBar(f"epoch {epoch + 1}/{num_epochs}", num_steps) as progress:
            for i in range(num_steps):
                trainer.step(i)
                progress.update(i + 1, partial(progress_text, trainer, epoch, i, started))
        train_loss, train_accuracy = trainer.end_epoch()

        # Evaluate the averaged weights.
        model = trainer.averaged_model
        logits = trainer.runtime.predict(model, trainer.normalize, dataset.test_images)
        loss, accuracy = loss_and_accuracy(logits, dataset.test_labels)

        # Log it, with the lr and momentum that the epoch began with, and save.
        lr, momentum = trainer.schedule(epoch * num_steps)
        row = {
            "epoch": epoch + 1,
            "lr": lr,
            "momentum": momentum,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            f"{run.split}_loss": loss,
            f"{run.split}_accuracy": accuracy,
            "seconds": time.perf_counter() - started,
        }
        run.history.append(row)
        print(ROW.format(*row.values()), flush=True)
        save_epoch(run)


def progress_text(trainer, epoch, i, started):
    """Return loss and accuracy of the epoch so far, and the time left of the run."""
    steps_done = i + 1
    images = min(steps_done * trainer.recipe.batch_size, len(trainer.dataset.train_images))
    loss, correct = (trainer.totals / images).tolist()
    steps_left = (trainer.recipe.epochs - epoch) * trainer.steps_per_epoch - steps_done
    minutes = (time.perf_counter() - started) / steps_done * steps_left / 60
    return f"loss {loss:.3f}, {100 * correct:.1f} %, run {minutes:.0f} min left"


def save_epoch(run):
    """Write the files of an epoch; last.pt comes last, so an epoch it counts has all its files."""
    trainer = run.trainer
    model = trainer.averaged_model
    accuracies = [row[f"{run.split}_accuracy"] for row in run.history]
    accuracy = accuracies[-1]
    before = accuracies[:-1]
    is_best = not before or accuracy > max(before)
    if not before:
        print(f"      accuracy {accuracy:.2f}, saving best.pt")
    elif is_best:
        print(f"      accuracy improved from {max(before):.2f} to {accuracy:.2f}, saving best.pt")
    if run.folder is None:
        return

    epoch = len(run.history)
    if is_best:
        path = run.folder / "best.pt"
        save_checkpoint(path, model, trainer.dataset, run.config, epoch, accuracy)
        runs = Path(os.path.abspath(run.folder)).parent
        if runs.name == "runs":  # a run that was moved elsewhere changes nothing around it
            with atomic_write(runs.parent / "best.pt") as temporary:
                shutil.copyfile(path, temporary)
    write_csv(run.folder / "history.csv", run.history)
    state = {**trainer.state_dict(), "history": run.history}
    path = run.folder / "last.pt"
    save_checkpoint(path, model, trainer.dataset, run.config, epoch, accuracy, state)


def print_result(run):
    """Print the accuracy of a run that is finished, and draw its curves."""
    trainer = run.trainer
    images = "test" if run.split == "test" else "held-out"
    key = f"{run.split}_accuracy"
    last = run.history[-1]
    best = max(run.history, key=lambda row: row[key])
    print(f"last epoch: {last[key]:.2f} % on {images} images")
    if len(run.history) > 1:
        line = f"best epoch: {best[key]:.2f} %"
        print(f"{line} (epoch {best['epoch']}, the best of all, so too high)")
    if run.folder is not None:
        title = f"{trainer.dataset.name}, recipe {run.config['recipe']}, seed {trainer.seed}"
        figure = plots.training_curves(
            run.history, trainer.schedule, trainer.steps_per_epoch, title, run.split
        )
        plots.save_figure(figure, run.folder / "curves.png")


# --- the script ---


def main():
    args, given = parse_args()
    if args.resume:
        runs = [resume_run(args, given)]
    else:
        runs = new_runs(args)
    histories = []
    for run in runs:
        try:
            train(run)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(how_to_resume(run)) from None
        print_result(run)
        histories.append(run.history)
    if len(histories) > 1:
        print(summarize(histories, run.trainer.dataset.name))
        print(f"best.pt is of seed {run.trainer.seed}, the last one")
    run.trainer.runtime.ranks.leave()


def new_runs(args):
    """Yield a new Run for each seed; its trainer is made when its turn comes."""
    assignments = list(args.set or [])
    for name in OVERRIDES:
        value = getattr(args, name)
        if value is not None:
            assignments.append(f"{name}={value}")
    recipe = with_overrides(RECIPES[args.recipe], assignments)
    runtime = Runtime(args.device, args.precision, args.kernels, distributed=True)
    tune_process(runtime.device)
    silence_other_ranks(runtime)
    writable_dir(args.out / "runs")
    writable_file(args.out / "best.pt")
    initial = None
    if args.init:
        initial = load_checkpoint(args.init, "cpu")
    print_header(runtime, args.recipe, recipe)
    dataset, data_sha256 = load_dataset(recipe, args.data, args.data_dir, args.val_split, runtime)

    for seed in range(args.seed, args.seed + args.runs):
        trainer = Trainer(recipe, dataset, runtime, seed)
        if initial is not None:
            load_weights(*initial, trainer)
        config = {
            "recipe": args.recipe,
            "settings": dataclasses.asdict(recipe),
            "seed": seed,
            "data": dataset.spec,
            "data_dir": os.path.abspath(args.data_dir),
            "data_sha256": data_sha256,
            "val_split": args.val_split,
            "kernels": args.kernels,
            "precision": runtime.precision,
            "init": str(args.init) if args.init else None,
            **environment(trainer),
        }
        folder = None
        if runtime.ranks.rank == 0:
            name = f"{args.recipe}-{dataset.name[:40]}-seed{seed}".replace(" ", "-")
            folder = make_run_dir(args.out / "runs", name)
            write_config(folder, config)
        print(f"\nseed {seed}, {dataset.name}, {printable(folder)}")
        yield Run(trainer, folder, config, history=[])


def write_config(folder, config):
    """Write config.json, which says how a run is made; checkpoints have the same.

    What a run depends on beside its settings (see environment) is that of its start.
    """
    with atomic_write(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_weights(model, ckpt, trainer):
    """Copy the weights of --init into a trainer; raises UsageError if they do not fit."""
    if ckpt["class_names"] != list(trainer.dataset.class_names):
        raise UsageError(f"--init: its classes are not those of {trainer.dataset.name}")
    if model.config != trainer.model.config:
        raise UsageError("--init: its network has other sizes")
    trainer.model.load_state_dict(model.state_dict())


def follow_link(path):
    """Return where a link leads, as the run lies there; links above a path stay as they are."""
    return path.resolve() if path.is_symlink() else path


def resume_run(args, given):
    """Return the Run of a folder or its last.pt, to go on with the bits of an unbroken run.

    Raises UsageError for other flags, other images and a file that does not fit.
    """
    for name in given:
        if name not in RESUME_FLAGS:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{flag}: a resumed run continues with the settings that it began with"
            )
    last = follow_link(args.resume)
    if last.is_dir():
        last = follow_link(last / "last.pt")
    if not last.is_file():
        raise UsageError(f"--resume {args.resume}: no last.pt there, which each epoch writes")
    _, ckpt = load_checkpoint(last, "cpu")
    config = ckpt["config"]
    state = ckpt.get("train_state")
    if type(state) is not dict:
        raise UsageError(f"{last} has weights only; the state of its run is in last.pt")
    recipe = recipe_of(config, last)
    writable_dir(last.parent, "--resume")

    device = args.device if "device" in given else config.get("device")
    runtime = Runtime(device, config["precision"], config["kernels"], distributed=True)
    tune_process(runtime.device)
    silence_other_ranks(runtime)
    print_header(runtime, config["recipe"], recipe)
    spec = args.data if "data" in given else config["data"]
    data_dir = args.data_dir if "data_dir" in given else config["data_dir"]
    dataset, data_sha256 = load_dataset(recipe, spec, data_dir, config["val_split"], runtime)
    if data_sha256 != config["data_sha256"]:
        raise UsageError(f"{last} was trained on other images, labels or classes than {spec} has")

    trainer = Trainer(recipe, dataset, runtime, config["seed"])
    reason = why_state_does_not_fit(ckpt, trainer)
    if reason:
        raise UsageError(f"{last} does not fit the run that it names: {reason}")
    history = state["history"]
    trainer.load_state_dict(state, len(history) * trainer.steps_per_epoch)
    trainer.averaged_model.load_state_dict(ckpt["model"])
    for name, value in environment(trainer).items():
        if config.get(name) != value:
            line = f"warning: the bits may differ: {name} was {config.get(name)} and is {value}"
            print(line, file=sys.stderr)
    # From now on the files of the run name the images and the device where they are now.
    config["data"] = dataset.spec
    config["data_dir"] = os.path.abspath(data_dir)
    config["device"] = runtime.device.type
    folder = None
    if runtime.ranks.rank == 0:
        folder = last.parent
        write_config(folder, config)
    where = f"{printable(folder)}, resumed after epoch {len(history)}"
    print(f"\nseed {trainer.seed}, {dataset.name}, {where}")
    return Run(trainer, folder, config, history)


# What new_runs writes to a config, and resume_run needs.
CONFIG_TYPES = {
    "recipe": str,
    "settings": dict,
    "seed": int,
    "data": str,
    "data_dir": str,
    "data_sha256": str,
    "val_split": int | None,
    "kernels": str,
    "precision": str,
    "device": str,
}


def recipe_of(config, last):
    """Return the Recipe of a run's config; raises UsageError that names what is wrong in it."""
    for name, type_ in CONFIG_TYPES.items():
        if name not in config or not isinstance(config[name], type_):
            raise UsageError(f"{last}: its config has no valid {name}")
    is_valid = {
        "seed": 0 <= config["seed"] < 2**63,
        "val_split": config["val_split"] is None or config["val_split"] >= 1,
        "kernels": config["kernels"] in ("auto", "triton", "torch"),
        "precision": config["precision"] in ("fp32", "bf16"),
    }
    for name, valid in is_valid.items():
        if not valid:
            raise UsageError(f"{last}: its config has no valid {name}")
    fields = {field.name for field in dataclasses.fields(Recipe)}
    if config["settings"].keys() != fields:
        raise UsageError(f"{last}: its settings are not those of recipes.Recipe")
    try:
        return Recipe(**config["settings"])
    except ValueError as error:
        raise UsageError(f"{last}: {error}") from None


def why_state_does_not_fit(ckpt, trainer):
    """Return a line about what of a last.pt is not as a run of this trainer leaves it, or None."""
    state = ckpt["train_state"]
    for key, expected in trainer.state_dict().items():
        reason = why_tensors_differ(state.get(key), expected)
        if reason:
            return f"{key}: {reason}"
    history = state.get("history")
    if type(history) is not list or len(history) != ckpt["epoch"]:
        return "its history does not have a row for each epoch"
    if not 1 <= len(history) <= trainer.recipe.epochs:
        return f"it has {len(history)} epochs of {trainer.recipe.epochs}"
    split = "val" if ckpt["config"]["val_split"] else "test"
    names = ["epoch", "lr", "momentum", "train_loss", "train_accuracy"]
    names += [f"{split}_loss", f"{split}_accuracy", "seconds"]
    for row in history:
        if type(row) is not dict or list(row) != names:
            return f"a row of its history does not have {', '.join(names)}"
        if not all(type(value) in (int, float) for value in row.values()):
            return "a row of its history has values that are no numbers"
    return None


def how_to_resume(run):
    """Return what Ctrl-C prints."""
    if run.folder is None:
        return "rank 0 says how to resume"
    if not (run.folder / "last.pt").exists():
        return "nothing is saved before the end of the first epoch"
    command = ["python"]
    if run.trainer.runtime.ranks.world_size > 1:
        command = ["torchrun", f"--nproc-per-node={os.environ['LOCAL_WORLD_SIZE']}"]
    command += [sys.argv[0], "--resume", str(run.folder)]
    return f"resume with: {shlex.join(command)}"


def silence_other_ranks(runtime):
    """Let rank 0 alone print to stdout."""
    if runtime.ranks.rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)


def print_header(runtime, name, recipe):
    """Print versions, device and all settings of the recipe."""
    found = ", ".join(f"{key} {value}" for key, value in versions().items())
    print(f"{found}, commit {git_commit()}")
    print(f"device   {runtime.describe()}")
    fields = []
    for key, value in dataclasses.asdict(recipe).items():
        if type(value) is float:
            value = f"{value:.6g}"
        fields.append(f"{key}={value}")
    text = f"recipe   {name}: {', '.join(fields)}"
    print(textwrap.fill(text, 79, subsequent_indent=" " * 9), flush=True)


def load_dataset(recipe, spec, data_dir, val_split, runtime):
    """Return the dataset of a run, and its fingerprint before any split."""
    # Rank 0 goes first. The others load what it has loaded, which for "auto" may be shapes, and
    # find what it has downloaded and decoded.
    rank = runtime.ranks.rank
    loaded = None
    try:
        if rank == 0:
            dataset = data.load(spec, data_dir, runtime.device)
            loaded = dataset.spec
    finally:  # after an error too: the others wait for this
        loaded = runtime.ranks.broadcast_object(loaded)
    if loaded is None:
        raise RunError("rank 0 could not load the images")
    if rank > 0:
        dataset = data.load(loaded, data_dir, runtime.device)
    fingerprint = dataset.fingerprint()
    kind = "test"
    if val_split:
        dataset = data.train_val_split(dataset, val_split)
        kind = "held-out"
    train = f"{len(dataset.train_images):,} train"
    test = f"{len(dataset.test_images):,} {kind}"
    print(f"dataset  {dataset.name}: {train}, {test}, {dataset.num_classes} classes", flush=True)
    warn_of_large_batch(recipe, dataset)
    return dataset, fingerprint


def warn_of_large_batch(recipe, dataset):
    """Print a line if the recipe's batches are larger than the dataset."""
    count = len(dataset.train_images)
    if recipe.batch_size > count:
        print(f"warning: batch_size {recipe.batch_size}, but a batch has all {count:,} images")


def environment(trainer):
    """Return what the last bits of a run depend on beside its settings, by name."""
    kernels = "PyTorch" if trainer.fused_step is None else "Triton kernels"
    return {
        "device": trainer.runtime.device.type,
        "runs_on": f"{trainer.runtime.describe()}, {kernels}",
        "versions": versions(),
        "git_commit": git_commit(),
    }


def make_run_dir(runs, name):
    """Make and return a new folder for a run."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    run_dir = runs / f"{stamp}-{name}"
    number = 1
    while True:
        try:
            run_dir.mkdir(parents=True)
            return run_dir
        except FileExistsError:  # another run began in the same second
            number += 1
            run_dir = runs / f"{stamp}-{name}-{number}"


def summarize(histories, dataset_name):
    """Return mean and std of last and best epoch over runs, as text."""
    key = "val_accuracy" if "val_accuracy" in histories[0][0] else "test_accuracy"
    images = "held-out" if key == "val_accuracy" else "test"
    last = [history[-1][key] for history in histories]
    best = [max(row[key] for row in history) for history in histories]
    lines = [f"\n{len(histories)} runs on {dataset_name}, accuracy on {images} images in %"]
    for name, values in (("last", last), ("best", best)):
        mean = statistics.mean(values)
        std = statistics.stdev(values)
        each = ", ".join(f"{value:.2f}" for value in values)
        lines.append(f"{name} epoch: mean {mean:.2f}, std {std:.2f} ({each})")
    return "\n".join(lines)


def git_commit():
    """Return the commit of this code, "-dirty" if files differ from it; "unknown" without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return result.stdout.strip()


if __name__ == "__main__":
    run_script(main)
