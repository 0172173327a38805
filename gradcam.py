"""Saliency maps: where the network looks for evidence of a class.

    python gradcam.py --ckpt best.pt --n 10             # ten misclassified test images: gradcam.png
    python gradcam.py --ckpt best.pt --image cat.jpg    # your images, as many as you name
    python gradcam.py --ckpt best.pt --metrics          # the maps measured: gradcam_metrics.csv

Tokens are channels, so nothing behind the stem has rows and columns: Grad-CAM is computed at the
end of the stem, and masked gradients at the image. Everything is in float32.
"""

import os
from collections import defaultdict
from pathlib import Path

from cli import Parser, ProgressBar, UsageError, add_device_argument, add_run_data_arguments
from cli import markdown_table, num_shown, parse_before_imports, positive_int, printable
from cli import run_script, seed_int, writable_dir, write_csv

# --- the flags ---

METHODS = {
    "gradcam": "Grad-CAM",
    "hirescam": "HiResCAM",
    "masked-gradients": "masked gradients",
}
SHOWN = ("gradcam", "masked-gradients")  # where --method names none
LAYERS = ("stem.conv1", "stem.gelu1", "stem.conv2", "stem.gelu2")  # have rows and columns
LAYER = "stem.gelu2"


def parse_args():
    parser = Parser(description="Show where the network looks, in test images or in yours.")
    add = parser.add_argument
    add("--ckpt", type=Path, default=Path("best.pt"), metavar="FILE", help="a file of train.py")
    add("--n", type=num_shown, default=10, help="test images to show, of each class in turn")
    add("--image", nargs="+", type=Path, metavar="FILE", help="show these instead of test images")
    add("--correct", action="store_true", help="show correctly classified test images")
    add("--class", dest="class_name", metavar="CLASS", help="show test images of this class")
    add("--method", choices=METHODS, help=f"show this one alone (default: {' and '.join(SHOWN)})")
    add("--layer", default=LAYER, choices=LAYERS, help="of gradcam and hirescam")
    help = "instead, measure all methods on up to N test images (1000 where N is left out)"
    add("--metrics", nargs="?", type=positive_int, const=1000, metavar="N", help=help)
    add("--seed", type=seed_int, default=1, help="of the choice of test images")
    add_run_data_arguments(parser)
    add_device_argument(parser)
    add("--out", type=Path, metavar="DIR", help="to write to (default: that of --ckpt)")
    args = parser.parse_args()
    if args.image and (args.correct or args.class_name):
        parser.error("--image shows no test images (--correct, --class)")
    if args.metrics and (args.image or args.correct or args.class_name or args.method):
        parser.error("--metrics shows no images, and measures every method")
    if args.method == "masked-gradients" and args.layer != LAYER:
        parser.error("--layer: masked-gradients are computed at the image")
    return args


if __name__ == "__main__":
    parse_before_imports(parse_args)

import torch
import torch.nn.functional as F

import plots
from augment import Normalize
from checkpoint import load_checkpoint
from data import class_balanced_indices, load_for_checkpoint, load_image
from runtime import Runtime, tune_process

NUM_MASKS = 32  # 16 cost 0.04 of the pointing game on `shapes`, n = 200
STEPS = 12  # of insertion and deletion, 85 pixels each
BLUR_STD = 4.0  # pixels, of the blurred image that insertion starts from
BATCH_SIZE = 125  # of --metrics, as fast as 250

# --- maps ---


