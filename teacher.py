"""Train a CNN on the training images and write its logits for them, for the ViT to distill.

    python teacher.py                       # writes teacher.npz
    python train.py --teacher teacher.npz   # the CNN's soft targets take the place of labels

The CNN sees the training images only. What it makes of each, upright and mirrored, is one row of a
table, so distillation costs a training nothing. Hinton et al. 2015, arXiv:1503.02531.
"""

from dataclasses import replace
from pathlib import Path

from cli import (
    Parser, ProgressBar, add_data_arguments, positive_int, printable, run_script, seed_int,
    writable_dir, writable_file,
)  # fmt: skip

import torch
import torch.nn.functional as F
from torch import nn

import data
from runtime import Runtime, tune_malloc
from schedule import Recipe
from trainer import Trainer, loss_and_accuracy

TEACHER = Recipe(
    epochs=14, batch_size=256, max_lr=0.015, pct_start=0.2, optimizer="muon", adamw_lr_scale=0.3,
    beta2=0.99, weight_decay=0.05, crop_padding=3, flip_p=0.5, cutout_p=0.5, cutout_size=8,
)  # fmt: skip


class CNN(nn.Module):
    """Normalized float images (B, 3, S, S) to logits (B, num_classes), by seven convolutions."""

    def __init__(self, num_classes, widths=(32, 64, 128, 256)):
        super().__init__()
        conv = lambda c, out: nn.Conv2d(c, out, kernel_size=3, padding=1, bias=False)
        self.config = {"num_classes": num_classes, "widths": widths}
        self.conv, self.norm = conv(3, widths[0]), nn.BatchNorm2d(widths[0])
        pairs = list(zip(widths, widths[1:]))
        self.convs1 = nn.ModuleList(conv(c, out) for c, out in pairs)
        self.norms1 = nn.ModuleList(nn.BatchNorm2d(out) for _, out in pairs)
        self.convs2 = nn.ModuleList(conv(out, out) for _, out in pairs)
        self.norms2 = nn.ModuleList(nn.BatchNorm2d(out) for _, out in pairs)
        self.head = nn.Linear(widths[-1], num_classes, bias=False)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))  # (B, 3, 32, 32) -> (B, 32, 32, 32)
        layers = self.convs1, self.norms1, self.convs2, self.norms2
        for conv1, norm1, conv2, norm2 in zip(*layers):  # -> 64 x 16x16 -> 128 x 8x8 -> 256 x 4x4
            x = F.relu(norm1(F.max_pool2d(conv1(x), 2)))
            x = x + F.relu(norm2(conv2(x)))
        return self.head(x.amax((2, 3)))  # (B, 256, 4, 4) -> (B, 256) -> (B, num_classes)


class AutocastRuntime(Runtime):
    """Plain PyTorch for any network; batch norm keeps its statistics in float32."""

    def logits(self, model, images):
        """float32 logits (B, num_classes) of normalized float32 images (B, 3, S, S)."""
        mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=mixed):
            return model(images.to(memory_format=torch.channels_last)).float()


def train(trainer):
    """Train to the end of the recipe, with a line for each epoch."""
    epochs, steps = trainer.recipe.epochs, trainer.steps_per_epoch
    progress = ProgressBar("training", epochs * steps)
    after_step = lambda: progress.update(trainer.epoch * steps + trainer.step_in_epoch)
    print(f"{'epoch':>5} {'train loss':>10} {'acc %':>7}", flush=True)
    for epoch in range(epochs):
        loss, accuracy = trainer.train_epoch(steps, after_step)
        progress.clear()
        print(f"{epoch + 1:>5} {loss:>10.4f} {accuracy:>7.2f}", flush=True)


def parse_args():
    parser = Parser(description="Train a CNN and write its logits for the training images.")
    add = parser.add_argument
    add("--epochs", type=positive_int, default=TEACHER.epochs, help="of the CNN's training")
    add_data_arguments(parser)
    help = "leave out the N training images that train.py holds out with the same flag"
    add("--val-split", type=positive_int, metavar="N", help=help)
    add("--seed", type=seed_int, default=1, help="of weights, order of images and augmentation")
    add("--out", type=Path, default=Path("."), metavar="DIR", help="directory of teacher.npz")
    return parser.parse_args()


def main():
    args = parse_args()
    path = writable_file(writable_dir(args.out) / "teacher.npz")
    runtime = AutocastRuntime(kernels="torch")
    tune_malloc()
    print(f"device   {runtime.describe()}", flush=True)
    dataset = data.load(args.data, args.data_dir, runtime.device)
    dataset = data.train_val_split(dataset, args.val_split) if args.val_split else dataset
    counts = f"{len(dataset.train_images):,} train, {len(dataset.test_images):,} evaluated"
    print(f"dataset  {printable(dataset.name)}: {counts}\n")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        model = CNN(dataset.num_classes).to(runtime.device)
    batch_size = min(TEACHER.batch_size, len(dataset.train_images))
    recipe = replace(TEACHER, epochs=args.epochs, batch_size=batch_size)
    trainer = Trainer(recipe, dataset, runtime, args.seed, model)
    train(trainer)
    model.eval()
    for images, labels, name in (
        (dataset.test_images, dataset.test_labels, "images that it has not seen"),
        (dataset.train_images, dataset.train_labels, "training images"),
    ):
        logits = runtime.predict(model, trainer.normalize, images, tta="flip")
        loss, accuracy = loss_and_accuracy(logits, labels)
        print(f"{name}: accuracy {accuracy:.2f} %, cross entropy {loss:.4f} nats", flush=True)
    data.save_teacher_logits(path, logits, dataset)
    print(f"saved {path}")


if __name__ == "__main__":
    run_script(main)
