"""Saliency maps: where the network looks for evidence of a class.

    python gradcam.py --ckpt best.pt --n 10             # ten misclassified test images: gradcam.png
    python gradcam.py --ckpt best.pt --image cat.jpg    # your images: the three most likely classes
    python gradcam.py --ckpt best.pt --metrics          # all methods judged: gradcam_metrics.csv

Tokens are channels, so nothing behind the stem has rows and columns: maps are computed at the stem,
by default from its second GELU, 32 channels of 16x16. Maps and the probabilities beside them are in
float32; --kernels and --precision are for the many predictions of --metrics.
"""

import itertools
from contextlib import ExitStack
from pathlib import Path

from cli import (
    Parser, ProgressBar, UsageError, add_data_arguments, add_device_arguments, atomic_write,
    positive_int, printable, run_script, seed_int, writable_dir, write_csv,
)  # fmt: skip

import numpy as np
import torch
import torch.nn.functional as F

import faithfulness
import plots
from augment import Normalize
from data import class_balanced_indices, load_for_checkpoint
from runtime import Runtime
from sources import IMAGE_SIZE, load_image
from trainer import load_checkpoint, predict
from vit import ScaledDotProductAttention

LAYER = "stem.gelu2"
TOKEN_LAYERS = ("stem.conv2", "stem.gelu2")  # their channels are the tokens that attention weights
METHOD = "hirescam"  # best insertion and deletion on the JPEG copy of CIFAR-10; docs/gradcam.md
BATCH_SIZE = 250


# --- methods: activations (B, C, h, w) and gradients of the same shape -> maps (B, h, w) ---


def gradcam(activations, gradients):
    """Each channel times its mean gradient. Selvaraju et al. 2017, arXiv:1610.02391."""
    return (gradients.mean((2, 3), keepdim=True) * activations).sum(1)


def hirescam(activations, gradients):
    """Each position times its own gradient. Draelos & Carin 2020, arXiv:2011.08891."""
    return (gradients * activations).sum(1)


def gradcam_plus_plus(activations, gradients):
    """Each channel times a sum of positive gradients. Chattopadhay et al. 2018, arXiv:1710.11063.

    Equation 19 for exp(logit), where g^2 / (2 g^2 + sum(A) g^3) times a gradient g > 0 is
    g / (2 + sum(A) g). Negative activations A, which the paper has not, count as 0 in the divisor.
    """
    positive, total = gradients.relu(), activations.relu().sum((2, 3), keepdim=True)
    weights = (positive / (2 + total * positive)).sum((2, 3), keepdim=True)
    return (weights * activations).sum(1)


GRADIENT_METHODS = {"gradcam": gradcam, "hirescam": hirescam, "gradcam++": gradcam_plus_plus}
METHODS = (*GRADIENT_METHODS, "attention")


def rollout(attentions):
    """Attention rollout: how much of each token reaches the CLS token, (B, T - 1).

    `attentions` has (B, T, T) for each block, or (B, 1, T) for a last one that computes the CLS
    token alone. Residual connections are half of the flow. Abnar & Zuidema 2020, arXiv:2005.00928.
    """
    flow = identity = torch.eye(attentions[0].shape[-1]).to(attentions[0])
    for weights in attentions:
        flow = (weights + identity[: weights.shape[1]]) / 2 @ flow  # rows still sum to 1
    return flow[:, 0, 1:]