class GradCAM:
    """Saliency maps of a network's classes, from gradients of their logits.

        with GradCAM(model.eval(), "layer4") as cam:
            maps = cam(images, targets)

    `layer` is the name of a module that outputs (B, C, h, w). The methods are

        gradcam             activations times the mean gradient of their channel, at the layer,
                            Selvaraju et al. 2017, arXiv:1610.02391
        hirescam            activations times their gradient, at the layer,
                            Draelos & Carin 2020, arXiv:2011.08891
        masked-gradients    what each pixel adds (see that function); needs no layer

    Raises ValueError for a method or layer that does not exist, and for a layer without rows and
    columns. The hook is removed however the block ends. Parameters, and gradients in them, stay as
    they are.
    """

    def __init__(self, model, layer=LAYER, method="gradcam"):
        if method not in METHODS:
            raise ValueError(f"no method {method!r}; there are {', '.join(METHODS)}")
        self.model = model
        self.layer = layer
        self.method = method
        self.uses_layer = method != "masked-gradients"
        if self.uses_layer and layer not in dict(model.named_modules()):
            raise ValueError(f"the model has no layer {layer!r}")
        self.activations = None
        self.hook = None

    def __enter__(self):
        if self.uses_layer:
            module = self.model.get_submodule(self.layer)
            self.hook = module.register_forward_hook(self.save_activations)
        return self

    def __exit__(self, *_):
        if self.hook is not None:
            self.hook.remove()
        self.activations = None

    def save_activations(self, module, args, output):
        """Keep what the layer outputs; called by PyTorch in each forward pass."""
        shape = tuple(getattr(output, "shape", ()))
        if len(shape) != 4 or min(shape[2:]) < 2:
            raise ValueError(f"layer {self.layer!r} outputs {shape}: no rows and columns")
        self.activations = output
        return output.clone()  # the next module may work in place

    def __call__(self, images, targets=None, normalize=True):
        """Return maps (B, H, W) of images (B, C, H, W) as the model takes them.

        `targets`, int64 (B,), are the classes to explain: by default the predicted ones. Maps are
        stretched to [0, 1]. With normalize=False they are not, so that the maps of two classes can
        be compared: 0 is no evidence.
        """
        # The caller may have turned gradients off. What was made in inference mode has to be
        # copied before a backward pass can use it.
        with torch.inference_mode(False), torch.enable_grad():
            images = images.detach().clone()
            if targets is None:
                targets = self.model(images.clone()).argmax(1)
            else:
                targets = targets.clone()
            if self.uses_layer:
                maps = self.layer_maps(images, targets)
            else:
                maps = self.masked_gradients(images, targets)
        if normalize:
            maps = normalize_maps(maps)
        return maps

    def gradients(self, images, targets, of_layer=False):
        """Return gradients of the targets' logits with respect to images, or to activations."""
        images = images.detach().requires_grad_()
        logits = self.model(images.clone())  # (B, C, H, W) -> (B, K)
        total = logits.gather(1, targets[:, None]).sum()  # each image has its own logit in it
        inputs = self.activations if of_layer else images
        return torch.autograd.grad(total, inputs)[0]

    def layer_maps(self, images, targets):
        """Return the maps of gradcam or hirescam, at least 0."""
        gradients = self.gradients(images, targets, of_layer=True)  # (B, C, h, w)
        activations = self.activations.detach()
        self.activations = None  # it keeps the whole forward pass in memory
        if self.method == "gradcam":
            gradients = gradients.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        maps = (gradients * activations).sum(1, keepdim=True).relu()  # (B, 1, h, w)
        return F.interpolate(maps, images.shape[2:], mode="bilinear")[:, 0]  # (B, H, W)

    def masked_gradients(self, images, targets):
        """Return what each pixel adds to the logit, averaged over images with masked parts.

        Masked parts are replaced by the blurred image, then by 0, the mean of normalized images:
        each alone hides some evidence. A pixel adds its gradient times (image - replacement). Masks
        are smooth and random, as in RISE, Petsiuk et al. 2018, arXiv:1806.07421; the mean over
        masks of all sizes estimates Shapley values, Okhrati & Lipani 2020, arXiv:2010.12082.
        """
        size = images.shape[2:]
        blurred = blur(images, min(size) / 8)
        mean = torch.zeros_like(images)
        generator = torch.Generator().manual_seed(0)
        total = 0
        for i in range(NUM_MASKS):
            # A mask keeps a share of 4x4 or 8x8 cells: almost none at first, almost all at last.
            share = (i + 0.5) / NUM_MASKS
            cells = 4 if i % 2 == 0 else 8
            kept = torch.rand(1, 1, cells, cells, generator=generator) < share
            mask = F.interpolate(kept.to(images), size, mode="bilinear")  # (1, 1, H, W)
            for replacement in (blurred, mean):
                masked = torch.lerp(replacement, images, mask)
                gradients = self.gradients(masked, targets)
                total = total + (gradients * (images - replacement)).sum(1)  # (B, H, W)
        maps = total / (2 * NUM_MASKS)
        # Pixels that speak against the class are left out. Without the blur, maps insert worse.
        return blur(maps.relu(), 1.0)


def blur(images, std):
    """Return (..., H, W) blurred by a Gaussian of `std` pixels, with nothing from outside."""

    def kernel(size):
        index = torch.arange(size, device=images.device)
        square = (index[:, None] - index) ** 2
        return (-square / (2 * std**2)).softmax(1)  # (size, size)

    height, width = images.shape[-2:]
    return kernel(height) @ images @ kernel(width).T


def normalize_maps(maps):
    """Return (..., H, W) stretched to [0, 1], each map by itself; a constant one becomes 0."""
    low = maps.amin((-2, -1), keepdim=True)
    high = maps.amax((-2, -1), keepdim=True)
    varies = high - low > 1e-5 * torch.maximum(high.abs(), low.abs())  # by more than rounding
    span = torch.where(varies, high - low, 1)
    return torch.where(varies, (maps - low) / span, 0)


# --- measures of maps ---


