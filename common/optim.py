"""LARS, and the parameter groups of a run's optimiser.

Deviation: AdamW: betas (momentum, .999), decay of everything, as the study; MAE's original has .95,
and neither DINO's nor MAE's decays biases and norms.
"""

import torch


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled, tensor by tensor, to the size of the weights.

    You et al. 2017, arXiv:1708.03888, Eq. 6: the local rate is trust_coefficient * |w| /
    (|g| + weight_decay * |w|), and 1 where a norm is zero. The global lr multiplies the momentum
    buffer, as in torch.optim.SGD. One-dimensional parameters (biases, norms) are neither decayed
    nor adapted unless exclude_bias_and_norm is False.
    """

    def __init__(
        self,
        params,
        lr,
        momentum=0.9,
        weight_decay=0.0,
        trust_coefficient=0.001,
        exclude_bias_and_norm=True,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "exclude_bias_and_norm": exclude_bias_and_norm,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        """One update of every parameter that has a gradient; no transfer to the host."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = self._adapted(params, group)
            buffers = [self._momentum_buffer(p) for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])

    @staticmethod
    def _adapted(params, group):
        """Gradients of params, those of weights decayed and scaled. All tensors in one call each:
        a small network spends more time on launching kernels than on their work."""
        updates = [p.grad for p in params]
        chosen = [
            i for i, p in enumerate(params) if p.ndim > 1 or not group["exclude_bias_and_norm"]
        ]
        if not chosen:
            return updates
        weights, gradients = [params[i] for i in chosen], [updates[i] for i in chosen]
        w_norm = torch.stack(torch._foreach_norm(weights))
        g_norm = torch.stack(torch._foreach_norm(gradients))
        decay = group["weight_decay"]
        rate = group["trust_coefficient"] * w_norm / (g_norm + decay * w_norm)
        rate = torch.where((w_norm > 0) & (g_norm > 0), rate, 1.0)
        scaled = torch._foreach_add(gradients, weights, alpha=decay)
        torch._foreach_mul_(scaled, rate.unbind())
        for i, update in zip(chosen, scaled, strict=True):
            updates[i] = update
        return updates

    def _momentum_buffer(self, p):
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


def build_optimizer(
    model, name, lr, momentum, weight_decay, exclude_bias_and_norm, trust_coefficient
):
    """name: lars | adamw over all parameters of model.

    exclude_bias_and_norm: one-dimensional parameters get no decay (and under LARS no adaptation).
    AdamW's betas are (momentum, 0.999), as the study.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    if name == "lars":
        return LARS(params, lr, momentum, weight_decay, trust_coefficient, exclude_bias_and_norm)
    groups = [{"params": params}]
    if exclude_bias_and_norm:
        groups = [
            {"params": [p for p in params if p.ndim > 1]},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
        ]
    return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999), weight_decay=weight_decay)


def set_lr(optimizer, lr):
    """The learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
