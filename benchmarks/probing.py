"""The probing suite beside the libraries that a user would call otherwise.

    python benchmarks/probing.py [--parts knn kmeans umap extract growth] [--threads 1] [--rounds 5]
                                 [--blocks 12] [--queries 10000 5000] [--device cuda] [--quick]

Everything runs in one process on the same synthetic features (classes around centres, a falling
spectrum), in rounds that alternate between the libraries and change who goes first. Reported are
medians of wall time and of processor time; where a machine is busy with other work, the second is
the fair one. Peak memory is that of a process of its own. Writes ``probing.json`` and
``probing.png`` into benchmarks/results (with ``--quick``: ``runs/probing-quick.*``), keeping the
parts that are not run again.

On a GPU (``--device cuda``) k-NN runs beside what else runs there and k-means beside scikit-learn's
on the processor, extraction is that of a ViT-B, and the result is ``probing_gpu.json``. Libraries
that are not installed are left out by name; plain torch (``matmul`` and ``topk``) is always there.

k-NN: accuracy for k = 1, 10, 20, 100, 200 from features as extracted, so each side standardises and
normalises. faiss and scikit-learn search once for the largest k and get our votes; lightly's
function has no other way than a call for each k. Every prediction is compared with float64. The
matrix products alone, in the tiles of our search, are timed as well: no search that compares every
query with every key in float32 can be faster.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.extract import compare as compare_extraction  # noqa: E402
from benchmarks.measured import installed  # noqa: E402
from refiner.base.files import write_json  # noqa: E402
from refiner.base.places import machine  # noqa: E402
from refiner.base.tensors import standardized  # noqa: E402
from refiner.probing.clusters import kmeans  # noqa: E402
from refiner.probing.neighbors import classify, knn_report  # noqa: E402
from refiner.probing.search import nearest_neighbors  # noqa: E402
from refiner.visuals.maps import umap_embedding  # noqa: E402

PEERS = ("faiss", "lightly")  # left out where they are not installed
KS = [1, 10, 20, 100, 200]
FLOOR = "products alone"
CLASSES = 100
# blocks, queries, keys, width
SIZES = [(12, 10_000, 50_000, 192), (12, 5_000, 20_000, 768)]
QUICK = [(2, 300, 5_000, 48)]
PARTS = {
    "cpu": ["knn", "kmeans", "umap", "extract", "growth"],
    "cuda": ["knn", "kmeans", "extract"],
}


def features(n: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, dim] and labels: overlapping classes, deviations that fall like j^-½, a common mean."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, dim, generator=torch.Generator().manual_seed(7))
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    x = torch.randn(n, dim, generator=generator) * 2 + centres[labels]
    return x * torch.arange(1, dim + 1) ** -0.5 + 1, labels


# ---------------------------------------------------------------- measuring


def interleaved(sides: dict[str, Callable], rounds: int) -> dict[str, dict]:
    """Median wall and processor seconds of each side, in alternating order after a warm-up."""
    taken = {name: [] for name in sides}
    for side in sides.values():
        side()
    for turn in range(rounds):
        for name in list(sides)[:: 1 if turn % 2 else -1]:
            wall, processor = time.perf_counter(), time.process_time()
            sides[name]()
            taken[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {
        name: {
            "wall_seconds": round(statistics.median(w for w, _ in times), 4),
            "cpu_seconds": round(statistics.median(c for _, c in times), 4),
        }
        for name, times in taken.items()
    }


def peak_megabytes(side: str, queries: int, keys: int, dim: int) -> int:
    """What a k-NN side adds to the memory of a process that holds the features of one block."""
    command = [sys.executable, __file__, "--peak", side, str(queries), str(keys), str(dim)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def print_peak(side: str, queries: int, keys: int, dim: int) -> None:
    call = knn_sides(*features(keys, dim, 0), *features(queries, dim, 1))[side]
    small = knn_sides(*features(300, dim, 0), *features(300, dim, 1))
    small[side]()  # so that libraries are loaded
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the highest so far
    call()
    print((kilobytes("VmHWM") - before) // 1024)


def kilobytes(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1])


# ---------------------------------------------------------------- k-NN


def gpu_megabytes(call: Callable) -> int:
    """What a call adds to the memory of the GPU."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) // 2**20


