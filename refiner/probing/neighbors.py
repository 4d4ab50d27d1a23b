"""What is read off nearest neighbors: votes, accuracy, agreement.

Shape legend: L blocks of a model, Q queries, K keys, D width, k neighbors, C classes, S several k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from refiner.base.errors import UserError
from refiner.base.tensors import (
    as_features,
    chunk_rows,
    class_labels,
    columns,
    device_for,
    feature_pair,
    in_kind,
    numbered,
    standardized,
)
from refiner.probing.search import Graph, check_k, search

# ---------------------------------------------------------------- k-NN classification


@dataclass(frozen=True, eq=False)
class KNNReport:
    """What a k-NN classifier says of every block; [S] stands first if a list of S k was asked for.

    Attributes:
        accuracy: float32 [S, L], share of correct predictions.
        predictions: int64 [S, L, Q].
        votes: float32 [S, L, Q, C], a query's adding up to 1; None if not kept.
        truth: int64 [Q], the test images' labels.
        classes: int64 [C], the label of each column of votes: 0 to the largest one, or where that
            is beyond 2^15 only those that occur.
        graph: the neighbors, [L, Q, largest k], cosines of the standardised features. Of a
            leave-one-out report it goes to :func:`refiner.visuals.maps.umap_embedding` as it is.

    Everything lies on the CPU and lacks the axis L for features of [N, D].
    """

    accuracy: Tensor
    predictions: Tensor
    votes: Tensor | None
    truth: Tensor
    classes: Tensor
    graph: Graph

    @property
    def confusion(self) -> Tensor:
        """Test images by class (row) and prediction (column), int64 [S, L, C, C]."""
        c = len(self.classes)
        rows, predicted = (
            torch.searchsorted(self.classes, y) for y in (self.truth, self.predictions)
        )
        cells = rows * c + predicted
        counts = torch.zeros(*cells.shape[:-1], c * c, dtype=torch.int64)
        counts.scatter_add_(-1, cells, torch.ones_like(cells))
        return counts.unflatten(-1, (c, c))

    @property
    def class_accuracy(self) -> Tensor:
        """Share of correct predictions by class, float32 [S, L, C]; NaN for absent classes."""
        confusion = self.confusion
        return (confusion.diagonal(dim1=-2, dim2=-1) / confusion.sum(-1)).float()


def knn_report(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor | None = None,
    test_y: Tensor | None = None,
    *,
    k: int | Sequence[int] = 10,
    temperature: float = 0.07,
    standardize: bool = True,
    keep_votes: bool = True,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> KNNReport:
    """All that a weighted k-NN classifier tells about every block, from one search.

    Features are standardised by the train set, neighbors found by cosine, and each votes for its
    class with weight exp(similarity / temperature) (Wu et al. 2018, arXiv 1805.01978; the
    standardisation follows MIM-Refiner). Similarities are float32, votes float64; of classes with
    equal votes the lowest wins.

    Args:
        train_x: [N, D], or [L, N, D] for L blocks.
        train_y: classes [N], integers from 0 or words. Words count by their place in the alphabet
            of train and test labels together.
        test_x: [Q, D] or [L, Q, D]. Without it the train images are classified by each other, none
            by itself (leave-one-out).
        test_y: classes [Q].
        k: number of neighbors, or a list of numbers.
        temperature: of the votes; large values weigh all neighbors alike.
        standardize: shift and scale each feature by the train set's mean and standard deviation,
            block by block; features that are constant on the train set are left out.
        keep_votes: votes take 4 bytes for each of S · L · Q · C.
        device, progress: see :func:`nearest_neighbors`.

    Returns:
        A :class:`KNNReport`.

    Raises:
        ValueError: for shapes or lengths that do not match, labels that are not classes, k larger
            than N, or features that are not finite.
    """
    if test_x is None and test_y is not None:
        raise UserError("test labels without test features; leave both out for leave-one-out")
    ks = [int(one) for one in np.atleast_1d(k)]
    if not ks:
        raise UserError("k must be a number or a list of at least one")
    ascending = sorted(set(ks))
    train_x = as_features(train_x, "train features")
    train_y, test_y = numbered(train_y, test_y)
    truth = train_y = class_labels(train_y, train_x, "train")
    if test_x is not None:
        test_x = as_features(test_x, "test features")
        truth = class_labels(test_y, test_x, "test")
    truth = truth.cpu()
    classes = columns(train_y, truth)
    found = []
    for indices, scores, labels in _block_neighbors(
        train_x, train_y, classes, test_x, ascending[-1], standardize, device, progress
    ):
        votes, predicted = classify(
            indices, scores, labels, ascending, temperature, len(classes), keep_votes
        )
        found.append((classes[predicted], votes, indices.cpu(), scores.cpu()))
    order = [ascending.index(k) for k in ks]
    predictions = torch.stack([p for p, *_ in found], dim=1)[order]  # [S, L, Q]
    votes = torch.stack([v for _, v, *_ in found], dim=1)[order] if keep_votes else None
    accuracy = (predictions == truth).double().mean(-1).float()
    asked = (slice(None) if np.ndim(k) else 0, slice(None) if train_x.ndim == 3 else 0)
    parts = [None if x is None else x[asked] for x in (accuracy, predictions, votes)]
    graph = Graph(torch.stack([i for *_, i, _ in found]), torch.stack([s for *_, s in found]))
    return KNNReport(*parts, truth, classes, graph[0] if train_x.ndim == 2 else graph)


@in_kind
def knn_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor | None = None,
    test_y: Tensor | None = None,
    *,
    k: int | Sequence[int] = 10,
    temperature: float = 0.07,
    standardize: bool = True,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Tensor:
    """Accuracy of a weighted k-NN classifier on every block; see :func:`knn_report` for the rest.

    Returns:
        float32 shares of correct predictions on the CPU: [L] for [L, N, D], a scalar for [N, D];
        with a list of S k a leading axis is added, [S, L] or [S].

    Raises:
        ValueError: as :func:`knn_report`.
    """
    how = {"k": k, "temperature": temperature, "standardize": standardize, "device": device}
    data = train_x, train_y, test_x, test_y
    return knn_report(*data, **how, keep_votes=False, progress=progress).accuracy


@in_kind
def knn_predict(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    k: int = 10,
    temperature: float = 0.07,
    standardize: bool = True,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Votes and predictions for images without labels; see :func:`knn_report` for the rest.

    Returns:
        Votes float32 [L, Q, C], a query's adding up to 1, and predicted classes int64 [L, Q], both
        on the CPU; without the L for features of [N, D]. The C columns of votes are the classes
        from 0 to the largest train label, or where that is beyond 2^15 those that occur, in order.

    Raises:
        ValueError: as :func:`knn_report`.
    """
    train_x = as_features(train_x, "train features")
    train_y = class_labels(train_y, train_x, "train")
    classes, k, found = columns(train_y), int(k), []
    for indices, scores, labels in _block_neighbors(
        train_x, train_y, classes, test_x, k, standardize, device, progress
    ):
        votes, predicted = classify(indices, scores, labels, [k], temperature, len(classes))
        found.append((votes, classes[predicted]))
    votes, predictions = (torch.stack(part, dim=1)[0] for part in zip(*found, strict=True))
    return (votes[0], predictions[0]) if train_x.ndim == 2 else (votes, predictions)