def normalize_map(maps):
    """Maps (..., S, S) stretched to [0, 1], each by itself; a constant one becomes 0."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    varies = high - low > 1e-5 * torch.maximum(high.abs(), low.abs())  # more than rounding
    return torch.where(varies, (maps - low) / torch.where(varies, high - low, 1), 0)


class GradCAM:
    """Saliency maps of a model's classes from the output of one layer.

        with GradCAM(model.eval(), "stem.gelu2", method="hirescam") as cam:
            maps = cam(images, targets)

    `layer` is the dotted name of any module that outputs (B, C, h, w). The hooks of the block are
    removed however it ends; gradients and requires_grad of parameters are neither used nor changed.
    Raises ValueError for a layer without a grid, or with other channels than attention's tokens.
    """

    def __init__(self, model, layer=LAYER, method=METHOD):
        self.model, self.layer, self.method = model, layer, method
        if method == "attention" and layer not in TOKEN_LAYERS:
            raise ValueError(f"attention is for {' and '.join(TOKEN_LAYERS)}, not for {layer!r}")

    def __enter__(self):
        hooks = [(self.model.get_submodule(self.layer), self.save_activation)]
        if self.method == "attention":
            attends = (m for m in self.model.modules() if isinstance(m, ScaledDotProductAttention))
            hooks += [(module, self.save_attention) for module in attends]
        self.handles = [module.register_forward_hook(hook) for module, hook in hooks]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def save_activation(self, module, args, output):
        """Replace the output by a leaf, where gradients stop."""
        if not is_spatial(output.shape[1:]):
            raise ValueError(f"layer {self.layer!r} outputs {tuple(output.shape)}: no grid")
        self.activations = output.detach().requires_grad_()
        return self.activations.clone()  # the next layer may work in place

    def save_attention(self, module, args, output):
        q, k, _ = args  # (B H, T or 1, D), (B H, T, D)
        weights = module.attention_weights(q.detach(), k.detach())
        self.attentions.append(weights.unflatten(0, (-1, module.heads)).mean(1))  # (B, T or 1, T)

    def __call__(self, images, targets=None, normalize=True):
        """Maps (B, S, S) of normalized images (B, 3, S, S) for classes `targets`, int64 (B,).

        `targets` default to the predicted classes; attention is the same for all. Maps are in
        [0, 1], or with normalize=False at least 0, on the scale of the method.
        """
        self.attentions = []
        with torch.enable_grad():
            logits = self.model(images)
            targets = logits.argmax(1) if targets is None else targets
            activations = self.activations.detach()
            if self.method == "attention":
                maps = (rollout(self.attentions)[:, :, None, None] * activations).sum(1)
            else:
                # Images do not mix, so each has its own gradient in that of the sum.
                total = logits.gather(1, targets[:, None]).sum()
                (gradients,) = torch.autograd.grad(total, self.activations)
                maps = GRADIENT_METHODS[self.method](activations, gradients)
        maps = F.interpolate(maps.relu()[:, None], images.shape[2:], mode="bilinear")[:, 0]
        return normalize_map(maps) if normalize else maps


def is_spatial(shape):
    """Whether an output of this shape, batch left out, has a grid of rows and columns."""
    return len(shape) == 3 and min(shape[1:]) > 1


@torch.no_grad()
def layer_shapes(model, images):
    """{dotted name: output shape, batch left out} of every module that `images` pass through."""
    shapes = {}
    with ExitStack() as stack:
        for name, module in list(model.named_modules())[1:]:
            hook = lambda _, args, output, name=name: shapes.update({name: tuple(output.shape[1:])})
            stack.enter_context(module.register_forward_hook(hook))
        model(images)
    return shapes


def baselines(images, grid, generator):
    """{name: maps (B, S, S)} for images (B, 3, S, S); `grid` is the layer's (h, w)."""
    B, _, S, _ = images.shape
    index = torch.arange(S, device=images.device) - (S - 1) / 2
    bell = (-((index / (S / 4)) ** 2) / 2).exp()
    sobel = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]]).to(images)
    gray = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    slopes = F.conv2d(gray, torch.stack([sobel, sobel.T])[:, None])  # (B, 2, S, S)
    cells = torch.rand(B, 1, *grid, generator=generator).to(images.device)
    return {
        "random pixels": torch.rand(B, S, S, generator=generator).to(images.device),
        "random grid": normalize_map(F.interpolate(cells, (S, S), mode="bilinear")[:, 0]),
        "center": normalize_map((bell[:, None] * bell).expand(B, S, S)),
        "edges": normalize_map(slopes.norm(dim=1)),
    }