def center_maps(images):
    """Return maps (B, H, W) of a blob in the center, which knows neither image nor network."""

    def bell(size):
        index = torch.arange(size, device=images.device) - (size - 1) / 2
        return (-((index / (size / 4)) ** 2) / 2).exp()

    B, _, height, width = images.shape
    blob = bell(height)[:, None] * bell(width)
    return normalize_maps(blob.expand(B, height, width))


def pixel_ranks(maps, generator):
    """Return ranks of pixels (B, 1, H, W), 0 for the most salient; ties are in random order.

    In another order, the first rows of an image would be preferred wherever its map is 0.
    """
    B, height, width = maps.shape
    shuffle = torch.rand(B, height * width, generator=generator).argsort(1).to(maps.device)
    shuffled = maps.flatten(1).gather(1, shuffle)
    order = shuffle.gather(1, shuffled.argsort(dim=1, descending=True, stable=True))
    ranks = order.argsort(1)  # the inverse permutation
    return ranks.view(B, 1, height, width)


@torch.no_grad()
def insertion_and_deletion(maps, images, model, targets, generator):
    """Return (insertion, deletion), each (B,): mean probabilities of the targets.

    Pixels are put into the blurred image, or replaced by 0, the mean of normalized images, the most
    salient first. Petsiuk et al. 2018, arXiv:1806.07421.
    """
    ranks = pixel_ranks(maps, generator)
    num_pixels = maps[0].numel()
    blurred = blur(images, BLUR_STD)
    mean = torch.zeros_like(images)

    def probability(images):
        return model(images).softmax(1).gather(1, targets[:, None])[:, 0]

    insertion = 0
    deletion = 0
    for step in range(STEPS):
        # Half a step further, for the area under the curve by the midpoint rule.
        count = num_pixels * (2 * step + 1) // (2 * STEPS)
        salient = ranks < count
        insertion = insertion + probability(torch.where(salient, images, blurred))
        deletion = deletion + probability(torch.where(salient, mean, images))
    return insertion / STEPS, deletion / STEPS


def pointing_games(maps, masks):
    """Return (pointing, inside), each (B,): shares of a map's maxima and of its sum in its mask.

    `masks`, bool (B, H, W), mark objects. There is mostly one maximum; a map of zeros is uniform.
    Zhang et al. 2016, arXiv:1608.00507, without its tolerance; Wang et al. 2020, arXiv:1910.01279.
    """

    def share_in_mask(values):
        return (values * masks).sum((1, 2)) / values.sum((1, 2))

    top = maps.amax((1, 2), keepdim=True)
    pointing = share_in_mask(maps == top)
    inside = share_in_mask(torch.where(top > 0, maps, 1))
    return pointing, inside


def run_metrics(args, ckpt, model, normalize, device):
    """Measure maps of the predicted classes: a table on stdout, and gradcam_metrics.csv."""
    dataset = load_for_checkpoint(ckpt, args.data, args.data_dir, device)
    total = len(dataset.test_images)
    count = min(args.metrics, total)
    if count < 2:
        raise UsageError("--metrics takes at least two test images")
    path = writable_dir(args.out or args.ckpt.parent) / "gradcam_metrics.csv"
    print(f"{count:,} test images of {dataset.name}", flush=True)
    generator = torch.Generator().manual_seed(args.seed)
    indices = torch.randperm(total, generator=generator)[:count].to(device)

    measures = ["insertion", "deletion"]
    if dataset.test_masks is not None:  # only `shapes` has them
        measures += ["pointing", "inside"]
    results = defaultdict(list)  # {(map, measure): a tensor (B,) for each batch}
    done = 0
    with ProgressBar("measuring", len(indices)) as bar:
        for batch in indices.split(BATCH_SIZE):
            # The maps of these images, by every method.
            images = normalize(dataset.test_images[batch])
            with torch.no_grad():
                targets = model(images).argmax(1)
            maps = {"center": center_maps(images)}
            for method in METHODS:
                with GradCAM(model, args.layer, method) as cam:
                    maps[method] = cam(images, targets)

            # What each measure says of them.
            for name, saliency in maps.items():
                insertion, deletion = insertion_and_deletion(
                    saliency, images, model, targets, generator
                )
                results[name, "insertion"].append(insertion)
                results[name, "deletion"].append(deletion)
                if dataset.test_masks is not None:
                    pointing, inside = pointing_games(saliency, dataset.test_masks[batch])
                    results[name, "pointing"].append(pointing)
                    results[name, "inside"].append(inside)
            done += len(batch)
            bar.update(done)

    # Means over images and their standard errors: a row for each map.
    rows = []
    lines = []
    for name in ("center", *METHODS):
        row = {"dataset": dataset.name, "n": len(indices), "layer": args.layer, "map": name}
        line = [name]
        for measure in measures:
            values = torch.cat(results[name, measure]).cpu().double()
            mean = values.mean().item()
            error = values.std().item() / len(values) ** 0.5
            row[measure] = mean
            row[f"{measure}_se"] = error
            line.append(f"{mean:.3f} +- {error:.3f}")
        rows.append(row)
        lines.append(line)
    write_csv(path, rows)
    print("\n" + markdown_table(["map", *measures], lines))
    print("\nmean +- standard error; the lower the deletion, and the higher the others, the better")
    print(f"saved {path}")


