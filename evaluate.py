"""Evaluate a checkpoint: accuracy, loss, confusion matrix, report and misclassified images.

    python evaluate.py --ckpt best.pt                   # on the dataset of its training run
    python evaluate.py --ckpt best.pt --tta shift       # also averaged over views of an image
    python evaluate.py --ckpt best.pt --images FOLDER   # classes of your images, or cat.jpg dog.jpg

Writes confusion.png and misclassified.png beside the checkpoint, or to --out. Of your own images it
prints class and probability, and writes predictions.csv where --out is given.
"""

from pathlib import Path

from cli import Parser, add_device_argument, add_precision_argument, add_run_data_arguments
from cli import num_shown, parse_before_imports, printable, run_script, writable_dir, write_csv

# --- the flags ---


def parse_args():
    parser = Parser(description="Evaluate a checkpoint on test images.")
    add = parser.add_argument
    help = "best.pt or last.pt of a run"
    add("--ckpt", type=Path, default=Path("best.pt"), metavar="FILE", help=help)
    help = "also averaged over mirror images (flip), and over those of crops a pixel away (shift)"
    add("--tta", default="none", choices=["none", "flip", "shift"], help=help)
    add("--n", type=num_shown, default=20, help="misclassified images to show")
    help = "print the classes of these images instead, files or folders; predictions.csv with --out"
    add("--images", nargs="+", type=Path, metavar="PATH", help=help)
    add_run_data_arguments(parser)
    add_device_argument(parser)
    add_precision_argument(parser)
    add("--out", type=Path, metavar="DIR", help="to write to (default: that of --ckpt)")
    args = parser.parse_args()
    if args.images and (args.tta != "none" or args.data or args.data_dir):
        parser.error("--images are classified as they are (--tta), without a dataset (--data)")
    return args


if __name__ == "__main__":
    parse_before_imports(parse_args)

import torch
import torch.nn.functional as F

import plots
from augment import Normalize
from checkpoint import load_checkpoint
from data import IMAGE_SIZE, class_balanced_indices, decode_all, image_files, load_for_checkpoint
from runtime import Runtime, tune_process


def loss_and_accuracy(logits, labels):
    """Return mean cross entropy in nats, and accuracy in percent, of logits (N, K)."""
    correct = (logits.argmax(1) == labels).sum().item()
    return F.cross_entropy(logits, labels).item(), 100 * correct / len(labels)


def confusion_matrix(labels, predictions, num_classes):
    """Return counts, int64 (K, K), of actual (rows) and predicted (columns) classes.

    labels and predictions are int64 (N,).
    """
    K = num_classes
    return torch.bincount(labels * K + predictions, minlength=K * K).view(K, K)


def classification_report(matrix, class_names):
    """Return precision, recall, F1 and support of each class, and their averages, as text.

    The layout is scikit-learn's; 0 / 0 is 0.
    """
    matrix = matrix.double()
    correct = matrix.diagonal()
    support = matrix.sum(1)  # images of each class
    predicted = matrix.sum(0)
    precision = (correct / predicted).nan_to_num(0)
    recall = (correct / support).nan_to_num(0)
    f1 = (2 * correct / (support + predicted)).nan_to_num(0)
    scores = torch.stack([precision, recall, f1], dim=1)  # (K, 3)
    total = support.sum()
    width = max(len("weighted avg"), *(len(name) for name in class_names))

    def line(name, *cells):
        return f"{name:>{width}} {cells[0]:>10} {cells[1]:>9} {cells[2]:>9} {cells[3]:>9}"

    def score_line(name, values, count):
        return line(name, *(f"{value:.2f}" for value in values), int(count))

    lines = [line("", "precision", "recall", "f1-score", "support"), ""]
    for name, values, count in zip(class_names, scores.tolist(), support.tolist()):
        lines.append(score_line(name, values, count))
    lines.append("")
    lines.append(line("accuracy", "", "", f"{correct.sum() / total:.2f}", int(total)))
    lines.append(score_line("macro avg", scores.mean(0).tolist(), total))
    lines.append(score_line("weighted avg", (support @ scores / total).tolist(), total))
    return "\n".join(lines)


def matrix_text(matrix, class_names):
    """Return a confusion matrix as text; columns are headed by the number of the row."""
    K = len(class_names)
    name_width = max(len(name) for name in class_names)
    cell_width = max(len(str(int(matrix.max()))), len(str(K - 1))) + 1
    heads = "".join(f"{j:>{cell_width}}" for j in range(K))
    lines = [" " * (name_width + 5) + heads]
    for i, (name, row) in enumerate(zip(class_names, matrix.tolist())):
        cells = "".join(f"{count:>{cell_width}}" for count in row)
        lines.append(f"{name:>{name_width}} {i:>3} {cells}")
    return "\n".join(lines)


