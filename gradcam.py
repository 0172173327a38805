"""Saliency maps: where the network looks for evidence of a class.

    python gradcam.py --ckpt best.pt --n 10             # ten misclassified test images: gradcam.png
    python gradcam.py --ckpt best.pt --image cat.jpg    # your images: the three most likely classes
    python gradcam.py --ckpt best.pt --metrics          # all methods judged: gradcam_metrics.csv

Tokens are channels, so nothing behind the stem has rows and columns: maps are computed at the image
or at the stem. Maps and the probabilities beside them are in float32; --kernels and --precision are
for the many predictions of --metrics.
"""

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
from faithfulness import blur, normalize_map
from runtime import Runtime
from sources import IMAGE_SIZE, load_image
from trainer import load_checkpoint

IMAGE = "image"  # the layer name of what the network is given
LAYER = "stem.gelu2"  # the last with rows and columns
METHOD = "combined"  # beats a blob in the center in every measure; docs/gradcam.md
NUM_MASKS = 32  # for each replacement; 16 cost 0.04 of the pointing game on `shapes`, n = 200
BATCH_SIZE = 125  # of --metrics, as fast as 250
SANITY_IMAGES = 25  # of --metrics, for randomization: it takes six maps of each by each method
MASK_METHODS = ("integrated-gradients", "masked-gradients", "contrast")
METHODS = ("gradcam", "hirescam", "finercam", "layercam", "gradcam++", *MASK_METHODS, "combined")


def layer_maps(activations, gradients, others):
    """{method: maps (B, 1, h, w)} of activations and gradients (B, C, h, w) of two classes.

    gradcam: Selvaraju et al. 2017, arXiv:1610.02391. hirescam: Draelos & Carin 2020,
    arXiv:2011.08891. finercam: Zhang et al. 2025, arXiv:2501.11309. layercam: Jiang et al. 2021.
    gradcam++: equation 19 of Chattopadhay et al. 2018, arXiv:1710.11063, for exp(logit), where
    g^2 / (2 g^2 + sum(A) g^3) times g > 0 is g / (2 + sum(A) g); A < 0 count as 0 in the sum.
    """
    positive, total = gradients.relu(), activations.relu().sum((2, 3), keepdim=True)
    weights = {
        "gradcam": gradients.mean((2, 3), keepdim=True),
        "hirescam": gradients,
        "finercam": gradients - others,
        "layercam": positive,
        "gradcam++": (positive / (2 + total * positive)).sum((2, 3), keepdim=True),
    }
    return {k: (weight * activations).sum(1, keepdim=True) for k, weight in weights.items()}