def knn_sides(train_x, train_y, test_x, test_y, ks=KS, device="cpu") -> dict[str, Callable]:
    """By library: a call that gives predictions [S, Q] of one block, on the CPU."""
    train_x, train_y, test_x = (t.to(device) for t in (train_x, train_y, test_x))
    ks = [k for k in ks if k <= len(train_x)]

    def unit():
        return (F.normalize(x, dim=1) for x in standardized(train_x, test_x))

    def voted(similarities, indices):
        scores = torch.as_tensor(similarities).double()
        found = torch.as_tensor(indices), scores, train_y
        return classify(*found, ks, 0.07, int(train_y.max()) + 1, keep_votes=False)[1].cpu()

    def refiner():
        return knn_report(
            train_x, train_y, test_x, test_y, k=ks, keep_votes=False, device=device
        ).predictions

    def plain_torch():
        """What anyone would write: products, then the largest, some queries at a time."""
        keys, queries = unit()
        found = [(some @ keys.T).topk(ks[-1], dim=1) for some in queries.split(1024)]
        return voted(*(torch.cat(part) for part in zip(*found, strict=True)))

    def faiss():
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        keys, queries = unit()
        index = faiss.IndexFlatIP(keys.shape[1])
        index.add(keys.numpy())
        return voted(*index.search(queries.numpy(), ks[-1]))

    def scikit_learn():
        from sklearn.neighbors import NearestNeighbors

        keys, queries = unit()
        search = NearestNeighbors(n_neighbors=ks[-1], algorithm="brute", metric="cosine")
        distances, indices = search.fit(keys.cpu().numpy()).kneighbors(queries.cpu().numpy())
        return voted(*(torch.as_tensor(x, device=device) for x in (1 - distances, indices)))

    def lightly():
        from lightly.utils.benchmarking import knn_predict

        keys, queries = unit()
        bank = keys.T.contiguous()
        return torch.stack(
            [
                torch.cat(
                    [
                        knn_predict(some, bank, train_y, CLASSES, knn_k=k, knn_t=0.07)[:, 0]
                        for some in queries.split(256)
                    ]
                )
                for k in ks
            ]
        ).cpu()

    sides = {
        "refiner": refiner,
        "torch": plain_torch,
        "faiss": faiss,
        "scikit-learn": scikit_learn,
        "lightly": lightly,
    }
    there = {name: side for name, side in sides.items() if name not in PEERS or installed(name)}
    if device == "cuda":  # these search on the CPU
        there = {name: there[name] for name in there if name not in ("faiss", "scikit-learn")}
    return there


def products_alone(train_x, test_x) -> Callable:
    """A call that multiplies all queries with all keys, a tile at a time, and keeps nothing."""
    buffer = torch.empty(512, 512)

    def products():
        for some in test_x.split(512):
            for keys in train_x.split(512):
                torch.mm(some, keys.T, out=buffer[: len(some), : len(keys)])

    return products


def float64_votes(train_x, train_y, test_x, ks) -> torch.Tensor:
    """Votes [S, Q, C] by float64 products, some queries at a time."""
    mean, std = train_x.double().mean(0), train_x.double().std(0, correction=0)
    keys = F.normalize((train_x.double() - mean) / std, dim=1)
    votes = torch.zeros(len(ks), len(test_x), CLASSES, dtype=torch.float64, device=test_x.device)
    for start in range(0, len(test_x), 256):
        some = F.normalize((test_x[start : start + 256].double() - mean) / std, dim=1)
        similarities, indices = (some @ keys.T).topk(ks[-1], dim=1)
        weights = (similarities / 0.07).exp()
        for s, k in enumerate(ks):
            votes[s, start : start + 256].scatter_add_(1, train_y[indices[:, :k]], weights[:, :k])
    return votes.cpu()


def knn(sizes, rounds: int, device: str) -> list[dict]:
    rows = []
    for blocks, queries, keys, dim in sizes:
        data = [
            (*features(keys, dim, 2 * l), *features(queries, dim, 2 * l + 1)) for l in range(blocks)
        ]
        each = [knn_sides(*block, device=device) for block in data]
        names = list(each[0])
        calls = {n: lambda n=n, each=each: [sides[n]() for sides in each] for n in names}
        if device == "cpu":
            bare = [products_alone(train_x, test_x) for train_x, _, test_x, _ in data]
            calls[FLOOR] = lambda bare=bare: [products() for products in bare]
        taken = interleaved(calls, rounds)
        train_x, train_y, test_x = (t.to(device) for t in data[0][:3])
        votes = float64_votes(train_x, train_y, test_x, [k for k in KS if k <= keys])
        best = votes.topk(2, dim=-1).values
        tied = best[..., 0] - best[..., 1] < 1e-12 * best[..., 0]
        for name in names:
            wrong = (each[0][name]() != votes.argmax(-1)) & ~tied
            taken[name] |= {
                "predictions_unlike_float64": int(wrong.sum()),
                "peak_MB": peak_megabytes(name, queries, keys, dim)
                if device == "cpu"
                else gpu_megabytes(each[0][name]),
            }
        rows.append(
            {
                "blocks": blocks,
                "queries": queries,
                "keys": keys,
                "dim": dim,
                "k": KS,
                "predictions_compared": votes.shape[0] * queries,
                "sides": taken,
            }
        )
        print_sides(f"k-NN, {blocks} blocks, {queries} x {keys} x {dim}", taken)
    return rows


