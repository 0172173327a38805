"""How weights move: the OneCycle schedule, Muon, and which parameters AdamW and Muon update."""

import inspect

import torch
import torch.nn.functional as F
from torch.optim.adamw import adamw

# --- the schedule ---


class OneCycle:
    """Computes lr and momentum of a step: `OneCycle(...)(step) -> (lr, momentum)`, floats.

    The lr rises linearly from max_lr / div_factor to max_lr during the first pct_start of the
    steps, then falls to max_lr / (div_factor * final_div_factor); momentum mirrors it. Equal to
    torch.optim.lr_scheduler.OneCycleLR with anneal_strategy="linear". Smith & Topin 2017,
    arXiv:1708.07120. Raises ValueError for a step outside [0, total_steps) and for invalid
    arguments.
    """

    def __init__(
        self,
        max_lr,
        total_steps,
        pct_start,
        div_factor,
        final_div_factor,
        base_momentum=0.85,
        max_momentum=0.95,
    ):
        if not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps is {total_steps!r}, not a whole number of at least 1")
        if not 0 <= pct_start <= 1 or div_factor <= 0 or final_div_factor <= 0:
            raise ValueError("pct_start must be in [0, 1], div_factor and final_div_factor above 0")
        self.total_steps = total_steps
        start_lr = max_lr / div_factor
        # (lr, momentum) at the first step, at the peak and at the last step
        self.start = (start_lr, max_momentum)
        self.peak = (max_lr, base_momentum)
        self.end = (start_lr / final_div_factor, max_momentum)
        # Steps are counted from 0, as in PyTorch. A run too short for a phase skips it.
        self.peak_step = pct_start * total_steps - 1
        self.end_step = total_steps - 1

    def __call__(self, step):
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step {step} is outside [0, {self.total_steps})")
        if step <= self.peak_step and self.peak_step > 0:
            fraction = step / self.peak_step
            return interpolate(self.start, self.peak, fraction)
        length = self.end_step - self.peak_step
        fraction = (step - self.peak_step) / length if length > 0 else 1.0
        return interpolate(self.peak, self.end, fraction)


def interpolate(first, second, fraction):
    """Return the pair that lies `fraction` of the way from one pair to another."""
    return tuple(a + (b - a) * fraction for a, b in zip(first, second))


def build_schedule(recipe, steps_per_epoch):
    """Return the OneCycle schedule of a whole training."""
    return OneCycle(
        max_lr=recipe.max_lr,
        total_steps=recipe.epochs * steps_per_epoch,
        pct_start=recipe.pct_start,
        div_factor=recipe.div_factor,
        final_div_factor=recipe.final_div_factor,
        base_momentum=recipe.base_momentum,
        max_momentum=recipe.max_momentum,
    )


# --- the optimizers; kernels/muon.py and kernels/update.py are the same as single launches ---

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
    """Return each matrix of a list (float32 or float64) with its singular values brought near 1.

    Newton-Schulz iterations on the gram matrix S = X X^T: X -> Q X and S -> Q S Q with
    Q = a I + b S + c S^2. All that is iterated is (n, n), n the shorter side, so matrices of any
    shapes share a batch.
    """
    # The shorter side of each matrix comes first, and its norm is 1.
    wide = [m if len(m) <= m.shape[1] else m.T for m in matrices]
    wide = [m / (m.norm() + EPS) for m in wide]

    # Gram matrices are padded with zeros to the size of the largest: (M, side, side).
    side = max(len(m) for m in wide)
    grams = []
    for m in wide:
        padding = side - len(m)
        grams.append(F.pad(m @ m.T, (0, padding, 0, padding)))
    gram = torch.stack(grams)

    # X becomes product @ X; the product of all Q is collected first, as it is small.
    eye = torch.eye(side, dtype=gram.dtype, device=gram.device)
    product = eye.expand_as(gram)
    for a, b, c in COEFFICIENTS:
        q = a * eye + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # a I + b S + c S^2
        product = q @ product
        gram = q @ gram @ q

    results = []
    for p, w, m in zip(product, wide, matrices):
        w = p[: len(w), : len(w)] @ w
        results.append(w if len(m) <= m.shape[1] else w.T)
    return results


class Optimizer(torch.optim.Optimizer):
    """A torch.optim.Optimizer that does not import torch._dynamo, which takes two seconds.

    torch decorates add_param_group, and the step of its own optimizers, so that torch.compile
    leaves them alone; the decorators import it. Nothing here is compiled.
    """

    def add_param_group(self, param_group):
        undecorated = inspect.unwrap(torch.optim.Optimizer.add_param_group)
        undecorated(self, param_group)


