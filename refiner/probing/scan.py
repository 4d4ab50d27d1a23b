"""The compiled loops of the neighbor search on a CPU: one pass over scores, exact rescoring.

:mod:`refiner.probing.neighbors` brings them in for searches that are large enough to pay for
compiling them (seconds once, then cached on disk). They hold no lock, so threads share the rows.

Shape legend: Q queries of a chunk, B keys of a part, K keys, D width, C room for candidates.
"""

from __future__ import annotations

import numpy as np
from numba import njit

STRIDE = 8
compiled = njit(cache=True, nogil=True, boundscheck=False)
ranking = njit(cache=True, nogil=True, boundscheck=False, fastmath={"nnan", "nsz"})
summing = njit(cache=True, nogil=True, boundscheck=False, fastmath={"reassoc", "contract"})


def ranks(k: int, n_keys: int, width: int) -> list[int]:
    """How many of the best keys seen after each part of ``width`` keys are worth keeping.

    In random order, k best keys of ``n_keys`` leave s = k m / n_keys of them among the first m, on
    average; three deviations more (of a Poisson distribution, which spreads wider) are missed by
    about one query in a thousand. :func:`finish` notices which.
    """
    seen = np.minimum(np.arange(width, n_keys + width, width), n_keys)
    share = k * seen / n_keys
    return np.minimum(np.ceil(share + 3 * np.sqrt(share) + 2), k).astype(int).tolist()


@compiled
def collect(scores_QB, base, rank, slack, limits_Q, counts_Q, values_QC, indices_QC, first, last):
    """Adds every key that is likely to be among a query's k best to its candidates.

    A key stays a candidate while its score is within ``slack`` of the best ``rank`` so far. Where
    more such keys turn up than there is room for, the count becomes -1.

    Args:
        scores_QB: float32 scores of all queries with keys ``base`` to ``base + B``.
        rank: k, or fewer while few keys have been seen (see :func:`ranks`).
        limits_Q: float32, what a score has to reach; rises from part to part.
        counts_Q: int64, candidates found so far.
        values_QC, indices_QC: float32 scores and int32 positions of the candidates.
        first, last: the rows to work on.
    """
    width, room = scores_QB.shape[1], values_QC.shape[1]
    strides = width // STRIDE
    maxima = np.empty(strides, dtype=np.float32)
    some = np.empty(strides, dtype=np.int64)
    for q in range(first, last):
        count, limit = counts_Q[q], limits_Q[q]
        if count < 0:
            continue
        row, values, indices = scores_QB[q], values_QC[q], indices_QC[q]
        _maxima(row, maxima)
        if base == 0 and rank <= strides:
            # That many strides hold a score of at least this.
            limit = max(limit, _at_least(maxima, strides, rank) - slack)
        # Everything is written, and the count decides what of it stays: branches here would be
        # guessed wrong too often.
        n_some = 0
        for s in range(strides):
            some[n_some] = s
            n_some += maxima[s] >= limit
        for i in range(n_some + 1):
            if i < n_some:
                j = some[i]
                for _ in range(STRIDE):
                    values[count], indices[count] = row[j], base + j
                    count += row[j] >= limit
                    j += strides
            else:  # what is left after the last whole stride is always looked at
                for j in range(strides * STRIDE, width):
                    values[count], indices[count] = row[j], base + j
                    count += row[j] >= limit
            if count + STRIDE > room:
                limit = max(limit, _at_least(values, count, rank) - slack)
                count = _keep(values, indices, count, limit)
                if count + STRIDE > room:
                    count = -1
                    break
        if 2 * count > 3 * rank:
            limit = max(limit, _at_least(values, count, rank) - slack)
            count = _keep(values, indices, count, limit)
        counts_Q[q], limits_Q[q] = count, limit


@ranking
def _maxima(row, out):
    """The largest of every stride: STRIDE scores that lie len(out) apart."""
    n = len(out)
    for s in range(n):  # vectorised over s
        top = row[s]
        for j in range(1, STRIDE):
            top = max(top, row[j * n + s])
        out[s] = top


@ranking
def _at_least(values, count, k):
    """A bound that at least k of the values reach, hardly below the k-th: found by bisection."""
    low = high = values[0]
    for i in range(count):
        low, high = min(low, values[i]), max(high, values[i])
    for _ in range(20):
        middle = low + (high - low) * np.float32(0.5)
        if _reaching(values, count, middle) >= k:
            low = middle
        else:
            high = middle
    return low


@ranking
def _reaching(values, count, bound):
    """How many of the values are no smaller than the bound."""
    reach = np.int32(0)
    for i in range(count):
        reach += np.int32(values[i] >= bound)
    return reach


