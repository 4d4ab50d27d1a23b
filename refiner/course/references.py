"""What the exercises' checks compare with, out of a learner's sight: plain torch, shape by shape.

``MISTAKES`` are wrong versions that people write; a check that meets one says which it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest(queries_QD: Tensor, keys_ND: Tensor, k: int, *, unit=F.normalize) -> Tensor:
    """Indices [Q, k] of the keys of largest cosine similarity, nearest first."""
    return (unit(queries_QD) @ unit(keys_ND).T).topk(k).indices


def problem_of_heads(blocks, first: int, last: int) -> str | None:
    """What is wrong with a choice of blocks that get a head; None if nothing is."""
    if (
        not isinstance(blocks, list | tuple)
        or not blocks
        or not all(isinstance(b, int) for b in blocks)
    ):
        return "a list of one or more whole numbers is needed, such as [10, 12]"
    if len(set(blocks)) < len(blocks):
        return f"{blocks} names a block twice"
    outside = [b for b in blocks if not first <= b <= last]
    if outside:
        return f"a head on block {outside[0]} would teach nothing: choose from {first} to {last}"
    return None


def patchify(images_BCHW: Tensor, patch: int, *, colours_last: bool = True) -> Tensor:
    """Patches [B, N, patch * patch * C], row by row, the colours of a pixel side by side."""
    patches_BPN = F.unfold(images_BCHW, patch, stride=patch)  # P is C, rows, columns
    patches_BCSN = patches_BPN.unflatten(1, (images_BCHW.shape[1], -1))
    return patches_BCSN.permute(0, 3, *((2, 1) if colours_last else (1, 2))).flatten(2)


def visible(noise_BN: Tensor, ratio: float, *, smallest: bool = True) -> Tensor:
    """Indices [B, K] of the patches with the smallest noise; ``ratio`` of all are hidden."""
    order_BN = noise_BN.argsort(dim=1, descending=not smallest)
    return order_BN[:, : round(noise_BN.shape[1] * (1 - ratio))]


def hidden_error(predicted_BNP, target_BNP, hidden_BN, *, over: str = "hidden") -> Tensor:
    """Mean squared error over hidden patches."""
    error_BN = (predicted_BNP - target_BNP).square().mean(2)
    kinds = {"hidden": hidden_BN, "visible": ~hidden_BN, "all": torch.ones_like(hidden_BN)}
    wanted_BN = kinds[over]
    return (error_BN * wanted_BN).sum() / wanted_BN.sum()


def attention(q_BHND: Tensor, k_BHND, v_BHND, *, root=True, over=-1, moved=True) -> Tensor:
    """Softmax attention [B, N, H * D] of H heads."""
    scores_BHNN = q_BHND @ k_BHND.mT / (q_BHND.shape[-1] ** 0.5 if root else 1)
    x_BHND = scores_BHNN.softmax(over) @ v_BHND
    x_BNHD = x_BHND.transpose(1, 2)
    return (x_BNHD if moved else x_BHND.reshape(x_BNHD.shape)).flatten(2)


def votes(labels_NK, similarities_NK, classes: int, temperature: float, *, add=True) -> Tensor:
    """Sums of the neighbors' votes for each class [N, classes]."""
    none, weights_NK = torch.zeros(len(labels_NK), classes), (similarities_NK / temperature).exp()
    return (none.scatter_add if add else none.scatter)(1, labels_NK, weights_NK)


def explained(x_ND: Tensor, groups_N: Tensor, *, by_column: bool = False) -> Tensor:
    """Variance of the groups' means over the variance of all, each summed over columns."""
    means_GD = torch.stack([x_ND[groups_N == g].mean(0) for g in range(int(groups_N.max()) + 1)])
    between_D, all_D = means_GD[groups_N].var(0), x_ND.var(0)
    return (between_D / all_D).mean() if by_column else between_D.sum() / all_D.sum()


def whiten(x_ND: Tensor, *, power: float = -0.5, back: bool = True) -> Tensor:
    """Standardised features times their correlation matrix to the power of -1/2."""
    x_ND = (x_ND - x_ND.mean(0)) / x_ND.std(0, correction=0)
    values_D, axes_DD = torch.linalg.eigh(x_ND.T @ x_ND / len(x_ND))
    scaled_ND = x_ND @ (axes_DD * values_D**power)
    return scaled_ND @ axes_DD.T if back else scaled_ND


