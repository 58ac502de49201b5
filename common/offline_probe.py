"""The offline probe: logistic regression to convergence on frozen, clean features.

A few hundred SGD steps do not train a probe, so a small set needs this one to be judged fairly.
"""

import numpy as np
import torch
import torch.nn.functional as F

from common.running.keyed import FIT_SAMPLE, FOLD, keyed_rng
from common.sampler import stratified_sample

MOST_ROWS = 200_000  # for the fit; a stratified sample of more
FIXED_ROWS, FIXED_SEED = 50_000, 0  # of the fit that is the same for every run
L2_GRID = tuple(10.0**e for e in range(1, -7, -1))  # strong to weak: each fit starts at the last
FOLDS = 5
MOST_ROWS_FOR_FOLDS = 20_000  # above it one held-out fold decides as well as five
MOST_ITERATIONS = 1000
CONVERGED = 1e-7  # largest entry of the gradient
GOOD_ENOUGH = 1e-4  # the same while L2 is chosen: held-out losses no longer move


def fits(defect, rows, seed):
    """{name of an offline probe: (training rows that it is fitted on, seed of its folds)}.

    defect: (N,) labels of a whole training CSV; rows: of a run's subset of it.
    offline: fitted on the run's subset, so that it has as many defects to learn from as the run.
    offline_fixed: on all labelled rows of defect, or FIXED_ROWS of them, at their own mix, the same
    for every proportion and seed, so that features are compared and not numbers of labels (as
    arXiv:2110.05025).
    """
    own = rows[stratified_sample(defect[rows], MOST_ROWS, seed, FIT_SAMPLE)]
    fixed = stratified_sample(defect, FIXED_ROWS, FIXED_SEED, FIT_SAMPLE)
    return {"offline": (own, seed), "offline_fixed": (fixed, FIXED_SEED)}


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


def offline_probe(features, defect, pos_weight, seed):
    """Fit on training features, with L2 chosen on them alone.

    features: (n, D); defect: (n,) 1 or 0. Features are standardised by their mean and standard
    deviation, and L2 is the one with the lowest held-out cross-entropy. Returns (D + 1,) float64,
    the weights of raw features (the standardisation folded in) and, last, the bias, with {"l2",
    "fit_rows", "fit_defects", "converged"}; or (None, the reason).
    """
    y = torch.as_tensor(np.asarray(defect), dtype=torch.float64)
    counts = (int((y == 0).sum()), int((y == 1).sum()))
    if min(counts) < 2:
        return None, f"{counts[0]} normal and {counts[1]} defect training rows are too few to fit"
    x = features.double()
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    x = (x - mean) / std

    l2_best = _choose_l2(x, y, pos_weight, seed)
    w, converged = fit_logistic(x, y, l2_best, pos_weight)
    weight = w[:-1] / std
    fit = {"l2": l2_best, "fit_rows": len(y), "fit_defects": counts[1], "converged": converged}
    return torch.cat([weight, w[-1:] - mean @ weight]), fit


def apply_probe(weight, features):
    """weight: (D + 1,) of `offline_probe`; features: (n, D) -> logits (n,) float64."""
    return features.double() @ weight[:-1] + weight[-1]
