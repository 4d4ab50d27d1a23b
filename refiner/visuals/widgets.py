"""Four small explorers: what a mask hides, where a head looks, what views show, whom a queue finds.

Each is a pure function that computes, one that draws, and a few controls over both. As the last
line of a cell it shows itself, and the figure as it is then stays in the stored notebook.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import replace
from html import escape

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from refiner.base.errors import UserError
from refiner.base.tensors import as_size
from refiner.images.sets import pixels_of, shown_channels
from refiner.images.views import View, make_view
from refiner.models.encoders import (
    PostNormBlock,
    prefix_tokens,
    preprocess,
    preprocessing_card,
    walk,
)
from refiner.models.mae import MaskedAutoencoder, random_masking, reconstruct
from refiner.training.heads import IDHeads, NeighborQueue
from refiner.visuals import static_copy
from refiner.visuals.explorer_page import HERE, png_address
from refiner.visuals.pictures import contact_sheet, grid_like
from refiner.visuals.style import RIGHT, WRONG, name_of

CHANCES = ("gray", "blur", "solarize")  # of a view, each with a slider from 0 to 1


class Panel:
    """Controls, by the name of the argument they set, over a function that draws.

    ``widget`` is everything together, to be put among others.
    """

    def __init__(self, draw: Callable[..., Figure], controls: dict, *, beside=None):
        import ipywidgets as w

        self.draw, self.controls, self._slow = draw, controls, False
        self._picture, self._message, self._quiet = w.Image(format="png"), w.HTML(), False
        wrap = w.Layout(flex_flow="row wrap", align_items="center")
        row = w.Box([c for c in controls.values() if c is not beside], layout=wrap)
        shown = w.Box([*([] if beside is None else [beside]), self._picture], layout=wrap)
        self.widget = w.VBox([row, self._message, shown])
        for control in controls.values():
            control.observe(self._changed, names="value")
        self._changed()

    def set(self, **values) -> Figure:
        """Sets controls by name, and draws once; a KeyError for one that is not there."""
        self._quiet = True
        try:
            for name, value in values.items():
                self.controls[name].value = value
        finally:
            self._quiet = False
        self._changed()
        return self.figure()

    def figure(self) -> Figure:
        """The present figure."""
        return self.draw(**{name: control.value for name, control in self.controls.items()})

    def _changed(self, _=None) -> None:
        if self._quiet:
            return
        began = time.monotonic()
        if self._slow:  # as the last drawing was
            self._message.value = '<span role="status">working …</span>'
        try:
            drawn = self.figure()
        except Exception as error:  # shown where the user looks, and passed on
            words = f"{type(error).__name__}: {escape(str(error))}"
            self._message.value = f'<b role="alert">{words}</b>'
            raise
        self._message.value = ""
        file = io.BytesIO()
        drawn.savefig(file, format="png", dpi=80)
        plt.close(drawn)
        self._picture.value = file.getvalue()
        self._slow = time.monotonic() - began > 0.5

    def _ipython_display_(self) -> None:
        static_copy.show(self.widget, self.figure())


def _slider(label: str, value, low, high, step=1):
    import ipywidgets as w

    kind = w.IntSlider if isinstance(step, int) else w.FloatSlider
    look = {"description": label, "style": {"description_width": "initial"}}
    return kind(value, min=low, max=high, step=step, continuous_update=False, **look)


def _image_slider(images):
    return _slider("image", 0, 0, len(images) - 1)


# ---------------------------------------------------------------- masks


def paint(mae: MaskedAutoencoder, image: Tensor, hidden: Tensor) -> dict[str, Tensor]:
    """Lets an autoencoder paint chosen patches of one image.

    Args:
        mae: in eval mode, on any device.
        image: uint8 [C, H, W].
        hidden: bool [N], row by row; at least one patch hidden and one visible.

    Returns:
        ``original``, ``masked`` and ``painted``, float [C, H, W] in 0…1; ``error``, the mean
        squared error over hidden patches in the units of the target, a scalar.
    """
    hidden = torch.as_tensor(hidden, dtype=torch.bool).cpu()
    if hidden.shape != (mae.patches,):
        raise UserError(f"hidden must be bool [{mae.patches}], not {list(hidden.shape)}")
    if hidden.all() or not hidden.any():
        raise UserError("hide at least one patch and leave at least one visible")
    found = reconstruct(mae, image[None], mask=hidden[None])
    shown = {name: found[name][0] for name in ("original", "masked", "painted")}
    return shown | {"error": found["loss"]}


def mask_explorer(mae: MaskedAutoencoder, images, *, ratio: float = 0.75, seed: int = 0) -> Panel:
    """Choose a share of patches to hide, or hide and show patches one by one, and see the painting.

    Args:
        mae: of :func:`refiner.models.mae.load_mae`.
        images: an ImageSet or uint8 [N, C, H, W].
        ratio, seed: share of hidden patches, and the random mask, at the start.

    Returns:
        A :class:`Panel` with the controls ``image``, ``ratio``, ``seed`` and ``hidden``, a bool for
        each patch, by a click on the image; ``ratio`` and ``seed`` draw a new mask.
    """
    pixels = pixels_of(images)
    n = mae.patches

    def mask(ratio, seed):
        hidden = random_masking(1, n, ratio, torch.Generator().manual_seed(seed))[1][0]
        hidden[0] |= not hidden.any()
        return hidden

    shown = _image_slider(pixels)
    patches = _board("Patches to hide", mask(ratio, seed).tolist(), shown, pixels)
    controls = {
        "image": shown,
        "ratio": _slider("hidden share", ratio, 0.05, 0.95, 0.05),
        "seed": _slider("Random mask no.", seed, 0, 99),
        "hidden": patches,
    }

    def redraw(_):
        patches.value = mask(controls["ratio"].value, controls["seed"].value).tolist()

    for name in ("ratio", "seed"):
        controls[name].observe(redraw, names="value")

    def draw(image, ratio, seed, hidden):
        found = paint(mae, pixels[int(image)], torch.tensor(hidden))
        title = f"{sum(hidden)} of {n} patches hidden: error {found['error'].item():.3f}"
        drawn, axes = plt.subplots(1, 3, figsize=(8, 3), layout="constrained")
        for ax, name in zip(axes, ("original", "masked", "painted"), strict=True):
            _show(ax, found[name], name, size=11)
        drawn.suptitle(title)
        drawn.set_label(f"An image, what the autoencoder saw of it, and what it painted; {title}")
        return drawn

    return Panel(draw, controls, beside=patches)


def _board(label: str, value: list[bool], image, pixels, *, alone: bool = False):
    """The image that a slider shows, whose patches can be pressed; ``value`` is a list of bool.

    Args:
        label: for those who cannot see it.
        value: which patches are pressed, row by row of a square.
        image: the slider.
        pixels: uint8 [N, C, H, W].
        alone: at most one patch is pressed.
    """
    import anywidget
    import traitlets

    if pixels.shape[-2] != pixels.shape[-1]:
        raise UserError("patches are pressed on square images; mae.reconstruct takes any others")

    picture = lambda: png_address(pixels[int(image.value)])  # noqa: E731

    class Board(anywidget.AnyWidget):
        _esm = HERE / "patches.js"
        value = traitlets.List().tag(sync=True)
        side = traitlets.Int().tag(sync=True)
        picture = traitlets.Unicode().tag(sync=True)
        label = traitlets.Unicode().tag(sync=True)
        alone = traitlets.Bool().tag(sync=True)

    side = round(len(value) ** 0.5)
    board = Board(value=value, side=side, picture=picture(), label=label, alone=alone)
    image.observe(lambda _: setattr(board, "picture", picture()), "value")
    return board


# ---------------------------------------------------------------- attention


@torch.no_grad()
def attention_maps(model: VisionTransformer, image: Tensor) -> Tensor:
    """Where every head of every block looks, for one image.

    Args:
        model: a timm VisionTransformer, in eval mode.
        image: uint8 [C, H, W].

    Returns:
        float32 [L, A, T, T]: the weight with which a token (row) reads another (column); rows add
        up to 1. Prefix tokens first, then patches row by row.
    """
    if not isinstance(model, VisionTransformer):
        raise UserError(f"attention is read from a VisionTransformer, not {type(model).__name__}")
    image = image[None].to(next(model.parameters()).device)
    pixels, maps = preprocess(image, preprocessing_card(model)), []
    for number, x_BTD in walk(model, pixels, top=len(model.blocks) - 1):
        block = model.blocks[number]  # the one that these tokens enter
        inside = x_BTD if isinstance(block, PostNormBlock) else block.norm1(x_BTD)
        maps.append(_weights(block.attn, inside)[0])
    return torch.stack(maps)


def _weights(attn, x_BTD: Tensor) -> Tensor:
    """Attention weights [B, A, T, T] of timm's Attention."""
    b, t, _ = x_BTD.shape
    q, k, _ = attn.qkv(x_BTD).reshape(b, t, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    return (q * attn.scale @ k.mT).softmax(-1)


def attention_figure(image: Tensor, maps_AT: Tensor, *, prefix: int, title: str = "") -> Figure:
    """One token's attention, a panel a head, beside the image.

    Args:
        image: uint8 [C, H, W].
        maps_AT: [A, T], weights by token.
        prefix: how many tokens stand before the patches.
    """
    patches_AN = maps_AT[:, prefix:].cpu()
    grid = grid_like(image.shape[-2:], patches_AN.shape[1])
    heads = len(maps_AT)
    size = (2.2 * (1 + heads) + 0.8, 2.7)
    drawn, axes = plt.subplots(1, 1 + heads, figsize=size, layout="constrained")
    axes[0].imshow(_picture(image))
    axes[0].set_title("image", fontsize=10)
    look = {"cmap": "cividis", "vmin": 0, "vmax": float(patches_AN.max())}
    for head, ax in enumerate(axes[1:]):
        shown = ax.imshow(patches_AN[head].reshape(grid).numpy(), **look)
        kept = float(patches_AN[head].sum())
        ax.set_title(f"head {head + 1}: {kept:.0%} on patches", fontsize=10)
    for ax in axes:
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
    drawn.colorbar(shown, ax=list(axes[1:]), label="weight", shrink=0.8)
    drawn.suptitle(title)
    drawn.set_label(f"An image, and beside it where each of {heads} attention heads looks")
    return drawn


def attention_explorer(model: VisionTransformer, images, *, block: int | None = None) -> Panel:
    """Move through images and blocks, and see where every head looks.

    Args:
        model: a timm VisionTransformer, in eval mode.
        images: an ImageSet or uint8 [N, C, H, W].
        block: shown first, counted from 1; default the last.

    Returns:
        A :class:`Panel` with the controls ``image``, ``block`` and ``token`` ("class token" where
        there is one, "mean of all patches", or a patch's position, by a click on the image).
    """
    import ipywidgets as w

    pixels = pixels_of(images)
    prefix, depth = prefix_tokens(model), len(model.blocks)
    n = attention_maps(model, pixels[0]).shape[-1] - prefix
    tokens = ([("class token", "cls")] if prefix else []) + [("mean of all patches", "mean")]
    tokens += [(f"patch {i}", i) for i in range(n)]
    controls = {
        "image": _image_slider(pixels),
        "block": _slider("block", block or depth, 1, depth),
        "token": w.Dropdown(options=tokens, description="from"),
    }
    board = _board("Patch that asks", [False] * n, controls["image"], pixels, alone=True)

    def asks(change):
        if any(change["new"]):
            controls["token"].value = change["new"].index(True)
        elif isinstance(controls["token"].value, int):  # pressed a second time
            controls["token"].value = tokens[0][1]

    def asked(change):
        board.value = [i == change["new"] for i in range(n)]

    board.observe(asks, "value")
    controls["token"].observe(asked, "value")
    known: dict[int, Tensor] = {}

    def draw(image, block, token):
        if image not in known:
            known.clear()
            known[image] = attention_maps(model, pixels[int(image)])
        maps_ATT = known[image][block - 1]
        rows = {"cls": slice(1), "mean": slice(prefix, None)}
        some = rows[token] if token in rows else slice(prefix + token, prefix + token + 1)
        maps_AT = maps_ATT[:, some].mean(1)
        name = next(label for label, value in tokens if value == token)
        title = f"block {block}, from the {name}"
        return attention_figure(pixels[int(image)], maps_AT, prefix=prefix, title=title)

    return Panel(draw, controls, beside=board)


# ---------------------------------------------------------------- views


def augmented(image: Tensor, view: View, n: int = 12, *, seed: int = 0) -> Tensor:
    """The image itself, then n random views of it: float [1 + n, C, S, S] in 0…1.

    Args:
        image: uint8 [C, H, W]; the first of the result, resized to S.
        view: how views are made; S is its size.
    """
    batch = image[None].expand(n, -1, -1, -1)
    views = make_view(batch, view, torch.Generator().manual_seed(seed))
    how = {"mode": "bilinear", "antialias": True}
    own = F.interpolate(image[None].float() / 255, views.shape[-2:], **how)
    return torch.cat([own.clamp(0, 1), views])


def view_explorer(images, view: View | None = None, *, n: int = 15, seed: int = 0) -> Panel:
    """Turn the strengths of an augmentation, and see what is left of an image.

    Args:
        images: an ImageSet or uint8 [N, C, H, W].
        view: what is shown first; default the cpu preset's first view.
        n: views shown.

    Returns:
        A :class:`Panel` with the controls ``image``, ``scale`` (a pair), ``strength`` (brightness,
        contrast and saturation), ``hue``, ``gray``, ``blur``, ``solarize`` and ``seed``.
    """
    import ipywidgets as w

    from refiner.training.recipe import Recipe

    pixels = pixels_of(images)
    view = view or Recipe.cpu(size=as_size(*pixels.shape[-2:])).views[0]
    look = {"description": "crop's area", "continuous_update": False}
    controls = {
        "image": _image_slider(pixels),
        "scale": w.FloatRangeSlider(value=view.scale, min=0.02, max=1, step=0.02, **look),
        "strength": _slider("colour jitter", max(view.brightness, view.contrast), 0.0, 1.0, 0.05),
        "hue": _slider("Hue shift (turns)", view.hue, 0.0, 0.5, 0.05),
        **{name: _slider(name, getattr(view, name), 0.0, 1.0, 0.05) for name in CHANCES},
        "seed": _slider("draw", seed, 0, 99),
    }

    def draw(image, scale, strength, seed, **others):
        colours = dict.fromkeys(("brightness", "contrast", "saturation"), strength)
        now = replace(view, scale=tuple(scale), **colours, **others)
        some = augmented(pixels[int(image)], now, n, seed=seed)
        title = "The image, then random views of it"
        drawn = contact_sheet(some, columns=8, title=title).figure
        drawn.set_label(f"An image and {n} random views of it, in other colours and crops")
        return drawn

    return Panel(draw, controls)


# ---------------------------------------------------------------- the queue


@torch.no_grad()
def project(
    model, heads: IDHeads, recipe, images: Tensor, *, view: View | None = None, seed: int = 0
) -> Tensor:
    """Projections of images, or of one random view of each: float32 [L, B, O] of L heads.

    Args:
        model, heads, recipe: a refined encoder, and what :func:`refiner.load_heads` gives.
        images: uint8 [B, C, H, W].
        view: how to augment; None takes the images as they are.
    """
    from refiner.models.encoders import head_features

    if view is not None:
        made = make_view(images, view, torch.Generator().manual_seed(seed))
        images = (255 * made).round().to(torch.uint8)
    x = preprocess(images.to(next(model.parameters()).device), preprocessing_card(model))
    pooling = recipe.pooling or "cls"
    pooled = [head_features(model, part, recipe.blocks, pooling=pooling) for part in x.split(256)]
    pooled_LBD = torch.cat(pooled, dim=1).to(next(heads.parameters()).device)
    return heads(pooled_LBD[:, None])[0][:, 0].to(images.device)


def queue_candidates(
    queue: NeighborQueue, z_LO: Tensor, own_id: int, *, k: int = 20, head: int = -1, seed: int = 0
) -> dict[str, Tensor]:
    """A query's nearest entries in the queue, and the one that a lookup draws among them.

    Args:
        queue: filled.
        z_LO: the query's projections, [L, O].
        own_id: the query's sample, which is never found.
        k: candidates.
        head: whose projection is compared.
        seed: of the draw.

    Returns:
        ``ids`` int64 [≤k] of the candidates' samples, nearest first; ``similarities`` [≤k];
        ``drawn``, the position among them of the one that :meth:`NeighborQueue.lookup` returns.
    """
    vectors_QO = queue.vectors[head]
    similarity_Q = vectors_QO @ F.normalize(z_LO[head], dim=-1)
    similarity_Q = similarity_Q.masked_fill((queue.ids == own_id) | (queue.ids < 0), -torch.inf)
    usable = int(similarity_Q.isfinite().sum())
    if not usable:
        raise UserError("the queue holds no other sample: push some first")
    values, where = similarity_Q.topk(min(k, usable))
    generator = torch.Generator().manual_seed(seed)
    found = queue.lookup(z_LO[:, None], torch.tensor([own_id]), k, generator)
    drawn = (where == found.positions[head, 0]).nonzero()[0, 0]
    return {"ids": queue.ids[where], "similarities": values, "drawn": drawn}


def queue_explorer(model, heads: IDHeads, recipe, images, *, k: int = 20, seed: int = 0) -> Panel:
    """Fill a queue with views of images, and see whom another view of an image finds in it.

    Args:
        model, heads, recipe: a refined encoder, and what :func:`refiner.load_heads` gives.
        images: an ImageSet or uint8 [N, C, H, W]; a view of each is put into the queue.
        k: candidates at the start; the paper draws among 20.

    Returns:
        A :class:`Panel` with the controls ``image``, ``k``, ``block`` (that of the head, counted
        from 1) and ``seed``.
    """
    import ipywidgets as w

    pixels = pixels_of(images)
    labels, classes = getattr(images, "labels", None), getattr(images, "classes", None)
    view, n = replace(recipe.views[0], keep=1.0), len(pixels)
    width = heads.predictor[0].weight.shape[1]  # of the projections
    queue = NeighborQueue(n, width, heads=len(recipe.blocks))
    queue.push(project(model, heads, recipe, pixels[:], view=view, seed=seed), torch.arange(n))
    blocks = [(f"block {number}", number) for number in recipe.blocks]
    controls = {
        "image": _image_slider(pixels),
        "k": _slider("candidates", min(k, n - 1), 1, min(40, n - 1)),
        "block": w.Dropdown(options=blocks, value=recipe.blocks[-1], description="head of"),
        "seed": _slider("draw", seed, 0, 99),
    }

    def draw(image, k, block, seed):
        query = pixels[int(image)][None]
        z_LO = project(model, heads, recipe, query, view=view, seed=seed + 1)[:, 0]
        head = recipe.blocks.index(block)
        found = queue_candidates(queue, z_LO, int(image), k=k, head=head, seed=seed)
        return _queue_figure(pixels, int(image), found, labels, classes, f"block {block}")

    return Panel(draw, controls)


def _queue_figure(pixels, image: int, found, labels, classes, name: str) -> Figure:
    drawn, ids, columns = int(found["drawn"]), found["ids"], 10
    rows = 1 + -(-len(ids) // columns)
    size = (11, 1.35 * rows + 0.5)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    _show(axes[0, 0], pixels[image], f"query\n{_label(image, labels, classes)}")
    right = None if labels is None else int((labels[ids] == labels[image]).sum())
    for place, (i, similarity) in enumerate(zip(ids.tolist(), found["similarities"], strict=True)):
        ax = axes[1 + place // columns, place % columns]
        same = None if labels is None else bool(labels[i] == labels[image])
        mark = "" if same is None else (" ✓" if same else " ✗")
        colour = "black" if same is None else (RIGHT if same else WRONG)
        star = "★ drawn\n" if place == drawn else ""
        text = f"{star}{_label(i, labels, classes)}{mark} {similarity:.2f}"
        _show(ax, pixels[i], text, colour=colour, frame=place == drawn)
    about = "" if right is None else f", {right} of its class"
    figure.suptitle(f"{name}: the {len(ids)} nearest in the queue{about}")
    words = f"A query image and the images whose views are nearest, number {drawn + 1} drawn"
    figure.set_label(words)
    return figure


def _label(i: int, labels, classes) -> str:
    return str(i) if labels is None else name_of(int(labels[i]), classes)


def _picture(image: Tensor) -> np.ndarray:
    """An image [C, H, W] as [H, W, 3]."""
    return shown_channels(image[None])[0].permute(1, 2, 0).cpu().numpy()


def _show(ax, picture: Tensor, text: str, *, colour="black", frame=False, size=8) -> None:
    ax.set_axis_on()
    ax.imshow(_picture(picture))
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.set_title(text, fontsize=size, color=colour)
    ax.spines[:].set_visible(True)
    ax.spines[:].set(color=colour if frame else "none", linewidth=4)
