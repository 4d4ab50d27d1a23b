"""MIM-Refiner: turn a masked-image model into one whose last blocks know what they see.

Alkin et al. 2025, arXiv 2402.10093. Instance-discrimination heads are attached to several late
blocks. Stage 2 trains the heads on the frozen encoder (stage 1 was the masked pretraining);
stage 3 trains the encoder with them. Views → blocks → heads → NNA loss; the queue feeds neighbors.

Shape legend: T heads, V views, G global views, B samples, N tokens, D encoder width, O output
width.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.optim import param_groups_layer_decay
from torch import nn
from tqdm.auto import tqdm

from refiner.encoders import (
    Encoder,
    check_refinable,
    embed,
    final_features,
    has_class_token,
    keep_patches,
    pool,
    prefix_tokens,
    run_block,
)
from refiner.files import write_json
from refiner.heads import IDHeads, NeighborQueue, nna_loss
from refiner.models import (
    allow_any_size,
    copy_model,
    data_folder,
    read_checkpoint,
    save_model,
)
from refiner.training import (
    EMA,
    autocast,
    batch_indices,
    cosine_schedule,
    load_state,
    machine,
    save_state,
    step_generator,
    take,
)
from refiner.views import View, make_views

Tensor = torch.Tensor


# ---------------------------------------------------------------- the recipe


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a refinement. Defaults follow the paper; presets adapt them.

    Attributes:
        blocks: which blocks get a head, counted from 0; None is the last third. The last block's
            head reads the encoder's output, after the final norm.
        pooling: "cls", "patch" (mean), or None for the class token where there is one.
        hidden, predictor_hidden, out: widths of the heads, see :class:`refiner.heads.IDHeads`.
        views: the random views of each image; the first ``global_views`` are targets too.
        batch: images a step.
        head_steps: steps of stage 2 (heads only).
        steps: steps of stage 3 (encoder and heads).
        head_lr, lr: peak learning rates of the two stages for a batch of 256; scaled linearly.
        layer_decay: factor on the learning rate from each block to the one before it.
        weight_decay, head_weight_decay: of the encoder's and the heads' matrices in stage 3.
        warmup: share of each stage's steps.
        frozen_blocks: this many first blocks, and the embedding, are not trained.
        temperature: τ of the NNA loss.
        queue: entries of the neighbor queue.
        top_k: stage 3 draws among this many nearest; stage 2 takes the nearest.
        swap: "neighbor" (NNA), "both" (NNCLR's swap of positives and negatives) or "none".
        swap_from, swap_full: shares of stage 3 between which the chance to swap grows from 0 to
            1. Neighbors are only useful once they are mostly right; (0, 0) swaps from the start.
        ema: decay of the averaged encoder that is returned.
        clip: largest gradient norm, None for no limit.
        seed: of heads, batches, views and draws.
    """

    blocks: tuple[int, ...] | None = None
    pooling: str | None = None
    hidden: int = 2048
    predictor_hidden: int = 4096
    out: int = 256
    views: tuple[View, ...] = (
        View(blur=1.0),
        View(blur=0.1, solarize=0.2),
        *(View(size=96, scale=(0.05, 0.25), blur=0.5) for _ in range(10)),
    )
    global_views: int = 2
    batch: int = 1024
    head_steps: int = 25_000
    steps: int = 37_500
    head_lr: float = 2e-4
    lr: float = 4e-4
    layer_decay: float = 0.65
    weight_decay: float = 0.05
    head_weight_decay: float = 1e-5
    warmup: float = 0.15
    frozen_blocks: int = 0
    temperature: float = 0.2
    queue: int = 65_536
    top_k: int = 20
    swap: str = "neighbor"
    swap_from: float = 0.0
    swap_full: float = 0.0
    ema: float = 0.9999
    clip: float | None = None
    seed: int = 0

    @classmethod
    def cpu(cls, *, size: int = 32, **changes) -> Recipe:
        """About three minutes on two cores: small crops, few steps, first half frozen.

        Toys are told apart by shape, so the views change every colour and crop gently. Half of a
        large view's patches are dropped, which the paper does not do: it saves time, and a masked
        autoencoder is used to it.

        Args:
            size: the model's image size; the small views have half of it.
            **changes: other values for any attribute.
        """
        base = cls(
            blocks=(8, 9, 10, 11), hidden=256, predictor_hidden=512, out=128,
            views=_toy_views(size, keep=0.5), batch=128, head_steps=20, steps=160, head_lr=4e-3,
            lr=6e-3, layer_decay=0.75, frozen_blocks=6, queue=4096, top_k=5, ema=0.98, warmup=0.1,
            swap_from=0.3, swap_full=0.9,
        )  # fmt: skip
        return replace(base, **changes)

    @classmethod
    def gpu(cls, *, size: int = 32, **changes) -> Recipe:
        """The full run on one GPU; up to 64 pixels the cpu preset's views, above the paper's.

        Not yet run on a GPU: the numbers are the paper's, scaled to one card by its own rules.

        Args:
            size: the model's image size.
            **changes: other values for any attribute.
        """
        base = cls(hidden=1024, predictor_hidden=2048, batch=512, head_steps=500, steps=6000,
                   head_lr=1e-3, lr=1e-3, queue=8192, ema=0.999)  # fmt: skip
        if size <= 64:
            base = replace(base, views=_toy_views(size), swap_from=0.3, swap_full=0.9)
        else:
            scaled = {224: size, 96: 16 * round(size * 96 / 224 / 16)}
            views = tuple(replace(view, size=scaled[view.size]) for view in base.views)
            base = replace(base, views=views, hidden=2048, predictor_hidden=4096, queue=65_536)
        return replace(base, **changes)


