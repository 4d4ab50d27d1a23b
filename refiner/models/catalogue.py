"""The catalogue of masked-image models: what ``load_model`` takes by name.

Facts are those of the papers and repositories that are named; parameters are of the encoder alone
and are counted by the tests, on the meta device, for every entry.
"""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass

META = "https://dl.fbaipublicfiles.com"
JKU = "https://ml.jku.at/research/mimrefiner/download"
DBOT = "https://lf3-nlp-opensource.bytetos.com/obj/nlp-opensource/mmodal/dbot"
CROSSMAE = "https://huggingface.co/longlian/CrossMAE/resolve/main"
NC = "CC-BY-NC 4.0"


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        name: for ``load_model``. Without an address it is timm's own name.
        method: how it was trained.
        paper: arXiv number.
        parameters: of the encoder, millions.
        patch, size: height and width of a patch and of the images it was trained on, pixels.
        shape: width (of the last block in a Hiera), blocks, attention heads (0 where they vary).
        pooling: which features carry what it knows, the better first: class token ("cls"), mean of
            the patches ("patch").
        licence: of the weights, as their repository states it.
        address: where the file lies, empty for timm's.
        file: name in the cache where the address's own is used by several models.
        kind: timm's class.
        post_norm: data2vec 2.0's architecture.
        labels: it was also trained with labels, so that a probe does not measure masking alone.
        md5, sha256: of the file, or how they begin; empty where nobody published them.
    """

    name: str
    method: str
    paper: str
    parameters: float
    patch: int
    size: int
    shape: tuple[int, int, int]
    pooling: str
    licence: str
    address: str = ""
    file: str | None = None
    kind: str = "VisionTransformer"
    post_norm: bool = False
    labels: bool = False
    md5: str | None = None
    sha256: str | None = None

    @property
    def gigabytes(self) -> float:
        """What the encoder's float32 weights take; files with decoder or optimizer are larger."""
        return self.parameters * 4e6 / 1e9

    @property
    def source(self) -> str:
        """Where it comes from, in a word."""
        return self.address.split("/")[2] if self.address else "timm"

    def as_dict(self) -> dict:
        """Plain JSON types."""
        return asdict(self) | {"shape": list(self.shape), "gigabytes": round(self.gigabytes, 2),
                               "source": self.source}  # fmt: skip


B16, L16, H16, H14 = (768, 12, 12), (1024, 24, 16), (1280, 32, 16), (1280, 32, 16)
S16, G16, TWOB14, SIXB14 = (384, 12, 6), (1408, 40, 16), (2560, 24, 32), (4096, 32, 32)

