"""What ``card.json`` and timm's ``config.json`` may say: what strangers wrote is checked first.

A model's network is built from these words, so each has a range, and names that are not here (a
path, an address, ``pretrained``) are refused.
"""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypedDict

import timm

from refiner.base.settings import Entries, Portion, Positive, Range

Side = Annotated[int, Range(1, 2**14)]  # pixels
Width = Annotated[int, Range(1, 2**16)]
Blocks = Annotated[int, Range(1, 2**8)]
Heads = Annotated[int, Range(1, 2**10)]
Registers = Annotated[int, Range(0, 2**10)]
Norm = Annotated[float, Range(above=0, high=1e-2)]  # the epsilon of layer norms
Sides = tuple[Side, Side] | Side  # height and width, or a square's side
Channels = Annotated[int, Range(1, 2**10)]
Means = Annotated[list[float], Entries(1, most=2**10)]  # one for each channel
Deviations = Annotated[list[Positive], Entries(1, most=2**10)]


class Preprocessing(TypedDict):
    """See :func:`refiner.models.encoders.preprocess`."""

    size: Sides
    mean: Means
    std: Deviations
    interpolation: NotRequired[Literal["bicubic", "bilinear"]]
    crop_pct: NotRequired[Portion]
    assumed: NotRequired[bool]  # mean and std, which nothing told


class Architecture(TypedDict, total=False):
    """Arguments of :func:`refiner.models.load.build_vit`."""

    size: Sides
    patch: Side
    channels: Channels
    dim: Width
    depth: Blocks
    heads: Heads
    mlp: Annotated[int, Range(1, 2**20)] | None
    class_token: bool
    registers: Registers
    qkv_bias: bool
    layer_scale: bool
    final_norm: bool
    fc_norm: bool
    post_norm: bool
    eps: Norm


class ModelArguments(TypedDict, total=False):
    """Arguments of timm's constructors that only shape the network."""

    img_size: Sides
    patch_size: Sides
    in_chans: Channels
    num_classes: Annotated[int, Range(0, 2**20)]
    embed_dim: Width
    depth: Blocks
    num_heads: Heads
    stages: Annotated[list[Blocks], Entries(1, most=8)]
    mlp_ratio: Annotated[float, Range(above=0, high=64)]
    swiglu_mlp: bool
    scale_mlp: bool
    class_token: bool
    no_embed_class: bool
    reg_tokens: Registers
    num_reg_tokens: Registers
    pos_embed: Literal["", "learn", "none"]
    use_abs_pos_emb: bool
    use_rel_pos_bias: bool
    use_shared_rel_pos_bias: bool
    use_rot_pos_emb: bool
    dynamic_img_size: bool
    dynamic_img_pad: bool
    global_pool: Literal["", "avg", "token"]
    qkv_bias: bool
    qkv_fused: bool
    qk_norm: bool
    init_values: float | None
    pre_norm: bool
    fc_norm: bool | None
    final_norm: bool


class Registered:
    """Which names are timm's own: no path, no address, nothing that leads to the network."""

    def __contains__(self, name: str) -> bool:
        return name.isidentifier() and timm.is_model(name)

    def __str__(self) -> str:
        return "the name of one of timm's architectures"


class Made(TypedDict):
    """How timm makes a network."""

    architecture: Annotated[str, Registered()]
    model_args: ModelArguments
    eps: NotRequired[Norm]


class Card(TypedDict):
    """A ``refiner_card`` on disk. All else that it says is only shown."""

    name: str
    preprocessing: Preprocessing
    architecture: NotRequired[Architecture]
    timm: NotRequired[Made]
    pooling: NotRequired[list[Literal["cls", "patch"]]]
    recipe: NotRequired[dict[str, object]]
    refine_recipe: NotRequired[dict[str, object]]


class Pretrained(TypedDict):
    """What timm notes about weights; where it says they lie is not read."""

    input_size: NotRequired[Annotated[list[Side], Entries(3, most=3)]]
    mean: NotRequired[Means]
    std: NotRequired[Deviations]
    interpolation: NotRequired[str]
    crop_pct: NotRequired[Portion]
    classifier: NotRequired[str | list[str] | None]


class Config(Pretrained):
    """timm's ``config.json``; in old ones, ``pretrained_cfg``'s fields stand beside the others."""

    architecture: Annotated[str, Registered()]
    model_args: NotRequired[ModelArguments]
    pretrained_cfg: NotRequired[Pretrained]
