"""Saliency maps: where the network looks for evidence of a class.

    python gradcam.py --ckpt best.pt --n 10             # ten misclassified test images: gradcam.png
    python gradcam.py --ckpt best.pt --image cat.jpg    # your images: the three most likely classes
    python gradcam.py --ckpt best.pt --metrics          # all methods judged: gradcam_metrics.csv

Tokens are channels, so nothing behind the stem has rows and columns: maps are computed at the image
or at the stem. Maps and the probabilities beside them are in float32; --kernels and --precision are
for the many predictions of --metrics.
"""

import itertools
from contextlib import ExitStack
from functools import partial
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
from faithfulness import blur, normalize_map
from runtime import Runtime
from sources import IMAGE_SIZE, load_image
from trainer import load_checkpoint, predict

IMAGE = "image"  # the layer name of what the network is given
LAYER = "stem.gelu2"  # the last with rows and columns
METHOD = "combined"  # beats a blob in the center in every measure; docs/gradcam.md
NUM_MASKS = 32  # for each replacement; 16 cost 0.04 of the pointing game on `shapes`, n = 200
BATCH_SIZE = 250
SANITY_IMAGES = 25  # of --metrics, for randomization: it takes six maps of each by each method


def gradcam_plus_plus(activations, gradients):
    """Equation 19 of Chattopadhay et al. 2018, arXiv:1710.11063, for exp(logit).

    Its g^2 / (2 g^2 + sum(A) g^3) times g > 0 is g / (2 + sum(A) g); A < 0 count as 0 in the sum.
    """
    positive, total = gradients.relu(), activations.relu().sum((2, 3), keepdim=True)
    weights = (positive / (2 + total * positive)).sum((2, 3), keepdim=True)
    return (weights * activations).sum(1)


def path_masks(method, S):
    """Masks (1, 1, S, S) of how much of the image is seen while the rest is replaced.

    Integrated gradients take a straight path, Sundararajan et al. 2017, arXiv:1703.01365. The other
    masks are smooth and random, as in RISE, Petsiuk et al. 2018, arXiv:1806.07421. Mean gradients
    at them estimate Shapley values, Okhrati & Lipani 2020, arXiv:2010.12082.
    """
    generator = torch.Generator().manual_seed(0)
    for i in range(NUM_MASKS):
        share, cells = (i + 0.5) / NUM_MASKS, (4, 8)[i % 2]
        mask = (torch.rand(1, 1, cells, cells, generator=generator) < share).float()
        mask = torch.full_like(mask, share) if method == "integrated-gradients" else mask
        yield F.interpolate(mask, (S, S), mode="bilinear")


# Gradients averaged over a channel: Selvaraju et al. 2017, arXiv:1610.02391; at each position:
# Draelos & Carin 2020, arXiv:2011.08891; where they are positive: Jiang et al. 2021, LayerCAM.
LAYER_METHODS = {
    "gradcam": lambda a, g: (a * g.mean((2, 3), keepdim=True)).sum(1),
    "hirescam": lambda a, g: (a * g).sum(1),
    "finercam": lambda a, g: (a * g).sum(1),
    "layercam": lambda a, g: (a * g.relu()).sum(1),
    "gradcam++": gradcam_plus_plus,
}
MASK_METHODS = ("integrated-gradients", "masked-gradients", "contrast")
# Of the logit of a class minus that of another one. Finer-CAM, Zhang et al. 2025, arXiv:2501.11309.
CONTRASTS = ("finercam", "contrast")
METHODS = (*LAYER_METHODS, *MASK_METHODS, "combined")


class GradCAM:
    """Saliency maps of a model's classes from one layer.

        with GradCAM(model.eval(), "layer4", method="hirescam") as cam:
            maps = cam(images, targets)

    `layer` is "image" or the name of a module that outputs (B, C, h, w), by default as fits the
    method and this project's network; ValueError for one without a grid. The hooks of the block
    are removed however it ends; parameters, their gradients and requires_grad stay as they are.
    Method combined is masked-gradients at the image, weighted by gradcam++ at the layer.
    """

    def __init__(self, model, layer=None, method=METHOD):
        self.model, self.method, self.handles = model, method, []
        self.layer = layer or (IMAGE if method in MASK_METHODS else LAYER)

    def __enter__(self):
        if self.method == "combined":
            return self  # its two maps have their own hooks
        if self.layer == IMAGE:
            hook = lambda module, args: (self.save_activation(args[0]), *args[1:])
            self.handles = [self.model.register_forward_pre_hook(hook)]
        else:
            hook = lambda module, args, output: self.save_activation(output)
            self.handles = [self.model.get_submodule(self.layer).register_forward_hook(hook)]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def save_activation(self, activations):
        """Replace activations by a leaf, where gradients stop."""
        if not is_spatial(activations.shape[1:]):
            raise ValueError(f"layer {self.layer!r} outputs {tuple(activations.shape)}: no grid")
        self.activations = activations.detach().requires_grad_()
        return self.activations.clone()  # the next layer may work in place

    def gradients(self, logits, targets, others):
        """Of the logits of `targets` to the activations; images do not mix in that of the sum."""
        scores = logits.gather(1, targets[:, None])
        if self.method in CONTRASTS:
            scores = scores - logits.gather(1, others[:, None])
        return torch.autograd.grad(scores.sum(), self.activations)[0]

    def integrate(self, images, targets, others):
        """What the image changes at the layer, times mean gradients of masked images: (B, h, w).

        The blurred image replaces what is masked, then the mean: each alone hides some evidence.
        """
        activations, total = self.activations.detach(), 0
        for replacement in (blur(images, images.shape[-1] / 8), torch.zeros_like(images)):
            self.model(replacement)
            change = activations - self.activations.detach()
            for mask in path_masks(self.method, images.shape[-1]):
                logits = self.model(torch.lerp(replacement, images, mask.to(images)))
                total = total + (change * self.gradients(logits, targets, others)).sum(1)
        return blur(total.relu(), 1.0) / (2 * NUM_MASKS)  # unsmoothed maps are worse to insert

    def combine(self, images, targets):
        """Masked gradients times 0.5 to 1.5, by the map of the layer, as in Guided Grad-CAM.

        Times 0 to 1, photographs lose 0.03 of insertion; not multiplied, `shapes` lose 0.09 of the
        pointing game: n = 120.
        """
        maps = []
        for layer, method in ((IMAGE, "masked-gradients"), (self.layer, "gradcam++")):
            with GradCAM(self.model, layer, method) as cam:
                maps.append(cam(images, targets, normalize=False))
        return maps[0] * (0.5 + normalize_map(maps[1]))

    @torch.enable_grad()
    def __call__(self, images, targets=None, others=None, normalize=True):
        """Maps (B, S, S) of normalized images (B, C, S, S) for classes `targets`, int64 (B,).

        `targets` default to the predicted classes, `others`, to contrast with, to the most likely
        of the rest. Maps are in [0, 1]; with normalize=False they are at least 0.
        """
        if self.method == "combined":
            maps = self.combine(images, targets)
            return normalize_map(maps) if normalize else maps
        logits = self.model(images)
        targets = logits.argmax(1) if targets is None else targets
        if others is None:
            others = logits.detach().scatter(1, targets[:, None], -torch.inf).argmax(1)
        if self.method in MASK_METHODS:
            maps = self.integrate(images, targets, others)
        else:
            gradients = self.gradients(logits, targets, others)
            maps = LAYER_METHODS[self.method](self.activations.detach(), gradients)
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


