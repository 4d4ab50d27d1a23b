"""The compiled loops of the neighbor search on a CPU: one pass over scores, exact rescoring.

:mod:`refiner.neighbors` brings them in for searches that are large enough to pay for compiling
them (seconds once, then cached on disk). They hold no lock, so threads share the rows.

Shape legend: Q queries of a chunk, B keys of a part, K keys, D width, C room for candidates.
"""

from __future__ import annotations

import numpy as np
from numba import njit

STRIDE = 16
compiled = njit(cache=True, nogil=True, boundscheck=False)
ranking = njit(cache=True, nogil=True, boundscheck=False, fastmath={"nnan", "nsz"})
summing = njit(cache=True, nogil=True, boundscheck=False, fastmath={"reassoc", "contract"})


@ranking
def _maxima(row, out):
    """The largest of each whole stride."""
    for s in range(len(row) // STRIDE):
        top = row[s * STRIDE]
        for j in range(s * STRIDE, s * STRIDE + STRIDE):
            top = max(top, row[j])
        out[s] = top


@compiled
def collect(scores_QB, base, k, slack, limits_Q, counts_Q, values_QC, indices_QC, first, last):
    """Adds every key that may be among a query's k best to its candidates.

    A key stays a candidate while its score is within ``slack`` of the k-th best so far. Where more
    such keys turn up than there is room for, the count becomes -1.

    Args:
        scores_QB: float32 scores of all queries with keys ``base`` to ``base + B``.
        limits_Q: float32, what a score has to reach; rises from part to part.
        counts_Q: int64, candidates found so far.
        values_QC, indices_QC: float32 scores and int32 positions of the candidates.
        first, last: the rows to work on.
    """
    width, room = scores_QB.shape[1], values_QC.shape[1]
    maxima = np.empty(width // STRIDE + 1, dtype=np.float32)
    copy, unused = np.empty_like(maxima), np.empty(len(maxima), dtype=np.int32)
    for q in range(first, last):
        count, limit = counts_Q[q], limits_Q[q]
        if count < 0:
            continue
        row, values, indices = scores_QB[q], values_QC[q], indices_QC[q]
        _maxima(row, maxima)
        if base == 0 and k < len(maxima):
            # k strides hold a score of at least this, so the k-th best does as well.
            copy[:] = maxima
            limit = max(limit, _kth(copy, unused, len(maxima) - 1, k) - slack)
        maxima[-1] = limit  # the part after the last whole stride is always looked at
        for s in range(len(maxima)):
            if maxima[s] < limit and s < len(maxima) - 1:
                continue
            for j in range(s * STRIDE, min(s * STRIDE + STRIDE, width)):
                if row[j] >= limit:
                    values[count], indices[count] = row[j], base + j
                    count += 1
            if count + STRIDE > room:
                limit = _kth(values, indices, count, k) - slack
                count = _keep(values, indices, count, limit)
                if count + STRIDE > room:
                    count = -1
                    break
        if count > k:
            limit = _kth(values, indices, count, k) - slack
            count = _keep(values, indices, count, limit)
        counts_Q[q], limits_Q[q] = count, limit


@compiled
def _kth(values, indices, count, k):
    """The k-th largest of the first values; reorders values and indices (Hoare's quickselect)."""
    low, high, place = 0, count - 1, k - 1
    while low < high:
        pivot = values[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                indices[i], indices[j] = indices[j], indices[i]
                i += 1
                j -= 1
        if place <= j:
            high = j
        elif place >= i:
            low = i
        else:
            break
    return values[place]


@compiled
def _keep(values, indices, count, limit):
    """Closes ranks over candidates below the limit; how many are left."""
    left = 0
    for i in range(count):
        if values[i] >= limit:
            values[left], indices[left] = values[i], indices[i]
            left += 1
    return left


@summing
def _dot(a, b, shift, factor):
    """float64; every pair in the same order, so that duplicates tie to the bit."""
    total = 0.0
    for i in range(len(a)):
        total += a[i] * ((np.float64(b[i]) - shift[i]) * factor[i])
    return total


@compiled
def finish(q_QD, x_KD, q_norm, x_norm, shift, factor, offset, k, slack, tie,
           counts_Q, values_QC, indices_QC, best_Qk, scores_Qk, first, last):  # fmt: skip
    """Rescores the candidates in float64 and sorts them: multiples of ``tie``, then the index.

    Args:
        q_QD, x_KD: all features; a score is the product of two, shifted and scaled, over their
            norms.
        offset: which of all queries the chunk's first one is.
        best_Qk, scores_Qk: int64 and float64, filled for queries whose count is not -1.
    """
    n_keys, room, dim = len(x_KD), values_QC.shape[1], q_QD.shape[1]
    wide = np.empty(dim, dtype=np.float64)
    exact = np.empty(room, dtype=np.float64)
    packed = np.empty(room, dtype=np.int64)
    for q in range(first, last):
        count = counts_Q[q]
        if count < 0:
            continue
        values, indices = values_QC[q], indices_QC[q]
        count = _keep(values, indices, count, _kth(values, indices, count, k) - slack)
        row, norm = q_QD[offset + q], q_norm[offset + q]
        for i in range(dim):
            wide[i] = (np.float64(row[i]) - shift[i]) * factor[i]
        for c in range(count):
            j = indices[c]
            exact[c] = _dot(wide, x_KD[j], shift, factor) / (norm * x_norm[j])
            packed[c] = np.int64(np.rint(exact[c] / tie)) * n_keys + (n_keys - 1 - j)
        _sort(packed, exact, indices, count)
        best_Qk[q] = indices[:k]
        scores_Qk[q] = exact[:k]


@compiled
def _sort(packed, exact, indices, count):
    """All three by falling ``packed``, which has no ties (Shell's sort, Ciura's gaps)."""
    for gap in (701, 301, 132, 57, 23, 10, 4, 1):
        for i in range(gap, count):
            a, b, c = packed[i], exact[i], indices[i]
            j = i
            while j >= gap and packed[j - gap] < a:
                packed[j] = packed[j - gap]
                exact[j] = exact[j - gap]
                indices[j] = indices[j - gap]
                j -= gap
            packed[j], exact[j], indices[j] = a, b, c