# fmt: off
CATALOGUE = (
    # MIM-Refiner's released encoders (Alkin et al. 2025; names as in its torch.hub file)
    Entry("mae_refined_l16", "MIM-Refiner of MAE", "2402.10093", 303.3, 16, 224, L16,
          "cls patch", "MIT", f"{JKU}/maerefined_l16.th"),
    Entry("mae_refined_h14", "MIM-Refiner of MAE", "2402.10093", 630.8, 14, 224, H14,
          "cls patch", "MIT", f"{JKU}/maerefined_h14.th"),
    Entry("mae_refined_twob14", "MIM-Refiner of MAE", "2402.10093", 1890.4, 14, 224, TWOB14,
          "cls patch", "MIT", f"{JKU}/maerefined_twob14.th"),
    Entry("d2v2_refined_l16", "MIM-Refiner of data2vec 2.0", "2402.10093", 303.3, 16, 224, L16,
          "cls patch", "MIT", f"{JKU}/d2v2refined_l16.th", post_norm=True),
    Entry("d2v2_refined_h14", "MIM-Refiner of data2vec 2.0", "2402.10093", 630.8, 14, 224, H14,
          "cls patch", "MIT", f"{JKU}/d2v2refined_h14.th", post_norm=True),
    Entry("dbot_refined_l16", "MIM-Refiner of dBOT", "2402.10093", 303.3, 16, 224, L16,
          "cls patch", "MIT", f"{JKU}/dbotrefined_l16.th"),
    Entry("dbot_refined_h14", "MIM-Refiner of dBOT", "2402.10093", 630.8, 14, 224, H14,
          "cls patch", "MIT", f"{JKU}/dbotrefined_h14.th"),
    Entry("crossmae_refined_l16", "MIM-Refiner of CrossMAE", "2402.10093", 303.3, 16, 224, L16,
          "cls patch", "MIT", f"{JKU}/crossmaerefined_l16.th"),
    # the originals that they and others start from
    Entry("mae_b16", "MAE", "2111.06377", 85.8, 16, 224, B16, "cls patch", NC,
          f"{META}/mae/pretrain/mae_pretrain_vit_base.pth", md5="8cad7c"),
    Entry("mae_l16", "MAE", "2111.06377", 303.3, 16, 224, L16, "cls patch", NC,
          f"{META}/mae/pretrain/mae_pretrain_vit_large.pth", md5="b8b06e"),
    Entry("mae_h14", "MAE", "2111.06377", 630.8, 14, 224, H14, "cls patch", NC,
          f"{META}/mae/pretrain/mae_pretrain_vit_huge.pth", md5="9bdbb0"),
    Entry("mae_l16_with_decoder", "MAE", "2111.06377", 303.3, 16, 224, L16, "cls patch", NC,
          f"{META}/mae/visualize/mae_visualize_vit_large.pth"),
    Entry("mae_2b14", "MAE", "2303.13496", 1890.4, 14, 224, TWOB14, "cls patch", NC,
          f"{META}/maws/pretrain/mae_in1k/vit_2b14.pt", "maws_mae_in1k_vit_2b14.pt"),
    Entry("mae_in21k_l16", "MAE, IN-21k", "2303.13496", 303.3, 16, 224, L16, "cls patch", NC,
          f"{META}/maws/pretrain/mae_in21k/vit_l16.pt", "maws_mae_in21k_vit_l16.pt"),
    Entry("mae_ig3b_b16", "MAE, IG-3B", "2303.13496", 85.8, 16, 224, B16, "cls patch", NC,
          f"{META}/maws/pretrain/mae/vit_b16.pt", "maws_mae_vit_b16.pt"),
    Entry("mae_ig3b_l16", "MAE, IG-3B", "2303.13496", 303.3, 16, 224, L16, "cls patch", NC,
          f"{META}/maws/pretrain/mae/vit_l16.pt", "maws_mae_vit_l16.pt"),
    Entry("mae_ig3b_h14", "MAE, IG-3B", "2303.13496", 630.8, 14, 224, H14, "cls patch", NC,
          f"{META}/maws/pretrain/mae/vit_h14.pt", "maws_mae_vit_h14.pt"),
    Entry("mae_ig3b_2b14", "MAE, IG-3B", "2303.13496", 1890.4, 14, 224, TWOB14, "cls patch", NC,
          f"{META}/maws/pretrain/mae/vit_2b14.pt", "maws_mae_vit_2b14.pt"),
    Entry("mae_ig3b_6.5b14", "MAE, IG-3B", "2303.13496", 6447.6, 14, 224, SIXB14, "cls patch", NC,
          f"{META}/maws/pretrain/mae/vit_6.5b14.pt", "maws_mae_vit_6.5b14.pt"),
    Entry("maws_b16", "MAWS", "2303.13496", 85.8, 16, 224, B16, "cls patch", NC,
          f"{META}/maws/pretrain/maws/vit_b16.pt", "maws_vit_b16.pt", labels=True),
    Entry("maws_l16", "MAWS", "2303.13496", 303.3, 16, 224, L16, "cls patch", NC,
          f"{META}/maws/pretrain/maws/vit_l16.pt", "maws_vit_l16.pt", labels=True),
    Entry("maws_h14", "MAWS", "2303.13496", 630.8, 14, 224, H14, "cls patch", NC,
          f"{META}/maws/pretrain/maws/vit_h14.pt", "maws_vit_h14.pt", labels=True),
    Entry("maws_2b14", "MAWS", "2303.13496", 1890.4, 14, 224, TWOB14, "cls patch", NC,
          f"{META}/maws/pretrain/maws/vit_2b14.pt", "maws_vit_2b14.pt", labels=True),
    Entry("maws_6.5b14", "MAWS", "2303.13496", 6447.6, 14, 224, SIXB14, "cls patch", NC,
          f"{META}/maws/pretrain/maws/vit_6.5b14.pt", "maws_vit_6.5b14.pt", labels=True),
    Entry("data2vec2_b16", "data2vec 2.0", "2212.07525", 85.8, 16, 224, B16, "cls patch", NC,
          f"{META}/fairseq/data2vec2/base_imagenet.pt", "data2vec2_base_imagenet.pt",
          post_norm=True),
    Entry("data2vec2_l16", "data2vec 2.0", "2212.07525", 303.3, 16, 224, L16, "cls patch", NC,
          f"{META}/fairseq/data2vec2/large_imagenet.pt", "data2vec2_large_imagenet.pt",
          post_norm=True),
    Entry("data2vec2_h14", "data2vec 2.0", "2212.07525", 630.8, 14, 224, H14, "cls patch", NC,
          f"{META}/fairseq/data2vec2/huge_imagenet.pt", "data2vec2_huge_imagenet.pt",
          post_norm=True),
    Entry("dbot_b16", "dBOT", "2209.03917", 85.8, 16, 224, B16, "cls patch", "Apache 2.0",
          f"{DBOT}/84.5_dbot_base_pre.pth"),
    Entry("dbot_l16", "dBOT", "2209.03917", 303.3, 16, 224, L16, "cls patch", "Apache 2.0",
          f"{DBOT}/86.6_dbot_large_pre.pth"),
    Entry("dbot_h14", "dBOT", "2209.03917", 630.8, 14, 224, H14, "cls patch", "Apache 2.0",
          f"{DBOT}/87.4_dbot_huge_pre.pth"),
    Entry("crossmae_s16", "CrossMAE", "2401.14391", 21.7, 16, 224, S16, "cls patch", NC,
          f"{CROSSMAE}/vits-mr0.75-kmr0.75-dd12/"
          "imagenet-mae-cross-vits-pretrain-wfm-mr0.75-kmr0.75-dd12-ep800-ui.pth"),
    Entry("crossmae_b16", "CrossMAE", "2401.14391", 85.8, 16, 224, B16, "cls patch", NC,
          f"{CROSSMAE}/vitb-mr0.75-kmr0.75-dd12/"
          "imagenet-mae-cross-vitb-pretrain-wfm-mr0.75-kmr0.75-dd12-ep800-ui.pth"),
    Entry("crossmae_l16", "CrossMAE", "2401.14391", 303.3, 16, 224, L16, "cls patch", NC,
          f"{CROSSMAE}/vitl-mr0.75-kmr0.75-dd12/"
          "imagenet-mae-cross-vitl-pretrain-wfm-mr0.75-kmr0.75-dd12-ep800-ui.pth"),
    Entry("crossmae_h14", "CrossMAE", "2401.14391", 630.8, 14, 224, H14, "cls patch", NC,
          f"{CROSSMAE}/vith-mr0.75-kmr0.25-dd12/"
          "imagenet-mae-cross-vith-pretrain-wfm-mr0.75-kmr0.25-dd12-ep800-ui.pth"),
    Entry("ijepa_h14", "I-JEPA", "2301.08243", 630.8, 14, 224, H14, "patch", NC,
          f"{META}/ijepa/IN1K-vit.h.14-300e.pth.tar"),
    Entry("ijepa_h16_448", "I-JEPA", "2301.08243", 631.7, 16, 448, H16, "patch", NC,
          f"{META}/ijepa/IN1K-vit.h.16-448px-300e.pth.tar"),
    Entry("ijepa_in22k_h14", "I-JEPA, IN-22k", "2301.08243", 630.8, 14, 224, H14, "patch", NC,
          f"{META}/ijepa/IN22K-vit.h.14-900e.pth.tar"),
    Entry("ijepa_in22k_g16", "I-JEPA, IN-22k", "2301.08243", 1011.4, 16, 224, G16, "patch", NC,
          f"{META}/ijepa/IN22K-vit.g.16-600e.pth.tar"),
    # timm's
    Entry("vit_base_patch16_224.mae", "MAE", "2111.06377", 85.8, 16, 224, B16,
          "cls patch", NC),
    Entry("vit_huge_patch14_224.mae", "MAE", "2111.06377", 630.8, 14, 224, H14,
          "cls patch", NC),
    Entry("vit_large_patch16_224.mae", "MAE", "2111.06377", 303.3, 16, 224, L16,
          "cls patch", NC),
    Entry("vit_giant_patch16_gap_224.in22k_ijepa", "I-JEPA", "2301.08243", 1011.4, 16, 224, G16,
          "patch", NC),
    Entry("vit_huge_patch14_gap_224.in1k_ijepa", "I-JEPA", "2301.08243", 630.8, 14, 224, H14,
          "patch", NC),
    Entry("vit_huge_patch14_gap_224.in22k_ijepa", "I-JEPA", "2301.08243", 630.8, 14, 224, H14,
          "patch", NC),
    Entry("vit_huge_patch16_gap_448.in1k_ijepa", "I-JEPA", "2301.08243", 631.7, 16, 448, H14,
          "patch", NC),
    Entry("beit_base_patch16_224.in22k_ft_in22k", "BEiT", "2106.08254", 85.8, 16, 224, B16,
          "patch", "Apache 2.0", kind="Beit", labels=True),
    Entry("beit_base_patch16_224.in22k_ft_in22k_in1k", "BEiT", "2106.08254", 85.8, 16, 224, B16,
          "patch", "Apache 2.0", kind="Beit", labels=True),
    Entry("beit_base_patch16_384.in22k_ft_in22k_in1k", "BEiT", "2106.08254", 86.0, 16, 384, B16,
          "patch", "Apache 2.0", kind="Beit", labels=True),
    Entry("beit_large_patch16_224.in22k_ft_in22k", "BEiT", "2106.08254", 303.4, 16, 224, L16,
          "patch", "Apache 2.0", kind="Beit", labels=True),
    Entry("beit_large_patch16_224.in22k_ft_in22k_in1k", "BEiT", "2106.08254", 303.4, 16, 224, L16,
          "patch", "Apache 2.0", kind="Beit", labels=True),
    Entry("beit_large_patch16_384.in22k_ft_in22k_in1k", "BEiT", "2106.08254", 304.0, 16, 384, L16,
          "patch", "Apache 2.0", kind="Beit", labels=True),
    Entry("beit_large_patch16_512.in22k_ft_in22k_in1k", "BEiT", "2106.08254", 304.6, 16, 512, L16,
          "patch", "Apache 2.0", kind="Beit", labels=True),
    Entry("beitv2_base_patch16_224.in1k_ft_in1k", "BEiT v2", "2208.06366", 85.8, 16, 224, B16,
          "cls patch", "Apache 2.0", kind="Beit", labels=True),
    Entry("beitv2_base_patch16_224.in1k_ft_in22k", "BEiT v2", "2208.06366", 85.8, 16, 224, B16,
          "cls patch", "Apache 2.0", kind="Beit", labels=True),
    Entry("beitv2_base_patch16_224.in1k_ft_in22k_in1k", "BEiT v2", "2208.06366", 85.8, 16, 224, B16,
          "cls patch", "Apache 2.0", kind="Beit", labels=True),
    Entry("beitv2_large_patch16_224.in1k_ft_in1k", "BEiT v2", "2208.06366", 303.4, 16, 224, L16,
          "cls patch", "Apache 2.0", kind="Beit", labels=True),
    Entry("beitv2_large_patch16_224.in1k_ft_in22k", "BEiT v2", "2208.06366", 303.4, 16, 224, L16,
          "cls patch", "Apache 2.0", kind="Beit", labels=True),
    Entry("beitv2_large_patch16_224.in1k_ft_in22k_in1k", "BEiT v2", "2208.06366", 303.4, 16, 224,
          L16, "cls patch", "Apache 2.0", kind="Beit", labels=True),
    Entry("beit3_base_patch16_224.pt", "BEiT-3", "2208.10442", 85.9, 16, 224, B16,
          "patch", "Apache 2.0"),
    Entry("beit3_large_patch16_224.pt", "BEiT-3", "2208.10442", 303.5, 16, 224, L16,
          "patch", "Apache 2.0"),
    Entry("beit3_base_patch16_224.indomain_pt", "BEiT-3", "2208.10442", 85.9, 16, 224, B16,
          "patch", "Apache 2.0"),
    Entry("beit3_large_patch16_224.indomain_pt", "BEiT-3", "2208.10442", 303.5, 16, 224, L16,
          "patch", "Apache 2.0"),
    Entry("eva02_base_patch14_224.mim_in22k", "EVA-02", "2303.11331", 85.8, 14, 224, B16,
          "patch", "MIT", kind="Eva"),
    Entry("eva02_large_patch14_224.mim_in22k", "EVA-02", "2303.11331", 303.3, 14, 224, L16,
          "patch", "MIT", kind="Eva"),
    Entry("eva02_small_patch14_224.mim_in22k", "EVA-02", "2303.11331", 21.6, 14, 224,
          (384, 12, 6), "patch", "MIT", kind="Eva"),
    Entry("eva02_tiny_patch14_224.mim_in22k", "EVA-02", "2303.11331", 5.5, 14, 224,
          (192, 12, 3), "patch", "MIT", kind="Eva"),
    Entry("eva02_large_patch14_224.mim_m38m", "EVA-02", "2303.11331", 303.3, 14, 224, L16,
          "patch", "MIT", kind="Eva"),
    Entry("eva_large_patch14_196.in22k_ft_in1k", "EVA", "2211.07636", 303.1, 14, 196, L16,
          "patch", "MIT", labels=True),
    Entry("eva_large_patch14_196.in22k_ft_in22k_in1k", "EVA", "2211.07636", 303.1, 14, 196, L16,
          "patch", "MIT", labels=True),
    Entry("eva_large_patch14_336.in22k_ft_in1k", "EVA", "2211.07636", 303.5, 14, 336, L16,
          "patch", "MIT", labels=True),
    Entry("eva_large_patch14_336.in22k_ft_in22k_in1k", "EVA", "2211.07636", 303.5, 14, 336, L16,
          "patch", "MIT", labels=True),
    Entry("hiera_base_224.mae", "Hiera MAE", "2306.00989", 50.8, 4, 224,
          (768, 24, 0), "patch", NC, kind="Hiera"),
    Entry("hiera_base_plus_224.mae", "Hiera MAE", "2306.00989", 69.0, 4, 224,
          (896, 24, 0), "patch", NC, kind="Hiera"),
    Entry("hiera_huge_224.mae", "Hiera MAE", "2306.00989", 670.7, 4, 224,
          (2048, 48, 0), "patch", NC, kind="Hiera"),
    Entry("hiera_large_224.mae", "Hiera MAE", "2306.00989", 212.6, 4, 224,
          (1152, 48, 0), "patch", NC, kind="Hiera"),
    Entry("hiera_small_224.mae", "Hiera MAE", "2306.00989", 34.2, 4, 224,
          (768, 16, 0), "patch", NC, kind="Hiera"),
    Entry("hiera_tiny_224.mae", "Hiera MAE", "2306.00989", 27.1, 4, 224,
          (768, 12, 0), "patch", NC, kind="Hiera"),
)
# fmt: on


