"""Batches of a training: the same from a tensor and from files; a process may train alone."""

import torch

from refiner.base import parallel
from refiner.images.sources import open_source
from refiner.training.loop import batch_indices

CPU = torch.device("cpu")


class Files:
    """Pixels that are read when indexed."""

    def __init__(self, pixels):
        self.pixels, self.shape = pixels, pixels.shape

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return self.pixels[index]


def test_a_tensor_and_files_give_the_same_batches():
    """Also when a run goes on in the midst: a step says all there is to know."""
    pixels = torch.randint(256, (20, 3, 4, 4), dtype=torch.uint8)

    def order(step):
        return batch_indices(20, 6, step, seed=1)

    options = {"batch": 6, "steps": 9, "device": CPU}
    whole, files, rest = (open_source(x, order, **options) for x in (pixels, *[Files(pixels)] * 2))
    for step in range(9):
        (a, ids), (b, same) = whole.batch(step), files.batch(step)
        assert torch.equal(ids, order(step)) and torch.equal(same, ids)
        assert torch.equal(a, pixels[ids]) and torch.equal(b, a)
    rest.restore(files.state(4))
    assert torch.equal(rest.batch(4)[0], whole.batch(4)[0])
    for source in (whole, files, rest):
        source.close()


def test_inside_of_alone_there_is_one_process(monkeypatch):
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(parallel.dist, "get_rank", lambda: 3)
    assert parallel.rows(8) == (6, 2)
    with parallel.alone():
        with parallel.alone():
            assert parallel.rows(8) == (0, 8) and parallel.first_decides(True)
        assert parallel.world() == 1 and parallel.rank() == 0
    assert parallel.world() == 4
