"""What features and embeddings tell without labels, and what the rare class's labels add.

All are of fixed images in eval mode, in float64, and compare runs of one method only. Which
direction is good stands in `common/study/measures.py`. l_k are the eigenvalues of the covariance.
"""

import math

import torch
import torch.nn.functional as F

from common.annotations import DEFECT, NORMAL
from common.normal_only import AT_ONCE, NEIGHBOURS
from common.rankme import effective_rank, rankme, singular_values
from common.running.keyed import SLICES, keyed_rng

VIEW_IMAGES, VIEWS = 1000, 10  # of LiDAR: as its paper, of other sizes; 2 views are untested
LIDAR_DELTA = 1e-4  # the paper has no number; here of the mean eigenvalue: z's scale must not count
FEW = 10_000  # rows of which neighbours are searched
KNOTS, LAST_KNOT, NUM_SLICES = 17, 3.0, 1024  # of SIGReg, as its authors' code
KINDS = ("features", "embeddings")


def label_free(features, embeddings):
    """What is worth its time at every validation. features: (N, D), embeddings: (N, K), clean.

    `rankme` is the original's (embeddings, not centred). `mean` and `std` of features are over
    images and dimensions, and over images, averaged over dimensions. Those of embeddings are after
    L2 normalisation, std times sqrt(K): 1 is healthy, 0 collapsed.
    """
    result = {"n": len(features)}
    unit = F.normalize(embeddings.double(), dim=1) * embeddings.shape[1] ** 0.5
    for name, raw, z in (("features", features, features), ("embeddings", embeddings, unit)):
        z = z.double()
        result |= {
            **_ranks(name, raw),
            f"mean_{name}": float(z.mean()),
            f"std_{name}": float(z.std(dim=0, correction=0).mean()),
        }
    return {"rankme": result["rankme_embeddings"], **result}


def _ranks(name, z):
    return {
        f"rankme_{name}": rankme(z),
        f"rankme_{name}_centred": rankme(z, centre=True),
        f"rankme_{name}_largest": min(z.shape),
    }


def spectrum(z):
    """Measures of the spectrum of centred z, (N, D). Of a z that is all alike they are None.

    stable_rank: ||Z||_F^2 / ||Z||_2^2; participation_ratio: (sum l)^2 / sum l^2; alpha_req and
    alpha_req_full with the R^2 of their fits, see `power_law`.
    """
    z = z.double()
    s = singular_values(z - z.mean(dim=0))
    squares = s.square().sort(descending=True).values
    if not squares[0] > torch.finfo(torch.float32).tiny:
        names = "stable_rank", "participation_ratio", "alpha_req", "alpha_req_full"
        return dict.fromkeys((*names, "alpha_req_fit", "alpha_req_full_fit"))
    found = {
        "stable_rank": float(squares.sum() / squares[0]),
        "participation_ratio": float(squares.sum().square() / squares.square().sum()),
    }
    for name, first, last in (("alpha_req", 4, 100), ("alpha_req_full", 1, len(squares))):
        found[name], found[f"{name}_fit"] = power_law(squares, first, last, name == "alpha_req")
    return found


def power_law(eigenvalues, first, last, by_rank):
    """alpha-ReQ (Agrawal et al. 2022, OpenReview ii9X4vtZGTZ): minus the slope of log l_i on log i.

    eigenvalues: descending, to any scale; ranks first to last, from 1, as far as they are more than
    rounding. by_rank: weigh each by 1 / rank. The paper has the full spectrum, its code ranks 4 to
    100 with weights. Returns (alpha, R^2 of the fit), or None twice: fewer than three ranks.
    """
    values = eigenvalues[:last]
    values = values[values > 1e-12 * eigenvalues[0]][first - 1 :]
    if len(values) < 3:
        return None, None
    ranks = torch.arange(first, first + len(values), dtype=torch.float64)
    weight = 1 / ranks if by_rank else torch.ones_like(ranks)
    weight = weight / weight.sum()
    x, y = ranks.log(), values.log()
    x, y = x - (weight * x).sum(), y - (weight * y).sum()
    xy, xx, yy = ((weight * a * b).sum() for a, b in ((x, y), (x, x), (y, y)))
    return -float(xy / xx), float(xy**2 / (xx * yy)) if yy > 0 else 1.0


def lidar(views):
    """LiDAR (Thilak et al. 2024, arXiv:2312.04000): rank of what tells images apart beyond views.

    views: (q, n, D), q views of n images. exp of the entropy of the eigenvalues of
    S_w^-1/2 S_b S_w^-1/2: S_b of the images' means over n - 1, S_w within images over n (q - 1),
    with LIDAR_DELTA of its mean eigenvalue added to its diagonal. None where nothing varies within.
    """
    views = views.double()
    q, n, dim = views.shape
    means = views.mean(dim=0)
    within = (views - means).flatten(0, 1)
    within = within.T @ within / (n * (q - 1))
    between = means - means.mean(dim=0)
    between = between.T @ between / (n - 1)
    scale = within.trace() / dim
    if not scale > torch.finfo(torch.float32).tiny:
        return None
    delta = LIDAR_DELTA * scale * torch.eye(dim, dtype=views.dtype)
    factor = torch.linalg.cholesky(within + delta)
    half = torch.linalg.solve_triangular(factor, between, upper=False)
    both = torch.linalg.solve_triangular(factor, half.T, upper=False)
    values = torch.linalg.eigvalsh((both + both.T) / 2).clamp_min(0)
    return effective_rank(values)