class AdamW(Optimizer):
    """torch.optim.AdamW with the same bits. Its beta1 is called momentum, and moves with the lr.

    A group has params, lr, momentum and weight_decay. Loshchilov & Hutter 2017, arXiv:1711.05101.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.01, *, beta2=0.999, eps=1e-8):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.beta2 = beta2
        self.eps = eps

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        # torch makes its state in the first step. Made now, it can be looked at and loaded.
        for p in self.param_groups[-1]["params"]:
            self.state[p]["step"] = torch.zeros((), device=p.device)
            self.state[p]["exp_avg"] = torch.zeros_like(p)
            self.state[p]["exp_avg_sq"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = group["params"]
            states = [self.state[p] for p in params]
            adamw(
                params,
                grads=[p.grad for p in params],
                exp_avgs=[state["exp_avg"] for state in states],
                exp_avg_sqs=[state["exp_avg_sq"] for state in states],
                max_exp_avg_sqs=[],
                state_steps=[state["step"] for state in states],
                lr=group["lr"],
                beta1=group["momentum"],
                beta2=self.beta2,
                weight_decay=group["weight_decay"],
                eps=self.eps,
                amsgrad=False,
                maximize=False,
                fused=True,
            )


class Muon(Optimizer):
    """SGD with Nesterov momentum whose updates are orthogonalized, for float32 weights.

        m += (1 - momentum) (g - m),  u = g + momentum (m - g)
        W = W (1 - lr weight_decay) - lr sqrt(max(1, rows / columns)) orthogonalize(u)

    A group has params of two or more dimensions, lr, momentum, weight_decay and num_chunks: so many
    matrices are stacked along the first axis of each of its params. Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon. torch.optim.Muon takes matrices only, one at a time;
    this one also takes convolutions, as (out, in * height * width), all in a few batched products.
    Raises ValueError for a parameter of fewer than two dimensions, or of other stacked matrices.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, num_chunks=1):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "num_chunks": num_chunks,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            if p.dim() < 2:
                raise ValueError(f"a parameter {tuple(p.shape)} is no matrix: leave it to AdamW")
            if len(p) % group["num_chunks"]:
                raise ValueError(f"{tuple(p.shape)} is not {group['num_chunks']} stacked matrices")
            self.state[p]["exp_avg"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient; return closure() if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        # A parameter (out, ...) is a matrix (out, rest), or several: q, k and v are three.
        weights = []
        matrices = []
        lrs = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            lr = group["lr"]
            momentum = group["momentum"]
            grads = [p.grad for p in params]
            exp_avgs = [self.state[p]["exp_avg"] for p in params]
            torch._foreach_lerp_(exp_avgs, grads, 1 - momentum)
            updates = torch._foreach_lerp(grads, exp_avgs, momentum)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            for p, update in zip(params, updates):
                weights += p.view(len(p), -1).chunk(group["num_chunks"])
                matrices += update.flatten(1).chunk(group["num_chunks"])
                lrs += [lr] * group["num_chunks"]

        if not matrices:
            return loss
        # All matrices of all groups in one batch.
        for weight, update, lr in zip(weights, orthogonalize(matrices), lrs):
            rows, columns = update.shape
            weight.add_(update, alpha=-lr * max(1.0, rows / columns) ** 0.5)
        return loss


def build_optimizers(recipe, model):
    """Return the optimizers of a recipe for a ViT: [AdamW], or [Muon, AdamW]; their lr is 0.

    Muon updates hidden weights: matrices and convolutions but the head. Biases, norms and
    embeddings never decay.
    """
    hidden = []
    stacked = []  # q, k and v in one matrix
    decay = []
    no_decay = []
    for name, p in model.named_parameters():
        is_weight = p.dim() > 1 and name not in ("cls_token", "pos_embedding")
        if recipe.optimizer == "muon" and is_weight and name != "head.weight":
            if name.endswith("qkv.weight"):
                stacked.append(p)
            else:
                hidden.append(p)
        elif recipe.optimizer == "adamw" and is_weight:
            decay.append(p)
        else:
            no_decay.append(p)

    groups = [
        {"params": decay, "weight_decay": recipe.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=0.0, beta2=recipe.beta2, eps=recipe.eps)
    if recipe.optimizer == "adamw":
        return [optimizer]
    groups = [{"params": hidden, "num_chunks": 1}, {"params": stacked, "num_chunks": 3}]
    return [Muon(groups, lr=0.0, weight_decay=recipe.weight_decay), optimizer]


def average_weight(recipe, steps_done):
    """Return how far the running mean of the weights moves to the newest: 1 / (frac * steps)."""
    return min(1.0, 1 / (recipe.weight_avg_frac * steps_done))


def set_lr_momentum(optimizers, lr, momentum, adamw_lr_scale=1.0):
    """Set the lr and momentum of the next step."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["momentum"] = momentum
            if isinstance(optimizer, AdamW):
                group["lr"] = lr * adamw_lr_scale
