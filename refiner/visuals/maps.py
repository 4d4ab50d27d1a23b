"""Maps of every block: shared PCA axes at once, and UMAP chained from block to block.

A chain starts at the PCA, and each block's map starts at that of the block before, so that groups
stay about where they were. Every map is kept on disk under the hash of what it was made from: the
exact graph, where the points started, and the settings. Blocks that two models share (refining
freezes the first ones) have the same hash and so the same map.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor
from tqdm.auto import tqdm

from refiner.base.errors import UserError
from refiner.base.files import keep_in_cache
from refiner.base.places import cache_folder, data_folder
from refiner.base.tensors import as_features, in_kind, standardized
from refiner.probing.search import Graph, nearest_neighbors

N_NEIGHBORS = 15
FIRST_EPOCHS, NEXT_EPOCHS = 300, 150  # of UMAP, from the PCA and from the map of the block before
SIGNATURE = 256  # images by whose nearest neighbor a prepared map is recognised
ALIKE = 0.95  # share of them that must agree; other machines round differently


# ---------------------------------------------------------------- PCA


def shared_axes(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Two directions for all blocks of all models of one width.

    Args:
        features: by model [L, N, D].

    Returns:
        By model float32 [D, 2], for features standardised block by block: the directions in which
        the last block of the last model varies most, so that one can watch how they come about. A
        point that moves between two maps made with them has moved in the feature space.
    """
    last = {x_LND.shape[2]: x_LND[-1] for x_LND in features.values()}
    fits = {width: _fitted(standardized(x, x[:1])[0]) for width, x in last.items()}
    axes = {width: torch.from_numpy(fit.components_.T).float() for width, fit in fits.items()}
    return {name: axes[x.shape[2]] for name, x in features.items()}


@in_kind
def pca_embedding(features: Tensor, *, axes_of: Tensor | None = None) -> Tensor:
    """Projects features onto the two directions in which they vary most.

    Args:
        features: [N, D].
        axes_of: other features [M, D] whose directions and mean are used, so that several sets
            share one map; default the features themselves.

    Returns:
        float32 [N, 2] on the CPU, in the features' unit. The sign of each axis, which is free, is
        chosen such that its largest weight is positive.

    Raises:
        ValueError: for features that are not [N, D] with N and D at least 2, or not finite.
    """
    features = as_features(features, "features")
    base = features if axes_of is None else as_features(axes_of, "features")
    for x in (base, features):
        if x.ndim != 2 or len(x) < 1 + (x is base) or x.shape[1] < 2 or x.shape[1] != base.shape[1]:
            raise UserError(f"features must be [N, D], both at least 2, not {list(x.shape)}")
    return torch.from_numpy(_fitted(base).transform(_doubles(features))).float()


def _fitted(x_ND: Tensor) -> PCA:
    with np.errstate(invalid="ignore"):  # shares of a variance of 0, which nobody reads
        return PCA(2, svd_solver="covariance_eigh").fit(_doubles(x_ND))


def _doubles(x_ND: Tensor) -> np.ndarray:
    return x_ND.detach().cpu().double().numpy()


def framed(xy: Tensor | np.ndarray) -> np.ndarray:
    """Coordinates [..., 2] moved and scaled into -1…1, all maps alike; float32."""
    xy = np.asarray(xy, dtype=np.float32)
    low, high = xy.reshape(-1, 2).min(0), xy.reshape(-1, 2).max(0)
    return (xy - (low + high) / 2) * (2 / max(float((high - low).max()), 1e-12))


# ---------------------------------------------------------------- UMAP


