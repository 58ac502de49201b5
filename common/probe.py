"""The online linear probe: trained beside the encoder on what the encoder computes anyway.

Deviation: online probe: its own SGD at the rate that the text gives, cosine to 0; the study's sat
in the method's optimiser.
"""

import torch
import torch.nn.functional as F
from torch import nn

from common.annotations import DEFECT, NORMAL
from common.data import batches
from common.distributed import all_reduce_sum_, gather_unpadded
from common.running.errors import UserError
from common.running.progress import Progress


def pos_weight(kind, defect):
    """Weight of a defect in the loss. defect: (N,) 1, 0 or -1 of the training subset.

    kind: balanced, normals / defects; inverse_proportion, labelled rows / defects; or a number. 1
    where a group is empty.
    """
    if not isinstance(kind, str):
        return float(kind)
    n_normal, n_defect = int((defect == NORMAL).sum()), int((defect == DEFECT).sum())
    if not n_normal or not n_defect:
        return 1.0
    return {"balanced": n_normal, "inverse_proportion": n_normal + n_defect}[kind] / n_defect


class LinearProbe(nn.Module):
    """Logistic regression on features with its own SGD, in float32; it cannot reach the encoder.

    Starts at zero and takes the same step on all ranks, so all ranks hold the same probe. The two
    gradients are written out, and the optimiser's state lies in buffers: one state_dict holds all.
    """

    def __init__(self, feature_dim, momentum, weight_decay, pos_weight):
        super().__init__()
        self.momentum, self.weight_decay = momentum, weight_decay
        # The last of the D + 1 entries is the bias.
        self.register_buffer("weight", torch.zeros(feature_dim + 1))
        self.register_buffer("momentum_buffer", torch.zeros(feature_dim + 1))
        self.register_buffer("pos_weight", torch.tensor(float(pos_weight)), persistent=False)
        self.loss = None  # of the last step, mean over all ranks' labelled samples

    @torch.no_grad()
    def forward(self, features):
        """features: (..., D) float32 -> logits (...)."""
        return features @ self.weight[:-1] + self.weight[-1]

    @torch.no_grad()
    def follow(self, head):
        """Take over a head's weights, where a method has its own. head: nn.Linear(D, 1)."""
        self.weight.copy_(torch.cat([head.weight[0], head.bias]))

    @torch.no_grad()
    def step(self, features, labels, lr):
        """One SGD step on binary cross-entropy with pos_weight, averaged over labelled samples.

        features: (V, B, D) float32; labels: (B,) 1, 0 or -1 (not labelled: ignored). The mean is
        over all ranks' labelled samples; where there are none, or a feature has overflowed, nothing
        changes. Returns the logits (V, B) from before the step, and sets `loss`.
        """
        logits = self(features)
        target = labels.to(logits.dtype).expand_as(logits)
        labelled, target = target >= 0, target.clamp_min(0)
        weight = torch.where(target > 0, self.pos_weight, 1.0) * labelled
        d_logits = weight * (torch.sigmoid(logits) - target)  # (V, B)
        losses = weight * F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        gradient = torch.einsum("vb,vbd->d", d_logits, features)
        sums = torch.stack([d_logits.sum(), losses.sum(), labelled.sum()])
        total = all_reduce_sum_(torch.cat([gradient, sums]))
        n = total[-1].clamp_min(1)
        self.loss = total[-2] / n
        gradient = total[:-2] / n + self.weight_decay * self.weight
        buffer = self.momentum * self.momentum_buffer + gradient
        # No branch on these: that would make the host wait for the device.
        steps = (total[-1] > 0) & gradient.isfinite().all()
        self.momentum_buffer.copy_(torch.where(steps, buffer, self.momentum_buffer))
        self.weight.sub_(torch.where(steps, lr * buffer, 0.0))
        return logits


class RunningScores:
    """The online probe's logits of the current epoch, as they came; part of the checkpoint."""

    def __init__(self):
        self.clear()

    def clear(self):
        """Start a new epoch."""
        self._rows, self._logits = [], []

    def add(self, rows, logits):
        """rows: (B,) rows of the annotations; logits: (V, B)."""
        self._rows.append(rows.expand_as(logits))
        self._logits.append(logits.detach())

    def gather(self):
        """All ranks' (rows, logits), each (n,) on CPU, ordered by row and logit."""
        if self._rows:
            rows = torch.cat([r.cpu().reshape(-1) for r in self._rows])
            logits = torch.cat([x.cpu().reshape(-1) for x in self._logits])
        else:
            rows, logits = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        rows, logits = gather_unpadded(rows), gather_unpadded(logits)
        logits, order = logits.sort(stable=True)
        rows, again = rows[order].sort(stable=True)
        return rows, logits[again]

    def restore(self, rows, logits, is_first_rank):
        """Take up what `gather` returned; one rank holds it, the others start empty."""
        self._rows, self._logits = ([rows], [logits]) if is_first_rank else ([], [])


@torch.no_grad()
def evaluate(model, loader, clean, device, autocast, label):
    """One pass over clean images in eval mode: rows (n,), features (n, D), embeddings (n, K).

    model: has `encode`; loader: this rank's share, see `clean_loader`; clean: uint8 to normalised
    images. All ranks return the rows of all ranks, each once, in ascending order, float32 on CPU.
    """
    was_training = model.training
    model.eval()
    rows, features, embeddings = [], [], []
    progress = Progress(len(loader.dataset), label, unit="images")
    for images, row in batches(loader):
        with autocast:
            h, z = model.encode(clean(images.to(device, non_blocking=True)))
        rows.append(row)
        features.append(h.float().cpu())
        embeddings.append(z.float().cpu())
        progress.update(len(row))
    progress.close()
    if not rows:  # more ranks than images: no rows, but of the right shape
        size = loader.dataset.image_size
        h, z = model.encode(clean(torch.zeros(1, 3, size, size, device=device)))
        rows, features, embeddings = (
            [torch.zeros(0, dtype=torch.int64)],
            [h[:0].cpu()],
            [z[:0].cpu()],
        )
    model.train(was_training)
    rows, features, embeddings = (
        gather_unpadded(torch.cat(parts)) for parts in (rows, features, embeddings)
    )
    if not (features.isfinite().all() and embeddings.isfinite().all()):
        raise UserError(
            f"{label}: some features are not finite, so nothing is scored. Lower "
            "optimization.lr, or use optimization.precision=bf16 or fp32"
        )
    order = rows.argsort()
    return rows[order], features[order], embeddings[order]