# ---------------------------------------------------------------- k-means, maps


def kmeans_part(quick: bool, rounds: int, device: str) -> list[dict]:
    rows = []
    for n, dim, k in [(1000, 48, 10)] if quick else [(5000, 192, 10), (5000, 192, 100)]:
        x, _ = features(n, dim, 0)
        inertia = {}

        def refiner():
            inertia["refiner"] = float(kmeans(x, k, restarts=5, device=device).inertia)  # noqa: B023

        def scikit_learn():
            from sklearn.cluster import KMeans

            found = KMeans(k, n_init=5, random_state=0, tol=0).fit(x.numpy())  # noqa: B023
            inertia["scikit-learn"] = float(found.inertia_)  # noqa: B023

        def faiss():
            import faiss

            faiss.omp_set_num_threads(torch.get_num_threads())
            # Its starts are plain draws; steps until nothing moves, as on the other sides.
            found = faiss.Kmeans(
                x.shape[1],  # noqa: B023
                k,  # noqa: B023
                niter=100,
                nredo=5,
                seed=0,
                max_points_per_centroid=len(x),  # noqa: B023
            )
            found.train(x.numpy())  # noqa: B023
            inertia["faiss"] = float(found.obj[-1])  # noqa: B023

        sides = {"refiner": refiner, "scikit-learn": scikit_learn}
        taken = interleaved(sides | ({"faiss": faiss} if installed("faiss") else {}), rounds)
        for name in taken:
            taken[name]["inertia"] = round(inertia[name], 2)
        rows.append({"images": n, "dim": dim, "clusters": k, "restarts": 5, "sides": taken})
        print_sides(f"k-means, {n} x {dim}, k={k}", taken)
    return rows


