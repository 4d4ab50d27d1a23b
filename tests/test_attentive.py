"""Attentive probes against a plain one written out block by block, closed forms and invariants."""

import math
from functools import partial

import pytest
import torch
from test_encoders import hiera
from test_features import tiny
from torch import nn

from refiner.base.errors import UserError
from refiner.base.tensors import step_generator
from refiner.evaluation.benchmark_row import FIELDS, benchmark_row
from refiner.images.sets import ImageSet
from refiner.models.encoders import preprocess, walk
from refiner.probing.attentive import attention_over_tokens, attentive_probe, efficient_pooling
from refiner.probing.features import extract
from refiner.probing.neighbors import knn_swept
from refiner.probing.probes import linear_probe

QUICK = {"queries": 4, "epochs": 2, "batch_size": 16, "rates": (1e-1, 1e-2), "progress": False}


def coloured(n: int, seed: int, classes: int = 3) -> ImageSet:
    """Noise with one square of the class's colour somewhere."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 160, (n, 3, 16, 16), generator=g, dtype=torch.uint8)
    labels, corners = torch.arange(n) % classes, torch.randint(0, 4, (n, 2), generator=g) * 4
    for image, label, (row, column) in zip(images, labels, corners.tolist(), strict=True):
        image[label, row : row + 4, column : column + 4] = 255
    return ImageSet(images, labels, tuple("abc"[:classes]))


@pytest.fixture(scope="module")
def model():
    return tiny(reg_tokens=2, no_embed_class=True)


@pytest.fixture(scope="module")
def sets() -> tuple[ImageSet, ImageSet]:
    return coloured(48, 0), coloured(24, 1)


@pytest.fixture(scope="module")
def probe(model, sets):
    return attentive_probe(model, *sets, **QUICK)


def tokens_of(model, images: ImageSet, block: int, class_token: bool = False) -> torch.Tensor:
    """[N, T, D]: patches, behind the class token or not, never the two registers."""
    with torch.no_grad():
        x = dict(walk(model, preprocess(images.images, model.refiner_card)))[block]
    return torch.cat([x[:, :1], x[:, 3:]], dim=1) if class_token else x[:, 3:]


# ---------------------------------------------------------------- the pooling


@pytest.mark.parametrize("queries, parts", [(1, 24), (4, 6), (5, 5)])
def test_the_pooling_is_the_papers_written_out(queries, parts):
    """Every token is mapped, the channels are split, and each query takes its mean of its part."""
    g = torch.Generator().manual_seed(0)
    x, q, v = (
        torch.randn(*s, generator=g) for s in [(3, 16, 24), (queries, 24), (queries, parts, 24)]
    )
    found = efficient_pooling(x[None], q[None, None], v[None, None])[0, 0]
    for i in range(3):
        mapped = (x[i] @ v.flatten(0, 1).T).unflatten(1, (queries, parts))
        for m in range(queries):
            weights = torch.tensor([math.exp(float(q[m] @ t) / math.sqrt(24)) for t in x[i]])
            part = sum(w * y for w, y in zip(weights / weights.sum(), mapped[:, m], strict=True))
            torch.testing.assert_close(found[i, m * parts : (m + 1) * parts], part)
    order = torch.randperm(16, generator=g)
    shuffled = efficient_pooling(x[None, :, order], q[None, None], v[None, None])[0, 0]
    torch.testing.assert_close(shuffled, found)


def test_queries_of_zeros_take_the_mean_and_a_long_query_the_token_it_points_to():
    x = torch.randn(1, 5, 16, 8, generator=torch.Generator().manual_seed(0))
    identity = torch.eye(8)[None, None, None]
    mean = efficient_pooling(x, torch.zeros(1, 1, 1, 8), identity)
    torch.testing.assert_close(mean[0, 0], x[0].mean(1))
    one = efficient_pooling(x[:, :1], 1e4 * x[:, :1, 3:4], identity)  # [1, 1, 1, 8]
    best = (x[0, 0] @ x[0, 0, 3]).argmax()
    torch.testing.assert_close(one[0, 0, 0], x[0, 0, best])
    attention = attention_over_tokens(x, torch.zeros(1, 1, 2, 8))
    torch.testing.assert_close(attention, torch.full((1, 5, 1, 2, 16), 1 / 16))


# ---------------------------------------------------------------- the training


class Plain(nn.Module):
    """EP of one block as the paper has it, on tokens [B, T, D]."""

    def __init__(self, dim: int, queries: int, classes: int, seed: int):
        super().__init__()
        g, parts = torch.Generator().manual_seed(seed), math.ceil(dim / queries)
        self.queries = nn.Parameter(0.02 * torch.randn(queries, dim, generator=g))
        self.value = nn.Linear(dim, queries * parts, bias=False)
        drawn = 2 * torch.rand(queries, parts, dim, generator=g) - 1
        self.value.weight.data = drawn.flatten(0, 1) / math.sqrt(dim)
        self.norm = nn.BatchNorm1d(queries * parts, eps=1e-6, affine=False)
        self.head = nn.Linear(queries * parts, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        attention = (self.queries @ x.mT / math.sqrt(x.shape[-1])).softmax(-1)  # [B, M, T]
        value = self.value(x).unflatten(2, (len(self.queries), -1))  # [B, T, M, P]
        return self.head(self.norm(torch.einsum("bmt,btmp->bmp", attention, value).flatten(1)))


@pytest.mark.parametrize("queries, class_token", [(4, False), (5, True)])
def test_every_block_is_trained_as_a_plain_probe_alone_would_be(model, sets, queries, class_token):
    train, test = sets
    options = QUICK | {"queries": queries, "class_token": class_token, "seed": 3}
    probe = attentive_probe(model, train, test, **options | {"rates": [1e-2]})
    assert probe.values.shape == (3, queries, -(-24 // queries), 24)
    for block in range(3):
        x, z = (tokens_of(model, s, block + 1, class_token) for s in sets)
        mean, std = x.mean((0, 1)), x.std((0, 1), correction=0)
        plain, ready = Plain(24, queries, 3, seed=3), ((x - mean) / std).half().float()
        steps = 2 * 3
        optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
        for epoch in range(2):
            order = torch.randperm(48, generator=step_generator(3, epoch))
            for i, some in enumerate(order.chunk(3)):
                done = 3 * epoch + i
                rate = min(10 * (done + 1) / steps, (1 + math.cos(math.pi * done / steps)) / 2)
                optimizer.param_groups[0]["lr"] = 1e-2 * rate
                loss = nn.functional.cross_entropy(plain(ready[some]), train.labels[some])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        plain.eval()
        logits = plain((z - mean) / std)
        found = efficient_pooling(
            z[None], probe.queries[block][None, None], probe.values[block][None, None]
        )
        torch.testing.assert_close(
            found[0, 0] @ probe.weights[block] + probe.bias[block], logits, atol=1e-4, rtol=1e-3
        )
        accuracy = (logits.argmax(1) == test.labels).float().mean()
        assert float(probe.accuracy[block]) == pytest.approx(float(accuracy), abs=1e-6)


@pytest.mark.parametrize(
    "other",
    [{"memory": 0}, {"memory": 2 * 48 * 16 * 24 * 2}, {"blocks": [-1]}],
    ids=["made again in every epoch", "two blocks, then one", "a block alone"],
)
def test_memory_and_the_other_blocks_change_nothing(model, sets, probe, other):
    again = attentive_probe(model, *sets, **QUICK, **other)
    kept = [number - 1 for number in again.blocks]
    for name in ("queries", "values", "weights", "bias", "accuracy", "rate"):
        torch.testing.assert_close(getattr(again, name), getattr(probe, name)[kept])
    torch.testing.assert_close(again.validation, probe.validation[:, kept])


def test_the_test_labels_choose_nothing(model, sets, probe):
    train, test = sets
    wrong = ImageSet(test.images, (test.labels + 1) % 3)
    again = attentive_probe(model, train, wrong, **QUICK)
    for name in ("rate", "validation", "queries", "weights"):
        assert torch.equal(getattr(again, name), getattr(probe, name))
    assert not torch.equal(again.accuracy, probe.accuracy)


def test_what_is_returned_is_what_was_scored(model, sets, probe):
    test = sets[1]
    accuracy = (probe.predict(model, test) == test.labels).float().mean(1)
    torch.testing.assert_close(accuracy, probe.accuracy)
    attention = probe.attention(model, test.images[:5])
    assert attention.shape == (3, 5, 4, 16)
    torch.testing.assert_close(attention.sum(-1), torch.ones(3, 5, 4))
    best = probe.validation.argmax(0)
    assert probe.rate.tolist() == pytest.approx([probe.rates[i] for i in best])
    assert probe.rates == tuple(sorted(probe.rates, reverse=True))


def test_a_few_images_are_learnt_by_heart(model, sets):
    options = QUICK | {"epochs": 12, "rates": [3e-2]}
    probe = attentive_probe(model, sets[0], sets[0], blocks=[1], **options)
    assert probe.accuracy.item() > 0.9 and probe.validation.isnan().all()


def test_labels_need_not_be_dense_and_a_class_that_train_lacks_is_wrong(model, sets):
    train, test = (ImageSet(s.images, torch.tensor([2, 5, 11])[s.labels]) for s in sets)
    test.labels[:6] = 7
    probe = attentive_probe(model, train, test, blocks=[2], **QUICK)
    guess = probe.predict(model, test)
    assert probe.classes.tolist() == [2, 5, 11] and set(guess.unique().tolist()) <= {2, 5, 11}
    assert probe.accuracy.item() == pytest.approx((guess[0] == test.labels).float().mean().item())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"queries": 0}, "at least 1"),
        ({"epochs": 0}, "at least 1"),
        ({"batch_size": 1}, "at least 2"),
        ({"rates": [0.0]}, "learning rates must be above 0"),
        ({"validation": 1.5}, "validation must be a share"),
        ({"blocks": [4]}, "blocks count from 1"),
    ],
)
def test_numbers_that_make_no_sense(model, sets, options, words):
    with pytest.raises(UserError, match=words):
        attentive_probe(model, *sets, **QUICK | options)


def test_images_that_cannot_be_probed(model, sets):
    train, test = sets
    for bad, words in [
        (ImageSet(train.images), "no labels"),
        (ImageSet(train.images, torch.zeros(48, dtype=torch.int64)), "at least two classes"),
        (ImageSet(train.images, torch.arange(48)), "no image left to choose"),
    ]:
        with pytest.raises(UserError, match=words):
            attentive_probe(model, bad, test, **QUICK)
    headless = tiny(class_token=False, global_pool="avg")
    with pytest.raises(UserError, match="no class token"):
        attentive_probe(headless, train, test, class_token=True, **QUICK)
    with torch.no_grad():
        headless.blocks[1].mlp.fc2.bias[0] = torch.nan
    with pytest.raises(UserError, match="after block 2 are not finite"):
        attentive_probe(headless, train, test, **QUICK)


def test_blocks_of_one_stage_are_probed_together_and_of_several_are_refused(sets):
    """Hiera's last four blocks lie in three stages: two of them in one."""
    probe = attentive_probe(hiera(), *sets, blocks=[3, 4], **QUICK)
    assert probe.queries.shape[:2] == (2, 4) and probe.blocks == (3, 4)
    with pytest.raises(UserError, match="give blocks=… of one stage"):
        attentive_probe(hiera(), *sets, **QUICK)


