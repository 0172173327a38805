"""Where the network looks: heat maps of what a class owes to each place of a picture.

    python gradcam.py --ckpt best.pt --n 10             # ten misclassified test pictures: gradcam.png
    python gradcam.py --ckpt best.pt --image cat.jpg    # pictures of yours: the three likeliest classes
    python gradcam.py --ckpt best.pt --metrics          # every method, judged: gradcam_metrics.csv

Tokens of this network are channels, so nothing behind the stem has rows and columns; the maps are read off the stem,
by default off its second GELU: 32 channels of 16x16. They, and the predictions beside them, come from vit.py's plain
network in float32, whatever --kernels and --precision say; those two speed up the many predictions of --metrics.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

import checkpoint
import data
import faithfulness
import plots
from augment import Normalize
from cifar import SIDE
from cli import Parser, Progress, UsageError, add_data_arguments, add_device_arguments, output_folder, positive_int, run, seed_int
from engine import Runtime, balanced_choice, predict
from files import write_csv
from pictures import decode_one
from vit import SoftmaxAttention

LAYER = "stem.gelu2"
TOKEN_LAYERS = ("stem.conv2", "stem.gelu2")  # whose channels are the tokens, so that attention speaks of them
METHOD = "hirescam"  # the best insertion and deletion on the JPEG copy of CIFAR-10; README, "Where it looks"
METRICS_BATCH = 250


# --- one map from a layer's activations (B, C, h, w) and a class's gradients, of the same shape: (B, h, w) ---


def gradcam(activations, gradients):
    """Selvaraju et al. 2017, arXiv:1610.02391: each channel weighted with its mean gradient."""
    return (gradients.mean((2, 3), keepdim=True) * activations).sum(1)


def hirescam(activations, gradients):
    """Draelos & Carin 2020, arXiv:2011.08891: each place with its own gradient, as suits a head that reads positions."""
    return (gradients * activations).sum(1)


def gradcam_plus_plus(activations, gradients):
    """Chattopadhay et al. 2018, arXiv:1710.11063, equation 19, for exp(logit): each channel weighted with its positive gradients.

    Their weight of a gradient g > 0, g^2 / (2 g^2 + sum(A) g^3), times g, is g / (2 + sum(A) g). Their activations A are
    never negative; what GELU lets below zero counts as zero in the divisor, which could vanish otherwise.
    """
    positive, total = gradients.relu(), activations.relu().sum((2, 3), keepdim=True)
    return ((positive / (2 + total * positive)).sum((2, 3), keepdim=True) * activations).sum(1)


GRADIENT_METHODS = {"gradcam": gradcam, "hirescam": hirescam, "gradcam++": gradcam_plus_plus}
METHODS = (*GRADIENT_METHODS, "attention")


def rollout(attentions):
    """How much of each token reaches the CLS token: a list of (B, T, T), first block first, -> (B, T - 1).

    Abnar & Zuidema 2020, arXiv:2005.00928: half of a token passes by in the residual connection. Rows of attention sum
    to 1 and rows of the identity too, so their mean needs no renormalising.
    """
    flow = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    for weights in attentions:
        flow = (weights + torch.eye(weights.shape[-1], device=weights.device)) / 2 @ flow
    return flow[:, 0, 1:]


def to_unit(maps, size):
    """Maps (B, h, w), interpolated to `size` and stretched to [0, 1], each for itself; a constant one becomes zeros."""
    maps = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]  # (B, h, w) -> (B, S, S)
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    varies = high - low > 1e-5 * torch.maximum(high.abs(), low.abs())  # interpolation rounds a constant, too
    return torch.where(varies, (maps - low) / torch.where(varies, high - low, 1), 0)


class GradCAM:
    """Heat maps of a model's classes, read off one layer by its dotted name.

        with GradCAM(model, "stem.gelu2") as cam:
            maps = cam(images, targets)

    In the block the model is in evaluation mode and has hooks; after it, however it ended, the hooks are gone and every
    module is in the mode it was in. A call without a block makes one for itself. No parameter's `grad` or `requires_grad`
    is touched, and neither needs to be on. Raises ValueError for a method or layer that there is not.
    """

    def __init__(self, model, layer=LAYER, method=METHOD):
        self.model, self.layer, self.method, self.handles = model, layer, method, []
        self.readers = [module for module in model.modules() if isinstance(module, SoftmaxAttention)]
        if method not in METHODS:
            raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
        if layer not in dict(model.named_modules()):
            raise ValueError(f"the network has no layer {layer!r}; --list-layers names them all")
        if method == "attention" and not (self.readers and layer in TOKEN_LAYERS):
            raise ValueError(f"attention speaks of tokens, which are the channels of {' and '.join(TOKEN_LAYERS)}; {layer!r} has others")

    def __enter__(self):
        if self.handles:
            raise RuntimeError("this GradCAM is in a with block already")
        self.modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        self.handles = [self.model.get_submodule(self.layer).register_forward_hook(self.keep)]
        if self.method == "attention":
            self.handles += [module.register_forward_hook(self.keep_attention) for module in self.readers]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()
        self.handles = []
        for module, training in self.modes:
            module.training = training

    def keep(self, module, inputs, output):
        """Put a leaf in the place of the layer's output: gradients reach it, and go no further back."""
        self.activations = output.detach().requires_grad_()
        return self.activations

    def keep_attention(self, module, inputs, output):
        self.attentions.append(module.weigh(inputs[0].detach())[0].mean(1))  # over heads: (B, T, T)

    def __call__(self, images, targets=None):
        """Maps (B, S, S) in [0, 1] of float pictures (B, 3, S, S), for classes `targets` (B,) or those predicted.

        The logits (B, K) of the same pass are left in `self.logits`. Attention knows no class: its maps are the same for
        all. Raises ValueError for a layer without a grid and for classes that there are not.
        """
        if not self.handles:
            with self:
                return self(images, targets)
        self.activations, self.attentions = None, []
        with torch.inference_mode(False), torch.enable_grad():  # whatever mode the caller is in
            logits = self.model(images.clone())  # clones, as tensors made in inference mode have no gradients
            if self.activations is None or not has_grid(self.activations.shape[1:]):
                check_layer(self.layer, layer_shapes(self.model, images[:1]))
            self.logits = logits.detach()
            targets = self.logits.argmax(1) if targets is None else torch.as_tensor(targets, device=logits.device).clone()
            if targets.shape != logits.shape[:1] or not ((0 <= targets) & (targets < logits.shape[1])).all():
                raise ValueError(f"targets must be {len(logits)} classes from 0 to {logits.shape[1] - 1}, one a picture")
            activations = self.activations.detach()
            if self.method == "attention":
                maps = (rollout(self.attentions)[:, :, None, None] * activations).sum(1)
            else:
                wanted = logits.gather(1, targets[:, None]).sum()  # pictures do not mix, so each has its own gradient
                (gradients,) = torch.autograd.grad(wanted, self.activations)
                maps = GRADIENT_METHODS[self.method](activations, gradients)
        return to_unit(maps.relu(), images.shape[2:])


