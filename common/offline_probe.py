"""The offline probe: logistic regression to convergence on frozen, clean features.

A few hundred SGD steps do not train a probe, so a small set needs this one to be judged fairly.
"""

import numpy as np
import torch
import torch.nn.functional as F

from common.annotations import DEFECT, NORMAL
from common.running.keyed import FIT_SAMPLE, FOLD, keyed_rng

MOST_ROWS = 200_000  # for the fit; a stratified sample of more
L2_GRID = tuple(10.0**e for e in range(1, -7, -1))  # strong to weak: each fit starts at the last
FOLDS = 5
MOST_ROWS_FOR_FOLDS = 20_000  # above it one held-out fold decides as well as five
MOST_ITERATIONS = 1000
CONVERGED = 1e-7  # largest entry of the gradient
GOOD_ENOUGH = 1e-4  # the same while L2 is chosen: held-out losses no longer move


def stratified_sample(defect, most, seed):
    """At most `most` labelled rows with the defect share of all labelled ones, sorted."""
    groups = [np.flatnonzero(defect == group) for group in (NORMAL, DEFECT)]
    n, n_defect = len(groups[0]) + len(groups[1]), len(groups[1])
    if n > most:
        n, n_defect = most, max(round(most * n_defect / n), min(n_defect, 1))
    chosen = []
    for group, (rows, take) in enumerate(zip(groups, (n - n_defect, n_defect), strict=True)):
        order = keyed_rng(FIT_SAMPLE, seed, group).permutation(len(rows))
        chosen.append(rows[order[:take]])
    return np.sort(np.concatenate(chosen))


def fit_logistic(x, y, l2, pos_weight=1.0, start=None, tolerance=CONVERGED):
    """Logistic regression by L-BFGS.

    x: (n, D) float64; y: (n,) float64 0 or 1. Minimises the mean of the cross-entropy, defects
    weighted by pos_weight, plus l2 / 2 |w|^2 without the bias. start: an earlier result.
    Returns (D + 1,), the bias last, and whether it converged before MOST_ITERATIONS.
    """
    w = torch.zeros(x.shape[1] + 1, dtype=x.dtype) if start is None else start.clone()
    weight = torch.tensor(pos_weight, dtype=x.dtype)
    w.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [w],
        max_iter=MOST_ITERATIONS,
        max_eval=2 * MOST_ITERATIONS,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        logits = x @ w[:-1] + w[-1]
        loss = F.binary_cross_entropy_with_logits(logits, y, pos_weight=weight)
        loss = loss + l2 / 2 * (w[:-1] ** 2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return w.detach(), optimizer.state[w]["n_iter"] < MOST_ITERATIONS


def _folds(y, seed):
    """(n,) fold number of each row, stratified, and the number of folds."""
    groups = [np.flatnonzero(y == group) for group in (0, 1)]
    folds = min(FOLDS, *map(len, groups))  # no fold without a defect or without a normal
    fold = np.zeros(len(y), np.int64)
    for group, rows in enumerate(groups):
        order = keyed_rng(FOLD, seed, group).permutation(len(rows))
        fold[rows[order]] = np.arange(len(rows)) % folds
    return torch.from_numpy(fold), folds


def _choose_l2(x, y, pos_weight, seed):
    """The L2 of the grid with the lowest held-out cross-entropy.

    Goes from strong to weak and stops when two in a row were no better: what is weaker still only
    fits noise, slowly.
    """
    fold, folds = _folds(y.numpy(), seed)
    used = range(folds if len(y) <= MOST_ROWS_FOR_FOLDS else 1)
    weight = torch.tensor(pos_weight, dtype=torch.float64)
    fits, losses = dict.fromkeys(used), []
    for l2 in L2_GRID:
        loss = 0.0
        for k in used:
            train = fold != k
            w, _ = fit_logistic(x[train], y[train], l2, pos_weight, fits[k], GOOD_ENOUGH)
            fits[k] = w
            logits = x[fold == k] @ w[:-1] + w[-1]
            loss += float(
                F.binary_cross_entropy_with_logits(logits, y[fold == k], pos_weight=weight)
            )
        losses.append(loss)
        if len(losses) - losses.index(min(losses)) > 2:
            break
    return L2_GRID[losses.index(min(losses))]


def offline_probe(features, defect, val_features, pos_weight, seed):
    """Fit on training features, with L2 chosen on them alone; score the validation features.

    features: (n, D); defect: (n,) 1 or 0; val_features: (m, D). Features are standardised by the
    training mean and standard deviation. L2 is the one with the lowest held-out cross-entropy.
    Returns (logits (m,) float64 tensor, {"l2", "fit_rows", "converged"}), or (None, the reason).
    """
    y = torch.as_tensor(np.asarray(defect), dtype=torch.float64)
    counts = (int((y == 0).sum()), int((y == 1).sum()))
    if min(counts) < 2:
        return None, f"{counts[0]} normal and {counts[1]} defect training rows are too few to fit"
    x, val_x = features.double(), val_features.double()
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    x, val_x = (x - mean) / std, (val_x - mean) / std

    l2_best = _choose_l2(x, y, pos_weight, seed)
    w, converged = fit_logistic(x, y, l2_best, pos_weight)
    fit = {"l2": l2_best, "fit_rows": len(y), "converged": converged}
    return val_x @ w[:-1] + w[-1], fit