@torch.no_grad()
def evaluate_maps(model, runtime, layer, images, masks, generator):
    """{map: {measure: (N,)}} of all methods and baselines for the predicted classes.

    images are normalized (N, 3, S, S), masks bool (N, S, S) or None; `runtime` predicts.
    """
    batches = images.split(BATCH_SIZE)
    targets = torch.cat([model(batch).argmax(1) for batch in batches])
    maps = baselines(images, layer_shapes(model, batches[0])[layer][1:], generator)
    for method in METHODS if layer in TOKEN_LAYERS else GRADIENT_METHODS:
        with GradCAM(model, layer, method) as cam:
            pairs = zip(batches, targets.split(BATCH_SIZE))
            maps[method] = torch.cat([cam(*pair) for pair in pairs])
    bar = ProgressBar("measuring", len(maps) * 2 * (faithfulness.STEPS + 1))
    done = itertools.count(1)

    def score(perturbed):
        logits = torch.cat([runtime.logits(model, part) for part in perturbed.split(BATCH_SIZE)])
        bar.update(next(done))
        return logits.softmax(1).gather(1, targets[:, None])[:, 0]

    evaluate = lambda saliency: faithfulness.evaluate(saliency, images, masks, score, generator)
    results = {name: evaluate(saliency) for name, saliency in maps.items()}
    bar.clear()
    return results


def parse_args():
    parser = Parser(description="Show where the network looks, in test images or in yours.")
    add = parser.add_argument
    add("--ckpt", type=Path, default=Path("best.pt"), metavar="FILE", help="a file of train.py")
    add("--method", default=METHOD, choices=METHODS, help="attention is the same for all classes")
    add("--layer", default=LAYER, metavar="NAME", help="dotted name of the layer to explain")
    add("--list-layers", action="store_true", help="print layers and whether they have a grid")
    add("--n", type=positive_int, default=10, help="test images to show, of each class in turn")
    add("--correct", action="store_true", help="show correctly classified test images")
    add("--class", dest="class_name", metavar="CLASS", help="show test images of this class")
    add("--image", nargs="+", type=Path, metavar="FILE", help="show these instead of test images")
    add("--target", metavar="CLASS", help="explain this class, not those predicted or actual")
    add("--save-maps", type=Path, metavar="FILE", help="also save the maps, unscaled, as .npy")
    add("--metrics", nargs="?", type=positive_int, const=1000, metavar="N",
        help="instead, measure all methods on N test images (default: 1000)")  # fmt: skip
    add("--seed", type=seed_int, default=1, help="of the choice of test images and random maps")
    add_data_arguments(parser, default=None)
    add_device_arguments(parser)
    add("--out", type=Path, metavar="DIR", help="to write to (default: that of --ckpt)")
    args = parser.parse_args()
    of_tests = args.correct or args.class_name
    shown = args.image or of_tests or args.target or args.save_maps
    if (args.image and of_tests) or (args.metrics and shown):
        parser.error("--metrics shows no images, --image no test images (--correct, --class)")
    return args


def main():
    args = parse_args()
    choices = (args.precision, args.kernels) if args.metrics else ("fp32", "torch")  # as the maps
    runtime = Runtime(args.device, *choices)
    model, ckpt = load_checkpoint(args.ckpt, runtime.device)
    shapes = layer_shapes(model, torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE).to(runtime.device))
    layers = [name for name, shape in shapes.items() if is_spatial(shape)]
    if args.list_layers:
        for name, shape in shapes.items():
            print(f"{name:<28} {shape!s:<14} {'has a grid' if name in layers else 'no grid'}")
        return
    layers = TOKEN_LAYERS if args.method == "attention" else layers
    if args.layer not in layers:
        raise UsageError(f"--layer {args.layer}: {args.method} explains {', '.join(layers)}")
    for flag, name in (("--class", args.class_name), ("--target", args.target)):
        if name is not None and name not in ckpt["class_names"]:
            raise UsageError(f"{flag} {name}: the classes are {', '.join(ckpt['class_names'])}")
    print(f"{runtime.describe()}\nloading images", flush=True)
    normalize = Normalize(ckpt["mean"], ckpt["std"], runtime.device)
    run = run_metrics if args.metrics else run_overlays
    run(args, ckpt, model, runtime, normalize)