@compiled
def _keep(values, indices, count, limit):
    """Closes ranks over candidates below the limit; how many are left."""
    left = 0
    for i in range(count):
        values[left], indices[left] = values[i], indices[i]
        left += values[left] >= limit
    return left


@compiled
def finish(q_QD, x_KD, q_norm, x_norm, shift, factor, order_K, k, slack, tie,
           limits_Q, counts_Q, values_QC, indices_QC, best_Qk, scores_Qk, first, last):  # fmt: skip
    """Rescores the candidates in float64 and sorts them: multiples of ``tie``, then the index.

    Where fewer than k candidates are clear of the limit, a key that was left out may belong to
    the result, and the count becomes -1.

    Args:
        q_QD, x_KD: features of the queries and of all keys; a score is the product of two,
            shifted and scaled, over their norms.
        order_K: int32, which key stood at each position that was scanned.
        best_Qk, scores_Qk: int64 and float64, filled for queries whose count is not -1.
    """
    n_keys = len(x_KD)
    starts_Q = np.zeros(last - first + 1, dtype=np.int64)  # of each query's pairs
    for q in range(first, last):
        count, values, indices = counts_Q[q], values_QC[q], indices_QC[q]
        if count >= 0 and _reaching(values, count, limits_Q[q] + slack) < k:
            count = counts_Q[q] = -1
        if count >= 0:
            count = _keep(values, indices, count, _at_least(values, count, k) - slack)
        starts_Q[q - first + 1] = starts_Q[q - first] + max(count, 0)
    keys_P = np.empty(starts_Q[-1], dtype=np.int32)
    for q in range(first, last):
        start = starts_Q[q - first]
        for p in range(start, starts_Q[q - first + 1]):
            keys_P[p] = order_K[indices_QC[q, p - start]]
    exact_P = _products(q_QD[first:last], x_KD, shift, factor, starts_Q, keys_P)
    packed_P = np.empty(len(keys_P), dtype=np.int64)
    for q in range(first, last):
        if counts_Q[q] < 0:
            continue
        start, end = starts_Q[q - first], starts_Q[q - first + 1]
        for p in range(start, end):
            exact_P[p] /= q_norm[q] * x_norm[keys_P[p]]
            packed_P[p] = np.int64(np.rint(exact_P[p] / tie)) * n_keys + (n_keys - 1 - keys_P[p])
        _sort(packed_P[start:end], exact_P[start:end], keys_P[start:end])
        best_Qk[q] = keys_P[start : start + k]
        scores_Qk[q] = exact_P[start : start + k]


@compiled
def _products(q_QD, x_KD, shift, factor, starts_Q, keys_P):
    """Products of the pairs of query and key, float64 [P], a key at a time.

    A query at a time would fetch rows from all over the memory. Every product is summed in the
    same order, so duplicates tie to the bit.
    """
    dim, n_pairs = q_QD.shape[1], len(keys_P)
    wide_QD = (q_QD.astype(np.float64) - shift) * factor
    ends_K = np.zeros(len(x_KD) + 1, dtype=np.int32)  # pairs sorted by key, by counting
    for p in range(n_pairs):
        ends_K[keys_P[p] + 1] += 1
    ends_K = np.cumsum(ends_K).astype(np.int32)
    pairs, queries = np.empty(n_pairs, dtype=np.int32), np.empty(n_pairs, dtype=np.int32)
    for q in range(len(q_QD)):
        for p in range(starts_Q[q], starts_Q[q + 1]):
            place = ends_K[keys_P[p]]
            pairs[place], queries[place] = p, q
            ends_K[keys_P[p]] += 1
    key, exact_P = np.empty(dim, dtype=np.float64), np.empty(n_pairs, dtype=np.float64)
    place = 0
    for j in range(len(x_KD)):
        if place == ends_K[j]:
            continue
        row = x_KD[j]
        for i in range(dim):
            key[i] = (np.float64(row[i]) - shift[i]) * factor[i]
        while place < ends_K[j]:
            exact_P[pairs[place]] = _dot(wide_QD[queries[place]], key)
            place += 1
    return exact_P


@summing
def _dot(a, b):
    total = 0.0
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@compiled
def _sort(packed, exact, indices):
    """All three by falling ``packed``, which has no ties (Shell's sort, Ciura's gaps)."""
    for gap in (701, 301, 132, 57, 23, 10, 4, 1):
        for i in range(gap, len(packed)):
            a, b, c = packed[i], exact[i], indices[i]
            j = i
            while j >= gap and packed[j - gap] < a:
                packed[j] = packed[j - gap]
                exact[j] = exact[j - gap]
                indices[j] = indices[j - gap]
                j -= gap
            packed[j], exact[j], indices[j] = a, b, c
