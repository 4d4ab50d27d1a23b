"""Downloads from a server of our own: whole, broken off, resumed, wrong, absent."""

import hashlib
import http.server
import io
import threading

import pytest
import timm
import torch
from safetensors.torch import save, save_file
from test_convert import ijepa_file, maws_file, refiner_file
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from refiner.base.errors import UserError
from refiner.models import download as d
from refiner.models.catalogue import Entry
from refiner.models.convert import HEADS
from refiner.models.load import load_model

SIZE = 1_024_000
CONTENT = save({"x": torch.arange(SIZE - 80, dtype=torch.int64).to(torch.uint8)})
CONTENT = save({"x": torch.arange(2 * SIZE - 80 - len(CONTENT)).to(torch.uint8)})
SHA = hashlib.sha256(CONTENT).hexdigest()
MARK = hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the server's content; how is the first part of the path, see the tests."""

    def do_GET(self):
        how = self.path.split("/")[1]
        self.server.asked.append((self.path, self.headers.get("Range")))
        if how == "absent":
            return self.send_error(404)
        if how == "garbled":
            return self.wfile.write(b"this is no HTTP\r\n\r\n")
        start, mark = 0, hashlib.md5(self.server.content).hexdigest()
        if (wanted := self.headers.get("Range")) and how != "plain":
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(self.server.content):
                return self.send_error(416)
        if self.headers.get("If-Range", mark) != mark:
            start = 0  # another version than the part is of
        body = self.server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            first = start + 1 if how == "shifted" else start
            self.send_header("Content-Range", f"bytes {first}-{SIZE - 1}/{SIZE}")
        if how in ("marked", "renewed"):
            self.send_header("ETag", mark)
        if how == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        elif how != "unsized":
            self.send_header("Content-Length", "many" if how == "miscounted" else str(len(body)))
        self.end_headers()
        if how == "chunked":
            body = b"fffff\r\n" + body[:1000]
        if how == "renewed" and self.server.content != CONTENT:  # replaced while it is fetched
            body, self.server.content = body[:300_000], CONTENT
        if how == "breaks":
            body = body[:300_000]
        if how == "stuck":
            body = body[: max(0, 1000 - start)]
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def pickled() -> bytes:
    """A checkpoint as torch wrote it before it wrote zip files."""
    file = io.BytesIO()
    torch.save({"x": torch.ones(30)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.content = [], CONTENT
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """torch.hub's folder, empty; nothing else is touched."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return tmp_path / "hub" / "checkpoints"


def quiet(address, **options):
    return d.download(address, **options)


def left(cache):
    """Files in the cache, but for the locks, which stay."""
    return sorted(p.name for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock")


def put(address, content, version=None):
    """What an earlier run left of an address."""
    place = d.cache_path(address)
    place.parent.mkdir(parents=True)
    place.with_name(f"{place.name}.part").write_bytes(content)
    if version is not None:
        place.with_name(f"{place.name}.version").write_text(version)


@pytest.mark.parametrize("how", ["ranges", "plain", "unsized"])
def test_a_file_arrives_whole_under_its_name_and_once(server, cache, how):
    address = f"{server.address}/{how}/w%20x.pth?download=true"
    path = quiet(address, md5=MARK)
    assert path == d.cache_path(address) and path.read_bytes() == CONTENT
    assert quiet(address) == path and len(server.asked) == 1
    assert left(cache) == ["w x.pth"]


def test_a_transfer_that_breaks_off_goes_on_where_it_was(server, cache):
    path = quiet(f"{server.address}/breaks/w.pth", md5=MARK)
    assert path.read_bytes() == CONTENT and left(cache) == ["w.pth"]
    starts = [wanted for _, wanted in server.asked]
    assert starts[:3] == [None, "bytes=300000-", "bytes=600000-"] and len(starts) == 4


@pytest.mark.parametrize(
    ("how", "part", "version", "md5", "asked"),
    [
        ("ranges", CONTENT[:777_777], None, MARK, "bytes=777777-"),
        ("marked", CONTENT[:777_777], MARK, None, "bytes=777777-"),
        ("marked", b"of another version", "older", None, "bytes=18-"),
        ("ranges", b"nobody could tell", None, None, None),
        ("plain", b"the server has no ranges", None, MARK, "bytes=24-"),
        ("ranges", CONTENT + b"more", None, MARK, "bytes=1024004-"),
        ("shifted", CONTENT[:777_777], None, MARK, "bytes=777777-"),
    ],
)
def test_a_part_of_an_earlier_run_is_used_where_it_fits(
    server, cache, how, part, version, md5, asked
):
    address = f"{server.address}/{how}/w.pth"
    put(address, part, version)
    assert quiet(address, md5=md5).read_bytes() == CONTENT
    assert server.asked[0][1] == asked and left(cache) == ["w.pth"]


def test_a_file_that_changes_amid_its_transfer_is_fetched_anew(server, cache):
    server.content = CONTENT[::-1]
    assert quiet(f"{server.address}/renewed/w.pth").read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == [None, "bytes=300000-"]


def test_a_transfer_without_progress_gives_up_and_keeps_the_part(server, cache):
    with pytest.raises(FileNotFoundError, match=r"broke off after 1,000 of 1,024,000 bytes; fetch"):
        quiet(f"{server.address}/stuck/w.pth")
    (part,) = (p for p in cache.rglob("*.part"))
    assert part.read_bytes() == CONTENT[:1000] and "w.pth" not in left(cache)


@pytest.mark.parametrize(("name", "md5"), [(f"w-{64 * '0'}.pth", None), ("w.pth", "abc")])
def test_a_wrong_checksum_keeps_nothing(server, cache, name, md5):
    with pytest.raises(ValueError, match=r"has the (sha256|md5) [0-9a-f]+, expected \w+; it was"):
        quiet(f"{server.address}/ranges/{name}", md5=md5)
    assert not left(cache)


def test_the_beginning_of_a_checksum_is_enough_also_in_the_name(server, cache):
    md5 = hashlib.md5(CONTENT).hexdigest()
    quiet(f"{server.address}/ranges/a.pth", md5=md5[:6])
    quiet(f"{server.address}/ranges/b-{SHA[:8]}.pth")
    with pytest.raises(ValueError, match="expected 00000000"):
        quiet(f"{server.address}/ranges/b-00000000.pth")
    assert left(cache) == ["a.pth", f"b-{SHA[:8]}.pth"]


def test_an_absent_file_says_what_to_put_where(server, cache):
    address = f"{server.address}/absent/w.pth"
    with pytest.raises(FileNotFoundError) as caught:
        quiet(address)
    said = str(caught.value)
    assert "the server says 404" in said and "\n" not in said
    assert f"fetch {address} on a connected machine and put it at {d.cache_path(address)}" in said
    assert "w.pth" not in left(cache)


@pytest.mark.parametrize(
    "address",
    [
        "{}/garbled/w.pth",
        "{}/chunked/w.pth",
        "http://127.0.0.1:many/w.pth",
        "http://[::1/w.pth",
        "http:///w.pth",
        "http://a..b/w.pth",
        "http://127.0.0.1:1/with space/w.pth",
        "{}/ranges/ü.pth",
    ],
)
def test_whatever_the_network_says_is_one_sentence(server, cache, address):
    address = address.format(server.address)
    with pytest.raises((FileNotFoundError, UserError)) as caught:
        quiet(address)
    assert address in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "last", ["", "..", "%2e%2e", "..%2f..%2fw.pth", "%2fetc%2fw.pth", "a%5cw.pth", "w%00.pth"]
)
def test_an_address_never_leads_out_of_the_cache(server, cache, last):
    with pytest.raises(UserError, match="does not end in a file's name"):
        quiet(f"{server.address}/ranges/{last}")
    assert not server.asked and not cache.exists()


def test_two_addresses_with_one_name_are_two_files(server, cache):
    first = quiet(f"{server.address}/ranges/w.pth").read_bytes()
    server.content = save({"x": torch.ones(3)})
    second = quiet(f"{server.address}/ranges/other/w.pth").read_bytes()
    assert (first, second) == (CONTENT, server.content)


@pytest.mark.parametrize("how", ["unsized", "ranges", "miscounted"])
@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html><title>Log in</title>", CONTENT[:-1], pickled()[:-9], b""]
)
def test_what_is_no_checkpoint_is_not_kept(server, cache, how, content):
    server.content = content
    with pytest.raises(UserError, match="incomplete or no checkpoint"):
        quiet(f"{server.address}/{how}/w.pth")
    assert not left(cache)


def test_a_cached_file_of_the_catalogue_is_compared_with_its_checksum_once(server, cache):
    known = {"file": "known.pth", "md5": hashlib.md5(CONTENT).hexdigest()[:8]}
    path = quiet(f"{server.address}/ranges/w.pth", **known)
    assert path == cache / "known.pth" and quiet("http://nowhere.invalid/w.pth", **known) == path
    path.write_bytes(b"x" + CONTENT[1:])
    for _ in range(2):
        with pytest.raises(UserError, match="known.pth has the md5 .*; delete it to fetch it"):
            quiet(f"{server.address}/ranges/w.pth", **known)


def test_several_at_once_fetch_it_once(server, cache):
    found, address = [], f"{server.address}/ranges/w.pth"
    threads = [threading.Thread(target=lambda: found.append(quiet(address))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [d.cache_path(address)] * 4 and found[0].read_bytes() == CONTENT
    assert len(server.asked) == 1 and left(cache) == ["w.pth"]


# ---------------------------------------------------------------- no network


@pytest.mark.parametrize(
    "name",
    [
        "mae_refined_l16",
        "crossmae_l16",
        "vit_base_patch16_224.mae",
        "ijepa_h14",
        "vit_huge_patch14_gap_224.in1k_ijepa",
    ],
)
def test_without_network_one_sentence_says_what_to_put_where(name, cache, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))

    def unknown(*args, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(d.socket, "getaddrinfo", unknown)
    with pytest.raises(FileNotFoundError) as caught:
        load_model(name)
    said = str(caught.value)
    assert said.startswith("no network: ") and "\n" not in said
    assert "fetch https://" in said and (str(cache) in said or "give load_model its path" in said)
    assert not left(cache)


@pytest.mark.parametrize("name", ["mae_refined_l16", "vit_base_patch16_224.mae"])
def test_offline_by_wish_asks_nobody(name, monkeypatch, tmp_path, cache):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(d.socket, "getaddrinfo", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set .*; fetch https://"):
        load_model(name)


def test_a_file_put_where_it_said_is_loaded_offline(monkeypatch, cache):
    content, reference = refiner_file()
    entry = Entry(
        "tiny",
        "MIM-Refiner",
        "2402.10093",
        0.1,
        8,
        32,
        (24, 2, 3),
        "cls patch",
        "MIT",
        "https://nowhere.invalid/tiny.th",
    )
    monkeypatch.setattr("refiner.models.load.find", lambda name: entry if name == "tiny" else None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cache.mkdir(parents=True)
    torch.save(content, cache / "tiny.th")
    model = load_model("tiny")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), reference(x), atol=1e-5, rtol=1e-5)
    card = model.refiner_card
    assert card["name"] == "tiny" and card["pooling"] == ["cls", "patch"]
    assert card["origin"] == entry.address and card["licence"] == "MIT"
    assert card["preprocessing"]["mean"] == [0.485, 0.456, 0.406]


def test_an_address_of_ones_own_is_loaded_too(server, cache, tmp_path):
    content, reference = maws_file()
    torch.save(content, tmp_path / "mine.pth")
    server.content = (tmp_path / "mine.pth").read_bytes()
    model = load_model(f"{server.address}/ranges/mine.pth", num_heads=3)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), reference(x), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- timm's names, from the cache


def test_timms_weights_are_read_from_the_hubs_cache(monkeypatch, tmp_path):
    torch.manual_seed(0)
    expected = timm.create_model("eva02_tiny_patch14_224", num_classes=0).eval()
    save_file(expected.state_dict(), tmp_path / "model.safetensors")
    asked = []

    def cached(repository, file):
        asked.append((repository, file))
        return tmp_path / file

    monkeypatch.setattr("refiner.models.load.from_hub", cached)
    model = load_model("eva02_tiny_patch14_224.mim_in22k")
    assert asked == [("timm/eva02_tiny_patch14_224.mim_in22k", "model.safetensors")]
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(x))
    card = model.refiner_card
    assert card["licence"] == "MIT" and card["pooling"] == ["patch"]
    assert card["preprocessing"] == {
        "size": 224,
        "mean": list(OPENAI_CLIP_MEAN),
        "std": list(OPENAI_CLIP_STD),
        "interpolation": "bicubic",
        "crop_pct": 0.9,
    }


def test_timms_names_of_original_files_are_converted(monkeypatch, cache):
    content, reference = ijepa_file()
    monkeypatch.setitem(HEADS, 24, 3)
    cache.mkdir(parents=True)
    torch.save(content, cache / "IN1K-vit.h.14-300e.pth.tar")
    model = load_model("vit_huge_patch14_gap_224.in1k_ijepa")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), reference(x), atol=1e-5, rtol=1e-5)
    assert model.refiner_card["origin"] == "timm" and not model.has_class_token
