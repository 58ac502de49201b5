"""Random numbers as a pure function of a key: what is drawn depends on nothing that ran before."""

import numpy as np

# One number a purpose, so that two purposes never share a stream. Never renumber.
SUBSET, ORDER, VIEW, JITTER_ORDER, FEATURE_ROWS, FIT_SAMPLE, FOLD, FILE_CHECK = range(1, 9)
MASK, BOOTSTRAP, DRAWN_SUBSET, SAMPLE_IMAGES, NORMAL_SAMPLE, RATES = range(9, 15)
LABEL_BUDGET, CUE_SAMPLE, SLICES, MEASURE_DRAWS = range(15, 19)


def keyed_rng(purpose, *key):
    """purpose: one of the constants above; key: non-negative integers. A new numpy Generator."""
    return np.random.default_rng([purpose, *key])