def best_of(readings_RND: Tensor, labels_N: Tensor, *, alone: bool = True) -> Tensor:
    """Which of R readings has the best 1-NN vote, each image asked of all others."""
    x_RND = F.normalize(readings_RND, dim=-1)
    alike_RNN = x_RND @ x_RND.mT
    if alone:
        alike_RNN.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return (labels_N[alike_RNN.argmax(-1)] == labels_N).double().mean(-1).argmax()


def _scaled(x_BD: Tensor, *, over: int = 0, correction: int = 0) -> Tensor:
    """What people write for BatchNorm: over rows, or with the variance of a sample."""
    variance, mean = torch.var_mean(x_BD, over, correction=correction, keepdim=True)
    return (x_BD - mean) / (variance + 1e-5).sqrt()


def head(x_BD: Tensor, weights: list[Tensor], *, norm=None, last_norm=True) -> Tensor:
    """Linear and BatchNorm in every layer, GELU between layers."""
    for i, weight in enumerate(weights):
        x_BD = x_BD @ weight
        if last_norm or i < len(weights) - 1:
            x_BD = norm(x_BD) if norm else F.batch_norm(x_BD, None, None, training=True)
        if i < len(weights) - 1:
            x_BD = F.gelu(x_BD)
    return x_BD


def places(pushed: int, batch: int, size: int) -> Tensor:
    """Where the next batch goes in a queue."""
    return (pushed + torch.arange(batch)) % size


def lookup(z_BO, ids_B, queue_QO, ids_Q, *, own=-torch.inf, unit=F.normalize) -> Tensor:
    """Where each query's nearest entry lies that is not of the same image [B]."""
    alike_BQ = unit(z_BO) @ unit(queue_QO).T
    return alike_BQ.masked_fill(ids_B[:, None] == ids_Q, own).argmax(1)


def nna(p_BO, z_BO, nn_BO, temperature=0.2, *, negatives="z", axis=1, unit=F.normalize):
    """Nearest Neighbor Alignment of one pair of views; only the positive has the neighbor."""
    p_BO, z_BO, nn_BO = unit(p_BO), unit(z_BO.detach()), unit(nn_BO.detach())
    logits_BB = (z_BO if negatives == "z" else nn_BO) @ p_BO.T
    logits_BB = torch.diagonal_scatter(logits_BB, (nn_BO * p_BO).sum(-1)) / temperature
    return F.cross_entropy(logits_BB if axis == 1 else logits_BB.T, torch.arange(len(p_BO)))


def _numerator_alone(p_BO, z_BO, nn_BO, temperature) -> Tensor:
    """NNA with the old positive in the sum, as people write it who start from the formula."""
    new, old = F.cosine_similarity(nn_BO, p_BO), F.cosine_similarity(z_BO, p_BO)
    return nna(p_BO, z_BO, z_BO, temperature) - ((new - old) / temperature).mean()


def step(
    x_VBD, projector, predictor, queue_QO, ids_B, ids_Q, *, pairs=lambda g, v: g != v, parts=1
) -> Tensor:
    """Loss of one head for V views, the first two of which are targets: the mean over pairs."""
    v, b, _ = x_VBD.shape

    def through(x_MD, weights):
        return torch.cat([head(part, weights) for part in x_MD.chunk(parts)])

    z_MO = through(x_VBD.flatten(0, 1), projector)
    p_VBO, z_VBO = through(z_MO, predictor).unflatten(0, (v, b)), z_MO.unflatten(0, (v, b))
    neighbors = [queue_QO[lookup(z_BO.detach(), ids_B, queue_QO, ids_Q)] for z_BO in z_VBO[:2]]
    losses = [
        nna(p_VBO[view], z_VBO[target], neighbors[target])
        for target in range(2)
        for view in range(v)
        if pairs(target, view)
    ]
    return torch.stack(losses).mean()


def rates(depth: int, decay: float) -> Tensor:
    """Share of the last block's learning rate that each block has [depth]."""
    return decay ** torch.arange(depth - 1, -1, -1.0)


def purity(indices_Nk: Tensor, labels_N: Tensor) -> Tensor:
    """Share of neighbors that have their query's class."""
    return (labels_N[indices_Nk] == labels_N[:, None]).float().mean()


def trust(points_N2: Tensor, indices_Nk: Tensor, m: int, *, itself: bool = False) -> Tensor:
    """Share of each point's m nearest on a map that are among its neighbors in the features."""
    apart_NN = torch.cdist(points_N2, points_N2)
    if not itself:
        apart_NN.fill_diagonal_(torch.inf)
    near_Nm = apart_NN.topk(m, largest=False).indices
    return (near_Nm[:, :, None] == indices_Nk[:, None]).any(-1).float().mean()