# ---------------------------------------------------------------- the benchmark's row


@pytest.mark.parametrize("with_token", [True, False])
def test_a_row_has_the_benchmarks_columns_and_the_probes_numbers(sets, with_token, monkeypatch):
    model = tiny() if with_token else tiny(class_token=False, global_pool="avg")
    model.refiner_card = model.refiner_card | {"name": "tiny", "method": "none"}
    short = partial(attentive_probe, **QUICK | {"progress": False})
    monkeypatch.setattr(
        "refiner.evaluation.benchmark_row.attentive_probe", lambda *a, progress, **o: short(*a, **o)
    )
    row = benchmark_row(model, *sets, family="GEN", class_token=with_token, progress=False)
    assert tuple(row) == FIELDS and row["arch"] == "ViT-24/4" and row["family"] == "GEN"
    variants = row["lp_variant"], row["lp_gap"], row["gap_reason"], row["ep_variant"]
    assert variants == (
        ("cls", "no", "", "ep_all") if with_token else ("pos", "yes", "no_cls", "ep")
    )
    (x, y), (z, t) = ((extract(model, s, progress=False).main[-1], s.labels) for s in sets)
    assert row["lp"] == pytest.approx(100 * float(linear_probe(x, y, z, t).accuracy), abs=0.006)
    near = knn_swept(x, y, z, t, standardize=False)
    found = row["knn"], row["knn_k"], row["knn_T"]
    expected = (100 * float(near.accuracy), int(near.k), float(near.temperature))
    assert found == pytest.approx(expected, abs=0.006)
    probe = short(model, *sets, blocks=[-1], class_token=with_token)
    assert row["ep"] == pytest.approx(100 * probe.accuracy.item(), abs=0.006)
    assert row["ep_queries"] == 4
