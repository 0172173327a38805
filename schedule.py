"""How the weights of a run move: its recipe, the OneCycle schedule, and the optimizers under it.

A recipe is one flat dataclass; `train.py --set NAME=VALUE` overrides any field.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from cli import UsageError, override_fields


@dataclass(frozen=True)
class Recipe:
    """Optimizer, schedule, initialization and augmentation of a run.

    Augmentation happens in the order of its fields; 0 switches a part off.
    """

    epochs: int = 24
    batch_size: int = 512
    max_lr: float = 0.03
    pct_start: float = 5 / 24  # fraction of the steps before the peak
    div_factor: float = 10.0
    final_div_factor: float = 10.0
    base_momentum: float = 0.85  # momentum is beta1 for AdamW
    max_momentum: float = 0.95
    optimizer: str = "adamw"  # or "sgd", or "muon": Muon for hidden weights, AdamW for the rest
    adamw_lr_scale: float = 1.0  # lr of AdamW beside Muon, relative to Muon's
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # of weight matrices; never of biases, norms and embeddings
    l1: float = 0.0  # times the L1 norm of all parameters, added to the loss
    weight_avg_frac: float = 0.0  # of the steps so far, over which evaluated weights are averaged
    aux_weight: float = 0.0  # at the start, of a second loss: the mean token's, through the head
    aux_frac: float = 0.7  # first part of the run, over which aux_weight falls to 0
    temperature: float = 4.0  # of soft targets, where there is a teacher
    embed_init_std: float = 1.0  # of the CLS token and the position embedding
    avg_pool_init: bool = False  # the stem's projection starts as an average over 2x2 cells
    crop_padding: int = 0  # pixels on each side
    padding_mode: str = "reflect"  # or "wrap"
    crop_decay_frac: float = 0.0  # last part of the run, with crops that reach half as far
    flip_p: float = 0.0
    affine_p: float = 0.0  # translate, scale and rotate, bilinear, wrapping at the border
    translate: float = 0.0  # fraction of the side, either way
    scale: float = 0.0  # either way around 1
    degrees: float = 0.0  # either way
    cutout_p: float = 0.0
    cutout_size: int = 0  # side in pixels of a square filled with the dataset's mean

    def schedule(self, steps_per_epoch):
        """The OneCycle schedule over a whole run."""
        return OneCycle(
            self.max_lr, self.epochs * steps_per_epoch, self.pct_start, self.div_factor,
            self.final_div_factor, self.base_momentum, self.max_momentum,
        )  # fmt: skip

    def aux_weight_of(self, epoch):
        """The weight of the second loss in epoch `epoch`, counted from 0."""
        end = self.aux_frac * self.epochs
        return self.aux_weight * (1 - epoch / end) if epoch < end else 0.0


# The run to reproduce.
ORIGINAL = Recipe(
    l1=2.5e-5, crop_padding=4, padding_mode="wrap", flip_p=0.45,
    affine_p=0.5, translate=0.07, scale=0.2, degrees=15.0, cutout_p=0.65, cutout_size=8,
)  # fmt: skip
# Values were chosen by accuracy on held-out training images (results/cifar10-jpeg/trials.csv).
DEFAULT = Recipe(
    batch_size=128, max_lr=0.013, optimizer="muon", adamw_lr_scale=0.75, beta2=0.99,
    weight_decay=0.05, embed_init_std=0.2, avg_pool_init=True,
    crop_padding=4, crop_decay_frac=0.2, flip_p=0.5,
)  # fmt: skip
# 200 epochs over-fit with less augmentation. Averaging gained 0.5 points in 60 epochs (n = 1).
LONG = replace(
    DEFAULT, epochs=200, aux_weight=0.5, weight_avg_frac=0.06,
    affine_p=0.5, translate=0.05, scale=0.15, degrees=10.0, cutout_p=0.5, cutout_size=8,
)  # fmt: skip
RECIPES = {"original": ORIGINAL, "default": DEFAULT, "long": LONG}

BOUNDS = {  # least and greatest value, or the choices; a number without an entry is at least 0
    "optimizer": ("adamw", "muon", "sgd"),
    "padding_mode": ("reflect", "wrap"),
    **dict.fromkeys(("epochs", "batch_size"), (1, 2**31)),
    **dict.fromkeys(("max_lr", "div_factor", "final_div_factor"), (1e-30, 1e30)),
    "temperature": (0.01, 100),
    **dict.fromkeys(("flip_p", "affine_p", "cutout_p"), (0, 1)),
    **dict.fromkeys(("pct_start", "aux_frac", "crop_decay_frac"), (0, 1)),
    **dict.fromkeys(("base_momentum", "max_momentum", "beta2", "weight_avg_frac"), (0, 0.9999)),
    "scale": (0, 0.9999),
    **dict.fromkeys(("crop_padding", "cutout_size"), (0, 31)),
}


def with_overrides(recipe, assignments):
    """The recipe with fields replaced by strings NAME=VALUE; raises UsageError for invalid ones."""
    recipe = override_fields(recipe, assignments, BOUNDS)
    if recipe.affine_p and not (recipe.translate or recipe.scale or recipe.degrees):
        raise UsageError("--set affine_p has no effect while translate, scale and degrees are 0")
    if recipe.cutout_p and not recipe.cutout_size:
        raise UsageError("--set cutout_p has no effect while cutout_size is 0")
    return recipe


class OneCycle:
    """OneCycle(...)(step) -> (lr, momentum), floats, for steps in [0, total_steps).

    The lr rises linearly from max_lr / div_factor to max_lr during the first pct_start of the
    steps, then falls to max_lr / (div_factor * final_div_factor); momentum mirrors it. Equal to
    torch.optim.lr_scheduler.OneCycleLR with anneal_strategy="linear". Smith & Topin 2017,
    arXiv:1708.07120. Raises ValueError for a step outside the run and for invalid arguments.
    """

    def __init__(
        self, max_lr, total_steps, pct_start, div_factor, final_div_factor,
        base_momentum=0.85, max_momentum=0.95,
    ):  # fmt: skip
        if not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps is {total_steps!r}, not a whole number of at least 1")
        if not 0 <= pct_start <= 1 or div_factor <= 0 or final_div_factor <= 0:
            raise ValueError("pct_start must be in [0, 1], div_factor and final_div_factor above 0")
        self.total_steps = total_steps
        start_lr = max_lr / div_factor
        self.start = start_lr, max_momentum
        self.peak = max_lr, base_momentum
        self.end = start_lr / final_div_factor, max_momentum
        # Both counted from 0, as in PyTorch. A run too short for a phase skips it.
        self.peak_step = pct_start * total_steps - 1
        self.end_step = total_steps - 1

    def __call__(self, step):
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} is outside [0, {self.total_steps})")
        if step <= self.peak_step and self.peak_step > 0:
            a, b, fraction = self.start, self.peak, step / self.peak_step
        else:
            a, b, length = self.peak, self.end, self.end_step - self.peak_step
            fraction = (step - self.peak_step) / length if length > 0 else 1.0
        return tuple(x + (y - x) * fraction for x, y in zip(a, b))


# --- optimizers; kernels/muon.py and kernels/update.py are the same as single launches ---

# f(s) = a s + b s^3 + c s^5, five times, takes singular values from [0.001, 1] to [0.876, 1.124].
# Amsel et al. 2025, "The Polar Express", arXiv:2505.16932.
COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
EPS = 1e-7  # added to a matrix's norm, which may be 0


def orthogonalize(matrices):
    """Each matrix of a list (float32 or float64) with its singular values brought near 1.

    Newton-Schulz iterations on the gram matrix S = X X^T: X -> Q X and S -> Q S Q with
    Q = a I + b S + c S^2. All that is iterated is (n, n), n the shorter side, so matrices of any
    shapes share a batch.
    """
    wide = [m if len(m) <= m.shape[1] else m.T for m in matrices]
    wide = [m / (m.norm() + EPS) for m in wide]
    side = max(map(len, wide))
    gram = torch.stack([F.pad(m @ m.T, (0, side - len(m)) * 2) for m in wide])  # (M, side, side)
    eye = torch.eye(side, dtype=gram.dtype, device=gram.device)
    product = eye.expand_as(gram)
    for a, b, c in COEFFICIENTS:
        q = a * eye + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product, gram = q @ product, q @ gram @ q
    wide = [p[: len(m), : len(m)] @ m for p, m in zip(product, wide)]
    return [w if len(m) <= m.shape[1] else w.T for w, m in zip(wide, matrices)]


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum whose updates are orthogonalized, for float32 weights.

        m += (1 - momentum) (g - m),  u = g + momentum (m - g)
        W = W (1 - lr weight_decay) - lr sqrt(max(1, rows / columns)) orthogonalize(u)

    num_chunks[i] matrices are stacked along the first axis of params[i]. Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon. torch.optim.Muon takes matrices only, one at a time;
    this one also takes convolutions, as (out, in * height * width), all in a few batched products.
    """

    def __init__(self, params, num_chunks, weight_decay):
        super().__init__(params, {"lr": 0.0, "momentum": 0.0, "weight_decay": weight_decay})
        self.num_chunks = num_chunks

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        params, lr, momentum = group["params"], group["lr"], group["momentum"]
        grads = [p.grad for p in params]
        for p in params:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
        exp_avgs = [self.state[p]["exp_avg"] for p in params]
        torch._foreach_lerp_(exp_avgs, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, exp_avgs, momentum)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        updates = [m for u, n in zip(updates, self.num_chunks) for m in u.flatten(1).chunk(n)]
        views = [m for p, n in zip(params, self.num_chunks) for m in p.view(len(p), -1).chunk(n)]
        for view, update in zip(views, orthogonalize(updates)):
            rows, columns = update.shape
            view.add_(update, alpha=-lr * max(1.0, rows / columns) ** 0.5)