@in_kind
def umap_embedding(
    features: Tensor,
    graph: Graph | None = None,
    *,
    n_neighbors: int = 15,
    seed: int = 0,
    init: Tensor | np.ndarray | None = None,
    epochs: int | None = None,
) -> Tensor:
    """Lays images out such that neighbors stay neighbors (McInnes et al. 2018, arXiv 1802.03426).

    Args:
        features: [N, D].
        graph: their nearest neighbors among themselves, [N, ≥ n_neighbors - 1], searched with
            ``exclude_self=True``; default searched here.
        n_neighbors: how many neighbors count, the image itself included, as in umap-learn. Few
            show fine structure, many the large one.
        seed: of the optimisation. The same seed gives the same points on one machine; other
            machines round differently and differ in detail.
        init: where the points start, [N, 2]; default the PCA. Start a map from that of the block
            before, and the same groups stay about where they were. An axis along which nothing
            differs, as where all features are equal, starts at small random places instead.
        epochs: rounds of optimisation; default umap-learn's, 500 up to 10,000 images and 200
            beyond. A map that starts from a good one needs fewer.

    Returns:
        float32 [N, 2], no unit.

    Raises:
        ValueError: for a graph of other images, with too few neighbors or with images that are
            their own neighbors, an init that is not [N, 2], or points that are not finite.
    """
    features = as_features(features, "features")
    n = len(features)
    if not 2 <= n_neighbors <= n:
        raise UserError(f"n_neighbors must be from 2 to the {n} images, not {n_neighbors}")
    if graph is None:
        graph = nearest_neighbors(features, features, k=n_neighbors - 1, exclude_self=True)
    knn = _with_self_first(graph, n, n_neighbors)
    start = pca_embedding(features) if init is None else torch.as_tensor(init)
    if start.shape != (n, 2):
        raise UserError(f"init must be [{n}, 2], not {list(start.shape)}")
    start = start.detach().cpu().float().numpy().copy()
    flat = np.ptp(start, axis=0) == 0  # umap-learn divides by the extent
    start[:, flat] = np.random.default_rng(seed).normal(scale=1e-3, size=(n, int(flat.sum())))

    import umap  # takes many seconds, so only when it is needed

    # A seed allows no more than one job.
    how = {"n_neighbors": n_neighbors, "metric": "cosine", "random_state": seed, "n_jobs": 1}
    mapper = umap.UMAP(**how, n_epochs=epochs, init=start, precomputed_knn=knn)
    with warnings.catch_warnings():
        # New images could not be added to the map. Nobody asks for that.
        warnings.filterwarnings("ignore", message="precomputed_knn.*NNDescent")
        points = mapper.fit_transform(features.detach().cpu().float().numpy())
    if not np.isfinite(points).all():
        raise UserError("UMAP found no finite places for these features: stay with the PCA map")
    return torch.from_numpy(np.ascontiguousarray(points, dtype=np.float32))


def _with_self_first(graph: Graph, n: int, n_neighbors: int) -> tuple[np.ndarray, np.ndarray]:
    """The graph as umap-learn wants it: [N, n_neighbors], each image its own first neighbor.

    Cut to size here, because umap-learn (0.5.12) uses surplus columns below 4096 images.
    """
    indices, similarities = graph.indices.cpu(), graph.similarities.cpu()
    if indices.ndim != 2 or len(indices) != n or graph.k < n_neighbors - 1:
        raise UserError(
            f"the graph is {list(indices.shape)}, but [{n}, ≥{n_neighbors - 1}] is needed: one "
            "block's neighbors of all images"
        )
    itself = torch.arange(n)[:, None]
    if (indices == itself).any():
        raise UserError("the graph must leave out the images themselves: exclude_self=True")
    others = slice(n_neighbors - 1)
    indices = torch.cat([itself, indices[:, others]], dim=1)
    distances = torch.cat([torch.zeros(n, 1), 1 - similarities[:, others].float()], dim=1)
    return indices.numpy(), distances.clamp_min(0).numpy()


# ---------------------------------------------------------------- chains that are kept on disk