def alignment(views):
    """Mean squared distance of two views of an image, on the unit sphere, 0 to 4.

    views: (q, n, D); over all pairs of views. arXiv:2005.10242, Section 4.1.1, alpha = 2.
    """
    unit = F.normalize(views.double(), dim=2)
    q = len(unit)
    return float(2 * q / (q - 1) * (unit - unit.mean(dim=0)).square().sum(dim=2).mean())


def uniformity(z):
    """log of the mean of exp(-2 ||x - y||^2) over pairs of images on the unit sphere, at most 0.

    z: (n, D), n of at least 2. arXiv:2005.10242, Section 4.1.2, t = 2.
    """
    distances = F.pdist(F.normalize(z.double(), dim=1))
    return float(distances.square().mul(-2).exp().mean().log())


def sigreg(z):
    """The SIGReg statistic (arXiv:2511.08544) of standardised z, (n, D): how far from N(0, I).

    About .5 for n draws of one, and growing with n the further from it; directions are fixed.
    """
    z = z.double()
    z = z - z.mean(dim=0)
    z = z / z.std(dim=0, correction=0).clamp_min(torch.finfo(torch.float32).tiny)
    slices = torch.from_numpy(keyed_rng(SLICES).standard_normal((NUM_SLICES, z.shape[1])))
    t = torch.linspace(0, LAST_KNOT, KNOTS, dtype=z.dtype)
    gauss = torch.exp(-t.square() / 2)
    total = 0.0
    for some in F.normalize(slices, dim=1).split(64):
        angles = (z @ some.T)[..., None] * t  # (n, slices, knots)
        error = (angles.cos().mean(dim=0) - gauss).square() + angles.sin().mean(dim=0).square()
        total += float(2 * torch.trapezoid(error * gauss, t).sum())
    return len(z) * total / NUM_SLICES


def of_views(features, embeddings):
    """Measures of views of fixed images. features: (q, n, D), embeddings: (q, n, K).

    None where there are fewer than two images, or an overflow.
    """
    result = {"views": len(features), "view_images": features.shape[1], "lidar_delta": LIDAR_DELTA}
    for of, z in zip(KINDS, (features, embeddings), strict=True):
        known = z.shape[1] > 1 and bool(z.isfinite().all())
        for name, measure in (("lidar", lidar), ("alignment", alignment)):
            result[f"{name}_{of}"] = measure(z) if known else None
    return result


def of_clean(features, embeddings, few):
    """The measures of `spectrum` for both, and of the rows `few` uniformity and SIGReg.

    features: (N, D), embeddings: (N, K), few: (n,). Of a pair each, or growing with n, these two
    are of as many images whatever N is.
    """
    result = {}
    for of, z in zip(KINDS, (features, embeddings), strict=True):
        result |= {f"{key}_{of}": value for key, value in spectrum(z).items()}
        for name, measure in (("uniformity", uniformity), ("sigreg", sigreg)):
            result[f"{name}_{of}"] = measure(z[few]) if len(few) > 1 else None
    return result


def given_labels(features, embeddings, label):
    """What the labels of the rare class add: measures that no label-free one can see.

    label: (N,) 1, 0 or -1. The spectra and RankMe of the defects alone; margin: distance of the two
    classes' means over the root of the mean variance within a class, summed over dimensions
    (after arXiv:2008.08186, Section 1: variability within classes, against their means); purity:
    share of defects among the NEIGHBOURS nearest (cosine, itself excluded) of a defect, of at most
    FEW rows; `share`: purity by chance. Where a class has fewer than two there is `undefined`, why.
    """
    label = torch.as_tensor(label)
    n_normal, n_defect = int((label == NORMAL).sum()), int((label == DEFECT).sum())
    result = {"n_normal": n_normal, "n_defect": n_defect}
    if min(n_normal, n_defect) < 2:
        return result | {"undefined": "two normal and two defect images are needed"}
    result["share"] = n_defect / (n_normal + n_defect)
    for name, z in zip(KINDS, (features, embeddings), strict=True):
        defects, normals = z[label == DEFECT].double(), z[label == NORMAL].double()
        inside = (defects.var(dim=0).sum() + normals.var(dim=0).sum()) / 2
        apart = (defects.mean(dim=0) - normals.mean(dim=0)).norm()
        found = spectrum(defects)
        found["margin"] = float(apart / inside.sqrt()) if inside > 0 else None
        found["purity"] = purity(z, label)
        result |= _ranks(name, defects) | {f"{key}_{name}": v for key, v in found.items()}
    return result


def purity(z, label):
    """Mean share of defects among a defect's nearest neighbours. z: (N, D); label: (N,)."""
    known = torch.nonzero(label >= 0)[:, 0]
    if len(known) > FEW:
        known = known[torch.linspace(0, len(known) - 1, FEW).long()]
    unit, defect = F.normalize(z[known].double(), dim=1), label[known] == DEFECT
    shares = []
    for at in torch.nonzero(defect)[:, 0].split(AT_ONCE):
        similarity = unit[at] @ unit.T
        similarity[torch.arange(len(at)), at] = -math.inf
        nearest = similarity.topk(min(NEIGHBOURS, len(known) - 1)).indices
        shares.append(defect[nearest].double().mean(dim=1))
    return float(torch.cat(shares).mean())