# --- which layers have a grid ---


def layer_shapes(model, images):
    """{dotted name: output shape, batch left out} of every module that `images` pass through, innermost first."""
    shapes = {}

    def keep(name):
        return lambda module, inputs, output: shapes.update({name: tuple(output.shape[1:])})

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def has_grid(shape):
    """Whether an output of this shape, batch left out, has rows and columns."""
    return len(shape) == 3 and min(shape[1:]) > 1


def check_layer(layer, shapes):
    """Raise ValueError, saying why and which layers would do, where no map can be read off `layer`."""
    fit = ", ".join(name for name, shape in shapes.items() if has_grid(shape))
    if layer not in shapes:
        raise ValueError(f"the network has no layer {layer!r} that pictures pass through; maps can be read off {fit}")
    if not has_grid(shapes[layer]):
        raise ValueError(f"layer {layer!r} gives {shapes[layer]} a picture: no rows and columns, as tokens are channels; maps can be read off {fit}")


# --- every method's maps, beside those that know nothing ---


def rivals(images, grid, generator):
    """What a map must beat, by name: maps (B, S, S) of pictures (B, 3, S, S) that know nothing of the network."""
    B, _, S, _ = images.shape
    bell = (-(((torch.arange(S, device=images.device) - (S - 1) / 2) / (S / 4)) ** 2) / 2).exp()
    kernel = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]], device=images.device)
    kernels = torch.stack([kernel, kernel.T])[:, None]  # Sobel's, (2, 1, 3, 3)
    slopes = F.conv2d(F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate"), kernels)  # (B, 3, S, S) -> (B, 2, S, S)
    return {
        "random pixels": torch.rand(B, S, S, generator=generator).to(images.device),
        "random grid": to_unit(torch.rand(B, *grid, generator=generator).to(images.device), (S, S)),
        "centre": to_unit((bell[:, None] * bell).expand(B, S, S), (S, S)),
        "edges": to_unit(slopes.norm(dim=1), (S, S)),
    }


@torch.no_grad()
def measure(model, runtime, layer, images, masks, generator, after_batch=lambda done: None):
    """{map: {measure: (N,)}} of each method's maps and its rivals', for the predicted classes of normalised images (N, 3, S, S).

    Measures and masks (N, S, S; bool, or None) are those of faithfulness.py.
    """
    found = {}
    grid = layer_shapes(model, images[:1])[layer][1:]
    methods = METHODS if layer in TOKEN_LAYERS else GRADIENT_METHODS
    for start in range(0, len(images), METRICS_BATCH):
        batch = images[start : start + METRICS_BATCH]
        inside = None if masks is None else masks[start : start + METRICS_BATCH]
        targets = model(batch).argmax(1)
        maps = rivals(batch, grid, generator)
        maps |= {method: GradCAM(model, layer, method)(batch, targets) for method in methods}

        def score(pictures):
            return runtime.logits(model, pictures).softmax(1).gather(1, targets[:, None])[:, 0]

        for name, heat in maps.items():
            for key, value in faithfulness.measure(heat, batch, inside, score, generator).items():
                found.setdefault(name, {}).setdefault(key, []).append(value)
        after_batch(start + len(batch))
    return {name: {key: torch.cat(parts) for key, parts in values.items()} for name, values in found.items()}


# --- the script ---


def parse():
    parser = Parser(description="Show where the network looks: heat maps over test pictures that it gets wrong, or over pictures of yours.")
    parser.add_argument("--ckpt", type=Path, default=Path("best.pt"), metavar="FILE", help="a checkpoint that train.py wrote")
    parser.add_argument("--method", default=METHOD, choices=METHODS, help="how a layer's maps are weighted; attention knows no class")
    parser.add_argument("--layer", default=LAYER, metavar="NAME", help="the layer whose maps are weighted, by its dotted name")
    parser.add_argument("--list-layers", action="store_true", help="print every layer's output shape and which have a grid, and end")
    parser.add_argument("--n", type=positive_int, default=10, help="how many test pictures to show, in turn from every actual class")
    parser.add_argument("--correct", action="store_true", help="show correctly classified ones, with the map of the second likeliest class too")
    parser.add_argument("--class", dest="class_name", metavar="NAME", help="show pictures of this actual class (default: of all)")
    parser.add_argument("--image", nargs="+", type=Path, metavar="FILE", help="show these RGB pictures and their three likeliest classes (default: test pictures)")
    parser.add_argument("--metrics", nargs="?", type=positive_int, const=1000, metavar="N", help="instead, measure all methods on N test pictures (default: N is 1000)")
    parser.add_argument("--seed", type=seed_int, default=1, help="of the choice of test pictures, and of the random maps of --metrics")
    add_data_arguments(parser, default=None)
    add_device_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where gradcam.png or gradcam_metrics.csv goes (default: the checkpoint's folder)")
    arguments = parser.parse_args()
    if arguments.image and (arguments.correct or arguments.class_name or arguments.metrics):
        parser.error("--image is about pictures of yours; --correct, --class and --metrics are about test pictures")
    if arguments.metrics and (arguments.correct or arguments.class_name):
        parser.error("--metrics is about test pictures of all kinds; --correct and --class choose which to show")
    for path in arguments.image or ():
        if not path.is_file():
            parser.error(f"--image {path}: there is no such file")
    return arguments


def main():
    arguments = parse()
    plain = Runtime(arguments.device, "fp32", "torch")  # what GradCAM runs, so that maps and predictions are of one network
    model, content = checkpoint.load(arguments.ckpt, plain.device)
    shapes = layer_shapes(model, torch.zeros(1, 3, SIDE, SIDE, device=plain.device))
    if arguments.list_layers:
        for name, shape in shapes.items():
            print(f"{name:<36} {str(shape):<14}", "has a grid, can be used" if has_grid(shape) else "no grid")
        return
    try:
        check_layer(arguments.layer, shapes)
        cam = GradCAM(model, arguments.layer, arguments.method)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if arguments.class_name and arguments.class_name not in content["class_names"]:
        raise UsageError(f"--class {arguments.class_name}: the checkpoint's classes are {', '.join(content['class_names'])}")
    normalize = Normalize(content["mean"], content["std"], plain.device)
    if arguments.metrics:
        report(arguments, content, model, Runtime(arguments.device, arguments.precision, arguments.kernels), normalize)
    else:
        show(arguments, content, cam, plain, normalize)


def report(arguments, content, model, runtime, normalize):
    """Measure every method: gradcam_metrics.csv, and a table to read."""
    dataset, count = data.load_for(content, arguments.data, arguments.data_dir, runtime.device), arguments.metrics
    if not 2 <= count <= len(dataset.test_images):
        raise UsageError(f"--metrics {count}: a mean and its error take 2 to {len(dataset.test_images):,} test pictures of {dataset.name}")
    folder = output_folder(arguments.out or arguments.ckpt.parent)
    generator = torch.Generator().manual_seed(arguments.seed)
    places = torch.randperm(len(dataset.test_images), generator=generator)[:count].to(runtime.device)
    masks = None if dataset.test_masks is None else dataset.test_masks[places]
    print(f"{runtime.describe()}\n{count:,} test pictures of {dataset.name}, layer {arguments.layer}, seed {arguments.seed}", flush=True)
    progress = Progress("pictures", count)
    found = measure(model, runtime, arguments.layer, normalize(dataset.test_images[places]), masks, generator, progress.update)
    progress.clear()
    rows = faithfulness.summarise(found, dataset=dataset.name, n=count, layer=arguments.layer)
    write_csv(folder / "gradcam_metrics.csv", rows)
    print(f"\n{faithfulness.table(rows)}\n\nmean ± standard error\nsaved {folder / 'gradcam_metrics.csv'}")


def show(arguments, content, cam, runtime, normalize):
    """Explain pictures, from files or of the test set: gradcam.png, and a line for each."""
    names, K = content["class_names"], len(content["class_names"])
    if arguments.image:
        images = torch.stack([torch.from_numpy(decode_one(path, convert=False).copy()) for path in arguments.image]).to(runtime.device)
        folder = output_folder(arguments.out or arguments.ckpt.parent)
        logits = predict(runtime, cam.model, normalize, images)
        classes = logits.topk(min(3, K)).indices  # (n, 3)
        titles, roles, title = [path.name for path in arguments.image], ["likeliest", "second", "third"], "pictures"
    else:
        dataset = data.load_for(content, arguments.data, arguments.data_dir, runtime.device)
        logits = predict(runtime, cam.model, normalize, dataset.test_images)
        places = choose(arguments, names, dataset, logits)
        folder = output_folder(arguments.out or arguments.ckpt.parent)
        images, labels, logits = dataset.test_images[places], dataset.test_labels[places], logits[places]
        classes = logits.topk(2).indices if arguments.correct else torch.stack([logits.argmax(1), labels], dim=1)  # (n, 2)
        titles, roles = [names[label] for label in labels.tolist()], ["predicted", "second" if arguments.correct else "actual"]
        title = f"{'correctly classified' if arguments.correct else 'misclassified'} test pictures of {dataset.name}"
    confidence = 100 * logits.softmax(1).gather(1, classes)
    n, M = classes.shape
    maps = cam(normalize(images).repeat_interleave(M, dim=0), classes.flatten()).unflatten(0, (n, M))  # (nM, S, S) -> (n, M, S, S)
    captions = [[f"{names[k]} {c:.0f} %" for k, c in zip(*row)] for row in zip(classes.tolist(), confidence.tolist())]
    for name, caption in zip(titles, captions):
        print(f"{name}: {', '.join(f'{role} {text}' for role, text in zip(roles, caption))}")
    same = ", the same for every class" if cam.method == "attention" else ""
    title = f"{title}: {cam.method} of {cam.layer}{same}\nyellow is each map's hottest place"
    plots.save(plots.heat_maps(images, titles, maps, captions, roles, title), folder / "gradcam.png")
    print(f"saved {folder / 'gradcam.png'}")


def choose(arguments, names, dataset, logits):
    """Places (n,) of the test pictures to show: right or wrong as asked, in random order, in turn from every actual class."""
    labels, asked = dataset.test_labels, names
    kind = ("correctly classified" if arguments.correct else "misclassified") + " test picture"
    wanted = (logits.argmax(1) == labels) == arguments.correct
    if arguments.class_name:
        asked = [arguments.class_name]
        wanted &= labels == names.index(arguments.class_name)
    counts = labels[wanted].bincount(minlength=len(names)).tolist()
    if arguments.n > sum(counts):
        whose = f" of class {arguments.class_name}" if arguments.class_name else ""
        raise UsageError(f"--n {arguments.n} is more than there are: {sum(counts):,} {kind}s{whose} in {dataset.name}")
    for name in asked:
        if not counts[names.index(name)]:
            print(f"no {kind} of class {name}")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(arguments.seed)).to(labels.device)
    return order[balanced_choice(labels[order], wanted[order], arguments.n)]


if __name__ == "__main__":
    run(main)
