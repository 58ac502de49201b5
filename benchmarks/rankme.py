"""How long does RankMe of 25,600 x 512 features take, against `torch.linalg.svdvals` in float64?

Where the spectrum falls below 1e-6 of its top, ours falls back to the same after a first look.
"""

import torch

from benchmarks.timing import emit, medians
from common.rankme import EPSILON, rankme


def by_svdvals(z):
    """RankMe from the singular values themselves."""
    s = torch.linalg.svdvals(z.double())
    p = s / s.sum() + EPSILON
    return float(torch.exp(-(p * p.log()).sum()))


def main():
    healthy = torch.randn(25600, 512, generator=torch.manual_seed(0))
    cases = {
        "healthy": (healthy, 1.3),
        "nearly collapsed": (healthy * torch.logspace(0, -9, 512), 0.5),
        "offset": (healthy + 100, 1.3),
    }
    for name, (z, target) in cases.items():
        calls = {"ours": lambda z=z: rankme(z), "peer": lambda z=z: by_svdvals(z)}
        seconds = medians(calls, repeats=5)
        off = abs(rankme(z) / by_svdvals(z) - 1)
        emit(f"RankMe, {name}", seconds["ours"], seconds["peer"], target, "s", difference=off)


if __name__ == "__main__":
    main()