def umap_part(quick: bool, rounds: int) -> list[dict]:
    import umap

    n, dim = (500, 48) if quick else (2000, 192)
    x, _ = features(n, dim, 0)
    start = time.perf_counter()
    code = (
        "import torch; from refiner.visuals.maps import umap_embedding; "
        f"umap_embedding(torch.randn({n}, {dim}))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    cold = round(time.perf_counter() - start, 2)
    graph = nearest_neighbors(x, x, k=15, exclude_self=True)
    taken = interleaved(
        {
            "umap-learn": lambda: umap.UMAP(
                metric="cosine", random_state=0, n_jobs=1
            ).fit_transform(x.numpy()),
            "refiner": lambda: umap_embedding(x),
            "refiner, graph at hand": lambda: umap_embedding(x, graph),
        },
        rounds,
    )
    print_sides(f"UMAP, {n} x {dim} (a new process: {cold} s)", taken)
    return [{"images": n, "dim": dim, "new_process_wall_seconds": cold, "sides": taken}]


def extract_part(quick: bool, rounds: int, device: str) -> list[dict]:
    if device == "cuda":
        return [
            compare_extraction(
                "base", images=4096, batch=512, rounds=max(rounds, 16), device=device
            )
        ]
    size = {"images": 32, "batch": 32} if quick else {"images": 512, "batch": 128}
    return [compare_extraction("small", **size, rounds=max(rounds, 16) if not quick else 1)]


# ---------------------------------------------------------------- growth


def growth(quick: bool, rounds: int) -> list[dict]:
    """k-NN of the refiner, of plain torch and of faiss where one of N, D, L and k changes."""
    base = {"keys": 10_000, "dim": 192, "blocks": 1, "k": 20}
    queries = 100 if quick else 500
    values = {
        "keys": [5_000, 10_000, 20_000, 40_000],
        "dim": [48, 96, 192, 384, 768],
        "blocks": [1, 2, 4, 8],
        "k": [1, 10, 50, 200],
    }
    rows = []
    for name, several in values.items():
        for value in several[:2] if quick else several:
            how = base | {name: value}
            sides = knn_sides(
                *features(how["keys"], how["dim"], 0),
                *features(queries, how["dim"], 1),
                ks=[how["k"]],
            )
            calls = {
                n: lambda n=n, sides=sides, how=how: [sides[n]() for _ in range(how["blocks"])]
                for n in ("refiner", "torch", "faiss")
                if n in sides
            }
            taken = interleaved(calls, rounds)
            rows.append({"grows": name, "queries": queries, **how, "sides": taken})
            print_sides(f"growth, {name} = {value}", taken)
    return rows


def draw_growth(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {
        "keys": "labelled images N",
        "dim": "width D",
        "blocks": "blocks L",
        "k": "neighbors k",
    }
    figure, axes = plt.subplots(1, 4, figsize=(12, 2.8), sharey=True, layout="constrained")
    for ax, (key, label) in zip(axes, names.items(), strict=True):
        some = [row for row in rows if row["grows"] == key]
        for side, marker in (("refiner", "o"), ("torch", "^"), ("faiss", "s")):
            there = [row for row in some if side in row["sides"]]
            ax.loglog(
                [row[key] for row in there],
                [row["sides"][side]["cpu_seconds"] for row in there],
                marker=marker,
                label=side,
            )
        ax.set_xlabel(label)
        ax.set_xticks([row[key] for row in some], [f"{row[key]:,}" for row in some])
        ax.minorticks_off()
    axes[0].set_ylabel("processor seconds")
    axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------- the run


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def print_sides(title: str, taken: dict[str, dict]) -> None:
    print(title)
    for name, row in taken.items():
        print(
            f"  {name:24}" + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True
        )


def table(result: dict) -> list[str]:
    """The table of docs/results.md: processor seconds by library, one row a task."""
    searches = (*result["knn"]["rows"], *result.get("knn_full", {"rows": []})["rows"])
    names = ["refiner", "torch", "faiss", "scikit-learn", "lightly"]
    names = [n for n in names if any(n in row["sides"] for row in searches)]
    names += [FLOOR] if any(FLOOR in row["sides"] for row in searches) else []
    rows = [["processor seconds", *names]]
    for row in searches:
        blocks = f"{row['blocks']} block" + "s" * (row["blocks"] > 1)
        size = f"{row['queries']:,} × {row['keys']:,} × {row['dim']}"
        rows.append([f"k-NN of {blocks}, {size}, five k", *_seconds(row["sides"], names)])
    for row in result["kmeans"]["rows"]:
        task = f"k-means, {row['images']:,} × {row['dim']}, {row['clusters']} clusters"
        rows.append([task, *_seconds(row["sides"], names)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def _seconds(sides: dict, names: list[str]) -> list[str]:
    return [f"{sides[name]['cpu_seconds']:.2f}" if name in sides else "–" for name in names]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS["cpu"], help="default: all")
    parser.add_argument("--device", choices=list(PARTS), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--blocks", type=int, help="instead of 12")
    parser.add_argument("--queries", type=int, nargs=2, help="instead of 10000 and 5000")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, into runs/")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    possible = PARTS[arguments.device]
    arguments.parts = arguments.parts or possible
    if set(arguments.parts) - set(possible):
        parser.error(f"on {arguments.device} there are only the parts {', '.join(possible)}")
    return arguments


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    np.seterr(all="ignore")
    if arguments.peak:
        side, *numbers = arguments.peak
        print_peak(side, *map(int, numbers))
        return
    quick, rounds = arguments.quick, 1 if arguments.quick else arguments.rounds
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here: leave out --device cuda")
    sizes = QUICK if quick else SIZES
    if arguments.queries:
        sizes = [(b, q, *s) for (b, _, *s), q in zip(sizes, arguments.queries, strict=False)]
    if arguments.blocks:
        sizes = [(arguments.blocks, *s) for _, *s in sizes]
    run = {
        "knn": lambda: knn(sizes, rounds, device),
        "kmeans": lambda: kmeans_part(quick, rounds, device),
        "umap": lambda: umap_part(quick, rounds),
        "extract": lambda: extract_part(quick, rounds, device),
        "growth": lambda: growth(quick, rounds),
    }
    name = "probing" if device == "cpu" else "probing_gpu"
    path = ROOT / (f"runs/{name}-quick.json" if quick else f"benchmarks/results/{name}.json")
    for part in arguments.parts:
        load = os.getloadavg()[0]
        rows = run[part]()
        # Read again, as another run may have added its own part.
        result = json.loads(path.read_text()) if path.is_file() else {}
        # The whole sizes stand beside a smaller run, not in its place.
        whole = part == "knn" and not quick and not arguments.queries
        result["knn_full" if whole else part] = {
            "command": "python benchmarks/probing.py " + " ".join(sys.argv[1:]),
            "rounds": rounds,
            "load_average": [round(load, 1), round(os.getloadavg()[0], 1)],
            "machine": machine() | {"threads": arguments.threads},
            "versions": {
                p: version(p)
                for p in ("faiss-cpu", "scikit-learn", "lightly", "umap-learn", "timm")
            },
            "rows": rows,
        }
        write_json(path, result)
        if part == "growth":
            draw_growth(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