def _toy_views(size: int, *, keep: float = 1.0) -> tuple[View, ...]:
    """Two large and two small views whose colours say nothing."""
    colour = {"jitter": 0.95, "brightness": 0.6, "contrast": 0.6, "saturation": 0.8, "hue": 0.5,
              "gray": 0.4}  # fmt: skip
    large = View(size=size, scale=(0.6, 1.0), keep=keep, **colour)
    small = View(size=size // 2, scale=(0.3, 0.6), **colour)
    return large, large, small, small


# ---------------------------------------------------------------- features of the views


def head_features(model: Encoder, x_BCHW: Tensor, blocks: tuple[int, ...], *,
                  pooling: str = "cls", keep: float = 1.0, frozen_blocks: int = 0,
                  generator: torch.Generator | None = None) -> Tensor:  # fmt: skip
    """Pooled output of the chosen blocks, [T, B, D], in one pass.

    Args:
        model: an encoder that takes any size (:func:`refiner.models.allow_any_size`).
        x_BCHW: normalised views of one size.
        blocks: indices from 0, ascending; the last block's is read after the final norm.
        pooling: "cls" or "patch".
        keep: share of patches that stay; the rest are dropped at random, per sample.
        frozen_blocks: the embedding and this many blocks run without gradient.
        generator: for the drop, on the CPU.
    """
    frozen = torch.no_grad() if frozen_blocks else nullcontext()
    with frozen:
        x_BND, context = embed(model, x_BCHW)
        if keep < 1:
            kept_BK = _draw_patches(x_BND, prefix_tokens(model), keep, generator)
            x_BND, context = keep_patches(model, x_BND, context, kept_BK)
    pooled = []
    last = len(model.blocks) - 1
    for i, block in enumerate(model.blocks[: max(blocks) + 1]):
        with torch.no_grad() if i < frozen_blocks else nullcontext():
            x_BND = run_block(block, x_BND, context)
        if i in blocks:
            take_out = final_features if i == last else pool
            pooled.append(take_out(model, x_BND, pooling))
    return torch.stack(pooled)


def _draw_patches(x_BND: Tensor, prefix: int, keep: float, generator) -> Tensor:
    """Random patches that stay, int64 [B, K] on the tokens' device."""
    b, n = len(x_BND), x_BND.shape[1] - prefix
    count = max(1, round(n * keep))
    order_BN = torch.rand(b, n, generator=generator).argsort(dim=1)[:, :count]
    return order_BN.to(x_BND.device)


def view_features(
    model: Encoder,
    views: list[Tensor],
    recipe: Recipe,
    *,
    frozen_blocks: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Features of all views, [T, V, B, D]; views of one size share a forward pass."""
    groups: dict[tuple[int, float], list[int]] = {}
    for position, spec in enumerate(recipe.views):
        groups.setdefault((spec.size, spec.keep), []).append(position)
    features: list[Tensor] = [torch.empty(0)] * len(views)
    for (_, keep), members in groups.items():
        batch = torch.cat([views[m] for m in members])
        out_TMD = head_features(
            model, batch, recipe.blocks, pooling=recipe.pooling, keep=keep,
            frozen_blocks=frozen_blocks, generator=generator,
        )  # fmt: skip
        for member, chunk in zip(members, out_TMD.chunk(len(members), dim=1), strict=True):
            features[member] = chunk
    return torch.stack(features, dim=1)


# ---------------------------------------------------------------- one step


@dataclass
class Step:
    """Loss and observations of one step: all [T] tensors on the device."""

    loss: Tensor
    similarity: Tensor
    neighbor_accuracy: Tensor | None


def refine_step(model, heads: IDHeads, queue: NeighborQueue, pixels: Tensor, ids: Tensor,
                recipe: Recipe, *, stage: int, swap_chance: float, generator: torch.Generator,
                labels: Tensor | None = None) -> Step:  # fmt: skip
    """Views → features → heads → neighbors → NNA loss of one batch; fills the queue.

    Args:
        pixels: uint8 [B, 3, H, W] on the device.
        ids: int64 [B] sample ids on the device.
        stage: 2 keeps the encoder out of the graph.
        swap_chance: probability that a sample's target is swapped for its neighbor.
        labels: int64 [all samples] on the device; only watched, never learned from.
    """
    pre = model.refiner_card["preprocessing"]
    mean, std = (torch.tensor(pre[k], device=pixels.device)[:, None, None] for k in ("mean", "std"))
    views = [(v - mean) / std for v in make_views(pixels, recipe.views, generator)]
    frozen = recipe.frozen_blocks if stage == 3 else len(model.blocks)
    with torch.no_grad() if stage == 2 else nullcontext():
        x_TVBD = view_features(model, views, recipe, frozen_blocks=frozen, generator=generator)
    z_TVBO, p_TVBO = heads(x_TVBD)

    t, _, b, o = z_TVBO.shape
    g = recipe.global_views
    targets = z_TVBO[:, :g].detach().float()
    found = queue.lookup(
        targets.reshape(t, g * b, o), ids, k=1 if stage == 2 else recipe.top_k,
        generator=generator if pixels.device.type == "cpu" else None,
    )  # fmt: skip
    neighbors = found.vectors.reshape(t, g, b, o)
    if recipe.swap == "none":
        swap_chance = 0.0
    if swap_chance < 1:
        swapped = torch.rand(1, g, b, 1, generator=generator).to(targets.device) < swap_chance
        neighbors = torch.where(swapped, neighbors, targets)
    loss_T = nna_loss(
        p_TVBO.float(), targets, neighbors, temperature=recipe.temperature, per_head=True,
        swap_negatives=neighbors if recipe.swap == "both" else None,
    )  # fmt: skip
    accuracy = None
    if labels is not None:
        same = labels[queue.ids[found.positions]] == labels[ids].repeat(g)
        accuracy = (same & (found.positions >= 0)).float().mean(dim=1)
    queue.push(targets[:, 0], ids)
    return Step(loss_T, found.similarity.mean(dim=1), accuracy)


def swap_chance(recipe: Recipe, step: int) -> float:
    """Probability to swap at a step of stage 3: a ramp from ``swap_from`` to ``swap_full``."""
    share = step / max(1, recipe.steps)
    if share >= recipe.swap_full:
        return 1.0
    return max(0.0, (share - recipe.swap_from) / (recipe.swap_full - recipe.swap_from))


# ---------------------------------------------------------------- the two stages


@dataclass
class Refined:
    """What :func:`refine` returns.

    Attributes:
        model: the refined encoder (averaged weights), eval mode; the input model is untouched.
        heads: the trained heads.
        queue: the neighbor queue as it was at the end.
        history: one dict per logged step: stage, step, loss and similarity per head,
            neighbor_accuracy per head (None without labels), lr, seconds, and what ``evaluate``
            returned.
        recipe: with blocks and pooling filled in.
    """

    model: Encoder
    heads: IDHeads
    queue: NeighborQueue
    recipe: Recipe
    history: list[dict] = field(default_factory=list)


def refine(
    model: Encoder,
    images,
    *,
    recipe: Recipe | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    evaluate: Callable[[Encoder], dict] | None = None,
    evaluate_every: int = 0,
    save_every: int = 100,
    log_every: int = 10,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Refined:
    """Refines a masked-image model with ID heads and Nearest Neighbor Alignment.

    Args:
        model: an encoder with a ``refiner_card`` (any but a Hiera); it is copied, not changed.
        images: an ImageSet or uint8 [N, 3, H, W]. Labels are only used to watch the neighbors.
        recipe: default :meth:`Recipe.cpu`.
        out: folder for the refined model, heads, ``history.json`` and the training state.
        resume: go on from the state in ``out``.
        evaluate: called with the averaged encoder; its dict of numbers goes into the history.
        evaluate_every: steps of stage 3 between evaluations; 0 evaluates never.
        save_every, log_every: steps.
        device: default CUDA if there is one, else CPU.
        progress: show a bar with the loss, the neighbors' accuracy and the remaining time.

    Returns:
        A :class:`Refined`.

    Raises:
        ValueError: for data or recipes that do not fit, before training starts.
        FloatingPointError: when the loss is no longer finite; the last saved state is kept.
    """
    recipe = complete_recipe(recipe or Recipe.cpu(), model, images)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    student = allow_any_size(copy_model(model)).to(device).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        heads = IDHeads(
            len(recipe.blocks), student.embed_dim, hidden=recipe.hidden,
            predictor_hidden=recipe.predictor_hidden, out=recipe.out,
        ).to(device).train()  # fmt: skip
    queue = NeighborQueue(recipe.queue, recipe.out, heads=len(recipe.blocks)).to(device)
    run = Refined(student, heads, queue, recipe)
    trainer = _Trainer(run, images, out, evaluate, evaluate_every, save_every, log_every, device)
    if resume:
        trainer.restore()
    total = recipe.head_steps + recipe.steps
    with tqdm(total=total, initial=trainer.done, desc="refining", unit="step",
              disable=not progress, mininterval=1.0) as bar:  # fmt: skip
        trainer.run_stage(2, bar)
        trainer.run_stage(3, bar)
    trainer.ema.copy_to(student)
    student.eval()
    if out:
        save_refined(run, Path(out), model)
    return run


class _Trainer:
    """The loop's state: what one step hands to the next, and what a checkpoint holds."""

    def __init__(self, run, images, out, evaluate, evaluate_every, save_every, log_every, device):
        self.run, self.out = run, Path(out) if out else None
        self.evaluate, self.evaluate_every = evaluate, evaluate_every
        self.save_every, self.log_every, self.device = save_every, log_every, device
        pixels = getattr(images, "images", images)
        self.pixels = pixels.to(device) if isinstance(pixels, Tensor) else pixels
        labels = getattr(images, "labels", None)
        self.labels = None if labels is None else labels.to(device)
        self.ema = EMA(run.model, run.recipe.ema)
        self.done, self.before, self.began = 0, 0.0, time.monotonic()
        self.optimizers = {2: _head_optimizer(run), 3: _full_optimizer(run)}

    def run_stage(self, stage: int, bar) -> None:
        recipe = self.run.recipe
        first = 0 if stage == 2 else recipe.head_steps
        steps = recipe.head_steps if stage == 2 else recipe.steps
        for step in range(max(self.done - first, 0), steps):
            self.one_step(stage, step, steps, bar)
            self.done = first + step + 1
            bar.update()
            if self.out and (self.done % self.save_every == 0):
                self.save()

    def one_step(self, stage: int, step: int, steps: int, bar) -> None:
        run, recipe = self.run, self.run.recipe
        run.model.train(stage == 3)
        optimizer = self.optimizers[stage]
        scale = recipe.batch / 256
        peak = (recipe.head_lr if stage == 2 else recipe.lr) * scale
        lr = cosine_schedule(step, total=steps, warmup=int(recipe.warmup * steps), peak=peak)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        index = batch_indices(len(self.pixels), recipe.batch, seed=recipe.seed, step=self.done)
        chance = 1.0 if stage == 2 else swap_chance(recipe, step)
        with autocast(self.device):
            result = refine_step(
                run.model, run.heads, run.queue, take(self.pixels, index, self.device),
                index.to(self.device), recipe, stage=stage, swap_chance=chance,
                generator=step_generator(recipe.seed, self.done), labels=self.labels,
            )  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        result.loss.sum().backward()
        if recipe.clip:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimizer.step()
        if stage == 3:
            self.ema.update(run.model)
        last = step + 1 == steps
        if (step + 1) % self.log_every == 0 or last:
            self.log(result, stage, step + 1, lr, bar)
        if self.evaluate_every and stage == 3 and ((step + 1) % self.evaluate_every == 0 or last):
            run.history[-1] |= self.evaluate_average()

    def log(self, result: Step, stage: int, step: int, lr: float, bar) -> None:
        loss = result.loss.detach()
        if not bool(loss.isfinite().all()):
            raise FloatingPointError(
                f"the loss is not finite at stage {stage}, step {step}; try a lower learning rate. "
                + (f"The last good state is in {self.out}." if self.out else "")
            )
        accuracy = result.neighbor_accuracy
        entry = {
            "stage": stage,
            "step": step,
            "loss": loss.tolist(),
            "similarity": result.similarity.tolist(),
            "neighbor_accuracy": None if accuracy is None else accuracy.tolist(),
            "lr": lr,
            "seconds": round(self.before + time.monotonic() - self.began, 1),
        }
        self.run.history.append(entry)
        shown = {"stage": stage, "loss": f"{loss.mean():.3f}"}
        if accuracy is not None:
            shown["neighbors right"] = f"{accuracy[-1]:.0%}"
        bar.set_postfix(shown)

    def evaluate_average(self) -> dict:
        """Runs the user's evaluation on the averaged weights, then puts the trained ones back."""
        model = self.run.model
        trained = {k: v.clone() for k, v in model.state_dict().items()}
        self.ema.copy_to(model)
        model.eval()
        result = self.evaluate(model)
        model.load_state_dict(trained)
        return result

    def save(self) -> None:
        run = self.run
        save_state(
            self.out / "state.pt",
            {
                "done": self.done,
                "recipe": recipe_dict(run.recipe),
                "model": run.model.state_dict(),
                "heads": run.heads.state_dict(),
                "queue": run.queue.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizers": {str(s): o.state_dict() for s, o in self.optimizers.items()},
                "history": run.history,
            },
        )

    def restore(self) -> None:
        run = self.run
        state = load_state((self.out or Path(".")) / "state.pt")
        if state["recipe"] != recipe_dict(run.recipe):
            raise ValueError(
                f"cannot resume {self.out}: its recipe is another one; use the same settings, "
                "or start again without --resume"
            )
        run.model.load_state_dict(state["model"])
        run.heads.load_state_dict(state["heads"])
        run.queue.load_state_dict(state["queue"])
        self.ema.load_state_dict(state["ema"])
        self.ema.shadow = {k: v.to(self.device) for k, v in self.ema.shadow.items()}
        for stage, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][str(stage)])
        run.history[:] = state["history"]
        self.done = state["done"]
        self.before = run.history[-1]["seconds"] if run.history else 0.0


