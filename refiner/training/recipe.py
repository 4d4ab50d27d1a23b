"""What decides a refinement: the recipe, its presets, its schedules, and the checks before a start.

Presets: ``cpu``, ``labs`` and ``gpu`` for the course, ``paper`` for the published runs
(MIM-Refiner, Alkin et al. 2025, arXiv 2402.10093), and ``fitted``, which scales the paper's recipe
to a model and a set of images by rules that its docstring states.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from typing import Annotated, Literal

import torch

from refiner.base import parallel
from refiner.base.errors import UserError
from refiner.base.places import check_memory
from refiner.base.settings import (
    Count,
    Entries,
    NotNegative,
    Positive,
    Range,
    Share,
    Whole,
    changed,
    checked,
    parse_setting,
    settings_from,
)
from refiner.base.tensors import as_size, sides
from refiner.images.sources import come_again, some
from refiner.images.views import View, by_channel, check_colour
from refiner.models.encoders import (
    Encoder,
    channels_of,
    check_channels,
    check_refinable,
    has_class_token,
    preprocessing_card,
)


def refine_preset(name: str, model, size, images, settings: list[str]):
    """The recipe of a preset for a model, its image size and a set or a number of images."""
    values = dict(map(parse_setting, settings))
    batch = values.get("batch")
    numbers = isinstance(batch, int | float) and float(batch).is_integer() and batch > 0
    batch = {"batch": int(batch)} if numbers else {}
    if name == "cpu":
        recipe = Recipe.cpu(size=size)
    elif name == "labs":
        recipe = Recipe.labs(size=size)
    elif name == "gpu":
        recipe = Recipe.gpu(size=size, patch=model.patch_embed.patch_size[0])
    elif name == "fitted":
        recipe = Recipe.fitted(model, images, **batch)  # its steps follow the batch
    else:
        recipe = Recipe.paper(name, images=images, **batch)
    if channels_of(model) != 3:
        recipe = replace(recipe, views=tuple(map(by_channel, recipe.views)))
    return _with_views(changed(recipe, settings), model)


IMAGENET = 1_281_167  # images of ImageNet-1k's train split
Pooling = Literal["cls", "patch"]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a refinement. Defaults follow the paper; presets adapt them.

    Attributes:
        blocks: which blocks get a head, counted from 1, negative from the end; None is the last
            third. The last block's head reads the encoder's output, after the final norm.
        pooling: "cls", "patch" (mean), one of them for each block of ``blocks``, or None for the
            class token where there is one.
        hidden, predictor_hidden, out: widths of the heads; see
            :class:`refiner.training.heads.IDHeads`.
        views: the random views of each image; the first ``global_views`` are targets too. The name
            "channels" stands for two large and two small views that assume nothing about colour,
            whatever the number of channels (:func:`refiner.images.views.by_channel`).
        batch: images a step, of all processes together.
        head_steps: steps of stage 2 (heads only).
        steps: steps of stage 3 (encoder and heads).
        head_lr, lr: peak learning rates of the two stages for a batch of 256; scaled linearly.
        layer_decay: factor on the learning rate from each block to the one before it.
        decay_last: the last block is one factor below the heads and the final norm already, as in
            the published runs. Without it, it learns at their rate.
        weight_decay, head_weight_decay: of the encoder's and the heads' matrices in stage 3.
        warmup: share of each stage's steps.
        head_warmup: the share in stage 2, where it is another one.
        cached_views: for so many epochs of stage 2 views are drawn; later epochs take the features
            that these had, in other batches, and need no encoder. Memory for each such epoch:
            images × views × heads × the encoder's width. 0 draws views at every step, as the paper
            does.
        frozen_blocks: this many first blocks, and the embedding, are not trained.
        temperature: τ of the NNA loss.
        queue: entries of the neighbor queue.
        top_k: stage 3 draws among this many nearest; stage 2 takes the nearest.
        swap: "neighbor" (NNA), "both" (NNCLR's swap of positives and negatives) or "none".
        swap_from, swap_full: shares of stage 3 between which the chance to swap grows from 0 to
            1. Neighbors are only useful once they are mostly right; (0, 0) swaps from the start.
        loss_weights: of the heads below the last in stage 3: "constant"; "decay", all from 1 to 0
            together; or "staggered", one after the other, the earliest block first.
        groups_a_step: of images with known groups (labs, say), each batch holds so many groups, and
            the loss compares within each; 0 mixes all groups. See
            :mod:`refiner.training.groups`.
        neighbors_from: "anywhere", or only from the sample's "own" group, or from "others".
        ema: decay of the averaged encoder that is returned.
        keep: "best" holds a tenth of the images out (100 to 1,000), follows the best reading of the
            averaged encoder on them, and returns the best weights with a verdict
            (:mod:`refiner.training.keeping`): those of a moment on the way, between before and
            after, or before. Of streams and of fewer than 400 images it returns the "last".
        clip: largest gradient norm, None for no limit.
        checkpoint: recompute each trained block in the backward pass instead of keeping its
            activations; less memory, about a third more time.
        compile: fuse each block with torch.compile; needs a C++ compiler.
        seed: of heads, batches, views and draws.
    """

    blocks: tuple[int, ...] | None = None
    pooling: Pooling | tuple[Pooling, ...] | None = None
    hidden: Count = 2048
    predictor_hidden: Count = 4096
    out: Count = 256
    views: Literal["channels"] | Annotated[tuple[View, ...], Entries(2)] = (
        View(blur=1.0),
        View(blur=0.1, solarize=0.2),
        *(View(size=96, scale=(0.05, 0.25), blur=0.5) for _ in range(10)),
    )
    global_views: Count = 2
    batch: Annotated[int, Range(2)] = 1024
    head_steps: Whole = 25_000
    steps: Whole = 37_500
    head_lr: NotNegative = 2e-4
    lr: NotNegative = 4e-4
    layer_decay: Positive = 0.65
    decay_last: bool = False
    weight_decay: NotNegative = 0.05
    head_weight_decay: NotNegative = 1e-5
    warmup: Share = 0.15
    head_warmup: Share | None = None
    cached_views: Whole = 0
    frozen_blocks: Whole = 0
    temperature: Positive = 0.2
    queue: Count = 65_536
    top_k: Count = 20
    swap: Literal["neighbor", "both", "none"] = "neighbor"
    swap_from: Share = 0.0
    swap_full: Share = 0.0
    loss_weights: Literal["constant", "decay", "staggered"] = "constant"
    groups_a_step: Whole = 1
    neighbors_from: Literal["anywhere", "own", "others"] = "anywhere"
    ema: Share = 0.9999
    keep: Literal["last", "best"] = "last"
    clip: Positive | None = None
    checkpoint: bool = False
    compile: bool = False
    seed: Whole = 0

    @classmethod
    def cpu(cls, *, size: int | tuple[int, int] = 32, **changes) -> Recipe:
        """About three minutes on two cores: small crops, few steps, first half frozen.

        Toys are told apart by shape, so the views change every colour and crop gently. Half of a
        large view's patches are dropped, which the paper does not do: it saves time, and a masked
        autoencoder is used to it.

        Args:
            size: the model's image size; the small views have half of it.
            **changes: other values for any attribute.
        """
        heads = dict(blocks=(9, 10, 11, 12), hidden=256, predictor_hidden=512, out=128)
        rates = dict(head_lr=4e-3, lr=6e-3, layer_decay=0.75, warmup=0.1, ema=0.98)
        run = dict(batch=128, head_steps=20, steps=160, frozen_blocks=6, queue=4096, top_k=5)
        base = cls(**heads, **rates, **run, views=_toy_views(size, keep=0.5), keep="best")
        return replace(base, **changes)

    @classmethod
    def labs(cls, *, size: int | tuple[int, int] = 32, **changes) -> Recipe:
        """Like ``cpu``, for images from several labs: views that cover what differs between labs.

        Plain instance discrimination: across labs most neighbors are wrong, and teach what is
        wrong. Hand ``groups=`` to :func:`refiner.refine`, so that each batch is of one lab.

        Args:
            size: the model's image size; the small views have half of it.
            **changes: other values for any attribute.
        """
        light = {"jitter": 0.95, "brightness": 0.8, "contrast": 0.8, "invert": 0.3}
        colour = {"saturation": 0.8, "hue": 0.5, "gray": 0.2, "blur": 0.5, "noise": 0.06}
        large = View(size=size, scale=(0.6, 1.0), keep=0.5, **light, **colour)
        small = View(size=_part(size, 0.5), scale=(0.3, 0.6), **light, **colour)
        run = dict(batch=64, steps=600, frozen_blocks=0, swap="none", keep="last")
        return replace(cls.cpu(views=(large, large, small, small), **run), **changes)

    @classmethod
    def gpu(cls, *, size: int | tuple[int, int] = 32, patch: int = 16, **changes) -> Recipe:
        """The full run on one GPU; up to 64 pixels the cpu preset's views, above the paper's.

        Not yet run on a GPU: the numbers are the paper's, scaled to one card by its own rules.

        Args:
            size: the model's image size.
            patch: and its patch size, which small views are a multiple of.
            **changes: other values for any attribute.
        """
        heads = dict(hidden=1024, predictor_hidden=2048, queue=8192)
        run = dict(batch=512, head_steps=500, steps=6000, head_lr=1e-3, lr=1e-3, ema=0.999)
        base = cls(**heads, **run, keep="best")
        if max(sides(size)) <= 64:
            base = replace(base, views=_toy_views(size), swap_from=0.3, swap_full=0.9)
        else:
            scaled = {224: size, 96: _part(size, 96 / 224, patch)}
            views = tuple(replace(view, size=scaled[view.size]) for view in base.views)
            base = replace(base, views=views, hidden=2048, predictor_hidden=4096, queue=65_536)
        return replace(base, **changes)

    @classmethod
    def paper(cls, name: str, *, images=IMAGENET, data2vec: bool = False, **changes) -> Recipe:
        """A published run: 20 epochs of heads, then 30 (or 20) of the encoder.

        Args:
            name: "L/16", "H/14" or "2B/14".
            images: a set, or how many; the epochs become steps with it.
            data2vec: the refined model is a data2vec 2.0: 20 epochs instead of 30.
            **changes: other values for any attribute; another batch changes the steps.

        Raises:
            ValueError: for another name, or fewer images than a batch.
        """
        if name not in _PAPER:
            raise UserError(f"no published recipe {name!r}: choose from {', '.join(_PAPER)}")
        facts = {"epochs": 30, **_PAPER[name]}
        epochs = min(facts.pop("epochs"), 20 if data2vec else 30)
        batch = changes.get("batch", facts["batch"])
        per_epoch = _count(images) // batch
        if not per_epoch:
            raise UserError(f"{_count(images)} images are fewer than one batch of {batch}")
        local = 96 if name.endswith("/16") else 98  # a multiple of the patch
        views = tuple(replace(v, size=local) if v.size == 96 else v for v in cls().views)
        facts |= _epochs(epochs, per_epoch)
        return replace(cls(views=views, **facts), **changes)

    @classmethod
    def fitted(cls, model: Encoder, images, **changes) -> Recipe:
        """The paper's recipe scaled to a model and to the images at hand.

        The rules; N images of S pixels, patch P, encoder of width D; powers of two rounded down:

        * batch: N/32 as a power of two, at most the paper's (1024, from D = 1280 on 512), so that
          an epoch has 32 steps or more. 20 epochs of heads, 30 of the encoder.
        * queue: N/4 as a power of two, at most 65,536: a sample's neighbors stay younger than a
          quarter of an epoch, as its features move on.
        * top_k: 20·√(queue/65,536), at least 1: a smaller queue holds fewer of each kind.
        * temperature: 0.2 up to D = 1024, 0.3 at 1280, 0.35 at 2560, straight lines between. The
          paper raises it with the model; no result says that it should follow N, so it does not.
        * crops: local views of 96/224·S, a multiple of P. Their share of the image starts at 0.05,
          or where a crop has 16 pixels a side, and ends at 0.25, or twice its start; there the
          global views' share begins.
        * heads: on the last third of the blocks, widths 2D, 4D, 256, at most the paper's.
        * ema: averages a quarter of stage 3, at most 0.9999.

        Args:
            model: the encoder to be refined.
            images: the set.
            **changes: other values for any attribute; another batch changes the steps.
        """
        n, width, depth = _count(images), model.embed_dim, len(model.blocks)
        size = model.refiner_card["preprocessing"]["size"]
        batch = changes.get("batch", min(_power(n / 32), 1024 if width < 1280 else 512))
        queue = min(_power(n / 4), 65_536)
        per_epoch = max(1, n // batch)
        heads = dict(hidden=min(2048, 2 * width), predictor_hidden=min(4096, 4 * width))
        heads |= dict(blocks=_last_third(depth), temperature=_temperature(width))
        run = dict(batch=batch, queue=queue, ema=min(0.9999, 1 - 4 / (30 * per_epoch)))
        run |= dict(top_k=max(1, round(20 * math.sqrt(queue / 65_536))), **_epochs(30, per_epoch))
        views = _fitted_views(size, model.patch_embed.patch_size[0])
        return replace(cls(views=views, **heads, **run), **changes)


# The last of the blocks is the final output; epochs of stage 3 where not 30.
_PAPER = {
    "L/16": {"blocks": tuple(range(17, 25)), "temperature": 0.2, "batch": 1024},
    "H/14": {"blocks": tuple(range(21, 33)), "temperature": 0.3, "batch": 512},
    "2B/14": {
        "blocks": tuple(range(17, 25)),
        "temperature": 0.35,
        "batch": 512,
        "frozen_blocks": 6,
        "epochs": 20,
    },
}


def _epochs(epochs: int, per_epoch: int) -> dict:
    """Steps and warm-up of the paper's 20 epochs of heads and so many of the encoder."""
    steps = {"head_steps": 20 * per_epoch, "steps": epochs * per_epoch}
    return steps | {"head_warmup": 4 / 20, "warmup": 4 / epochs, "decay_last": True}


def _count(images) -> int:
    return images if isinstance(images, int) else len(images)


def _power(x: float) -> int:
    """The largest power of two up to x, at least 2."""
    return 2 ** max(1, math.floor(math.log2(max(x, 1))))


def _temperature(width: int) -> float:
    """τ by the encoder's width: the paper's three models, straight lines between them."""
    for (low, a), (high, b) in (((1024, 0.2), (1280, 0.3)), ((1280, 0.3), (2560, 0.35))):
        if width <= high:
            return round(a + (b - a) * max(0, width - low) / (high - low), 3)
    return 0.35


def _part(size, share: float, patch: int = 1):
    """A share of both sides, in whole patches."""
    return as_size(*(max(patch, patch * round(side * share / patch)) for side in sides(size)))


def _toy_views(size, *, keep: float = 1.0) -> tuple[View, ...]:
    """Two large and two small views whose colours say nothing."""
    light = {"jitter": 0.95, "brightness": 0.6, "contrast": 0.6}
    colour = light | {"saturation": 0.8, "hue": 0.5, "gray": 0.4}
    large = View(size=size, scale=(0.6, 1.0), keep=keep, **colour)
    small = View(size=_part(size, 0.5), scale=(0.3, 0.6), **colour)
    return large, large, small, small


def _fitted_views(size, patch: int) -> tuple[View, ...]:
    """The paper's twelve views for images of another size (the rule of :meth:`Recipe.fitted`)."""
    low = min(0.5, max(0.05, 16**2 / math.prod(sides(size))))
    high = max(0.25, 2 * low)
    local = _part(size, 96 / 224, patch)
    one, two, small = Recipe().views[:3]
    large = {"size": size, "scale": (min(high, 0.5), 1.0)}
    small = replace(small, size=local, scale=(low, high))
    return replace(one, **large), replace(two, **large), *(small,) * 10


# ---------------------------------------------------------------- schedules


def swap_chance(recipe: Recipe, step: int) -> float:
    """Probability to swap at a step of stage 3: a ramp from ``swap_from`` to ``swap_full``.

    Where both are the same, it is 0 before and 1 from there on.
    """
    share = step / max(1, recipe.steps)
    if share >= recipe.swap_full:
        return 1.0
    if share < recipe.swap_from:
        return 0.0
    return (share - recipe.swap_from) / (recipe.swap_full - recipe.swap_from)


def head_loss_weights(recipe: Recipe, step: int) -> list[float] | None:
    """Each head's weight in the loss at a step of stage 3; None where all are 1.

    The last head always counts fully; the earlier ones are turned off along straight lines, all
    together or one by one (after the paper's ablation on scheduling the loss weights).
    """
    earlier = len(recipe.blocks) - 1
    if recipe.loss_weights == "constant" or not earlier:
        return None
    share = step / max(1, recipe.steps)
    if recipe.loss_weights == "decay":
        return [1 - share] * earlier + [1.0]
    return [min(1.0, max(0.0, t + 1 - share * earlier)) for t in range(earlier)] + [1.0]


# ---------------------------------------------------------------- as JSON


def recipe_dict(recipe: Recipe) -> dict:
    """The recipe as plain JSON types, with a mark that its blocks count from 1."""
    return json.loads(json.dumps(asdict(recipe) | {"blocks_from": 1}))


def recipe_from(values: dict) -> Recipe:
    """The recipe that :func:`recipe_dict` wrote down.

    What an older one lacks has its default; without the mark ``blocks_from``, its blocks count
    from 0 and are converted.
    """
    values = dict(values)
    if values.pop("blocks_from", 0) == 0:
        values["blocks"] = _one_higher(values.get("blocks"))
    return settings_from(Recipe, values)


def _one_higher(blocks):
    """Blocks counted from 0 as blocks counted from 1; from the end they count alike."""
    if isinstance(blocks, Integral):
        return blocks + 1 if blocks >= 0 else blocks
    return None if blocks is None else [_one_higher(b) for b in blocks]


# ---------------------------------------------------------------- checks


def complete_recipe(recipe: Recipe | None, model: Encoder, images) -> Recipe:
    """Fills in blocks, pooling and views and checks the recipe against model and data.

    Without one it is :meth:`Recipe.cpu`, for other than three channels with its views "channels".

    A single block may stand without a tuple, and whole numbers may be floats.

    Raises:
        ValueError: in one sentence, for what would fail later.
    """
    check_refinable(model)
    if recipe is None:
        recipe = Recipe.cpu() if channels_of(model) == 3 else Recipe.cpu(views="channels")
    recipe = _with_views(checked(recipe), model)
    given = _given_blocks(recipe.blocks, len(model.blocks))
    blocks = _checked_blocks(given, recipe, len(model.blocks))
    pooling = _checked_pooling(recipe.pooling, model, len(blocks))
    if isinstance(pooling, tuple):  # they move with their blocks
        pooling = tuple(p for _, p in sorted(zip(given, pooling, strict=True)))
    _check_swap(recipe)
    if recipe.cached_views and not come_again(images):
        raise UserError("features of a stream cannot be kept; leave cached_views at 0")
    pixels = some(images, recipe.batch)
    check_channels(pixels, preprocessing_card(model))
    _check_pixels(pixels)
    _check_views(recipe, model.patch_embed.patch_size[0], tuple(pixels.shape[1:]))
    if len(pixels) < recipe.batch:
        raise UserError(
            f"{len(pixels)} images are fewer than one batch of {recipe.batch}; "
            "give more images or a smaller batch"
        )
    values = pixels.shape[1] * sum(view.pixels for view in recipe.views)  # of one image's views
    check_memory(4 * recipe.batch // parallel.world() * values, "a batch's views together")
    kept = 4 * len(pixels) * len(blocks) * len(recipe.views) * model.embed_dim
    check_memory(recipe.cached_views * kept, "the features of cached views")
    return replace(recipe, blocks=blocks, pooling=pooling)


def _given_blocks(blocks, depth: int) -> tuple[int, ...]:
    """The blocks in the order given, counted from 1; by default the last third."""
    if blocks is None:
        return _last_third(depth)
    return tuple(depth + 1 + b if b < 0 else b for b in blocks)


def _last_third(depth: int) -> tuple[int, ...]:
    return tuple(range(depth - max(1, round(depth / 3)) + 1, depth + 1))


def _checked_blocks(given: tuple[int, ...], recipe: Recipe, depth: int) -> tuple[int, ...]:
    blocks = tuple(sorted(given))
    if not blocks or len(set(blocks)) < len(blocks) or blocks[0] < 1 or blocks[-1] > depth:
        raise UserError(
            f"heads on blocks {list(blocks)}: blocks count from 1, choose different blocks from 1 "
            f"to {depth}"
        )
    if blocks[0] <= recipe.frozen_blocks and recipe.steps:
        raise UserError(
            f"a head on block {blocks[0]} trains nothing when {recipe.frozen_blocks} blocks are "
            "frozen; freeze fewer blocks or move the head up"
        )
    return blocks


def _checked_pooling(pooling, model: Encoder, heads: int) -> str | tuple[str, ...]:
    has_cls = has_class_token(model)
    pooling = pooling or ("cls" if has_cls else "patch")
    each = (pooling,) if isinstance(pooling, str) else tuple(pooling)
    for one in each:
        if one == "cls" and not has_cls:
            raise UserError("this model has no class token; use the pooling 'patch'")
    if not isinstance(pooling, str) and len(each) != heads:
        raise UserError(f"{len(each)} poolings for {heads} heads: give one, or one for each block")
    return pooling if isinstance(pooling, str) else each


def _check_swap(recipe: Recipe) -> None:
    if recipe.swap_from > recipe.swap_full:
        raise UserError(
            f"swapping cannot begin at {recipe.swap_from} and be full at {recipe.swap_full}; "
            "choose a swap_from that is not above swap_full"
        )


def _with_views(recipe: Recipe, model: Encoder) -> Recipe:
    """The recipe with its views by name made for the model."""
    if recipe.views != "channels":
        return recipe
    size, patch = model.refiner_card["preprocessing"]["size"], model.patch_embed.patch_size[0]
    large = View(size=size, scale=(0.5, 1.0))
    small = View(size=_part(size, 0.5, patch), scale=(0.2, 0.5))
    return replace(recipe, views=tuple(map(by_channel, (large, large, small, small))))


def _check_views(recipe: Recipe, patch: int, shape: tuple[int, int, int]) -> None:
    channels, *size = shape
    if len(recipe.views) < 2 or not 1 <= recipe.global_views <= len(recipe.views):
        raise UserError("a recipe needs at least two views, and one to all of them global")
    for view in recipe.views:
        check_colour(view, channels)
        height, width = sides(view.size)
        if height % patch or width % patch:
            raise UserError(
                f"a view of {view.size} pixels is no multiple of the patch of {patch}; choose "
                f"{_part(view.size, 1, patch)}, or the preset fitted, which does so"
            )
        if height > size[0] or width > size[1]:
            raise UserError(
                f"images of {as_size(*size)} pixels are smaller than a view of {view.size}; "
                "load larger images or choose smaller views"
            )


def _check_pixels(pixels) -> None:
    """Numbers that are pixels, and not one image again and again."""
    if pixels.dtype != torch.uint8:
        low, high = (float(v) for v in pixels.aminmax()) if pixels.numel() else (0.0, 0.0)
        if not (0 <= low and high <= 1):  # also false for NaN
            raise UserError(
                "pixels are NaN or outside of 0 to 1; give uint8 images, or floats from 0 to 1"
            )
    some = torch.linspace(0, len(pixels) - 1, min(8, len(pixels))).long()
    sample = pixels[some]
    if len(sample) > 1 and bool((sample == sample[:1]).all()):
        raise UserError(
            "the images look all alike (eight of them are identical): there is nothing to tell "
            "apart; check the data"
        )