def apart(joined: Tensor, *, in_turn: bool = False) -> Tensor:
    """Rows of queries, keys and values [3, D, ...], one below the other in [3 * D, ...]."""
    return joined.unflatten(0, (-1, 3)).transpose(0, 1) if in_turn else joined.unflatten(0, (3, -1))


def normalised(images_B3HW: Tensor, mean_3: Tensor, std_3: Tensor) -> Tensor:
    """Pixels of 0 to 255 as an encoder gets them: from 0 to 1, then standardised by colour."""
    mean_311, std_311 = (x.reshape(3, 1, 1) for x in (mean_3, std_3))
    return (images_B3HW / 255 - mean_311) / std_311


def linear_decoder(x_MD: Tensor, y_MP: Tensor, penalty: float) -> Tensor:
    """Ridge regression's weights [D, P]."""
    a_DD = x_MD.T @ x_MD + penalty * torch.eye(x_MD.shape[1])
    return torch.linalg.solve(a_DD, x_MD.T @ y_MP)


def cka(x_ND: Tensor, y_NE: Tensor, *, centred: bool = True, squared: bool = True) -> Tensor:
    """Linear CKA of two sets of features."""
    if centred:
        x_ND, y_NE = x_ND - x_ND.mean(0), y_NE - y_NE.mean(0)
    norm = torch.linalg.matrix_norm
    return norm(y_NE.T @ x_ND) ** (1 + squared) / (norm(x_ND.T @ x_ND) * norm(y_NE.T @ y_NE))


def overlap(a_Nk: Tensor, b_Nk: Tensor) -> Tensor:
    """Share of each image's neighbors in one list that are in the other [N]."""
    return (a_Nk[:, :, None] == b_Nk[:, None]).any(-1).float().mean(1)


def gap(values_N: Tensor, indices_Nk: Tensor) -> Tensor:
    """Mean difference of a value between neighbors, over that between any two images."""
    apart = (values_N[:, None] - values_N).abs().mean()
    return (values_N[indices_Nk] - values_N[:, None]).abs().mean() / apart


def share(right_N: Tensor, *, correction: int = 0, power: float = 0.5) -> Tensor:
    """A share and its standard error [2]."""
    error = right_N.std(correction=correction) / len(right_N) ** power
    return torch.stack([right_N.mean(), error])


def few(keys_ND, labels_N, queries_MD, shots: int, order_N, *, scale_by: str = "chosen") -> Tensor:
    """Classes [M] of the nearest of the first ``shots`` images of each class, in an order.

    Features are standardised by the chosen images alone.
    """
    chosen = [order_N[labels_N[order_N] == c][:shots] for c in labels_N.unique()]
    chosen = torch.cat(chosen)
    scale = {"chosen": keys_ND[chosen], "all keys": keys_ND, "queries": queries_MD}[scale_by]
    x, y = ((f - scale.mean(0)) / scale.std(0) for f in (keys_ND[chosen], queries_MD))
    return labels_N[chosen][(F.normalize(y, dim=-1) @ F.normalize(x, dim=-1).T).argmax(1)]


def iou(truth: Tensor, guess: Tensor, classes: int, *, below=torch.logical_or) -> Tensor:
    """Pixels in both over pixels in at least one, of each class [C]."""
    c = torch.arange(classes).reshape(-1, 1, 1, 1)
    both, either = (truth == c) & (guess == c), below(truth == c, guess == c)
    return both.sum((1, 2, 3)).double() / either.sum((1, 2, 3))


def received(n: float, world: int, *, turns: int = 2) -> float:
    """Numbers that each process receives when sums go around a ring."""
    return turns * (world - 1) * n / world


def statistics(means_WD: Tensor, variances_WD: Tensor, *, between: bool = True) -> Tensor:
    """Mean and variance of equally large parts together [2, D]."""
    apart_D = means_WD.var(0, correction=0)
    return torch.stack([means_WD.mean(0), variances_WD.mean(0) + between * apart_D])


