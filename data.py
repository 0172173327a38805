"""Pictures and labels as tensors on the device, from CIFAR-10, CIFAR-100, a folder of pictures or drawn shapes.

    python data.py                    # statistics of the data, and data.png: samples before and after augmentation
    python data.py --data FOLDER --recipe original

A whole data set is uint8 (N, 3, 32, 32), 184 MB for CIFAR-10, and stays where the model is: no loader, no workers.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import cifar
import pictures
import plots
import shapes
from augment import Augmenter, Normalize
from cli import Parser, RunError, UsageError, add_data_arguments, output_file, positive_int, run, seed_int
from recipe import RECIPES

# As the run to reproduce normalised; to three digits what `statistics` finds.
CIFAR10_MEAN = (0.49139968, 0.48215841, 0.44653091)
CIFAR10_STD = (0.24703223, 0.24348513, 0.26158784)
SHAPES_TRAIN, SHAPES_TEST, SHAPES_SEED = 50_000, 10_000, 0
HOLD_OUT_SEED = 0

NOT_CIFAR = """
{stars}
*  WARNING: THIS IS NOT CIFAR-10.                                             *
*  CIFAR-10 could not be had; the line above says why. Going on with          *
*  `shapes`: pictures that this program draws. No figure of this run says     *
*  anything about CIFAR-10. `--data cifar10` stops instead of going on.       *
{stars}
""".format(stars="*" * 79)


@dataclass(frozen=True)
class Dataset:
    """Pictures uint8 (N, 3, 32, 32) and labels int64 (N,) on one device; `source` is what `load` takes to give it again.

    mean and std (of the training pictures, a number a channel) are on the scale [0, 1]. Masks, bool (N, 32, 32), say
    which pixels are the object's; only `shapes` knows them.
    """

    name: str
    source: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    class_names: tuple
    mean: tuple
    std: tuple
    train_masks: torch.Tensor | None = None
    test_masks: torch.Tensor | None = None

    @property
    def num_classes(self):
        return len(self.class_names)


def load(source, data_dir, device="cpu"):
    """The Dataset of a source: cifar10, cifar100, shapes, auto, or the path of a folder of pictures.

    Raises UsageError for a source that is none of these or a folder laid out otherwise, and RunError for data that
    cannot be had or read.
    """
    if source == "auto":
        try:
            dataset = load_cifar("cifar10", Path(data_dir))
        except RunError as error:
            print(f"{error}\n{NOT_CIFAR}", file=sys.stderr, flush=True)
            dataset = load_shapes()
    elif source in cifar.ARCHIVES:
        dataset = load_cifar(source, Path(data_dir))
    elif source == "shapes":
        dataset = load_shapes()
    elif os.path.isdir(source):  # and not Path.is_dir, which raises an OSError for a name too long to be one
        dataset = load_folder(Path(source), Path(data_dir))
    else:
        raise UsageError(f"--data {source}: neither a folder that exists nor one of auto, {', '.join(cifar.ARCHIVES)}, shapes")
    moved = {name: value.to(device) for name, value in vars(dataset).items() if torch.is_tensor(value)}
    return Dataset(**{**vars(dataset), **moved})


def hold_out(dataset, count):
    """The Dataset whose test pictures are `count` of the training pictures, which are trained on no more: always the same ones.

    Raises UsageError where that leaves nothing to train on.
    """
    total = len(dataset.train_images)
    if count >= total:
        raise UsageError(f"--val-split {count}: {dataset.name} has {total} training pictures, and some must be left to train on")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(HOLD_OUT_SEED)).to(dataset.train_images.device)
    train, held = order[count:], order[:count]
    split = {"name": f"{dataset.name}-val{count}"}
    for kind in ("images", "labels", "masks"):
        of_train = getattr(dataset, f"train_{kind}")
        for part, chosen in (("train", train), ("test", held)):
            split[f"{part}_{kind}"] = None if of_train is None else of_train[chosen]
    return replace(dataset, **split)


def load_for(content, source, data_dir, device):
    """The Dataset that a checkpoint (its content) was trained on, or that of another `source` or `data_dir` where they are not None.

    Raises UsageError where its classes are not the checkpoint's, and what `load` raises.
    """
    config, known = content["config"], content["class_names"]
    dataset = load(source or config["data"], data_dir or config.get("data_dir", "./data"), device)
    if list(dataset.class_names) != known:
        raise UsageError(f"the checkpoint knows {len(known)} classes ({known[0]} ...), {dataset.name} has {dataset.num_classes} ({dataset.class_names[0]} ...)")
    return dataset


def statistics(images):
    """Mean and standard deviation of each channel of uint8 (N, 3, S, S), on the scale [0, 1], as tuples of floats."""
    # Sums of whole numbers are exact, so the figures depend neither on order nor on the number of threads.
    total = squares = 0
    for part in images.split(10_000):
        part = part.transpose(0, 1).flatten(1).long()  # (n, 3, S, S) -> (3, nSS)
        total, squares = total + part.sum(1), squares + (part * part).sum(1)
    count = images.numel() / 3
    mean = total.double() / count
    std = (squares.double() / count - mean**2).sqrt()
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


def load_cifar(name, data_dir):
    train_images, *others = cifar.read(name, data_dir)
    mean, std = (CIFAR10_MEAN, CIFAR10_STD) if name == "cifar10" else statistics(train_images)
    return Dataset(name, name, train_images, *others, mean, std)


def load_folder(folder, data_dir):
    images, labels, is_train, class_names = pictures.read_folder(folder, data_dir)
    train, test = (images[is_train], labels[is_train]), (images[~is_train], labels[~is_train])
    return Dataset(folder.resolve().name, str(folder.resolve()), *train, *test, class_names, *statistics(images[is_train]))


def load_shapes(train=SHAPES_TRAIN, test=SHAPES_TEST):
    images, labels, masks = shapes.draw(train + test, SHAPES_SEED)
    mean, std = statistics(images[:train])
    return Dataset(
        "shapes", "shapes", images[:train], labels[:train], images[train:], labels[train:],
        shapes.CLASS_NAMES, mean, std, masks[:train], masks[train:],
    )  # fmt: skip


def describe(dataset):
    """The data's statistics as text: pictures a class in train and test, mean and deviation of each channel."""
    mean, std = statistics(dataset.train_images)
    width = max(map(len, dataset.class_names))
    lines = [f"{'class':<{width}} {'train':>7} {'test':>7}"]
    train = dataset.train_labels.bincount(minlength=dataset.num_classes).tolist()
    test = dataset.test_labels.bincount(minlength=dataset.num_classes).tolist()
    lines += [f"{name:<{width}} {a:>7,} {b:>7,}" for name, a, b in zip(dataset.class_names, train, test)]
    lines += [f"{'all':<{width}} {sum(train):>7,} {sum(test):>7,}", ""]
    lines += [f"{name:<10} mean {m:.4f}  std {s:.4f}" for name, m, s in zip(("red", "green", "blue"), mean, std)]
    return "\n".join(lines)