@torch.no_grad()
def evaluate_maps(model, runtime, layer, images, masks, generator):
    """{map: {measure: (N,)}} of baselines and methods, at `layer` or theirs, of predicted classes.

    images are normalized (N, 3, S, S), masks bool (N, S, S) or None.
    """
    predict = lambda x: torch.cat([runtime.logits(model, part) for part in x.split(BATCH_SIZE)])
    targets = predict(images).argmax(1)
    maps = faithfulness.baselines(images, generator)
    bar = ProgressBar("measuring", (len(maps) + len(METHODS)) * faithfulness.NUM_SCORES)
    done = itertools.count(1)

    def score(perturbed):
        bar.update(next(done))
        return predict(perturbed).softmax(1).gather(1, targets[:, None])[:, 0]

    def explain(method, model, images):
        with GradCAM(model, layer, method) as cam:
            pairs = zip(images.split(BATCH_SIZE), targets.split(BATCH_SIZE))
            return torch.cat([cam(x, y[: len(x)]) for x, y in pairs])

    results = {}
    for name in (*maps, *METHODS):
        saliency = maps[name] if name in maps else explain(name, model, images)
        results[name] = faithfulness.evaluate(saliency, images, masks, score, generator)
        if name in METHODS:
            args = partial(explain, name), model, images[:SANITY_IMAGES], generator
            results[name] |= faithfulness.randomization(*args)
    bar.clear()
    return results


def parse_args():
    parser = Parser(description="Show where the network looks, in test images or in yours.")
    add = parser.add_argument
    add("--ckpt", type=Path, default=Path("best.pt"), metavar="FILE", help="a file of train.py")
    add("--method", default=METHOD, choices=METHODS, help="the contrasts are finercam and contrast")
    add("--layer", metavar="NAME", help=f"to explain (default: {IMAGE} or {LAYER}, by method)")
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
    size = (3, IMAGE_SIZE, IMAGE_SIZE)
    shapes = {IMAGE: size} | layer_shapes(model, torch.zeros(1, *size, device=runtime.device))
    layers = [name for name, shape in shapes.items() if is_spatial(shape)]
    if args.list_layers:
        for name, shape in shapes.items():
            print(f"{name:<28} {shape!s:<14} {'has a grid' if name in layers else 'no grid'}")
        return
    if args.layer not in (None, *layers):
        raise UsageError(f"--layer {args.layer}: layers with a grid are {', '.join(layers)}")
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
    print(f"{N:,} test images of {name}", flush=True)
    results = evaluate_maps(model, runtime, args.layer, images, masks, generator)
    rows = faithfulness.summarize(results, dataset=name, n=N, layer=args.layer or "default")
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
    others = targets.flip(1).unbind(1) if len(target_names) == 2 else itertools.repeat(None)
    with GradCAM(model, args.layer, args.method) as cam:
        maps = [cam(inputs, *pair, normalize=False) for pair in zip(targets.unbind(1), others)]
    maps = torch.stack(maps, dim=1)  # (n, M, S, S)
    scaled = maps / maps.amax((1, 2, 3), keepdim=True).clamp(min=1e-12)  # comparable in an image
    captions, percents = [], (100 * logits.softmax(1).gather(1, targets)).tolist()
    for name, classes, values in zip(titles, targets.tolist(), percents):
        captions.append([f"{value:.0f} % {names[k]}" for k, value in zip(classes, values)])
        print(f"{name}: {', '.join(map(' '.join, zip(target_names, captions[-1])))}")
    title = f"{title}\n{args.method} at {cam.layer}"
    figure = plots.heat_maps(images, titles, scaled, captions, target_names, title)
    plots.save_figure(figure, path)
    print(f"saved {path}")
    if args.save_maps:
        with atomic_write(args.save_maps) as temporary, open(temporary, "wb") as file:
            np.save(file, maps.cpu().numpy())
        print(f"saved {args.save_maps}, float32 {tuple(maps.shape)}")


if __name__ == "__main__":
    run_script(main)