def umap_maps(
    features: Mapping[str, Tensor],
    graphs: Mapping[str, Graph],
    start: Mapping[str, np.ndarray],
    *,
    seed: int = 0,
    cache: bool = True,
    progress: bool = True,
    report: Callable[[int, int, float], None] = lambda done, total, left: None,
) -> dict[str, np.ndarray]:
    """UMAP of every block of every model.

    Args:
        features: by model [L, N, D].
        graphs: by model the neighbors [L, N, ≥14], searched with ``exclude_self=True``.
        start: by model where the first block's points start, [N, 2].
        seed: of the optimisation.
        cache: read and keep maps in ``maps`` of :func:`refiner.base.places.cache_folder`.
        progress: show a bar.
        report: called after each map with maps done, maps in all and the seconds left.

    Returns:
        By model float32 [L, N, 2], each map in -1…1.

    Warns:
        UserWarning: when a kept map is damaged (it is made again) or cannot be written.
    """
    total = sum(len(x) for x in features.values())
    found, done, began = {}, 0, time.monotonic()
    with tqdm(total=total, desc="UMAP", unit="map", disable=not progress) as bar:
        for name, x_LND in features.items():
            init, maps = framed(start[name]), []
            for block, x_ND in enumerate(x_LND):
                epochs = NEXT_EPOCHS if block else FIRST_EPOCHS
                init = _one_map(x_ND, graphs[name][block], init, epochs, seed, cache)
                maps.append(init)
                done += 1
                bar.update()
                report(done, total, (time.monotonic() - began) / done * (total - done))
            found[name] = np.stack(maps)
    return found


def _one_map(x_ND, graph: Graph, init: np.ndarray, epochs: int, seed: int, cache: bool):
    graph = graph.first(N_NEIGHBORS - 1)
    path = cache_folder() / "maps" / f"{_key(graph, init, epochs, seed)}.npy"
    known = _read(path, len(x_ND)) if cache else None
    if known is not None:
        return known
    how = {"n_neighbors": N_NEIGHBORS, "seed": seed, "init": init, "epochs": epochs}
    points = framed(umap_embedding(x_ND, graph, **how))
    if cache:
        keep_in_cache(path, "the maps", lambda file: np.save(file, points))
    return points


def _key(graph: Graph, init: np.ndarray, epochs: int, seed: int) -> str:
    content = hashlib.sha256(f"1 {N_NEIGHBORS} {epochs} {seed}".encode())
    content.update(graph.indices.to(torch.int64).contiguous().numpy().data)
    content.update(graph.similarities.float().contiguous().numpy().data)
    content.update(np.ascontiguousarray(init, dtype=np.float32).data)
    return content.hexdigest()[:32]


def _read(path: Path, n: int) -> np.ndarray | None:
    try:
        points = np.load(path, allow_pickle=False)
        if points.shape != (n, 2) or not np.isfinite(points).all():
            raise ValueError("not the expected points")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, EOFError) as error:
        warnings.warn(f"the map in {path} is damaged ({error}) and is made again", stacklevel=4)
        return None
    return points


# ---------------------------------------------------------------- maps that come with the course


def prepared_maps(graphs: Mapping[str, Graph]) -> dict[str, np.ndarray] | None:
    """Maps of the embedded checkpoints' blocks, made by ``benchmarks/prepare_maps.py``.

    Args:
        graphs: by model the neighbors [L, N, k] among the images themselves.

    Returns:
        By model float32 [L, N, 2]; None unless every block is known. A block is recognised by its
        images' nearest neighbors, of which nearly all must be those the map was made from.
    """
    found = {}
    for name, graph in graphs.items():
        own = [_prepared(graph[block]) for block in range(len(graph.indices))]
        if any(points is None for points in own):
            return None
        found[name] = np.stack(own)
    return found


def _prepared(graph: Graph) -> np.ndarray | None:
    known = _prepared_file(len(graph.indices))
    if known is None:
        return None
    agree = (known["signatures"] == signature(graph)).mean(1)
    best = int(agree.argmax())
    return known["maps"][best].astype(np.float32) / 32767 if agree[best] >= ALIKE else None


@lru_cache(maxsize=4)
def _prepared_file(n: int) -> dict[str, np.ndarray] | None:
    path = data_folder() / "maps" / f"toybox_test_{n}.npz"
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def signature(graph: Graph) -> np.ndarray:
    """The nearest neighbors by which a block is recognised, uint16 [≤256]."""
    return graph.indices[:SIGNATURE, 0].numpy().astype(np.uint16)