def main():
    parser = Parser(description="Print the data's statistics and save a picture of samples before and after augmentation.")
    add_data_arguments(parser)
    parser.add_argument("--recipe", default="default", choices=sorted(RECIPES), help="whose augmentation to show")
    parser.add_argument("--n", type=positive_int, default=12, help="how many samples to show")
    parser.add_argument("--seed", type=seed_int, default=1, help="of the samples and their augmentation")
    parser.add_argument("--out", type=Path, default=Path("data.png"), metavar="FILE", help="where the picture goes")
    arguments = parser.parse_args()

    output_file(arguments.out)
    dataset = load(arguments.data, arguments.data_dir)
    print(f"data set: {dataset.name}\n\n{describe(dataset)}")
    generator = torch.Generator().manual_seed(arguments.seed)
    count = len(dataset.train_images)
    chosen = torch.randperm(count, generator=generator)[: arguments.n]
    normalize = Normalize(dataset.mean, dataset.std, "cpu")
    recipe = RECIPES[arguments.recipe]
    augment = Augmenter(recipe.augmentation, normalize, count, generator, recipe.epochs)
    rows = [dataset.train_images[chosen]]
    rows += [normalize.invert(augment(dataset.train_images[chosen], chosen, epoch)) for epoch in range(5)]
    names = [dataset.class_names[label] for label in dataset.train_labels[chosen].tolist()]
    sides = ["as it is"] + [f"epoch {epoch + 1}" for epoch in range(5)]
    plots.save(plots.sample_rows(rows, names, sides, f"{dataset.name}, recipe {arguments.recipe}"), arguments.out)
    print(f"\nsaved {arguments.out}")


if __name__ == "__main__":
    run(main)