class GradCAM:
    """Saliency maps of a model's classes.

        with GradCAM(model.eval(), "layer4", method="hirescam") as cam:
            maps = cam(images, targets)

    `layer` is "image" or the name of a module that outputs (B, C, h, w); ValueError for one without
    a grid. MASK_METHODS are computed at the image whatever it is; combined is masked-gradients
    there, times 0.5 to 1.5 by gradcam++ at the layer. Several methods share gradients; their maps
    are a dict. The hook is removed however the block ends; the model stays as it is.
    """

    def __init__(self, model, layer=None, method=METHOD):
        self.model, self.method, self.handle = model, method, None
        self.methods = (method,) if isinstance(method, str) else method
        self.layer = IMAGE if method in MASK_METHODS else layer or LAYER

    def __enter__(self):
        if self.layer != IMAGE:
            module = self.model.get_submodule(self.layer)
            self.handle = module.register_forward_hook(self.save_activations)
        return self

    def __exit__(self, *_):
        if self.handle is not None:
            self.handle.remove()

    def save_activations(self, module, args, output):
        if not is_spatial(output.shape[1:]):
            raise ValueError(f"layer {self.layer!r} outputs {tuple(output.shape)}: no grid")
        self.activations = output
        return output.clone()  # the next layer may work in place

    def gradients(self, images, classes, at_layer=False):
        """Of the logit of each of `classes`, int64 (B,), to images or layer: (classes, B, ...)."""
        self.activations = images = images.detach().requires_grad_()  # without a hook, the image
        logits = self.model(images.clone())
        inputs = self.activations if at_layer else images
        sums = [logits.gather(1, k[:, None]).sum() for k in classes]  # images do not mix in it
        return torch.stack([torch.autograd.grad(s, inputs, retain_graph=True)[0] for s in sums])

    def integrate(self, images, classes, straight=False):
        """What the image adds, times mean gradients of masked images: (classes, B, S, S).

        Integrated gradients take a straight path, Sundararajan et al. 2017, arXiv:1703.01365. Other
        masks are smooth and random, as in RISE, Petsiuk et al. 2018, arXiv:1806.07421; their mean
        gradients estimate Shapley values, Okhrati & Lipani 2020, arXiv:2010.12082. The blurred
        image replaces what is masked, then the mean: each alone hides some evidence.
        """
        S, total, generator = images.shape[-1], 0, torch.Generator().manual_seed(0)
        replacements = blur(images, S / 8), torch.zeros_like(images)
        for i in range(NUM_MASKS):
            share, cells = (i + 0.5) / NUM_MASKS, (4, 8)[i % 2]
            mask = (torch.rand(1, 1, cells, cells, generator=generator) < share).to(images)
            mask = share if straight else F.interpolate(mask, (S, S), mode="bilinear")
            for replacement in replacements:
                gradients = self.gradients(torch.lerp(replacement, images, mask), classes)
                total = total + (gradients * (images - replacement)).sum(2)
        return total / (2 * NUM_MASKS)

    @torch.enable_grad()
    def __call__(self, images, targets=None, others=None, normalize=True):
        """Maps (B, S, S) of normalized images (B, C, S, S) for classes `targets`, int64 (B,).

        `targets` default to the predicted classes, `others`, which finercam and contrast subtract,
        to the most likely of the rest. Maps are in [0, 1]; at least 0 with normalize=False.
        """
        logits = self.model(images).detach()
        targets = logits.argmax(1) if targets is None else targets
        second = logits.scatter(1, targets[:, None], -torch.inf).argmax(1)
        classes, methods = [targets, second if others is None else others], self.methods
        gradients = self.gradients(images, classes, at_layer=True)
        maps = layer_maps(self.activations.detach(), *gradients)
        for method, values in maps.items():
            maps[method] = F.interpolate(values.relu(), images.shape[2:], mode="bilinear")[:, 0]
        smooth = lambda values: blur(values.relu(), 1.0)  # unsmoothed maps are worse to insert
        if "integrated-gradients" in methods:
            maps["integrated-gradients"] = smooth(self.integrate(images, classes[:1], True)[0])
        if not {"masked-gradients", "contrast", "combined"}.isdisjoint(methods):
            values = self.integrate(images, classes[: 1 + ("contrast" in methods)])
            maps["masked-gradients"] = smooth(values[0])
            maps["contrast"] = smooth(values[0] - values[-1])
            # As in Guided Grad-CAM. Times 0 to 1, photographs lose 0.03 of insertion; not
            # multiplied, `shapes` lose 0.09 of the pointing game: n = 120.
            maps["combined"] = maps["masked-gradients"] * (0.5 + normalize_map(maps["gradcam++"]))
        maps = {k: normalize_map(maps[k]) if normalize else maps[k] for k in methods}
        return maps if self.method == methods else maps[self.method]


def is_spatial(shape):
    """Whether an output of this shape, batch left out, has a grid of rows and columns."""
    return len(shape) == 3 and min(shape[1:]) > 1


@torch.no_grad()
def layer_shapes(model, device):
    """{dotted name: output shape, batch left out} of every module, and of the image."""
    shapes = {IMAGE: (3, IMAGE_SIZE, IMAGE_SIZE)}
    with ExitStack() as stack:
        for name, module in list(model.named_modules())[1:]:
            hook = lambda _, args, output, name=name: shapes.update({name: tuple(output.shape[1:])})
            stack.enter_context(module.register_forward_hook(hook))
        model(torch.zeros(1, *shapes[IMAGE], device=device))
    return shapes