@dataclass(frozen=True, eq=False)
class KNNChoice:
    """What :func:`knn_swept` returns, on the CPU; without the axis L for features [N, D].

    Attributes:
        accuracy: on the test images, float32 [L].
        k: the number of neighbors that was chosen, int64 [L].
        temperature: of the votes, chosen, float32 [L].
    """

    accuracy: Tensor
    k: Tensor
    temperature: Tensor


def knn_swept(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    k: Sequence[int] = (5, 10, 15, 20, 50, 100, 200),
    temperatures: Sequence[float] = (0.07, 0.1, 0.2),
    standardize: bool = True,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> KNNChoice:
    """k-NN accuracy of every block with k and temperature chosen among the train images.

    Each train image is classified by the others; what is best there is asked once on test (in a tie
    the fewest neighbors, the lowest temperature). The grid is that of the public benchmark of
    frozen encoders by Psomas et al. (github.com/billpsomas/efficient-probing), which reports the
    best on test. Numbers of neighbors that train does not have are left out.

    Raises:
        ValueError: as :func:`knn_report`.
    """
    train_x = as_features(train_x, "train features")
    test_x = as_features(test_x, "test features")
    train_y, test_y = numbered(train_y, test_y)
    train_y, truth = class_labels(train_y, train_x, "train"), class_labels(test_y, test_x, "test")
    n, classes = train_x.shape[-2], columns(train_y, truth)
    ks = sorted({int(one) for one in k if one < n})
    if not ks or not temperatures:
        raise UserError(f"give temperatures, and numbers of neighbors below {n}, not {list(k)}")
    truth, found = torch.searchsorted(classes, truth.cpu()), []

    def accuracy(near: tuple, y_Q: Tensor) -> Tensor:
        """[S, T], of each number of neighbors and temperature."""
        votes = (classify(*near, ks, t, len(classes), False)[1] for t in temperatures)
        return torch.stack([(predicted == y_Q).float().mean(1) for predicted in votes], dim=1)

    sides = [
        _block_neighbors(train_x, train_y, classes, side, ks[-1], standardize, device, progress)
        for side in (None, test_x)
    ]
    for own, asked in zip(*sides, strict=True):
        s, t = divmod(int(accuracy(own, own[2].cpu()).argmax()), len(temperatures))
        found.append((accuracy(asked, truth)[s, t], ks[s], temperatures[t]))
    chosen = [torch.as_tensor(part) for part in zip(*found, strict=True)]
    return KNNChoice(*(c if train_x.ndim == 3 else c[0] for c in chosen))


def _block_neighbors(train_x, train_y, classes, test_x, k, standardize, device, progress):
    """Yields each block's neighbors: indices [Q, k], similarities [Q, k], and the labels' columns.

    A block at a time, on the device, so that copies and votes of one block only are held.
    """
    alone = test_x is None
    test_x, train_x = feature_pair(
        train_x if alone else test_x, train_x, names=("test features", "train features")
    )
    train_y = torch.searchsorted(classes, train_y.cpu())
    check_k(k, test_x, train_x, alone)
    device = device_for(device, test_x)
    blocks = [(train_x, test_x)] if train_x.ndim == 2 else list(zip(train_x, test_x, strict=True))
    for train, test in tqdm(blocks, desc="k-NN", unit="block", disable=not progress):
        train, test = train.to(device), test.to(device)
        if standardize:
            train, test = standardized(train, test)
        yield *search(test, train, k, exclude_self=alone), train_y.to(device)


def classify(
    indices, scores, labels, ascending, temperature: float, n_classes: int, keep_votes: bool = True
):
    """Votes float32 [S, Q, C] (None if not kept) and predictions int64 [S, Q], on the CPU."""
    if temperature <= 0:
        raise UserError(f"temperature must be positive, not {temperature}")
    step = chunk_rows(indices.device, 8 * n_classes * (1 + len(ascending)))
    votes, predictions = [], []
    for some, close in zip(indices.split(step), scores.split(step), strict=True):
        # Divided by the nearest neighbor's weight: the same winners, and no overflow.
        weights_Qk = ((close - close[:, :1]).double() / temperature).exp()
        classes_Qk = labels[some]
        votes_QC = weights_Qk.new_zeros(len(weights_Qk), n_classes)
        start, winners, shares = 0, [], []
        for k in ascending:  # each adds to the votes of the one before
            votes_QC.scatter_add_(1, classes_Qk[:, start:k], weights_Qk[:, start:k])
            winners.append(votes_QC.argmax(1))
            if keep_votes:
                shares.append((votes_QC / votes_QC.sum(1, keepdim=True)).float())
            start = k
        predictions.append(torch.stack(winners).cpu())
        votes += [torch.stack(shares).cpu()] if keep_votes else []
    return torch.cat(votes, dim=1) if keep_votes else None, torch.cat(predictions, dim=1)


# ---------------------------------------------------------------- what a graph tells


def neighbor_agreement(a: Graph, b: Graph) -> Tensor:
    """Mean share of neighbors that two graphs of the same queries and keys have in common.

    Returns:
        float32, [L] for graphs of [L, Q, k], a scalar for [Q, k]; 0 (none) to 1 (the same sets).

    Raises:
        ValueError: for graphs of different shapes.
    """
    if a.indices.shape != b.indices.shape:
        raise UserError(
            f"graphs of {list(a.indices.shape)} and {list(b.indices.shape)} cannot be compared"
        )
    if a.indices.ndim == 3:
        return torch.stack([neighbor_agreement(a[l], b[l]) for l in range(len(a.indices))])
    shared_Qk = (a.indices[:, :, None] == b.indices[:, None, :]).any(-1)
    return shared_Qk.double().mean().float()
