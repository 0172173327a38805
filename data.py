"""Datasets as tensors on the device: CIFAR-10, CIFAR-100, image folders, generated shapes.

    python data.py                    # statistics, and data.png: samples of the first epochs
    python data.py --data FOLDER --recipe original

A whole dataset is uint8 (N, 3, 32, 32), 184 MB for CIFAR-10: there is no loader.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from cli import (
    Parser, RunError, UsageError, add_data_arguments, atomic_write, first_line, positive_int,
    printable, run_script, seed_int, sha256, writable_dir,
)  # fmt: skip

import numpy
import torch
import torch.nn.functional as F

import plots
import sources
from augment import Normalize, augment, epoch_plan
from schedule import RECIPES

# Of the run to reproduce; `channel_mean_std` gives the same to three digits.
CIFAR10_MEAN, CIFAR10_STD = (
    (0.49139968, 0.48215841, 0.44653091), (0.24703223, 0.24348513, 0.26158784),
)  # fmt: skip
SHAPES_SEED, SPLIT_SEED = 0, 0

FALLBACK_WARNING = """
******************************************************************************
*  WARNING: THIS IS NOT CIFAR-10, which could not be loaded; see above.      *
*  Continuing with `shapes`, images that this program generates: no figure   *
*  of this run says anything about CIFAR-10. `--data cifar10` stops instead. *
******************************************************************************
"""


# --- datasets ---


@dataclass(frozen=True)
class Dataset:
    """Images uint8 (N, 3, 32, 32) and labels int64 (N,) on one device; load(spec) gives it again.

    mean and std of the training images are on the scale [0, 1], one value a channel. Masks, bool
    (N, 32, 32), mark the objects of test images; `shapes` alone has them. Logits of a teacher,
    float32 (N, K), are those of the training images.
    """

    name: str
    spec: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    class_names: tuple
    mean: tuple
    std: tuple
    test_masks: torch.Tensor | None = None
    teacher_logits: torch.Tensor | None = None

    @property
    def num_classes(self):
        return len(self.class_names)

    def fingerprint(self):
        """sha256 of all images and labels."""
        tensors = self.train_images, self.train_labels, self.test_images, self.test_labels
        return sha256(tensors)


def load(spec, data_dir, device="cpu"):
    """The Dataset of a spec: cifar10, cifar100, shapes, auto, or the path of an image folder.

    Raises UsageError for another spec or folder layout, RunError for data that cannot be loaded.
    """
    if spec == "auto":
        try:
            return load("cifar10", data_dir, device)
        except RunError as error:
            print(f"{printable(error)}\n{FALLBACK_WARNING}", file=sys.stderr, flush=True)
            spec = "shapes"
    if spec == "shapes":
        dataset = load_shapes()
    elif spec in sources.ARCHIVES:
        *tensors, class_names = sources.load_cifar(spec, Path(data_dir))
        cifar10 = CIFAR10_MEAN, CIFAR10_STD
        mean, std = cifar10 if spec == "cifar10" else channel_mean_std(tensors[0])
        dataset = Dataset(spec, spec, *tensors, class_names, mean, std)
    elif os.path.isdir(spec):
        folder = Path(spec).resolve()
        *tensors, class_names = sources.load_image_folder(folder, Path(data_dir))
        mean, std = channel_mean_std(tensors[0])
        dataset = Dataset(folder.name, str(folder), *tensors, class_names, mean, std)
    else:
        choices = ", ".join(("auto", *sources.ARCHIVES, "shapes"))
        raise UsageError(f"--data {spec}: not a folder that exists, nor one of {choices}")
    tensors = {k: v.to(device) for k, v in vars(dataset).items() if torch.is_tensor(v)}
    return replace(dataset, **tensors)


def load_shapes(num_train=50_000, num_test=10_000):
    images, labels, masks = sources.generate_shapes(num_train + num_test, SHAPES_SEED)
    train, test = slice(num_train), slice(num_train, None)
    mean, std = channel_mean_std(images[train])
    return Dataset(
        "shapes", "shapes", images[train], labels[train], images[test], labels[test],
        sources.SHAPE_NAMES, mean, std, masks[test],
    )  # fmt: skip


def train_val_split(dataset, count):
    """The Dataset whose test images are `count` training images, the same ones every time."""
    total = len(dataset.train_images)
    if count >= total:
        raise UsageError(f"--val-split {count}: {dataset.name} has {total} training images")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(SPLIT_SEED))
    order = order.to(dataset.train_images.device)
    images, labels = dataset.train_images, dataset.train_labels
    train, val = order[count:], order[:count]
    return replace(
        dataset, name=f"{dataset.name}-val{count}", test_masks=None,
        train_images=images[train], train_labels=labels[train],
        test_images=images[val], test_labels=labels[val],
    )  # fmt: skip


def save_teacher_logits(path, logits, dataset):
    """Write logits float32 (N, K) of the training images, for `load_teacher_logits`."""
    images = sha256((dataset.train_images, dataset.train_labels))
    with atomic_write(path) as temporary:
        numpy.savez(temporary, logits=logits.cpu().numpy(), images=images)


def load_teacher_logits(path, dataset):
    """The logits that teacher.py wrote for the training images of `dataset`, on their device.

    Raises UsageError for another file, and for one of other images.
    """
    try:
        with numpy.load(path) as arrays:
            logits, images = torch.from_numpy(arrays["logits"]), str(arrays["images"])
        fits = logits.shape == (len(dataset.train_labels), dataset.num_classes)
        fits = fits and logits.dtype == torch.float32 and bool(logits.isfinite().all())
    except Exception as error:  # numpy and zipfile raise anything for a foreign file
        reason = f"not a file of teacher.py: {first_line(error)}"
        raise UsageError(f"--teacher {path}: {reason}") from None
    if not fits or images != sha256((dataset.train_images, dataset.train_labels)):
        hint = "give teacher.py the same --data and --val-split"
        raise UsageError(f"--teacher {path}: not of these training images; {hint}")
    return logits.to(dataset.train_labels.device)


def load_for_checkpoint(ckpt, spec, data_dir, device):
    """The Dataset of a checkpoint, or of `spec` if it is not None; warns if its images changed."""
    known = ckpt["class_names"]
    dataset = load(spec or ckpt["config"]["data"], data_dir, device)
    if list(dataset.class_names) != known:
        has = [f"{len(names)} classes ({names[0]} ...)" for names in (known, dataset.class_names)]
        raise UsageError(f"the checkpoint has {has[0]}, {dataset.name} has {has[1]}")
    if spec is None and dataset.fingerprint() != ckpt["config"].get("data_sha256"):
        print("warning: these are not the images of the training run", file=sys.stderr)
    return dataset


def channel_mean_std(images):
    """Mean and std of each channel of uint8 (N, 3, S, S) on the scale [0, 1], tuples of floats."""
    # Integer sums are exact, so the result depends on neither order nor threads.
    total = total_of_squares = 0
    for chunk in images.split(10_000):
        values = chunk.transpose(0, 1).flatten(1).long()  # (n, 3, S, S) -> (3, n S S)
        total, total_of_squares = total + values.sum(1), total_of_squares + values.square().sum(1)
    count = images.numel() / 3
    mean = total.double() / count
    std = (total_of_squares.double() / count - mean**2).sqrt()
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def class_balanced_indices(labels, mask, count):
    """Up to `count` indices where `mask` (N,; bool) is true, one of each label in turn."""
    candidates = mask.nonzero()[:, 0]
    one_hot = F.one_hot(labels[candidates], int(labels.max()) + 1)  # (n, K)
    turn = (one_hot.cumsum(0) * one_hot).sum(1)  # 1 for the first image of a class
    order = (turn * one_hot.shape[1] + labels[candidates]).argsort()
    return candidates[order[:count]]


# --- the script ---


def describe(dataset):
    """Images of each class in train and test, mean and std of each channel, as text."""
    names = [printable(name) for name in dataset.class_names]
    line = f"{{:<{max(map(len, names))}}} {{:>7}} {{:>7}}".format
    splits = dataset.train_labels, dataset.test_labels
    counts = [labels.bincount(minlength=dataset.num_classes).tolist() for labels in splits]
    lines = [line("class", "train", "test"), *map(line, names, *counts)]
    for channel, *stats in zip(("red", "green", "blue"), *channel_mean_std(dataset.train_images)):
        lines.append("{:<6} mean {:.4f}, std {:.4f}".format(channel, *stats))
    return "\n".join(lines)


def main():
    parser = Parser(description="Print statistics of a dataset and save a grid of samples.")
    add_data_arguments(parser)
    parser.add_argument("--recipe", default="default", choices=RECIPES, help="its augmentation")
    parser.add_argument("--n", type=positive_int, default=12, help="number of samples")
    parser.add_argument("--seed", type=seed_int, default=1, help="of the run whose epochs to show")
    parser.add_argument("--out", type=Path, default=Path("."), help="directory of data.png")
    args = parser.parse_args()

    writable_dir(args.out)
    dataset, recipe = load(args.data, args.data_dir), RECIPES[args.recipe]
    print(f"dataset {printable(dataset.name)}\n\n{describe(dataset)}")
    images, normalize = dataset.train_images, Normalize(dataset.mean, dataset.std, "cpu")
    plans = [epoch_plan(recipe, len(images), 32, args.seed, epoch, "cpu") for epoch in range(5)]
    shown = plans[0].indices[: args.n]  # the first images of the first epoch
    grid = [images[shown]]
    for plan in plans:
        rows = plan.at(plan.indices.argsort()[shown])
        grid.append(normalize.invert(augment(images[shown], rows, recipe, normalize)))
    names = [dataset.class_names[label] for label in dataset.train_labels[shown].tolist()]
    row_labels = ["original"] + [f"epoch {epoch + 1}" for epoch in range(5)]
    figure = plots.sample_grid(grid, names, row_labels, f"{dataset.name}, recipe {args.recipe}")
    plots.save_figure(figure, args.out / "data.png")
    print(f"\nsaved {args.out / 'data.png'}")


if __name__ == "__main__":
    run_script(main)
