"""Evaluate a checkpoint: accuracy, loss, confusion matrix, report and misclassified images.

    python evaluate.py --ckpt best.pt                   # on the dataset of its training run
    python evaluate.py --ckpt best.pt --tta shift       # also averaged over views of an image

Writes confusion.png and misclassified.png beside the checkpoint, or to --out.
"""

from pathlib import Path

from cli import (
    Parser, add_data_arguments, add_device_arguments, positive_int, printable, run_script,
    writable_dir,
)  # fmt: skip

import torch

import plots
from augment import Normalize
from data import class_balanced_indices, load_for_checkpoint
from runtime import Runtime
from sources import IMAGE_SIZE, load_image
from trainer import load_checkpoint, loss_and_accuracy


def confusion_matrix(labels, predictions, num_classes):
    """Counts, int64 (K, K), of actual (rows) and predicted (columns) classes, int64 (N,) each."""
    K = num_classes
    return torch.bincount(labels * K + predictions, minlength=K * K).view(K, K)


def classification_report(matrix, class_names):
    """Precision, recall, F1 (0 / 0 is 0) and support, in scikit-learn's layout, as text."""
    matrix = matrix.double()
    correct, support, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    ratios = [correct / predicted, correct / support, 2 * correct / (support + predicted)]
    scores = torch.stack(ratios, dim=1).nan_to_num(0)  # (K, 3)
    total = support.sum()
    width = max(len("weighted avg"), *map(len, class_names))
    line = f"{{:>{width}}} {{:>10}} {{:>9}} {{:>9}} {{:>9}}".format
    score_line = lambda name, values, count: line(name, *(f"{x:.2f}" for x in values), int(count))
    lines = [
        line("", "precision", "recall", "f1-score", "support"),
        "",
        *map(score_line, class_names, scores.tolist(), support.tolist()),
        "",
        line("accuracy", "", "", f"{correct.sum() / total:.2f}", int(total)),
        score_line("macro avg", scores.mean(0).tolist(), total),
        score_line("weighted avg", (support @ scores / total).tolist(), total),
    ]
    return "\n".join(lines)


def matrix_text(matrix, class_names):
    """A confusion matrix as text; columns are headed by the number of the row."""
    K, width = len(class_names), max(map(len, class_names))
    cell = max(len(str(int(matrix.max()))), len(str(K - 1))) + 1
    lines = [" " * (width + 5) + "".join(f"{j:>{cell}}" for j in range(K))]
    for i, (name, row) in enumerate(zip(class_names, matrix.tolist())):
        lines.append(f"{name:>{width}} {i:>3} " + "".join(f"{count:>{cell}}" for count in row))
    return "\n".join(lines)


def classify(ckpt, images, device="auto"):
    """(class names, probabilities float32 (N, K)) of images, by a file of train.py.

    `images` are paths of image files, or a tensor uint8 (N, 3, 32, 32); they are normalized here.
    Raises UsageError for another file or device, RunError for an image that cannot be read, and
    ValueError for another tensor.
    """
    runtime = Runtime(device)
    model, ckpt = load_checkpoint(ckpt, runtime.device)
    if not torch.is_tensor(images):
        images = torch.stack([load_image(path) for path in images])
    if images.dtype != torch.uint8 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        shape = tuple(images.shape)
        raise ValueError(f"images are {images.dtype} {shape}, not uint8 (N, 3, 32, 32)")
    normalize = Normalize(ckpt["mean"], ckpt["std"], runtime.device)
    logits = runtime.predict(model, normalize, images.to(runtime.device))
    return ckpt["class_names"], logits.softmax(1)


def parse_args():
    parser = Parser(description="Evaluate a checkpoint on test images.")
    add = parser.add_argument
    add("--ckpt", type=Path, default=Path("best.pt"), metavar="FILE", help="a file of train.py")
    help = "also averaged over mirror images (flip), and over those of crops a pixel away (shift)"
    add("--tta", default="none", choices=["none", "flip", "shift"], help=help)
    add("--n", type=positive_int, default=20, help="misclassified images to show")
    add_data_arguments(parser, default=None)
    add_device_arguments(parser)
    add("--out", type=Path, metavar="DIR", help="to write to (default: that of --ckpt)")
    return parser.parse_args()


def main():
    args = parse_args()
    runtime = Runtime(args.device, args.precision, args.kernels)
    model, ckpt = load_checkpoint(args.ckpt, runtime.device)
    out = writable_dir(args.out or args.ckpt.parent)
    print(f"{runtime.describe()}\nloading images", flush=True)
    dataset = load_for_checkpoint(ckpt, args.data, args.data_dir, runtime.device)
    images, labels = dataset.test_images, dataset.test_labels
    names = [printable(name) for name in ckpt["class_names"]]
    title = f"{args.ckpt.name} (epoch {ckpt['epoch']}, recipe {ckpt['config'].get('recipe')})"
    title = printable(f"{title} on {dataset.name}")
    print(f"{title}, {len(labels):,} test images", flush=True)
    normalize = Normalize(ckpt["mean"], ckpt["std"], runtime.device)
    logits = runtime.predict(model, normalize, images)
    accuracy = "accuracy {1:.2f} %, cross entropy {0:.4f} nats".format
    print("\n" + accuracy(*loss_and_accuracy(logits, labels)))
    if args.tta != "none":
        averaged = runtime.predict(model, normalize, images, args.tta)
        print(f"with --tta {args.tta}: {accuracy(*loss_and_accuracy(averaged, labels))}")
    confidence, predictions = logits.softmax(1).max(1)
    matrix = confusion_matrix(labels, predictions, len(names)).cpu()
    print(f"\nconfusion matrix, rows actual, columns predicted\n{matrix_text(matrix, names)}")
    print(f"\n{classification_report(matrix, names)}\n")

    figures = {"confusion.png": plots.confusion_matrix(matrix, names, title)}
    shown = class_balanced_indices(labels, predictions != labels, args.n)
    if len(shown):
        columns = zip(labels[shown], predictions[shown], 100 * confidence[shown])
        captions = [f"{names[i]}\n{percent:.0f} % {names[j]}" for i, j, percent in columns]
        head = f"misclassified: actual class, and predicted class with probability\n{title}"
        figures["misclassified.png"] = plots.image_grid(images[shown], captions, head)
    for name, figure in figures.items():
        plots.save_figure(figure, out / name)
        print(f"saved {out / name}")


if __name__ == "__main__":
    run_script(main)
