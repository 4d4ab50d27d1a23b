"""Streams: every image once an epoch, the same ids in any order, exact resuming, clear errors."""

import gc
import io
import os
import subprocess
import sys
import tarfile
import warnings
import weakref
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny

from refiner.base import parallel
from refiner.cli import main
from refiner.images import streams
from refiner.images.load import load_images
from refiner.images.streams import SHARD, StreamBatches, open_stream, shard_paths
from refiner.models.load import build_vit
from refiner.training.loop import Loop
from refiner.training.planning import plan
from refiner.training.recipe import Recipe
from refiner.training.refining import refine

CPU = torch.device("cpu")
SIZES = (7, 5, 9)
TINY = tiny()


def png(seed: int, side: int = 8) -> bytes:
    pixels = np.random.default_rng(seed).integers(256, size=(side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Three shards of 7, 5 and 9 samples, each an image, a second image and a label."""
    folder = tmp_path_factory.mktemp("tars")
    for shard, count in enumerate(SIZES):
        members = {}
        for i in range(count):
            members |= {
                f"set/{i:04}.png": png(100 * shard + i),
                f"set/{i:04}.mask.png": png(999),
                f"set/{i:04}.cls": b"3",
            }
        write_tar(folder / f"s-{shard:03}.tar", members)
    return str(folder / "s-{000..002}.tar")


@pytest.fixture
def stream(tars):
    return open_stream(tars, size=8, block=6)


@pytest.fixture(scope="module")
def model():
    return build_vit(size=8, patch=4, dim=8, depth=2, heads=2, seed=0)


def take(stream, steps, *, batch=3, **options):
    """(id, pixels) of every image of some steps."""
    batches = StreamBatches(stream, batch, CPU, steps=steps, **options)
    found = [pair for s in range(steps) for pair in zip(*batches.batch(s)[::-1], strict=True)]
    batches.close()
    return [(int(i), pixels) for i, pixels in found]


def test_braces_and_stars_name_shards(tmp_path):
    for i in (8, 9, 10):
        (tmp_path / f"a-{i:02}.tar").touch()
    expected = [str(tmp_path / f"a-{i:02}.tar") for i in (8, 9, 10)]
    assert shard_paths(str(tmp_path / "a-{08..10}.tar")) == expected
    assert shard_paths(str(tmp_path / "a-*.tar")) == [expected[0], expected[1], expected[2]]
    assert shard_paths("https://x.org/b-{0..1}.tar") == [
        "https://x.org/b-0.tar",
        "https://x.org/b-1.tar",
    ]
    with pytest.raises(FileNotFoundError, match="no shard .*a-11.tar"):
        shard_paths(str(tmp_path / "a-{10..11}.tar"))


def test_an_id_always_means_the_same_image(stream):
    seen = {}
    for i, pixels in take(stream, 28, seed=1):
        shard, image = divmod(i, SHARD)
        assert image < SIZES[shard]
        assert torch.equal(pixels, stream.decode(png(100 * shard + image)))
        assert torch.equal(seen.setdefault(i, pixels), pixels)
    assert len(seen) == sum(SIZES)


def test_an_epoch_is_every_image_once_in_another_order(stream):
    ids = [i for i, _ in take(stream, 14)]
    first, second = ids[:21], ids[21:]
    assert sorted(first) == sorted(second) and len(set(first)) == 21
    assert first != second and first != sorted(first)
    assert ids == [i for i, _ in take(stream, 14)]
    assert ids != [i for i, _ in take(stream, 14, seed=1)]


def test_processes_have_their_own_shards(stream, monkeypatch):
    def ids_of(rank, world):
        monkeypatch.setattr(parallel, "rank", lambda: rank)
        monkeypatch.setattr(parallel, "world", lambda: world)
        return {i for i, _ in take(stream, 20)}

    monkeypatch.setattr(parallel, "gather", lambda x: x)
    ids = [ids_of(rank, 2) for rank in range(2)]
    assert {i // SHARD for i in ids[0]} == {0, 2} and {i // SHARD for i in ids[1]} == {1}
    with pytest.raises(ValueError, match="3 shards .* cannot be shared by 4 processes"):
        ids_of(0, 4)


def test_a_closed_stream_leaves_no_batches_behind(stream):
    """Not even without the garbage collector: they would lie on a GPU."""
    batches = StreamBatches(stream, 3, CPU, steps=16)
    there = [weakref.ref(batches), weakref.ref(batches.batch(0)[0])]
    gc.collect()
    gc.disable()
    try:
        batches.close()
        del batches
        assert [x() for x in there] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("done", [1, 2, 3, 6, 7, 8, 13])
def test_reading_goes_on_where_it_was(stream, done):
    whole = take(stream, 16)
    batches = StreamBatches(stream, 3, CPU, steps=16)
    for step in range(done):
        batches.batch(step)
    state = batches.state(done)
    batches.close()
    assert state[0][0] > done * 3 - 3 - stream.block, "little is read twice"
    again = StreamBatches(stream, 3, CPU, steps=16)
    again.restore(state)
    rest = [int(i) for step in range(done, 16) for i in again.batch(step)[1]]
    again.close()
    assert rest == [i for i, _ in whole[3 * done :]]


def test_a_broken_image_is_replaced_and_named(tmp_path):
    good = {f"{i}.png": png(i) for i in range(5)}
    write_tar(tmp_path / "x.tar", good | {"bad.png": b"no image"})
    stream = open_stream(str(tmp_path / "x.tar"), size=8)
    with pytest.warns(UserWarning, match="image 5 of shard 0 .*x.tar cannot be read") as warned:
        ids = Counter(i for i, _ in take(stream, 4, batch=6))
    assert len(warned) == 1 and set(ids) == set(range(5)) and sum(ids.values()) == 24
    write_tar(tmp_path / "bad.tar", {f"{i}.png": b"no image" for i in range(4)})
    with pytest.raises(OSError, match="no image of a whole batch of .*bad.tar can be read"):
        take(open_stream(str(tmp_path / "bad.tar"), size=8), 1, batch=4)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([f"scan_0.{i}.png" for i in range(9)], range(9)),
        (["2024.01.01.png", "2024.01.02.png", "2024.02.01.jpg"], range(3)),
        ([f"2024.{i}.png" for i in range(streams.MOST_KEYS + 2)], range(streams.MOST_KEYS + 2)),
        (["a.mask.png", "a.png", "a.json", "b.thumb.png", "b.JPG", "b.png"], [1, 4]),
        (["a.seg.png", "a.image.png", "a.tif", "b.tif", "b.depth.tif"], [1, 3]),
        (
            ["._a.png", "a.png", ".hidden/b.png", "__MACOSX/._c.png", "./d.png", "d/a.png"],
            [1, 4, 5],
        ),
        (["a.left.png", "a.right.png", "a.cls"], [0, 1]),
    ],
)
@pytest.mark.filterwarnings("ignore:of each sample")
def test_every_image_that_no_other_key_explains_is_read(names, expected, tmp_path):
    write_tar(tmp_path / "x.tar", {name: b"%d" % i for i, name in enumerate(names)})
    stream = open_stream(str(tmp_path / "x.tar"), size=8)
    assert [int(x) for x in stream.encoded(0)] == list(expected)
    assert [int(x) for x in stream.encoded(0, 2)] == list(expected)[2:]


def test_a_choice_of_keys_is_told_once(tars):
    with pytest.warns(UserWarning, match="s-000.tar is read png, not mask.png") as warned:
        open_stream(tars, size=8).sample(21)
    assert len(warned) == 1


@pytest.mark.parametrize("damage", ["cut", "no tar", "gone"])
def test_a_broken_shard_is_told_and_the_others_are_read(damage, tmp_path):
    for shard in range(3):
        images = {f"{i}.png": png(10 * shard + i, side=64) for i in range(3)}
        write_tar(tmp_path / f"s-{shard}.tar", images)
    stream, broken = open_stream(str(tmp_path / "s-{0..2}.tar"), size=8), tmp_path / "s-1.tar"
    if damage == "gone":
        broken.unlink()
    else:  # three images of 13 kB
        broken.write_bytes(broken.read_bytes()[:20_000] if damage == "cut" else b"no tar" * 200)
    readable = int(damage == "cut")
    with pytest.warns(UserWarning, match=f"shard 1 of .* beyond its first {readable} images"):
        ids = {i for i, _ in take(stream, 4)}
    assert ids == {s * SHARD + i for s in (0, 2) for i in range(3)} | {SHARD} - {
        SHARD * (not readable)
    }


def test_a_stream_without_any_image_is_an_error(tmp_path):
    write_tar(tmp_path / "text.tar", {"a.txt": b"words"})
    (tmp_path / "no.tar").write_bytes(b"no tar" * 200)
    for name in ("text", "no"):
        with (
            warnings.catch_warnings(),
            pytest.raises(OSError, match=f"no images in the shards of .*{name}.tar"),
        ):
            warnings.simplefilter("ignore")
            take(open_stream(str(tmp_path / f"{name}.tar"), size=8), 1)


@pytest.mark.parametrize("numbers", ["1..0", "0..999999999"])
def test_shards_that_count_down_or_to_the_sky_are_refused(numbers):
    with pytest.raises(ValueError, match="must count up, and to at most 1,000,000 shards"):
        open_stream(f"x-{{{numbers}}}.tar", size=8)


def test_a_member_larger_than_any_image_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "MOST_BYTES", 1000)
    write_tar(tmp_path / "x.tar", {"a.png": png(0), "zeros.png": bytes(1001)})
    stream = open_stream(str(tmp_path / "x.tar"), size=8)
    assert list(stream.encoded(0)) == [png(0), b""] and len(stream.sample(1)) == 1


def test_scans_of_a_stream_share_one_range(tmp_path):
    files = {}
    for i, top in enumerate((900, 4000)):
        file = io.BytesIO()
        Image.fromarray(np.full((8, 8), top, dtype=np.uint16)).save(file, "PNG")
        files[f"{i}.png"] = file.getvalue()
    write_tar(tmp_path / "x.tar", files)
    stream = open_stream(str(tmp_path / "x.tar"), size=8)
    with pytest.warns(UserWarning, match="values from 0 to 4095 become 0 to 255"):
        assert stream.sample(2)[:, 0, 0, 0].tolist() == [56, 249]
    given = open_stream(str(tmp_path / "x.tar"), size=8, value_range=(0, 8000))
    assert given.sample(2)[:, 0, 0, 0].tolist() == [29, 128]


# ---------------------------------------------------------------- refining


def test_a_stream_is_refined_and_resumed_to_the_same_result(model, stream, tmp_path, monkeypatch):
    options = {"recipe": TINY, "progress": False, "log_every": 1}
    whole = refine(model, stream, **options)
    known = {s * SHARD + k for s, count in enumerate(SIZES) for k in range(count)}
    assert set(whole.queue.ids.tolist()) <= known
    half = replace(TINY, steps=2)
    refine(model, stream, recipe=half, progress=False, log_every=1, out=tmp_path, save_every=1)
    state = torch.load(tmp_path / "state.pt")
    assert len(state["source"]) == 1 and state["done"] == 6
    # The same run, interrupted there: schedules depend on the steps, so it is killed instead.
    step, calls = Loop.one_step, []

    def killed(self, *args):
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(1)
        return step(self, *args)

    monkeypatch.setattr(Loop, "one_step", killed)
    with pytest.raises(KeyboardInterrupt):
        refine(model, stream, out=tmp_path / "k", save_every=1, **options)
    monkeypatch.setattr(Loop, "one_step", step)
    resumed = refine(model, stream, out=tmp_path / "k", resume=True, **options)
    assert [e["loss"] for e in whole.history] == [e["loss"] for e in resumed.history]
    assert all(
        torch.equal(v, resumed.model.state_dict()[k]) for k, v in whole.model.state_dict().items()
    )


def test_a_stream_resumes_with_as_many_processes_only(model, stream, tmp_path):
    refine(model, stream, recipe=TINY, progress=False, out=tmp_path, save_every=1)
    state = torch.load(tmp_path / "state.pt")
    torch.save(state | {"source": state["source"] * 2, "done": 1}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="2 processes read the stream then, 1 now"):
        refine(model, stream, recipe=TINY, progress=False, out=tmp_path, resume=True)


def test_the_plan_of_a_stream(model, tars):
    text = str(plan(model, open_stream(tars, size=8), recipe=TINY, device="cpu"))
    assert "3 shards of images, decoded to 8×8" in text and "4 steps of batch 4" in text
    told = str(plan(model, open_stream(tars, size=8, n=21), recipe=TINY, device="cpu"))
    assert "3 shards of 21 images" in told and "4 steps, 0.762 epochs of batch 4" in told


def test_too_few_images_and_no_length_are_said(model, stream):
    with pytest.raises(ValueError, match="21 images in .* are fewer than one batch of 64"):
        refine(model, stream, recipe=replace(TINY, batch=64), progress=False)
    with pytest.raises(ValueError, match="say it with --images N"):
        Recipe.fitted(model, stream)


def test_shards_from_the_command_line(tars, tmp_path, capsys):
    sizes = ["steps=2", "head_steps=2", "batch=4", "hidden=8", "predictor_hidden=8", "out=4"]
    settings = [part for value in sizes for part in ("--set", value)]
    command = ["refine", "--data", tars, "--out", str(tmp_path / "r"), *settings]
    assert main(command) == 0
    assert "3 shards of images" in capsys.readouterr().out
    assert main([*command, "--knn-every", "1"]) == 2
    assert "a stream has no labels" in capsys.readouterr().err
    assert main([*command[:2], tars.replace("002", "004"), *command[3:]]) == 2
    assert "there is no shard" in capsys.readouterr().err


# ---------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """Two files of five and six rows, as the hub keeps them."""
    pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("parquet")
    for shard, count in enumerate((5, 6)):
        rows = [{"bytes": png(100 * shard + i), "path": None} for i in range(count)]
        kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        table = pyarrow.table({"label": list(range(count)), "image": pyarrow.array(rows, kind)})
        parquet.write_table(table, folder / f"train-{shard:05}-of-00002.parquet")
    return folder


def test_a_hugging_face_set_is_streamed(parquet, model):
    stream = open_stream(f"hf:{parquet}", size=8, block=4)
    assert stream.shards == 2
    seen = dict(take(stream, 22, batch=1))
    assert len(seen) == 11
    for i, pixels in seen.items():
        shard, image = divmod(i, SHARD)
        assert torch.equal(pixels, stream.decode(png(100 * shard + image)))
    assert list(islice(stream.read(1, 4), 1)) == [png(104)]
    run = refine(model, stream, recipe=TINY, progress=False)
    assert run.queue.ids.min() >= 0


def test_rows_without_an_image_are_replaced_and_the_column_is_chosen_by_name(tmp_path):
    pytest.importorskip("datasets")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "there.png").write_bytes(png(2))
    rows = [
        {"bytes": png(0), "path": None},
        None,
        {"bytes": None, "path": str(tmp_path / "there.png")},
        {"bytes": None, "path": str(tmp_path / "missing.png")},
    ]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {
        "thumbnail": pyarrow.array([{"bytes": png(9), "path": None}] * 4, kind),
        "image": pyarrow.array(rows, kind),
        "audio": pyarrow.array([b"sound"] * 4, pyarrow.binary()),
    }
    (tmp_path / "set").mkdir()
    parquet.write_table(pyarrow.table(columns), tmp_path / "set" / "train.parquet")
    with pytest.warns(UserWarning, match="is read image, not thumbnail, audio"):
        stream = open_stream(f"hf:{tmp_path / 'set'}", size=8)
    assert "column 'image'" in repr(stream)
    assert list(stream.encoded(0)) == [png(0), b"", png(2), b""]
    with pytest.warns(UserWarning, match=r"image [13] of shard 0 .* cannot be read"):
        assert {i for i, _ in take(stream, 4, batch=4)} == {0, 2}


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mim-refiner-lab\[stream\]'"):
        open_stream("hf:somebody/pictures", size=8)


def test_a_set_without_images_is_refused(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "a.csv").write_text("text,number\nx,1\n")
    with pytest.raises(ValueError, match="no column of images, only text, number"):
        open_stream(f"hf:{tmp_path}", size=8)


def test_importing_does_not_import_datasets():
    code = "import sys, refiner.images.streams; assert 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


@pytest.mark.parametrize("name", ["shards-{000..010}.tar", "hf:owner/name"])
def test_what_cannot_read_a_stream_says_what_can(name):
    with pytest.raises(FileNotFoundError, match="is a stream, which only `refiner refine`"):
        load_images(name)
