"""Evaluate a checkpoint: accuracy, mean loss, confusion matrix, classification report and misclassified pictures.

    python evaluate.py --ckpt best.pt                   # on the data that it was trained for
    python evaluate.py --ckpt best.pt --tta flip        # and, apart, with each picture's mirror image averaged in

Class names, normalisation and data set come from the checkpoint; pictures go beside it or to --out.
"""

from pathlib import Path

import torch

import checkpoint
import data
import plots
from augment import Normalize
from cli import Parser, add_data_arguments, add_device_arguments, output_folder, positive_int, run
from engine import Runtime, balanced_choice, predict, score


def confusion_matrix(labels, predictions, num_classes):
    """How often class i was taken for class j: int64 (num_classes, num_classes), rows actual, columns predicted.

    `labels` and `predictions` are integer tensors (N,). Raises ValueError for a class outside [0, num_classes).
    """
    if labels.shape != predictions.shape or labels.dim() != 1:
        raise ValueError(f"labels {tuple(labels.shape)} and predictions {tuple(predictions.shape)} must both be (N,)")
    for name, values in (("label", labels), ("prediction", predictions)):
        if len(values) and not 0 <= values.min() <= values.max() < num_classes:
            raise ValueError(f"a {name} lies outside the {num_classes} classes 0 to {num_classes - 1}")
    return torch.bincount(labels.long() * num_classes + predictions.long(), minlength=num_classes**2).view(num_classes, num_classes)


def classification_report(matrix, class_names):
    """Precision, recall, f1-score and support of each class and their averages, in scikit-learn's layout, as text.

    `matrix` is a confusion matrix (K, K), rows actual. A quotient of nothing by nothing counts as 0, as there.
    """

    def quotient(part, whole):
        return torch.where(whole > 0, part / whole.clamp(min=1), 0.0)

    matrix = matrix.double()
    hits, support, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    precision, recall = quotient(hits, predicted), quotient(hits, support)
    f1 = quotient(2 * hits, support + predicted)  # 2 P R / (P + R), in the form that divides once
    total = support.sum()
    width = max(len("weighted avg"), *map(len, class_names))
    row = f"{{:>{width}}} {{:>10}} {{:>9}} {{:>9}} {{:>9}}".format

    def line(name, values, count):
        return row(name, *(f"{value:.2f}" for value in values), int(count))

    scores = torch.stack([precision, recall, f1], dim=1)  # (K, 3)
    lines = [row("", "precision", "recall", "f1-score", "support"), ""]
    lines += [line(name, values, count) for name, values, count in zip(class_names, scores.tolist(), support.tolist())]
    lines += [
        "",
        row("accuracy", "", "", f"{quotient(hits.sum(), total).item():.2f}", int(total)),
        line("macro avg", scores.mean(0).tolist(), total),
        line("weighted avg", quotient((scores * support[:, None]).sum(0), total.expand(3)).tolist(), total),
    ]
    return "\n".join(lines)


def matrix_text(matrix, class_names):
    """A confusion matrix as text, rows actual and columns predicted, columns headed by the row's number."""
    width = max(map(len, class_names))
    cell = max(len(str(int(matrix.max()))), len(str(len(class_names) - 1))) + 1
    lines = [f"{'':>{width}}     " + "".join(f"{j:>{cell}}" for j in range(len(class_names)))]
    lines += [f"{name:>{width}} {i:>3} " + "".join(f"{count:>{cell}}" for count in row) for i, (name, row) in enumerate(zip(class_names, matrix.tolist()))]
    return "\n".join(lines)


def main():
    parser = Parser(description="Evaluate a checkpoint on test pictures.")
    parser.add_argument("--ckpt", type=Path, default=Path("best.pt"), metavar="FILE", help="a checkpoint that train.py wrote")
    parser.add_argument("--tta", default="none", choices=["none", "flip"], help="also report test-time augmentation, as a figure of its own")
    add_data_arguments(parser, default=None)
    add_device_arguments(parser)
    parser.add_argument("--n", type=positive_int, default=20, help="how many misclassified pictures to show")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the pictures go (default: the checkpoint's folder)")
    arguments = parser.parse_args()

    runtime = Runtime(arguments.device, arguments.precision, arguments.kernels)
    model, content = checkpoint.load(arguments.ckpt, runtime.device)
    folder = output_folder(arguments.out or arguments.ckpt.parent)
    dataset = data.load_for(content, arguments.data, arguments.data_dir, runtime.device)
    class_names, K = content["class_names"], len(content["class_names"])
    normalize = Normalize(content["mean"], content["std"], runtime.device)
    logits = predict(runtime, model, normalize, dataset.test_images)
    labels = dataset.test_labels
    loss, accuracy = score(logits, labels)
    confidence, predictions = logits.softmax(1).max(1)
    matrix = confusion_matrix(labels, predictions, K).cpu()
    title = f"{arguments.ckpt.name} (epoch {content['epoch']}, recipe {content['config'].get('recipe')}) on {dataset.name}"
    print(f"{runtime.describe()}\n{title}, {len(labels):,} test pictures")
    print(f"\naccuracy {accuracy:.2f} %, mean loss {loss:.4f}")
    if arguments.tta == "flip":
        flipped = score(predict(runtime, model, normalize, dataset.test_images, tta=True), labels)
        print(f"with mirrored pictures averaged in: accuracy {flipped[1]:.2f} %, mean loss {flipped[0]:.4f}")
    print(f"\nconfusion matrix, rows actual, columns predicted\n{matrix_text(matrix, class_names)}")
    print(f"\n{classification_report(matrix, class_names)}\n")

    shown = balanced_choice(labels, predictions != labels, arguments.n)
    captions = [f"{class_names[labels[i]]}\nas {class_names[predictions[i]]} {100 * confidence[i]:.0f} %" for i in shown.tolist()]
    pictures = {"confusion.png": plots.confusion(matrix, class_names, title)}
    if captions:
        pictures["misclassified.png"] = plots.misclassified(dataset.test_images[shown], captions, f"misclassified: actual, and predicted with confidence\n{title}")
    for name, made in pictures.items():
        plots.save(made, folder / name)
        print(f"saved {folder / name}")


if __name__ == "__main__":
    run(main)
