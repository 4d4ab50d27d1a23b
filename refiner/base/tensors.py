"""Small helpers on tensors that several rooms share: devices, precision, chunks, drawing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, wraps
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from refiner.base.errors import UserError

GROUP = 8  # keys whose maximum stands for them
MOST_CLASSES = 2**15  # labels beyond are ids: a column for each number up to them would not fit
GROUPED_KEYS = 4096  # from here on the maxima of groups pay
# A CPU chunk below 32 MiB comes from reused memory; larger ones cost a page fault every 4 KiB.
CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**29}


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width; a number is both.

    Raises:
        ValueError: for anything but whole numbers of pixels from 1.
    """
    both = (size, size) if isinstance(size, Integral) else size
    right = isinstance(both, list | tuple) and len(both) == 2
    if not right or not all(isinstance(side, Integral) and side >= 1 for side in both):
        raise UserError(
            f"size must be at least 1 pixel, a whole number or (height, width), not {size!r}"
        )
    return tuple(both)


def as_size(height: int, width: int) -> int | tuple[int, int]:
    """A number for a square, else (height, width); JSON makes a list of it."""
    return height if height == width else (height, width)


def largest(scores_QK: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores and their keys: those of the k groups with the largest maxima."""
    n_keys = scores_QK.shape[1]
    n_groups = n_keys // GROUP
    if n_keys < GROUPED_KEYS or n_groups < 2 * k:
        return scores_QK.topk(k, dim=1)
    grouped = scores_QK[:, : n_groups * GROUP].unflatten(1, (GROUP, n_groups))
    groups_Qk = grouped.amax(1).topk(k, dim=1, sorted=False).indices
    members = torch.arange(GROUP, device=scores_QK.device) * n_groups
    some = (groups_Qk[:, :, None] + members).flatten(1)
    rest = torch.arange(n_groups * GROUP, n_keys, device=scores_QK.device)
    some = torch.cat([some, rest.expand(len(some), -1)], dim=1)
    top, where = scores_QK.gather(1, some).topk(k, dim=1)
    return top, some.gather(1, where)


def chunk_rows(device: torch.device, bytes_a_row: int) -> int:
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // bytes_a_row)


def device_for(device: str | torch.device | None, like: Tensor) -> torch.device:
    """The device asked for; by default a GPU if there is one, else where ``like`` is."""
    if device is None:
        return torch.device("cuda") if torch.cuda.is_available() else like.device
    return torch.device(device)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No gradients, and float32 products that are float32: no autocast, no TF32."""
    before = torch.get_float32_matmul_precision()
    matmul = torch.backends.cuda.matmul
    reduced = matmul.allow_bf16_reduced_precision_reduction
    torch.set_float32_matmul_precision("highest")
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        matmul.allow_bf16_reduced_precision_reduction = reduced


def as_features(x, name: str) -> Tensor:
    """Features as a tensor of floats without gradients; they may be an array or a list of rows.

    Raises:
        ValueError: for other types than floats, NaN or infinity, or where there are none.
    """
    try:
        if isinstance(x, list | tuple) and any(isinstance(row, Tensor) for row in x):
            x = torch.stack([torch.as_tensor(row) for row in x])
        x = x.detach() if isinstance(x, Tensor) else torch.from_numpy(np.array(x))
    except (TypeError, ValueError, RuntimeError) as error:  # of what is no array, or has no rows
        raise UserError(
            f"the {name} must be an array of floats, not {type(x).__name__}: {error}"
        ) from None
    if not x.is_floating_point() or 0 in x.shape:
        raise UserError(
            f"features must be floats, at least one, but the {name} are {x.dtype} {list(x.shape)}"
        )
    # A sum is finite only if everything is, unless it overflows; isfinite needs a copy.
    if not x.sum().isfinite() and not x.isfinite().all():
        raise UserError(f"the {name} hold NaN or infinity; look at the model or its precision")
    return x


def axes_of(x) -> int:
    """How many axes an array has, or a list of lists."""
    if hasattr(x, "ndim"):
        return x.ndim
    return 1 + axes_of(x[0]) if isinstance(x, list | tuple) else 0


def in_kind(function: Callable) -> Callable:
    """A function of features that gives arrays for arrays: in tensors, tuples and dicts of them."""

    @wraps(function)
    def run(x, *args, **options):
        found = function(x, *args, **options)
        first = x[0] if isinstance(x, list | tuple) and len(x) else x
        return found if isinstance(first, Tensor) else _arrays(found)

    return run


def _arrays(found):
    if isinstance(found, Tensor):
        return found.numpy()
    if isinstance(found, dict):
        return {key: _arrays(value) for key, value in found.items()}
    return tuple(map(_arrays, found)) if isinstance(found, tuple) else found


def feature_pair(queries, keys, names: tuple[str, str] = ("queries", "keys")):
    """Two sets of features that can be compared, as tensors.

    Raises:
        ValueError: for shapes that do not match, or as :func:`as_features`.
    """
    queries, keys = as_features(queries, names[0]), as_features(keys, names[1])
    match = (
        queries.ndim == keys.ndim
        and queries.ndim in (2, 3)
        and queries.shape[-1] == keys.shape[-1]
        and queries.shape[:-2] == keys.shape[:-2]
    )
    if not match:
        raise UserError(
            "features must be [N, D] or [L, N, D] with the same D and L, not "
            f"{list(queries.shape)} and {list(keys.shape)}"
        )
    return queries, keys


@torch.no_grad()
def standardized(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets [N, D] and [Q, D] shifted and scaled by the train set's mean and deviation.

    Returns:
        float32. Features that are constant on the train set, up to float32 rounding, become zero
        on both: there is no scale to measure them by.
    """
    mean, scale = mean_and_scale(train)
    # Some rows at a time, as float64 of all would leave the cache.
    parts = [[((x - mean) * scale).float() for x in whole.split(512)] for whole in (train, test)]
    return torch.cat(parts[0]), torch.cat(parts[1])


def mean_and_scale(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation of every feature, float64 [D]."""
    parts = x_ND.split(512)  # in the cache
    mean = sum(x.sum(0, dtype=torch.float64) for x in parts) / len(x_ND)
    variance = sum((x.double() - mean).square_().sum(0) for x in parts) / len(x_ND)
    std = variance.sqrt()
    return mean, torch.where(std > 1e-7 * mean.abs(), 1 / std, 0)


def numbered(*labels) -> list:
    """Labels that are words, as their places in the alphabet of all sets; others as they are.

    Raises:
        ValueError: where only some of the sets have words.
    """
    given = [y if y is None or isinstance(y, Tensor) else np.asarray(y) for y in labels]
    words = [y is not None and not isinstance(y, Tensor) and _are_words(y) for y in given]
    if not any(words):
        return given
    if not all(w or y is None for y, w in zip(given, words, strict=True)):
        raise UserError("some labels are words and others numbers: give words or numbers to all")
    names = np.unique(np.concatenate([y.astype(str).ravel() for y in given if y is not None]))
    return [None if y is None else np.searchsorted(names, y.astype(str)) for y in given]


def _are_words(labels: np.ndarray) -> bool:
    return labels.dtype.kind in "UST" or (
        labels.dtype.kind == "O" and all(isinstance(label, str) for label in labels.flat)
    )


def class_labels(labels, features: Tensor, name: str) -> Tensor:
    """Labels as int64, one for each of the features; they may be an array, a list or a series.

    Words are numbered by themselves: those of several sets go through :func:`numbered` together.

    Raises:
        ValueError: unless they are words, or whole numbers from 0.
    """
    if labels is None:
        raise UserError(f"the {name} images have no labels")
    return _whole(labels, features.shape[-2], f"{name} features", f"the {name} labels")


def _whole(labels, n: int, what: str, name: str) -> Tensor:
    (labels,) = numbered(labels)
    if tuple(labels.shape) != (n,):
        raise UserError(f"{n} {what} do not match labels of shape {list(labels.shape)}")
    if not isinstance(labels, Tensor):
        whole = labels.dtype.kind in "biu" or all(isinstance(y, Integral) for y in labels)
        labels = torch.from_numpy(labels.astype(np.int64)) if whole else labels
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise UserError(
            f"{name} must be words or whole numbers from 0, not {labels.dtype}; "
            "numpy.unique(labels, return_inverse=True)[1] numbers classes of any kind"
        )
    labels = labels.detach().long()
    if n and int(labels.min()) < 0:
        raise UserError(
            f"{name} must be whole numbers from 0, and that of image {int(labels.argmin())} is "
            f"{int(labels.min())}: leave images without a class out"
        )
    return labels


def named_labels(labels, n: int, classes: Sequence = ()) -> tuple[Tensor, tuple[str, ...]]:
    """Labels of one set as places among its classes' names, int64 [n], and those names.

    Words are looked up among the names, or become the names, in alphabetical order, where there are
    none. Numbers stay what they are.

    Raises:
        ValueError: as :func:`class_labels`, and for labels beyond the names or not among them.
    """
    classes = tuple(map(str, classes))
    given = labels if isinstance(labels, Tensor) else np.asarray(labels)
    if not isinstance(given, Tensor) and _are_words(given) and given.size:
        words = given.astype(str)
        classes = classes or tuple(np.unique(words).tolist())
        place = {name: i for i, name in enumerate(classes)}
        if unknown := sorted(set(words.ravel().tolist()) - set(place)):
            raise UserError(f"the label {unknown[0]!r} is none of the {len(classes)} classes")
        given = np.array([place[word] for word in words.ravel()])
    labels = _whole(given, n, "images", "the labels")
    if n and classes and int(labels.max()) >= len(classes):
        raise UserError(f"label {int(labels.max())} has no name among {len(classes)} classes")
    return labels, classes


def group_numbers(groups, n: int) -> Tensor:
    """The group of each of n images, int64 [n] from 0, of numbers or words in any container.

    Raises:
        ValueError: for another number of them.
    """
    groups = np.asarray(groups.cpu() if isinstance(groups, Tensor) else groups)
    if groups.shape != (n,):
        raise UserError(f"{n} images need as many groups, not {list(groups.shape)}")
    return torch.from_numpy(np.unique(groups, return_inverse=True)[1].astype(np.int64))


def columns(*labels: Tensor) -> Tensor:
    """The class of each column of a table: every one up to the largest, int64 [C].

    Beyond MOST_CLASSES labels are ids, and only those that occur have a column.
    """
    most = max(int(y.max()) for y in labels)
    if most < MOST_CLASSES:
        return torch.arange(most + 1)
    return torch.cat([y.cpu() for y in labels]).unique()


def step_generator(seed: int, step: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator that depends on (seed, step) alone."""
    mixed = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(mixed >> np.uint64(1)))


def draw(
    *shape: int, generator: torch.Generator | None = None, device: torch.device | None = None
) -> Tensor:
    """Uniform numbers from 0 to 1, drawn where the generator lives and given on ``device``.

    With a generator on the GPU nothing travels, and the host need not wait.
    """
    home = device if generator is None else generator.device
    return torch.rand(*shape, generator=generator, device=home).to(device or home)


@lru_cache(maxsize=64)
def constant(values: tuple, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A small tensor that is copied to a device once, not at every step."""
    return torch.tensor(values, dtype=dtype, device=device)


def take(pixels, index: Tensor, device: torch.device) -> Tensor:
    """The images of one step on the device; a tensor that lies there already is not copied."""
    on_device = isinstance(pixels, Tensor) and pixels.device.type == device.type
    if on_device:
        return pixels[index.to(device, non_blocking=True)]
    chosen = pixels[index]
    return chosen.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else chosen