def _head_optimizer(run: Refined) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        run.heads.parameters(), lr=run.recipe.head_lr, betas=(0.9, 0.95),
        weight_decay=run.recipe.head_weight_decay, fused=True,
    )  # fmt: skip


def _full_optimizer(run: Refined) -> torch.optim.Optimizer:
    """Encoder with layer-wise decay (timm's groups) and heads at full rate."""
    recipe, model = run.recipe, run.model
    freeze_first(model, recipe.frozen_blocks)
    groups = param_groups_layer_decay(
        model, weight_decay=recipe.weight_decay, layer_decay=recipe.layer_decay,
        no_weight_decay_list=model.no_weight_decay(),
    )  # fmt: skip
    kept = [{key: group[key] for key in ("params", "weight_decay", "lr_scale")} for group in groups]
    heads = {"params": list(run.heads.parameters()), "weight_decay": recipe.head_weight_decay}
    return torch.optim.AdamW([*kept, heads], lr=recipe.lr, betas=(0.9, 0.95), fused=True)


def freeze_first(model: Encoder, blocks: int) -> None:
    """Takes the embedding and the first ``blocks`` blocks out of training; 0 freezes nothing."""
    model.requires_grad_(True)
    if blocks:
        for part in (model.patch_embed, *model.blocks[:blocks]):
            part.requires_grad_(False)
        for name in ("cls_token", "pos_embed", "reg_token"):
            if getattr(model, name, None) is not None:
                getattr(model, name).requires_grad_(False)


