"""NNA loss, queue and stacked heads against independent, slow, plain versions."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from refiner.training.heads import IDHeads, NeighborQueue, StackedBatchNorm, nna_loss

torch.manual_seed(0)


def naive_nna(predictions, targets, neighbors, temperature, *, pairs, negatives=None):
    """The formula as a loop over pairs, samples and negatives, in float64."""
    z = targets if negatives is None else negatives
    unit = lambda x: x.double() / x.double().norm(dim=-1, keepdim=True)  # noqa: E731
    p, z, nn_z = unit(predictions), unit(z), unit(neighbors)
    total = 0.0
    for g, v in pairs:
        for i in range(p.shape[1]):
            positive = math.exp(float(nn_z[g, i] @ p[v, i]) / temperature)
            rest = sum(
                math.exp(float(z[g, i] @ p[v, j]) / temperature)
                for j in range(p.shape[1])
                if j != i
            )
            total += -math.log(positive / (positive + rest)) / p.shape[1]
    return total / len(pairs)


def tensors(v=4, g=2, b=5, o=7, t=None, seed=0):
    rng = torch.Generator().manual_seed(seed)
    lead = () if t is None else (t,)
    return (
        torch.randn(*lead, v, b, o, generator=rng, dtype=torch.float64),
        torch.randn(*lead, g, b, o, generator=rng, dtype=torch.float64),
        torch.randn(*lead, g, b, o, generator=rng, dtype=torch.float64),
    )


PAIRS = [(g, v) for g in range(2) for v in range(4) if g != v]


@pytest.mark.parametrize("temperature", [0.1, 0.2, 1.0])
def test_loss_is_the_formula(temperature):
    p, z, n = tensors()
    expected = naive_nna(p, z, n, temperature, pairs=PAIRS)
    assert nna_loss(p, z, n, temperature=temperature).item() == pytest.approx(expected, rel=1e-12)


def test_reference_indexing_is_the_authors_loop():
    p, z, n = tensors()
    pairs = [(0, 1), (1, 0)] + [(g, local) for g in range(2) for local in range(2)]
    expected = naive_nna(p, z, n, 0.2, pairs=pairs)
    assert nna_loss(p, z, n, reference_indexing=True).item() == pytest.approx(expected, rel=1e-12)
    p.requires_grad_(True)
    nna_loss(p, z, n, reference_indexing=True).backward()
    assert p.grad[2:].abs().max() == 0, "their last two local views get no gradient"


def test_nnclr_swaps_both_roles():
    p, z, n = tensors()
    expected = naive_nna(p, z, n, 0.2, pairs=PAIRS, negatives=n)
    assert nna_loss(p, z, n, swap_negatives=n).item() == pytest.approx(expected, rel=1e-12)
    assert abs(nna_loss(p, z, n).item() - expected) > 1e-3


def test_without_swap_it_is_cross_entropy():
    p, z, _ = tensors(v=2)
    logits = F.normalize(z[0], dim=-1) @ F.normalize(p[1], dim=-1).T / 0.2
    other = F.normalize(z[1], dim=-1) @ F.normalize(p[0], dim=-1).T / 0.2
    labels = torch.arange(5)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(other, labels)) / 2
    assert torch.allclose(nna_loss(p, z, z), expected)


def test_heads_are_summed_and_independent():
    p, z, n = tensors(t=3)
    each = nna_loss(p, z, n, per_head=True)
    for t in range(3):
        assert torch.allclose(each[t], nna_loss(p[t], z[t], n[t]))
    assert torch.allclose(nna_loss(p, z, n), each.sum())


def test_gradient_flows_through_predictions_only():
    p, z, n = (x.requires_grad_(True) for x in tensors())
    nna_loss(p, z, n).backward()
    assert z.grad is None and n.grad is None
    assert p.grad.flatten(2).norm(dim=2).min() > 0, "every view of every sample learns"


def test_gradient_is_the_numerical_one():
    p, z, n = tensors(v=3, b=3, o=4)
    p.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda p: nna_loss(p, z, n), p)


def test_perfect_and_uniform_predictions_have_known_losses():
    same = torch.ones(2, 6, 4, dtype=torch.float64)
    assert nna_loss(same, same, same).item() == pytest.approx(math.log(6))
    apart = torch.eye(6, dtype=torch.float64).repeat(2, 1, 1)
    expected = math.log(1 + 5 * math.exp(-1 / 0.2))
    assert nna_loss(apart, apart, apart).item() == pytest.approx(expected)


@pytest.mark.parametrize("shapes", [((1, 4, 3), (1, 4, 3)), ((2, 4, 3), (3, 4, 3))])
def test_no_pair_of_views_is_an_error(shapes):
    p, z = (torch.randn(s) for s in shapes)
    with pytest.raises(ValueError, match="pair of different views"):
        nna_loss(p, z, z)


# ---------------------------------------------------------------- queue


def on_circle(ids):
    return torch.stack([ids.float().cos(), ids.float().sin()], dim=1)


def test_queue_is_first_in_first_out_and_wraps():
    queue = NeighborQueue(5, 2)
    for start in (0, 2, 4, 6):
        ids = torch.tensor([start, start + 1])
        queue.push(3 * on_circle(ids), ids)
    assert sorted(queue.ids.tolist()) == [3, 4, 5, 6, 7]
    assert torch.allclose(queue.vectors[0], on_circle(queue.ids), atol=1e-6)


def test_a_push_larger_than_the_queue_keeps_the_newest():
    queue = NeighborQueue(3, 4)
    queue.push(torch.randn(8, 4), torch.arange(8))
    assert sorted(queue.ids.tolist()) == [5, 6, 7]


def test_a_sample_never_finds_itself():
    queue = NeighborQueue(64, 8)
    z = torch.randn(16, 8)
    for _ in range(4):
        queue.push(z, torch.arange(16))
    for k in (1, 5, 64):
        for seed in range(20):
            rng = torch.Generator().manual_seed(seed)
            found = queue.lookup(z, torch.arange(16), k=k, generator=rng)
            assert (queue.ids[found.positions] != torch.arange(16)).all()


def test_lookup_is_the_nearest_of_a_naive_search():
    queue, stored, z = NeighborQueue(50, 6, heads=2), torch.randn(2, 50, 6), torch.randn(2, 9, 6)
    queue.push(stored, torch.arange(50))
    found = queue.lookup(z, torch.arange(100, 109), k=1)
    for t in range(2):
        for i in range(9):
            sims = [float(F.cosine_similarity(z[t, i], stored[t, j], dim=0)) for j in range(50)]
            assert found.similarity[t, i].item() == pytest.approx(max(sims), abs=1e-6)
            assert found.positions[t, i].item() == sims.index(max(sims))


def test_top_k_draws_uniformly_among_the_k_nearest():
    queue = NeighborQueue(20, 4)
    stored, z = torch.randn(20, 4), torch.randn(1, 4)
    queue.push(stored, torch.arange(20))
    nearest = F.cosine_similarity(z, stored).topk(4).indices.tolist()
    rng = torch.Generator().manual_seed(0)
    drawn = queue.lookup(z.repeat(4000, 1), torch.tensor([99]), k=4, generator=rng).positions
    counts = drawn.bincount(minlength=20)
    assert set(counts.nonzero()[:, 0].tolist()) == set(nearest)
    assert counts[nearest].min() > 900 and counts[nearest].max() < 1100


def test_the_nearest_of_a_long_queue_are_those_of_a_full_sort():
    """Long enough that the maxima of groups are looked at first; the last keys fill no group."""
    queue = NeighborQueue(1003, 4, heads=2)
    queue.push(torch.randn(2, 1003, 4), torch.arange(1003))
    z = torch.randn(2, 3, 4)
    best = (F.normalize(z, dim=-1) @ queue.vectors.mT).sort(descending=True).indices
    for k in (1, 20):
        rng = torch.Generator().manual_seed(0)
        drawn = torch.stack(
            [
                queue.lookup(z, torch.arange(2000, 2003), k=k, generator=rng).positions
                for _ in range(30 * k)
            ]
        )
        for t in range(2):
            for i in range(3):
                assert set(drawn[:, t, i].tolist()) == set(best[t, i, :k].tolist())


def test_without_a_candidate_the_query_comes_back():
    queue, z = NeighborQueue(4, 3), torch.randn(2, 3)
    empty = queue.lookup(z, torch.tensor([0, 1]))
    queue.push(z[:1], torch.tensor([0]))
    only_own = queue.lookup(z[:1], torch.tensor([0]))
    assert torch.allclose(empty.vectors, F.normalize(z, dim=1))
    assert torch.allclose(only_own.vectors, F.normalize(z[:1], dim=1))
    assert empty.positions.tolist() == [-1, -1] and only_own.positions.tolist() == [-1]


def test_few_entries_never_lead_to_empty_slots():
    queue = NeighborQueue(100, 3)
    queue.push(torch.randn(3, 3), torch.arange(3))
    rng = torch.Generator().manual_seed(0)
    found = queue.lookup(torch.randn(500, 3), torch.tensor([2]), k=20, generator=rng)
    assert set(found.positions.tolist()) == {0, 1}


def test_no_gradient_enters_the_queue():
    queue, z = NeighborQueue(4, 3), torch.randn(4, 3, requires_grad=True)
    queue.push(z, torch.arange(4))
    assert not queue.vectors.requires_grad
    assert not queue.lookup(z, torch.arange(4) + 10).vectors.requires_grad


# ---------------------------------------------------------------- heads


def plain_head(heads: IDHeads, t: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Head t rebuilt from torch's own layers."""

    def rebuild(stacked):
        layers = []
        for layer in stacked:
            if isinstance(layer, nn.GELU):
                layers.append(nn.GELU())
            elif isinstance(layer, StackedBatchNorm):
                layers.append(nn.BatchNorm1d(layer.mean.shape[2], affine=False))
            else:
                linear = nn.Linear(*layer.weight.shape[1:], bias=False)
                linear.weight.data = layer.weight[t].detach().T.contiguous()
                layers.append(linear)
        return nn.Sequential(*layers).double()

    return rebuild(heads.projector), rebuild(heads.predictor)