MISTAKES: dict[Callable, dict[str, Callable]] = {
    nearest: {
        "these are the largest products: bring all rows to length 1 first": partial(
            nearest, unit=torch.clone
        ),
        "these are the farthest": lambda queries, keys, k: nearest(-queries, keys, k),
    },
    patchify: {
        "each patch has its colours one after another, not those of a pixel side by side": partial(
            patchify, colours_last=False
        ),
        "a reshape alone cuts rows of pixels, not patches": lambda x, patch: x.reshape(
            len(x), -1, patch * patch * x.shape[1]
        ),
    },
    visible: {"these are the patches with the largest noise": partial(visible, smallest=False)},
    hidden_error: {
        "this is the error over all patches": partial(hidden_error, over="all"),
        "this is the error over the visible patches": partial(hidden_error, over="visible"),
        "this is divided by the number of all patches": lambda predicted, target, hidden: (
            hidden_error(predicted, target, hidden) * hidden.float().mean()
        ),
    },
    attention: {
        "the scores are not divided by the root of D": partial(attention, root=False),
        "the softmax runs over the queries instead of the keys": partial(attention, over=-2),
        "a reshape without transpose mixes heads and tokens": partial(attention, moved=False),
    },
    votes: {
        "votes for one class replace each other instead of adding up": partial(votes, add=False),
        "the similarities are not divided by the temperature": (
            lambda labels, similarities, classes, _: votes(labels, similarities, classes, 1.0)
        ),
    },
    explained: {"this is the mean of each column's share": partial(explained, by_column=True)},
    whiten: {
        "this is C to the power of 1/2: long directions get longer": partial(whiten, power=0.5),
        "this is C to the power of -1: short directions are now the long ones": partial(
            whiten, power=-1.0
        ),
        "the features still lie along the axes of C: multiply by axes.T": partial(
            whiten, back=False
        ),
    },
    best_of: {"every image has found itself": partial(best_of, alone=False)},
    head: {
        "the last layer has no BatchNorm": partial(head, last_norm=False),
        "GELU follows the last layer as well": lambda x, weights: F.gelu(head(x, weights)),
        "the variance is that of correction=1": partial(head, norm=partial(_scaled, correction=1)),
        "mean and variance are those of each row": partial(head, norm=partial(_scaled, over=1)),
    },
    lookup: {
        "an image has found itself in the queue": partial(lookup, own=2.0),
        "not every image has an entry of its own to leave out": lambda z, ids, queue, _: nearest(
            z, queue, 2
        )[:, 1],
        "the vectors do not all have length 1": partial(lookup, unit=torch.clone),
        "these are the neighbors' image numbers, not their places": lambda z, ids, queue, known: (
            known[lookup(z, ids, queue, known)]
        ),
    },
    nna: {
        "the negatives have been swapped, too: this is NNCLR": partial(nna, negatives="nn"),
        "row i has to compare z_i with all p_j, not p_i with all z_j": partial(nna, axis=0),
        "without any division by the temperature": lambda p, z, nn, *_: nna(p, z, nn, 1.0),
        "the sum below still has z_i·p_i where nn_i·p_i belongs": _numerator_alone,
        "the vectors do not have length 1": partial(nna, unit=torch.clone),
    },
    linear_decoder: {
        "this is plain least squares: the penalty is missing": (
            lambda x, y, _: linear_decoder(x, y, 0.0)
        ),
        "the penalty goes with its square": lambda x, y, p: linear_decoder(x, y, p**2),
    },
    cka: {
        "the features are not centred": partial(cka, centred=False),
        "the norm in the numerator is not squared": partial(cka, squared=False),
    },
    trust: {"every point has found itself on the map": partial(trust, itself=True)},
    apart: {"the first D rows are the queries, not every third": partial(apart, in_turn=True)},
    normalised: {
        "the pixels still go from 0 to 255": lambda x, *scale: normalised(255 * x.float(), *scale)
    },
    step: {
        "a view is compared with itself": partial(step, pairs=lambda g, v: True),
        "the losses are added, not averaged": lambda x, *others: (
            step(x, *others) * 2 * (len(x) - 1)
        ),
        "each view has passed BatchNorm by itself": lambda x, *others: step(
            x, *others, parts=len(x)
        ),
    },
    few: {
        "the test images' statistics have leaked into the features": partial(
            few, scale_by="queries"
        ),
        "images without a label known have scaled the features": partial(few, scale_by="all keys"),
    },
    share: {
        "this is the deviation of one image, not of the share": partial(share, power=0),
        "the deviation is divided by N, not by its root": partial(share, power=1),
        "the variance is divided by N - 1": partial(share, correction=1),
    },
    iou: {
        "pixels in both are counted twice below": partial(iou, below=lambda t, g: t.int() + g),
        "this divides by the pixels of the truth alone": partial(iou, below=lambda t, _: t),
        "this divides by the pixels of the guess alone": partial(
            iou, below=lambda t, g: g.expand_as(t)
        ),
    },
    received: {
        "after W - 1 rounds only the sums are ready, each in one place": partial(received, turns=1),
        "each round hands on a piece, not the whole vector": lambda n, w: received(n, w) * w,
    },
    statistics: {"the parts' means differ, too": partial(statistics, between=False)},
}