# ---------------------------------------------------------------- checks, saving


def recipe_dict(recipe: Recipe) -> dict:
    """The recipe as plain JSON types."""
    return json.loads(json.dumps(asdict(recipe)))


def complete_recipe(recipe: Recipe, model: Encoder, images) -> Recipe:
    """Fills in blocks and pooling and checks the recipe against model and data.

    Raises:
        ValueError: in one sentence, for what would fail later.
    """
    check_refinable(model)
    depth = len(model.blocks)
    blocks = recipe.blocks
    if blocks is None:
        blocks = tuple(range(depth - max(1, round(depth / 3)), depth))
    blocks = tuple(sorted(depth + b if b < 0 else b for b in blocks))
    if not blocks or len(set(blocks)) < len(blocks) or blocks[0] < 0 or blocks[-1] >= depth:
        raise ValueError(
            f"heads on blocks {list(blocks)}: choose different blocks from 0 to {depth - 1}"
        )
    if blocks[0] < recipe.frozen_blocks - 1:
        raise ValueError(
            f"a head on block {blocks[0]} trains nothing when {recipe.frozen_blocks} blocks are "
            "frozen; freeze fewer blocks or move the head up"
        )
    has_cls = has_class_token(model)
    pooling = recipe.pooling or ("cls" if has_cls else "patch")
    if pooling not in ("cls", "patch") or (pooling == "cls" and not has_cls):
        raise ValueError(f"pooling {pooling!r} does not exist for this model; use 'patch' or 'cls'")
    if recipe.swap not in ("neighbor", "both", "none"):
        raise ValueError(f"swap {recipe.swap!r}: choose 'neighbor', 'both' or 'none'")
    patch = model.patch_embed.patch_size[0]
    for view in recipe.views:
        if view.size % patch:
            raise ValueError(f"a view of {view.size} pixels is no multiple of the patch of {patch}")
    if len(recipe.views) < 2 or not 1 <= recipe.global_views <= len(recipe.views):
        raise ValueError("a recipe needs at least two views, and one to all of them global")
    n = len(getattr(images, "images", images))
    if n < recipe.batch:
        raise ValueError(
            f"{n} images are fewer than one batch of {recipe.batch}; "
            "give more images or a smaller batch"
        )
    return replace(recipe, blocks=blocks, pooling=pooling)