def build_optimizers(recipe, model):
    """The optimizers of a recipe for a ViT: AdamW, SGD, or Muon for hidden weights and AdamW.

    Loshchilov & Hutter 2017, arXiv:1711.05101. Biases, norms and embeddings never decay. SGD has
    Nesterov momentum.
    """
    params = dict(model.named_parameters())
    embeddings = "cls_token", "pos_embedding"
    decay = [name for name, p in params.items() if p.dim() > 1 and name not in embeddings]
    optimizers = []
    if recipe.optimizer == "muon":
        hidden = [name for name in decay if name != "head.weight"]
        num_chunks = [3 if name.endswith("qkv.weight") else 1 for name in hidden]
        hidden = [params.pop(name) for name in hidden]
        optimizers.append(Muon(hidden, num_chunks, recipe.weight_decay))
        decay = []
    no_decay = {"params": [p for n, p in params.items() if n not in decay], "weight_decay": 0.0}
    groups = [{"params": [params[n] for n in decay], "weight_decay": recipe.weight_decay}, no_decay]
    if recipe.optimizer == "sgd":  # momentum comes with every step, but Nesterov's is not 0
        return [torch.optim.SGD(groups, momentum=0.9, nesterov=True, fused=True)]
    betas = 0.0, recipe.beta2  # beta1 comes with every step
    optimizers.append(torch.optim.AdamW(groups, betas=betas, eps=recipe.eps, fused=True))
    return optimizers


def set_lr_momentum(optimizers, lr, momentum, adamw_lr_scale=1.0):
    """Set the lr and momentum (beta1 of AdamW) of the next step."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "betas" in group:
                group["lr"], group["betas"] = lr * adamw_lr_scale, (momentum, group["betas"][1])
            else:
                group["lr"], group["momentum"] = lr, momentum