def test_stacked_heads_are_separate_torch_heads():
    heads = IDHeads(3, 10, hidden=16, predictor_hidden=24, out=8).double()
    x = torch.randn(3, 4, 6, 10, dtype=torch.float64)
    z, p = heads(x)
    for t in range(3):
        projector, predictor = plain_head(heads, t)
        expected = projector(x[t].flatten(0, 1))
        assert torch.allclose(z[t].flatten(0, 1), expected)
        assert torch.allclose(p[t].flatten(0, 1), predictor(expected))
        for stacked, plain in zip(heads.projector, projector, strict=True):
            if isinstance(stacked, StackedBatchNorm):
                assert torch.allclose(stacked.mean[t, 0].double(), plain.running_mean)
                assert torch.allclose(stacked.var[t, 0].double(), plain.running_var)
    heads.eval()
    z_eval, _ = heads(x)
    projector, _ = plain_head(heads, 1)
    for stacked, plain in zip(heads.projector, projector, strict=True):
        if isinstance(stacked, StackedBatchNorm):
            plain.running_mean, plain.running_var = stacked.mean[1, 0], stacked.var[1, 0]
    assert torch.allclose(z_eval[1].flatten(0, 1), projector.eval()(x[1].flatten(0, 1)))


def test_the_norms_gradient_is_the_numerical_one_and_torchs():
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    norm = StackedBatchNorm(2, 3).double()
    assert torch.autograd.gradcheck(lambda x: norm(x), x)
    weight = torch.randn_like(x)
    (norm(x) * weight).sum().backward()
    for t in range(2):
        alone = x[t].detach().requires_grad_()
        (nn.BatchNorm1d(3, affine=False).double()(alone) * weight[t]).sum().backward()
        assert torch.allclose(alone.grad, x.grad[t], rtol=1e-9, atol=1e-12)