def save_refined(run: Refined, out: Path, origin: Encoder) -> None:
    """Writes encoder, card, heads with their queue, and history of a run into a folder."""
    card = run.model.refiner_card
    card |= {
        "name": out.name,
        "method": "MIM-Refiner (Alkin et al. 2025, arXiv 2402.10093)",
        "refined_from": origin.refiner_card.get("name", "unknown"),
        "refine_recipe": recipe_dict(run.recipe),
        "machine": machine(),
        "seconds": run.history[-1]["seconds"] if run.history else 0.0,
    }
    save_model(run.model, out)
    state = {f"heads.{k}": v for k, v in run.heads.state_dict().items()}
    state |= {f"queue.{k}": v for k, v in run.queue.state_dict().items()}
    save_state(out / "heads.pt", state)
    write_json(out / "history.json", run.history)


def load_heads(name: str | Path = "mae_toybox_refined") -> tuple[IDHeads, NeighborQueue, Recipe]:
    """The ID heads and the filled queue that a refined encoder was trained with.

    Args:
        name: an embedded refined checkpoint, or a folder that :func:`refine` wrote.

    Returns:
        The heads in eval mode, the queue, and the recipe that made them.

    Raises:
        FileNotFoundError: when the checkpoint has no heads.
    """
    embedded, saved = data_folder() / "heads" / f"{name}.safetensors", Path(name) / "heads.pt"
    if not (embedded.is_file() or saved.is_file()):
        raise FileNotFoundError(
            f"{name} has no heads: give a folder that refine wrote, or 'mae_toybox_refined'"
        )
    state = load_file(embedded) if embedded.is_file() else load_state(saved)
    card, encoder, _ = read_checkpoint(name)
    recipe = recipe_from(card["refine_recipe"])
    parts: dict[str, dict] = {"heads": {}, "queue": {}}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        parts[part][rest] = value.float() if value.is_floating_point() else value
    heads = IDHeads(
        len(recipe.blocks), encoder["patch_embed.proj.weight"].shape[0], hidden=recipe.hidden,
        predictor_hidden=recipe.predictor_hidden, out=recipe.out,
    )  # fmt: skip
    heads.load_state_dict(parts["heads"])
    queue = NeighborQueue(recipe.queue, recipe.out, heads=len(recipe.blocks))
    queue.load_state_dict(parts["queue"])
    return heads.eval(), queue, recipe


def recipe_from(values: dict) -> Recipe:
    """The recipe that :func:`recipe_dict` wrote down."""
    pair = lambda v: tuple(v) if isinstance(v, list) else v  # noqa: E731
    views = tuple(View(**{k: pair(v) for k, v in view.items()}) for view in values["views"])
    return Recipe(**{k: pair(v) for k, v in values.items() if k != "views"}, views=views)