def classify(ckpt, images, device="auto", precision="auto"):
    """Return (class names, probabilities float32 (N, K)) of images, by a file of train.py.

    `images` are the path of a file or of a folder, a list of paths, or a tensor uint8
    (N, 3, 32, 32); they are normalized here. A folder stands for the images in it, in the order of
    data.image_files. Raises UsageError for another file or device, RunError for an image that
    cannot be read, and ValueError for another tensor.
    """
    runtime = Runtime(device, precision)
    model, ckpt = load_checkpoint(ckpt, runtime.device)
    runtime.prepare(model)
    if not torch.is_tensor(images):
        images = torch.from_numpy(decode_all(image_files(images)))
    if images.dtype != torch.uint8 or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        shape = tuple(images.shape)
        raise ValueError(f"images are {images.dtype} {shape}, not uint8 (N, 3, 32, 32)")
    normalize = Normalize(ckpt["mean"], ckpt["std"], runtime.device)
    logits = runtime.predict(model, normalize, images.to(runtime.device))
    return ckpt["class_names"], logits.softmax(1)


def classify_files(args):
    """Print the class of each of --images and its probability; with --out, as a table too."""
    if args.out:
        writable_dir(args.out)
    paths = image_files(args.images)
    names, probabilities = classify(args.ckpt, paths, args.device, args.precision)
    probabilities, labels = probabilities.max(1)
    rows = []
    for path, probability, label in zip(paths, probabilities.tolist(), labels.tolist()):
        row = {"image": printable(path), "class": names[label], "probability": probability}
        print(f"{row['image']}: {100 * probability:.1f} % {row['class']}")
        rows.append(row)
    if args.out:
        write_csv(args.out / "predictions.csv", rows)
        print(f"saved {args.out / 'predictions.csv'}")


def main():
    args = parse_args()
    runtime = Runtime(args.device, args.precision)
    tune_process(runtime.device)
    if args.images:
        classify_files(args)
        return
    model, ckpt = load_checkpoint(args.ckpt, runtime.device)
    runtime.prepare(model)
    out = writable_dir(args.out or args.ckpt.parent)
    print(f"{runtime.describe()}\nloading images", flush=True)
    dataset = load_for_checkpoint(ckpt, args.data, args.data_dir, runtime.device)
    images = dataset.test_images
    labels = dataset.test_labels
    names = ckpt["class_names"]
    recipe = ckpt["config"]["recipe"]
    title = f"{args.ckpt.name} (epoch {ckpt['epoch']}, recipe {recipe}) on {dataset.name}"
    print(f"{title}, {len(labels):,} test images", flush=True)
    if "train_state" not in ckpt and args.data is None:  # a best.pt, on the data of its run
        if ckpt["config"].get("val_split"):
            print("its epoch was chosen by the accuracy on held-out training images")
        else:
            print("its epoch was chosen by test accuracy, so that accuracy is too high")

    # Figures and report are of the images as they are; --tta adds one line.
    normalize = Normalize(ckpt["mean"], ckpt["std"], runtime.device)
    logits = runtime.predict(model, normalize, images)
    loss, accuracy = loss_and_accuracy(logits, labels)
    print(f"\naccuracy {accuracy:.2f} %, cross entropy {loss:.4f} nats")
    if args.tta != "none":
        averaged = runtime.predict(model, normalize, images, args.tta)
        loss, accuracy = loss_and_accuracy(averaged, labels)
        print(f"with --tta {args.tta}: accuracy {accuracy:.2f} %, cross entropy {loss:.4f} nats")
    confidence, predictions = logits.softmax(1).max(1)
    matrix = confusion_matrix(labels, predictions, len(names)).cpu()
    print(f"\nconfusion matrix, rows actual, columns predicted\n{matrix_text(matrix, names)}")
    print(f"\n{classification_report(matrix, names)}\n")

    plots.save_figure(plots.confusion_matrix(matrix, names, title), out / "confusion.png")
    print(f"saved {out / 'confusion.png'}")
    shown = class_balanced_indices(labels, predictions != labels, args.n)
    if len(shown):
        captions = []
        for i in shown.tolist():
            actual = names[labels[i]]
            predicted = names[predictions[i]]
            captions.append(f"{actual}\n{100 * confidence[i]:.0f} % {predicted}")
        head = f"misclassified: actual class, and predicted class with probability\n{title}"
        figure = plots.image_grid(images[shown], captions, head)
        plots.save_figure(figure, out / "misclassified.png")
        print(f"saved {out / 'misclassified.png'}")


if __name__ == "__main__":
    run_script(main)