def test_the_norm_is_as_exact_far_from_zero():
    x = torch.randn(1, 500, 4) + 300  # the mean of squares minus the squared mean would fail
    y = StackedBatchNorm(1, 4)(x)
    wide = x.double()
    expected = (wide - wide.mean(1)) / (wide.var(1, correction=0) + 1e-5).sqrt()
    assert torch.allclose(y.double(), expected, atol=1e-4)


def test_head_has_the_papers_layers():
    heads = IDHeads(2, 1024)
    shapes = [tuple(p.shape[1:]) for p in heads.parameters()]
    assert shapes == [(1024, 2048), (2048, 2048), (2048, 256), (256, 4096), (4096, 256)]
    bound = math.sqrt(6 / (1024 + 2048))
    weight = heads.projector[0].weight
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(
        bound / math.sqrt(3), rel=0.01
    )


def test_the_benchmarks_loop_computes_the_same():
    """Both ends of benchmarks/refine_step.py, with the same weights, queue and samples."""
    folder = Path(__file__).parent.parent / "benchmarks"
    sys.path.insert(0, str(folder))
    try:
        bench = importlib.import_module("refine_step")
    finally:
        sys.path.remove(str(folder))
    shape = bench.Shape(heads=2, views=4, batch=6, hidden=10, predictor_hidden=12, out=5, queue=20)
    loop, stacked = bench.Loop(8, shape, "cpu"), bench.Stacked(8, shape, "cpu")
    loop.heads = nn.ModuleList(
        nn.ModuleList(m.float() for m in plain_head(stacked.heads, t)) for t in range(2)
    )
    loop.queues, loop.ids = list(stacked.queue.vectors), stacked.queue.ids
    x, ids = torch.randn(2, 4, 6, 8), torch.arange(6)
    for rung in (loop, stacked):
        rung.total = rung.loss(x, ids)
        rung.total.backward()
    assert loop.total.item() == pytest.approx(stacked.total.item(), rel=1e-5)
    for t in range(2):
        got = stacked.heads.projector[0].weight.grad[t]
        assert torch.allclose(got, loop.heads[t][0][0].weight.grad.T, rtol=1e-3, atol=1e-5)
