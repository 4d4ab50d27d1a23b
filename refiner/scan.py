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
    strides = width // STRIDE
    maxima = np.empty(strides + 1, dtype=np.float32)
    for q in range(first, last):
        count, limit = counts_Q[q], limits_Q[q]
        if count < 0:
            continue
        row, values, indices = scores_QB[q], values_QC[q], indices_QC[q]
        _maxima(row, maxima)
        if base == 0 and k <= strides:
            # k strides hold a score of at least this, so the k-th best does as well.
            limit = max(limit, _at_least(maxima, strides, k) - slack)
        maxima[strides] = np.inf  # what is left after the last whole stride is always looked at
        for s in range(strides + 1):
            if maxima[s] < limit:
                continue
            for j in range(s * STRIDE, min(s * STRIDE + STRIDE, width)):
                # Written in any case, as a branch here would be guessed wrong too often.
                values[count], indices[count] = row[j], base + j
                count += row[j] >= limit
            if count + STRIDE > room:
                limit = _at_least(values, count, k) - slack
                count = _keep(values, indices, count, limit)
                if count + STRIDE > room:
                    count = -1
                    break
        if 2 * count > 3 * k:
            limit = _at_least(values, count, k) - slack
            count = _keep(values, indices, count, limit)
        counts_Q[q], limits_Q[q] = count, limit


@ranking
def _maxima(row, out):
    """The largest of each whole stride."""
    for s in range(len(row) // STRIDE):
        top = row[s * STRIDE]
        for j in range(s * STRIDE, s * STRIDE + STRIDE):
            top = max(top, row[j])
        out[s] = top


@ranking
def _at_least(values, count, k):
    """A bound that at least k of the values reach, hardly below the k-th: found by bisection."""
    low = high = values[0]
    for i in range(count):
        low, high = min(low, values[i]), max(high, values[i])
    for _ in range(20):
        middle = low + (high - low) * np.float32(0.5)
        reach = np.int32(0)
        for i in range(count):
            reach += np.int32(values[i] >= middle)
        if reach >= k:
            low = middle
        else:
            high = middle
    return low


@compiled
def _keep(values, indices, count, limit):
    """Closes ranks over candidates below the limit; how many are left."""
    left = 0
    for i in range(count):
        values[left], indices[left] = values[i], indices[i]
        left += values[left] >= limit
    return left


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
    exact = np.empty(room + 3, dtype=np.float64)
    packed = np.empty(room, dtype=np.int64)
    for q in range(first, last):
        count = counts_Q[q]
        if count < 0:
            continue
        values, indices = values_QC[q], indices_QC[q]
        count = _keep(values, indices, count, _at_least(values, count, k) - slack)
        row, norm = q_QD[offset + q], q_norm[offset + q]
        for i in range(dim):
            wide[i] = (np.float64(row[i]) - shift[i]) * factor[i]
        for c in range(0, count, 4):
            _products(wide, x_KD, indices, c, count - 1, shift, factor, exact)
        for c in range(count):
            j = indices[c]
            exact[c] /= norm * x_norm[j]
            packed[c] = np.int64(np.rint(exact[c] / tie)) * n_keys + (n_keys - 1 - j)
        _sort(packed, exact, indices, count)
        best_Qk[q] = indices[:k]
        scores_Qk[q] = exact[:k]


@summing
def _products(wide, x_KD, indices, c, last, shift, factor, out):
    """Products of a query with four candidates; the memory fetches four rows at a time.

    Each of the four is summed in the same order, so duplicates tie to the bit.
    """
    a, b = x_KD[indices[c]], x_KD[indices[min(c + 1, last)]]
    d, e = x_KD[indices[min(c + 2, last)]], x_KD[indices[min(c + 3, last)]]
    t = u = v = w = 0.0
    for i in range(len(wide)):
        m, f, y = shift[i], factor[i], wide[i]
        t += y * ((np.float64(a[i]) - m) * f)
        u += y * ((np.float64(b[i]) - m) * f)
        v += y * ((np.float64(d[i]) - m) * f)
        w += y * ((np.float64(e[i]) - m) * f)
    out[c], out[c + 1], out[c + 2], out[c + 3] = t, u, v, w


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
