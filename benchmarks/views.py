"""Our batched augmentation beside kornia's and torchvision's, on the same images and views.

    python benchmarks/views.py

Each makes all views of a batch with the same operations, ranges and probabilities (crop and resize,
mirror, colour jitter, gray, blur, solarize). kornia takes the batch at once, torchvision's v2
transforms one image after the other; given a batch, they draw one crop and one colour for all of
it, which is no augmentation for contrastive learning and stands here as their lower bound. They
jitter in random order and clamp in between, and turn the hue in HSV; ours is one linear map.

Every round runs all sides once, in changing order, in one process; the median of five rounds
counts, on a CPU of processor time, as others may use the machine. Writes
``benchmarks/results/views-<device>.json``. ``pip install '.[bench]'`` brings kornia; without it,
its side is left out.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measured import header, installed
from torch import nn
from torchvision.transforms import v2

from refiner.base.files import write_json
from refiner.images.views import View, make_views
from refiner.training.recipe import Recipe

RESULTS = Path(__file__).parent / "results"
CASES = {
    "cpu preset": {"views": Recipe.cpu().views, "images": 128, "size": 32},
    "paper": {"views": Recipe().views, "images": 8, "size": 224},
}


def blur_of(view: View) -> dict:
    """Sigma and an odd kernel that reaches three of the largest."""
    low, high = (s * view.size / 224 for s in view.sigma)
    return {"kernel_size": 2 * max(1, round(3 * high)) + 1, "sigma": (low, high)}


def jitter_of(view: View) -> list[float]:
    return [view.brightness, view.contrast, view.saturation, view.hue]


def kornias(view: View) -> nn.Module:
    """The view as kornia makes it, on float [B, 3, H, W]."""
    import kornia.augmentation as K

    size, blur = (view.size, view.size), blur_of(view)
    steps = [
        K.RandomResizedCrop(size, scale=view.scale, ratio=view.ratio, cropping_mode="resample"),
        K.RandomHorizontalFlip(p=view.flip),
        K.ColorJitter(*jitter_of(view), p=view.jitter),
        K.RandomGrayscale(p=view.gray),
    ]
    if view.blur:
        steps.append(K.RandomGaussianBlur((blur["kernel_size"],) * 2, blur["sigma"], p=view.blur))
    if view.solarize:
        steps.append(K.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=view.solarize))
    return nn.Sequential(*steps)


def torchvisions(view: View) -> nn.Module:
    """The view as torchvision makes it, one draw a call, on uint8."""
    steps = [
        v2.RandomResizedCrop(view.size, scale=view.scale, ratio=view.ratio, antialias=True),
        v2.RandomHorizontalFlip(view.flip),
        v2.RandomApply([v2.ColorJitter(*jitter_of(view))], view.jitter),
        v2.RandomGrayscale(view.gray),
    ]
    if view.blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(**blur_of(view))], view.blur))
    if view.solarize:
        steps.append(v2.RandomSolarize(128, view.solarize))
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True)])


def sides(pixels: torch.Tensor, views: tuple[View, ...]) -> dict[str, Callable[[], list]]:
    """What is measured: a list of float [B, 3, S, S] each."""
    has_kornia = installed("kornia")
    theirs = [kornias(v) for v in views] if has_kornia else []
    theirs_tv = [torchvisions(v) for v in views]

    def with_kornia() -> list[torch.Tensor]:
        x = pixels.float() / 255
        return [view(x) for view in theirs]

    return {
        "refiner": lambda: make_views(pixels, views),
        **({"kornia": with_kornia} if has_kornia else {}),
        "torchvision, image by image": lambda: [
            torch.stack([view(image) for image in pixels]) for view in theirs_tv
        ],
        "torchvision, one draw a batch": lambda: [view(pixels) for view in theirs_tv],
    }


def seconds_of(work: Callable, device: str) -> float:
    """Wall time on a GPU, processor time on a CPU."""
    if device == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(case: dict, device: str, rounds: int) -> dict:
    """Milliseconds of each side, and how many times ours it takes."""
    shape = (case["images"], 3, case["size"], case["size"])
    pixels = torch.randint(256, shape, dtype=torch.uint8, device=device)
    work = sides(pixels, case["views"])
    for make in work.values():  # warm up, and check that all make the same views
        made = [tuple(view.shape) for view in make()]
        assert made == [(case["images"], 3, v.size, v.size) for v in case["views"]], made
    seconds = {name: [] for name in work}
    order = list(work)
    for turn in range(rounds):
        random.Random(turn).shuffle(order)
        for name in order:
            seconds[name].append(seconds_of(work[name], device))
    found = {}
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(values, seconds["refiner"], strict=True)]
        found[name] = {
            "milliseconds": round(1000 * statistics.median(values), 1),
            "times_ours": round(statistics.median(ratios), 2),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    cases = {}
    for name, case in CASES.items():
        measured = measure(case, device, args.rounds)
        sizes = [v.size for v in case["views"]]
        cases[name] = {
            "images": case["images"],
            "size": case["size"],
            "views": sizes,
            "sides": measured,
        }
        for side, cell in measured.items():
            print(
                f"{name:11} {side:30} {cell['milliseconds']:8.1f} ms  {cell['times_ours']} times",
                flush=True,
            )
    out = args.out or RESULTS / f"views-{device}.json"
    write_json(out, {**header("python benchmarks/views.py"), "rounds": args.rounds, "cases": cases})
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
