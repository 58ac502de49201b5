"""The online linear probe: trained beside the encoder on what the encoder computes anyway.

Deviation: online probe: its own SGD at the rate that the text gives, cosine to 0; the study's sat
in the method's optimiser.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from common.annotations import DEFECT, NORMAL
from common.data import batches
from common.distributed import all_reduce_sum_, gather_unpadded, has_batchnorm
from common.running.errors import REMEDY, UserError
from common.running.progress import Progress

SETTLING_BATCHES = 50


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
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))  # labelled 0 and 1, views
        self.register_buffer("pos_weight", torch.tensor(float(pos_weight)), persistent=False)
        self.loss = None  # of the last step, mean over all ranks' labelled samples

    @torch.no_grad()
    def forward(self, features):
        """features: (..., D) float32 -> logits (...)."""
        return features @ self.weight[:-1] + self.weight[-1]

    def unlearned(self):
        """Why there is nothing to score: all that it learned from was of one class. Else None."""
        normals, defects = self.seen.tolist()
        if normals and defects:
            return None
        return f"the probe learned from {normals} normal and {defects} defect views: it needs both"

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
        sums = [d_logits.sum(), losses.sum(), labelled.sum(), (labelled * target).sum()]
        total = all_reduce_sum_(torch.cat([gradient, torch.stack(sums)]))
        n, n_defect = total[-2].clamp_min(1), total[-1]
        self.loss = total[-3] / n
        gradient = total[:-3] / n + self.weight_decay * self.weight
        buffer = self.momentum * self.momentum_buffer + gradient
        # No branch on these: that would make the host wait for the device.
        steps = (total[-2] > 0) & gradient.isfinite().all()
        self.seen += (steps * torch.stack([total[-2] - n_defect, n_defect])).long()
        self.momentum_buffer.copy_(torch.where(steps, buffer, self.momentum_buffer))
        self.weight.sub_(torch.where(steps, lr * buffer, 0.0))
        return logits


class RunningScores:
    """The online probe's logits of the current epoch, as they came; part of the checkpoint.

    leave_out: whether logits that are not finite are left out, as under a gradient scaler; without
    one they are for the scores to refuse.
    """

    def __init__(self, leave_out=False):
        self._leave_out = leave_out
        self.clear()

    def clear(self):
        """Start a new epoch."""
        self._rows, self._logits = [], []

    def add(self, rows, logits):
        """rows: (B,) rows of the annotations; logits: (V, B)."""
        # A copy: what a worker made holds a file descriptor for as long as it is kept.
        self._rows.append(rows.clone().expand_as(logits))
        self._logits.append(logits.detach())

    def keep_last_if(self, counts):
        """Whether the step that came last counts: a boolean tensor, so without a wait."""
        if self._logits:
            self._logits[-1] = torch.where(counts, self._logits[-1], float("nan"))

    def gather(self):
        """All ranks' (rows, logits), each (n,) on CPU, ordered by row and logit."""
        if self._rows:
            rows = torch.cat([r.cpu().reshape(-1) for r in self._rows])
            logits = torch.cat([x.cpu().reshape(-1) for x in self._logits])
        else:
            rows, logits = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        if self._leave_out:
            rows, logits = rows[logits.isfinite()], logits[logits.isfinite()]
        rows, logits = gather_unpadded(rows), gather_unpadded(logits)
        logits, order = logits.sort(stable=True)
        rows, again = rows[order].sort(stable=True)
        return rows, logits[again]

    def restore(self, rows, logits, is_first_rank):
        """Take up what `gather` returned; one rank holds it, the others start empty."""
        if rows.shape != logits.shape:
            raise ValueError(f"{len(rows)} rows have {len(logits)} scores")
        self._rows, self._logits = ([rows], [logits]) if is_first_rank else ([], [])


@torch.no_grad()
def settle_batchnorm(model, loader, augment, device, autocast):
    """Let the BatchNorm statistics of an encoder that does not train become those of the data.

    SETTLING_BATCHES training batches in train mode, without a gradient: with a momentum of .1, less
    than 1 % of the initial mean 0 and variance 1 is left. model: has `encode`; loader: yields
    Batch, its sampler is started anew; all ranks call it. Without a BatchNorm nothing happens.
    """
    if not has_batchnorm(model):
        return
    model.train()
    progress = Progress(SETTLING_BATCHES, "BatchNorm statistics", unit="batches")
    for epoch in itertools.count():
        loader.batch_sampler.start(epoch)
        for batch in batches(loader):
            batch = batch.to(device)
            for view in augment(batch.views, batch.factors, progress.done):
                with autocast:
                    model.encode(view)
            progress.update()
            if progress.done == SETTLING_BATCHES:
                progress.close()
                return


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
        rows.append(row.clone())  # a worker's own would hold a file descriptor
        features.append(h.float().cpu())
        embeddings.append(z.float().cpu())
        progress.update(len(row))
    progress.close()
    if not rows:  # more ranks than images: no rows, but of the right shape
        size = loader.dataset.image_size
        h, z = model.encode(clean(torch.zeros(1, 3, size, size, device=device)))
        rows = [torch.zeros(0, dtype=torch.int64)]
        features, embeddings = [h[:0].cpu()], [z[:0].cpu()]
    model.train(was_training)
    rows, features, embeddings = (
        gather_unpadded(torch.cat(parts)) for parts in (rows, features, embeddings)
    )
    if not (features.isfinite().all() and embeddings.isfinite().all()):
        raise UserError(f"{label}: some features are not finite, so nothing is scored. {REMEDY}")
    order = rows.argsort()
    return rows[order], features[order], embeddings[order]
