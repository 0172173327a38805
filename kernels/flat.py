"""What optimizers whose whole step is a launch have in common: parameters that lie end to end, and settings on the device."""

import torch


class FlatOptimizer:
    """float32 parameters on one device, which become views of one tensor; `mean` is their running mean of gradients.

    A subclass's `step` reads rate and momentum from `settings`, on the device, and nothing from the host, so that a CUDA
    graph can hold it.
    """

    def __init__(self, parameters, settings):
        self.parameters = list(parameters)
        self.flat = torch.cat([p.detach().flatten() for p in self.parameters])
        for parameter, piece in zip(self.parameters, self.flat.split([p.numel() for p in self.parameters])):
            parameter.data = piece.view(parameter.shape)
        self.mean, self.settings = torch.zeros_like(self.flat), torch.zeros(settings, device=self.flat.device)

    def tell(self, *settings):
        self.settings.copy_(torch.tensor(settings), non_blocking=True)

    def gradient(self):
        return torch.cat([p.grad.flatten() for p in self.parameters])

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean.copy_(state["mean"])
