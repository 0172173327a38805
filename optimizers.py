"""The optimizers, each told every step's rate and momentum by `prepare`, so that all of them follow one schedule.

kernels/adamw.py and kernels/muon.py are the same in one launch each.
"""

import torch
import torch.nn.functional as F

# f(s) = a s + b s^3 + c s^5, five times: singular values from 0.001 to 1 end between 0.876 and 1.124. Amsel et al. 2025, "The
# Polar Express", arXiv:2505.16932.
COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
EPS = 1e-7  # added to a matrix's norm, which may be 0


def orthogonalize(matrices):
    """Each float32 or float64 matrix of a list with its singular values brought near 1, by five Newton-Schulz steps.

    Singular values below a thousandth of the matrix's norm stay smaller. With S = X X^T a step takes X to Q X and S to Q S Q,
    Q = a I + b S + c S^2; so all that is repeated is (n, n), n the shorter side, and matrices of any shapes share a batch.
    """
    wide = [m if len(m) <= m.shape[1] else m.T for m in matrices]
    wide = [m / (m.norm() + EPS) for m in wide]
    side = max(map(len, wide))
    squares = torch.stack([F.pad(m @ m.T, (0, side - len(m)) * 2) for m in wide])  # (number of matrices, side, side)
    eye = torch.eye(side, dtype=squares.dtype, device=squares.device)
    product = eye.expand_as(squares)
    for a, b, c in COEFFICIENTS:
        q = a * eye + torch.baddbmm(squares, squares, squares, beta=b, alpha=c)
        product, squares = q @ product, q @ squares @ q
    wide = [p[: len(m), : len(m)] @ m for p, m in zip(product, wide)]
    return [w if len(m) <= m.shape[1] else w.T for w, m in zip(wide, matrices)]


def step_size(matrix):
    """By how much more than its neighbours a tall matrix moves, sqrt(max(1, rows / columns))."""
    rows, columns = matrix.shape
    return max(1.0, rows / columns) ** 0.5


class Muon(torch.optim.Optimizer):
    """SGD's momentum, each matrix of it made nearly orthogonal, for float32 matrices and convolutions.

        m += (1 - momentum) (g - m),  u = g + momentum (m - g)                       # Nesterov's momentum
        W = W (1 - lr decay) - lr sqrt(max(1, rows / columns)) orthogonalize(u)

    `stacked` says of how many matrices, one above the other, each parameter is made. Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon. torch.optim.Muon takes matrices alone, one by one; this one takes
    convolutions too, as (out, in height width), and all in a few batched products.
    """

    def __init__(self, parameters, stacked, weight_decay):
        super().__init__(parameters, {"lr": 0.0, "momentum": 0.0, "weight_decay": weight_decay})
        self.stacked = stacked

    def prepare(self, lr, momentum):
        for group in self.param_groups:
            group["lr"], group["momentum"] = lr, momentum

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        parameters, lr, momentum = group["params"], group["lr"], group["momentum"]
        gradients = [p.grad for p in parameters]
        for p in parameters:
            if not self.state[p]:
                self.state[p]["mean"] = torch.zeros_like(p)
        means = [self.state[p]["mean"] for p in parameters]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, means, momentum)
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        matrices = orthogonalize([m for u, count in zip(updates, self.stacked) for m in u.flatten(1).chunk(count)])
        places = [m for p, count in zip(parameters, self.stacked) for m in p.view(len(p), -1).chunk(count)]
        for place, matrix in zip(places, matrices):
            place.add_(matrix, alpha=-lr * step_size(matrix))


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW in one fused kernel: `decayed` with `weight_decay` and `others` without, as kernels.adamw.AdamW."""

    def __init__(self, decayed, others, weight_decay, beta2, eps):
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        super().__init__(groups, betas=(0.0, beta2), eps=eps, fused=True)  # rate and beta1 come with every step

    def prepare(self, lr, momentum):
        for group in self.param_groups:
            group["lr"], group["betas"] = lr, (momentum, group["betas"][1])


class MuonAndAdamW:
    """Muon for some parameters and AdamW for the others, whose rate is `share` of Muon's, as one optimizer."""

    def __init__(self, muon, adamw, share):
        self.muon, self.adamw, self.share = muon, adamw, share

    def prepare(self, lr, momentum):
        self.muon.prepare(lr, momentum)
        self.adamw.prepare(self.share * lr, momentum)

    def zero_grad(self):
        self.muon.zero_grad()
        self.adamw.zero_grad()

    def step(self):
        self.muon.step()
        self.adamw.step()

    def state_dict(self):
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state):
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])