def find(name: str) -> Entry | None:
    """The entry of this name, or None."""
    return next((entry for entry in CATALOGUE if entry.name == name), None)


def search(text: str = "") -> list[Entry]:
    """Entries whose name, method, class or source holds every word of a text; all for no text."""

    def described(e: Entry) -> str:
        return f"{e.name} {e.method} {e.kind} {e.source}".lower()

    return [e for e in CATALOGUE if all(word in described(e) for word in text.lower().split())]


def nearest(name: str, others: list[str], n: int = 3) -> list[str]:
    """Known names most like a wrong one."""
    known = [*others, *(entry.name for entry in CATALOGUE)]
    return difflib.get_close_matches(name, dict.fromkeys(known), n=n, cutoff=0.4)


def table(entries: list[Entry]) -> str:
    """Entries as lines of text in columns."""
    rows = [("name", "method", "params", "GB", "patch", "size", "pooling", "labels", "arXiv",
             "licence", "from")]  # fmt: skip
    for e in entries:
        parameters, labels = f"{e.parameters:,.0f}M", "yes" if e.labels else "no"
        rows.append((e.name, e.method, parameters, f"{e.gigabytes:.1f}", str(e.patch), str(e.size),
                     e.pooling, labels, e.paper, e.licence, e.source))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)
