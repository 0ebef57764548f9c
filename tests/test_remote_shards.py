"""Shards behind URLs: a real S3 server and a real web server, on this machine, in threads."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from dino_lite.contracts import Source
from dino_lite.data import shards
from dino_lite.data.clean import CleanImages
from dino_lite.data.folder import open_folder
from dino_lite.data.huggingface import open_huggingface
from dino_lite.data.pack import write_shards
from dino_lite.data.preprocessing import Preprocessing
from dino_lite.data.shards import open_shards
from dino_lite.data.subset import Subset
from images import sentence
from tiny import photos

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 12 images, with their index."""
    folder = tmp_path_factory.mktemp("data")
    names = [f"{split}/{'ab'[i % 2]}/{i:02}.png" for split in ("train", "val") for i in range(6)]
    write_shards(open_folder(photos(folder / "photos", names)), folder / "packed", 20_000)
    return folder / "packed"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Indexes are cached below the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dino_lite" / "shards"


@pytest.fixture(scope="module")
def s3(packed: Path) -> Iterator[str]:
    """A bucket that holds the shards with their index, and below bare/ without."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(key, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            patch.delenv(name, raising=False)
        fs = fsspec.filesystem("s3")
        fs.mkdir("bucket")
        for file in packed.iterdir():
            fs.put_file(str(file), f"bucket/set/{file.name}")
            if file.suffix == ".tar":
                fs.put_file(str(file), f"bucket/bare/{file.name}")
        yield "s3://bucket"
        type(fs).clear_instance_cache()
    server.stop()


class Ranged(SimpleHTTPRequestHandler):
    """Files with byte ranges, as real web servers give them."""

    protocol_version = "HTTP/1.1"
    ranges = True

    def log_message(self, *args: Any) -> None:
        """Nothing."""

    def send_head(self) -> Any:
        """One part, where one is asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not self.ranges or asked is None or not path.is_file():
            return super().send_head()
        content = path.read_bytes()
        first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        return BytesIO(content[first : last + 1])


@pytest.fixture(params=[True], ids=["ranges"])
def web(request: pytest.FixtureRequest, packed: Path, tmp_path: Path) -> Iterator[str]:
    """The shards on a web server, which lists its folder."""
    shutil.copytree(packed, tmp_path / "www" / "set")
    kind = type("Handler", (Ranged,), {"ranges": request.param})
    root = str(tmp_path / "www")
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: kind(*args, directory=root))
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/set"
    server.shutdown()
    server.server_close()
    thread.join()


def pixels(source: Source, num_workers: int) -> np.ndarray:
    """All images, read by so many workers."""
    loader = DataLoader(
        CleanImages(source, Preprocessing((16, 16))),
        batch_size=2,
        num_workers=num_workers,
        collate_fn=lambda x: x,
    )
    batches = list(loader)
    assert not [bad for batch in batches for bad in batch.bad]
    return np.concatenate([batch.images.numpy() for batch in batches])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("folder", ["set", "bare"])
def test_shards_on_s3_are_those_on_disk(
    s3: str, packed: Path, folder: str, num_workers: int
) -> None:
    """With the index beside them and without; in this process and in forked ones."""
    local, remote = open_shards(packed), open_shards(f"{s3}/{folder}")
    for ours, theirs in zip(local[:2], remote[:2], strict=True):
        assert ours is not None
        assert theirs is not None
        assert ours.digest() == theirs.digest()
        assert np.array_equal(pixels(ours, 0), pixels(theirs, num_workers))


def test_headers_of_a_remote_shard_are_read_once(s3: str, cache: Path) -> None:
    """The cached index holds until the shard's etag changes."""
    pattern = f"{s3}/bare/train-{{000000..000000}}.tar"
    before = open_shards(pattern).train
    (stored,) = cache.iterdir()
    written = stored.stat().st_mtime_ns
    assert open_shards(pattern).train.digest() == before.digest()
    assert stored.stat().st_mtime_ns == written


def test_images_are_fetched_together(s3: str) -> None:
    """One call for a list of images, also of a part of the source; then no server is asked."""
    source: Any = open_shards(f"{s3}/set").train
    Subset(source, np.array([5, 1, 4])).prefetch([1, 2])
    source.base = "s3://nowhere"
    assert source.read(4).shape == (30, 40, 3)
    assert source.read(1).shape == (30, 40, 3)
    with pytest.raises(OSError, match="nowhere"):
        source.read(5)


def test_evaluations_fetch_a_batch_at_a_time(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six images in batches of two are three calls."""
    source: Any = open_shards(f"{s3}/set").train
    calls: list[int] = []
    plain = shards.read_ranges
    monkeypatch.setattr(shards, "read_ranges", lambda w: calls.append(len(w)) or plain(w))
    monkeypatch.setattr(shards, "read_range", None)
    pixels(source, 0)
    assert calls == [2, 2, 2]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_parquet_on_s3_is_read_where_it_lies(
    s3: str, packed: Path, tmp_path: Path, num_workers: int
) -> None:
    """By row group, only the column of images; without a local copy."""
    datasets = pytest.importorskip("datasets")
    local = open_shards(packed).train
    cells = [{"bytes": local.encoded(i)[0], "path": None} for i in range(6)]  # type: ignore[attr-defined]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"image": cells, "label": list(range(6))}, features)
    table.to_parquet(tmp_path / "a.parquet", batch_size=2)
    fsspec.filesystem("s3").put_file(str(tmp_path / "a.parquet"), "bucket/tables/a.parquet")
    for root in (f"{s3}/tables", f"{s3}/tables/a.parquet"):
        source: Any = open_huggingface(root, streaming=True).train
        assert source.groups.tolist() == [0, 2, 4, 6]
        assert source.labels.tolist() == list(range(6))
        assert np.array_equal(pixels(source, num_workers), pixels(local, 0))
    assert "cannot be opened" in sentence(open_huggingface, f"{s3}/no.parquet", streaming=True)


def test_what_is_not_on_s3(s3: str) -> None:
    """One sentence."""
    assert "cannot be read" in sentence(open_shards, f"{s3}/set/missing.tar")
    assert "holds no .tar" in sentence(open_shards, f"{s3}/empty")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_shards_on_a_web_server_are_those_on_disk(web: str, packed: Path, num_workers: int) -> None:
    """The folder as the server lists it, or a pattern."""
    local = open_shards(packed)
    names = sorted(path.name for path in packed.glob("*.tar"))
    for root in (web, f"{web}/{{{','.join(name[:-4] for name in names)}}}.tar"):
        remote = open_shards(root)
        assert remote.train.digest() == local.train.digest()
        assert np.array_equal(pixels(remote.train, num_workers), pixels(local.train, 0))
    assert "cannot be read" in sentence(open_shards, f"{web}/missing.tar")


@pytest.mark.parametrize("web", [False], ids=["no ranges"], indirect=True)
def test_a_server_without_ranges_is_told(web: str) -> None:
    """It gives whole shards for each image: an error of that image, not a wrong one."""
    source = open_shards(web).train
    with pytest.raises(OSError, match="train-000000"):
        source.read(0)


def test_unknown_protocols() -> None:
    """One sentence."""
    assert "several places" in sentence(open_shards, "s3://{a,b}/0.tar")
    assert "several places" in sentence(open_shards, "{s3://a,s3://b}/0.tar")
    assert "nosuch:// is not a protocol" in sentence(open_shards, "nosuch://bucket/a.tar")
