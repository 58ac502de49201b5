"""RankMe, the rank of what an encoder puts out, and how to see that it has collapsed.

Deviation: RankMe: of one fixed, clean set in eval mode; the study's was of augmented batches.
"""

import torch
import torch.nn.functional as F

from common.distributed import all_reduce_mean

EPSILON = 1e-7  # of the original, added to each p_k
# A Gram matrix squares the condition number (Golub and Van Loan, Matrix Computations, 5.3): where s
# is a share r of the largest, rounding moves it by about 1e-16 / r ** 2 of itself.
GRAM_HOLDS = 1e-6  # smallest r for which it is used
COLLAPSED = 0.01  # an embedding std below this is a collapse


def singular_values(z):
    """All of them, in no order. z: (N, D) float64."""
    gram = z.T @ z if len(z) > z.shape[1] else z @ z.T  # its eigenvalues, the squares, come faster
    s = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    return torch.linalg.svdvals(z) if s.min() <= GRAM_HOLDS * s.max() else s


def effective_rank(values):
    """exp of the entropy of values as shares of their sum, a float. values: (n,) of at least 0."""
    p = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + EPSILON
    return float(torch.exp(-(p * p.log()).sum()))


def rankme(z, centre=False):
    """RankMe, Eq. 1 of arXiv:2210.02885: exp of the entropy of the normalised singular values.

    z: (N, D), tensor or array. The original does not centre. Returns a float, 1 to about min(N, D).
    """
    z = torch.as_tensor(z).detach().double()
    s = singular_values(z - z.mean(dim=0) if centre else z)
    return effective_rank(s)


def embedding_std(embeddings):
    """Std over all ranks' images of L2-normalised embeddings, mean over dimensions, times sqrt(K).

    embeddings: (V, B, K) of a rank. Each view alone, then their mean: what the views of one image
    share must not count. 1 is healthy, 0 collapsed. All ranks call it and get the same float.
    """
    unit = F.normalize(embeddings.double(), dim=-1)
    mean = all_reduce_mean(unit.mean(dim=1, keepdim=True))
    variance = all_reduce_mean((unit - mean).square().mean(dim=1))  # (V, K)
    return float(variance.sqrt().mean()) * embeddings.shape[-1] ** 0.5


def is_collapsed(std, notes):
    """std: an embedding_std; notes: a method's own numbers, maybe with its own `collapsed`."""
    return std < COLLAPSED or notes.get("collapsed", 0.0) > 0.5