# --- the picture ---


def choose_test_images(args, names, dataset, logits):
    """Choose test images at random, one of each actual class in turn: (what they are, indices)."""
    labels = dataset.test_labels
    is_correct = logits.argmax(1) == labels
    if args.correct:
        candidates = is_correct
        title = f"correctly classified test images of {dataset.name}"
    else:
        candidates = ~is_correct
        title = f"misclassified test images of {dataset.name}"
    if args.class_name is not None:
        candidates = candidates & (labels == names.index(args.class_name))
        title += f", {args.class_name}"
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    indices = order[class_balanced_indices(labels[order], candidates[order], args.n)]
    if len(indices) == 0:
        raise UsageError(f"there are no {title}")
    if len(indices) < args.n:
        print(f"there are only {len(indices)} {title}")
    return title, indices


def file_names(paths):
    """Return names of files; where two are the same, with the folders in which they differ."""
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        paths = [path.absolute() for path in paths]
        shared = os.path.commonpath([path.parent for path in paths])
        names = [str(path.relative_to(shared)) for path in paths]
    return [printable(name) for name in names]


def enlarge(images, high):
    """Return (n, C, S, S) in [0, high] at eight times the size, bicubic."""
    return F.interpolate(images.float(), scale_factor=8, mode="bicubic").clamp(0, high)


def run_picture(args, ckpt, model, normalize, runtime):
    """Draw maps of two classes over each image: gradcam.png, and a line for each on stdout."""
    names = ckpt["class_names"]
    if args.image:
        images = torch.stack([load_image(path) for path in args.image]).to(runtime.device)
        logits = runtime.predict(model, normalize, images)
        title = "the two most likely classes"
        image_names = file_names(args.image)
    else:
        dataset = load_for_checkpoint(ckpt, args.data, args.data_dir, runtime.device)
        logits = runtime.predict(model, normalize, dataset.test_images)
        title, indices = choose_test_images(args, names, dataset, logits)
        images = dataset.test_images[indices]
        logits = logits[indices]
        image_names = [f"test image {i}" for i in indices.tolist()]
    path = writable_dir(args.out or args.ckpt.parent) / "gradcam.png"

    # Two classes of each image, (n, 2): the most likely one, and the actual one if it is another.
    targets = logits.topk(min(2, len(names))).indices
    roles = ["predicted", "second"]
    if not args.image and not args.correct:
        targets[:, 1] = dataset.test_labels[indices]
        roles = ["predicted", "actual"]
    percents = 100 * logits.softmax(1).gather(1, targets)

    captions = []
    for i, image_name in enumerate(image_names):
        pair = []
        for role, k, percent in zip(roles, targets[i].tolist(), percents[i].tolist()):
            pair.append(f"{role}\n{percent:.0f} % {names[k]}")
        captions.append(pair)
        print(f"{image_name}: {', '.join(pair)}".replace("\n", " "))

    inputs = normalize(images)
    maps = {}
    for method in [args.method] if args.method else SHOWN:
        with GradCAM(model, args.layer, method) as cam:
            pair = [cam(inputs, classes, normalize=False) for classes in targets.T]
        values = torch.stack(pair, dim=1)  # (n, 2, 32, 32)
        # The maps of an image have one scale, so that the brighter one is the stronger evidence.
        largest = values.amax((1, 2, 3), keepdim=True)
        head = METHODS[method]
        if cam.uses_layer and args.layer != LAYER:
            head += f" at {args.layer}"
        maps[head] = enlarge(values / largest.clamp(min=1e-12), 1)
    figure = plots.heat_maps(enlarge(images, 255).byte(), image_names, maps, captions, title)
    plots.save_figure(figure, path)
    print(f"saved {path}")


# --- the script ---


def main():
    args = parse_args()
    runtime = Runtime(args.device, "fp32", "torch")
    tune_process(runtime.device)
    model, ckpt = load_checkpoint(args.ckpt, runtime.device)
    names = ckpt["class_names"]
    if args.class_name is not None and args.class_name not in names:
        raise UsageError(f"--class {args.class_name}: the classes are {', '.join(names)}")
    print(f"{runtime.describe()}\nloading images", flush=True)
    normalize = Normalize(ckpt["mean"], ckpt["std"], runtime.device)
    if args.metrics:
        run_metrics(args, ckpt, model, normalize, runtime.device)
    else:
        run_picture(args, ckpt, model, normalize, runtime)


if __name__ == "__main__":
    run_script(main)