def parse_args():
    parser = Parser(description="Show where the network looks, in test images or in yours.")
    add = parser.add_argument
    add("--ckpt", type=Path, default=Path("best.pt"), metavar="FILE", help="a file of train.py")
    add("--method", default=METHOD, choices=METHODS, help="the contrasts are finercam and contrast")
    add("--layer", metavar="NAME", help=f"whose gradients are taken (default: {LAYER})")
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
    if args.layer not in (None, IMAGE) and args.method in MASK_METHODS:
        parser.error(f"--layer: {args.method} is computed at the image")
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
    shapes = layer_shapes(model, runtime.device)
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


@torch.no_grad()
def run_metrics(args, ckpt, model, runtime, normalize):
    """Measure all methods, for the predicted classes: gradcam_metrics.csv, a table on stdout."""
    dataset = load_for_checkpoint(ckpt, args.data, args.data_dir, runtime.device)
    N, total, name = args.metrics, len(dataset.test_images), printable(dataset.name)
    if not 2 <= N <= total:
        raise UsageError(f"--metrics {N}: it takes 2 to {total:,} test images of {name}")
    path = writable_dir(args.out or args.ckpt.parent) / "gradcam_metrics.csv"
    generator, results = torch.Generator().manual_seed(args.seed), []
    indices = torch.randperm(total, generator=generator)[:N].to(runtime.device)
    print(f"{N:,} test images of {name}", flush=True)

    def explain(model, images):
        with GradCAM(model, args.layer, METHODS) as cam:
            return cam(images, targets[: len(images)])

    score = lambda x: runtime.logits(model, x).softmax(1).gather(1, targets[:, None])[:, 0]
    bar = ProgressBar("measuring", N)
    for batch in indices.split(BATCH_SIZE):
        images = normalize(dataset.test_images[batch])
        masks = None if dataset.test_masks is None else dataset.test_masks[batch]
        targets, measures = runtime.logits(model, images).argmax(1), {}
        maps = faithfulness.baselines(images, generator) | explain(model, images)
        for i, (k, saliency) in enumerate(maps.items(), 1):
            measures[k] = faithfulness.evaluate(saliency, images, masks, score, generator)
            bar.update(len(results) * BATCH_SIZE + len(batch) * i // len(maps))
        if not results:
            found = faithfulness.randomization(explain, model, images[:SANITY_IMAGES], generator)
            measures = {k: measures[k] | found.get(k, {}) for k in measures}
        results.append(measures)
    bar.clear()
    rows = faithfulness.summarize(results, dataset=name, n=N, layer=args.layer or "default")
    write_csv(path, rows)
    print(f"\n{faithfulness.table(rows)}\n\nmean +- standard error\nsaved {path}")


def select_test_images(args, ckpt, model, runtime, normalize):
    """Images in random order, one of each actual class in turn: title, images, labels, logits."""
    dataset = load_for_checkpoint(ckpt, args.data, args.data_dir, runtime.device)
    logits, labels = runtime.predict(model, normalize, dataset.test_images), dataset.test_labels
    kind = f"{'correctly classified' if args.correct else 'misclassified'} test images"
    mask = (logits.argmax(1) == labels) == args.correct
    if args.class_name is not None:
        mask &= labels == ckpt["class_names"].index(args.class_name)
    if args.n > mask.sum():
        raise UsageError(f"--n {args.n}: {dataset.name} has {mask.sum()} {kind}")
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    indices = order[class_balanced_indices(labels[order], mask[order], args.n)]
    images = dataset.test_images[indices]
    return f"{dataset.name}, {kind}", images, labels[indices], logits[indices]


def run_overlays(args, ckpt, model, runtime, normalize):
    """Draw maps over images: gradcam.png, and a line for each image."""
    names = [printable(name) for name in ckpt["class_names"]]
    if args.image:
        title, titles = "images", [printable(path.name) for path in args.image]
        images = torch.stack([load_image(path) for path in args.image]).to(runtime.device)
        logits = runtime.predict(model, normalize, images)
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
    others = targets.flip(1).T if len(target_names) == 2 else [None] * len(target_names)
    with GradCAM(model, args.layer, args.method) as cam:
        maps = [cam(inputs, *pair, normalize=False) for pair in zip(targets.T, others)]
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