def run_metrics(args, ckpt, model, runtime, normalize):
    """Measure all methods: gradcam_metrics.csv, and a table on stdout."""
    dataset = load_for_checkpoint(ckpt, args.data, args.data_dir, runtime.device)
    N, total, name = args.metrics, len(dataset.test_images), printable(dataset.name)
    if not 2 <= N <= total:
        raise UsageError(f"--metrics {N}: it takes 2 to {total:,} test images of {name}")
    path = writable_dir(args.out or args.ckpt.parent) / "gradcam_metrics.csv"
    generator = torch.Generator().manual_seed(args.seed)
    indices = torch.randperm(total, generator=generator)[:N].to(runtime.device)
    images = normalize(dataset.test_images[indices])
    masks = None if dataset.test_masks is None else dataset.test_masks[indices]
    print(f"{N:,} test images of {name}, {args.layer}", flush=True)
    results = evaluate_maps(model, runtime, args.layer, images, masks, generator)
    rows = faithfulness.summarize(results, dataset=name, n=N, layer=args.layer)
    write_csv(path, rows)
    print(f"\n{faithfulness.table(rows)}\n\nmean +- standard error\nsaved {path}")


def select_test_images(args, ckpt, model, runtime, normalize):
    """Images in random order, one of each actual class in turn: title, images, labels, logits."""
    dataset = load_for_checkpoint(ckpt, args.data, args.data_dir, runtime.device)
    logits, labels = predict(runtime, model, normalize, dataset.test_images), dataset.test_labels
    kind = f"{'correctly classified' if args.correct else 'misclassified'} test images"
    mask = (logits.argmax(1) == labels) == args.correct
    if args.class_name is not None:
        mask &= labels == ckpt["class_names"].index(args.class_name)
    if args.n > mask.sum():
        raise UsageError(f"--n {args.n}: {dataset.name} has {mask.sum()} {kind}")
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    indices = order[class_balanced_indices(labels[order], mask[order], args.n)]
    title, images = f"{dataset.name}, {kind}", dataset.test_images[indices]
    return title, images, labels[indices], logits[indices]


def run_overlays(args, ckpt, model, runtime, normalize):
    """Draw maps over images: gradcam.png, and a line for each image."""
    names = [printable(name) for name in ckpt["class_names"]]
    if args.image:
        title, titles = "images", [printable(path.name) for path in args.image]
        images = torch.stack([load_image(path) for path in args.image]).to(runtime.device)
        logits = predict(runtime, model, normalize, images)
        targets, target_names = logits.topk(min(3, len(names))).indices, ["1st", "2nd", "3rd"]
    else:
        title, images, labels, logits = select_test_images(args, ckpt, model, runtime, normalize)
        titles = [names[label] for label in labels]
        targets, target_names = logits.topk(min(2, len(names))).indices, ["predicted", "second"]
        if not args.correct:
            targets[:, 1], target_names[1] = labels, "actual"
    if args.target is not None:
        target = ckpt["class_names"].index(args.target)
        targets, target_names = torch.full_like(targets[:, :1], target), ["target"]
    path = writable_dir(args.out or args.ckpt.parent) / "gradcam.png"
    inputs = normalize(images)
    with GradCAM(model, args.layer, args.method) as cam:
        maps = [cam(inputs, target, normalize=False) for target in targets.unbind(1)]
    maps = torch.stack(maps, dim=1)  # (n, M, S, S)
    captions, percents = [], (100 * logits.softmax(1).gather(1, targets)).tolist()
    for name, classes, values in zip(titles, targets.tolist(), percents):
        captions.append([f"{value:.0f} % {names[k]}" for k, value in zip(classes, values)])
        print(f"{name}: {', '.join(map(' '.join, zip(target_names, captions[-1])))}")
    title = f"{title}\n{args.method} of {args.layer}"
    figure = plots.heat_maps(images, titles, normalize_map(maps), captions, target_names, title)
    plots.save_figure(figure, path)
    print(f"saved {path}")
    if args.save_maps:
        with atomic_write(args.save_maps) as temporary, open(temporary, "wb") as file:
            np.save(file, maps.cpu().numpy())
        print(f"saved {args.save_maps}, float32 {tuple(maps.shape)}")


if __name__ == "__main__":
    run_script(main)
