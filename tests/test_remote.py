"""Images by URL from real servers on loopback: HTTP, and S3's protocol."""

from __future__ import annotations

import csv
import io
import logging
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dino_lite.contracts import Source, Splits
from dino_lite.data import remote
from dino_lite.data.auto import open_auto
from dino_lite.data.crops import MultiCrop
from dino_lite.data.datamodule import DataModule
from dino_lite.data.files import open_files
from dino_lite.data.photometric import Normalize
from images import classes, sentence
from servers import Served, http_files, png

# Multiprocessing's, from Python 3.12 on, where libraries have started threads before: as they have.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other at once."""
    monkeypatch.setattr(remote, "WAITS", (0.01, 0.01))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A folder over HTTP: eight images of one color each, and four faults."""
    (tmp_path / "www").mkdir()
    for i in range(8):
        (tmp_path / "www" / f"{i}.png").write_bytes(png((i, i, i)))
    for name in ("busy.png", "cut.png", "down.png"):
        (tmp_path / "www" / name).write_bytes(png((9, 9, 9)))
    faults = ["busy.png", "cut.png", "down.png", "gone.png"]
    rows = "".join(f"{name},{i % 2}\n" for i, name in enumerate([*map("{}.png".format, range(8))]))
    (tmp_path / "www" / "good.csv").write_text(rows)
    (tmp_path / "www" / "all.csv").write_text(rows + "".join(f"{name},0\n" for name in faults))
    (tmp_path / "www" / "lost.csv").write_text("".join(f"down{i}.png\n" for i in range(200)))
    with http_files(tmp_path / "www") as server:
        yield server


class Colors(Dataset[str]):
    """The first value of an image, or why it cannot be read."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> str:
        try:
            return str(self.source.read(index)[0, 0, 0])
        except OSError as error:
            return str(error)


def colors(source: Source, num_workers: int) -> list[str]:
    """All of a source, through a loader; a worker has every second image."""
    loader = DataLoader(
        Colors(source), batch_size=1, num_workers=num_workers, timeout=20 * num_workers
    )
    return [batch[0] for batch in loader]


# ------------------------------------------------------------------------------------------ HTTP


@pytest.mark.parametrize("num_workers", [0, 2])
def test_http(served: Served, num_workers: int) -> None:
    """The list and its images, in workers also after the parent has read some."""
    splits = open_auto(f"{served.url}/good.csv")
    source = splits.train
    assert classes(source) == ["0", "1"] * 4
    assert source.name(3) == f"{served.url}/3.png"
    assert source.read(3)[0, 0, 0] == 3
    assert colors(source, num_workers) == [str(i) for i in range(8)]
    assert source.read(5)[0, 0, 0] == 5


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_may_come_later_is_tried_again(served: Served, num_workers: int) -> None:
    """A 503 that goes away is no loss; one that stays, a 404 and a cut body are bad images."""
    found = colors(open_auto(f"{served.url}/all.csv").train, num_workers)
    assert found[:9] == [*map(str, range(8)), "9"]
    assert "payload" in found[9]
    assert "503" in found[10]
    assert "(3 tries)" in found[10]
    assert found[11] == f"FileNotFoundError: {served.url}/gone.png"
    asked = [served.asked[f"{name}.png"] for name in ("busy", "cut", "down", "gone", "1")]
    assert asked == [3, 3, 3, 1, 1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_by_url_are_replaced_and_listed(
    served: Served, num_workers: int, tmp_path: Path
) -> None:
    """As files on disk are: the run goes on, and bad_files.csv has URLs and reasons."""
    splits = open_auto(f"{served.url}/all.csv")
    bad = tmp_path / "bad_files.csv"
    data = module(splits, num_workers, max_bad_fraction=0.3, bad_files=bad)
    steps = [data.on_after_batch_transfer(parts, 0) for parts in data.train_dataloader()]
    assert {int(i) for crops in steps for i in crops.index} == set(range(9))
    with open(bad, newline="") as file:
        rows = {name.rpartition("/")[2]: reason for name, reason in csv.reader(file)}
    assert set(rows) == {"path", "cut.png", "down.png", "gone.png"}
    assert "503" in rows["down.png"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_dead_network_ends_the_run(served: Served, num_workers: int) -> None:
    """After a few failures in a row nothing more is asked for, and the sentence names the first."""
    splits = open_files(f"{served.url}/lost.csv")
    data = module(splits, num_workers, max_bad_fraction=0.5)
    told = sentence(list, data.train_dataloader())
    assert "of the 200 images cannot be read" in told
    assert "503" in told
    most = 3 * (4 + remote.MAX_IN_A_ROW)  # a part asked for together, then its replacements
    assert sum(served.asked.values()) <= 1 + most * max(1, num_workers)


@pytest.mark.slow
def test_a_short_outage_costs_one_failure_not_the_run(served: Served) -> None:
    """Files that are asked for together and fail together count once; then all is well again."""
    opener = remote.Remote()
    down = [f"{served.url}/down{i}.png".encode() for i in range(20)]
    for _ in range(remote.MAX_IN_A_ROW - 1):
        assert all(isinstance(found, OSError) for found in opener.fetch_all(down))
    assert opener.fetch(f"{served.url}/3.png") == png((3, 3, 3))
    for _ in range(remote.MAX_IN_A_ROW):
        opener.fetch_all(down)
    with pytest.raises(OSError, match=r"not requested, after 5 failures.*the last: .*503"):
        opener.fetch(f"{served.url}/3.png")


def test_the_images_of_a_part_are_asked_for_together(served: Served) -> None:
    """Once each, before the first is read; what cannot be had says so when it is read."""
    source = open_auto(f"{served.url}/all.csv").train
    source.prefetch([0, 3, 11])
    assert [served.asked[name] for name in ("0.png", "3.png", "gone.png")] == [1, 1, 1]
    assert (source.read(3)[0, 0, 0], source.image_size(0)) == (3, (4, 6))
    with pytest.raises(OSError, match="gone"):
        source.read(11)
    assert served.asked["3.png"] == 1
    assert source.read(4)[0, 0, 0] == 4
    assert pickle.loads(pickle.dumps(source)).read(3)[0, 0, 0] == 3
    assert served.asked["3.png"] == 2  # what was fetched is not sent to workers


def test_failures_that_are_not_in_a_row_count_for_nothing(served: Served) -> None:
    """An answer, be it a 404, starts the count anew."""
    opener = remote.Remote()
    for _ in range(2 * remote.MAX_IN_A_ROW):
        for name, told in (("down.png", "503"), ("gone.png", "FileNotFound")):
            with pytest.raises(OSError, match=told):
                opener.fetch(f"{served.url}/{name}")


def test_no_server(tmp_path: Path) -> None:
    """A list that cannot be fetched is a sentence; an image of one, a bad image."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert "cannot be read as a list" in sentence(open_auto, f"{url}/list.csv")
        (tmp_path / "l.txt").write_text(f"{url}/a.png\n")
        with pytest.raises(OSError, match=r"Connect.*\(3 tries\)"):
            open_auto(tmp_path / "l.txt").train.read(0)


def test_a_server_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A try has an end."""
    monkeypatch.setattr(remote, "TIMEOUT", 0.2)
    monkeypatch.setattr(remote, "WAITS", ())
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        (tmp_path / "l.txt").write_text(f"http://127.0.0.1:{silent.getsockname()[1]}/a.png\n")
        with pytest.raises(OSError, match="Timeout"):
            open_auto(tmp_path / "l.txt").train.read(0)


# -------------------------------------------------------------------------------------------- S3


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server in memory."""
    server_module = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options for a bucket `set` with a list of eight images, one that is cut and one missing."""
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    client = boto3.client("s3", endpoint_url=s3)
    client.create_bucket(Bucket="set")
    for i in range(8):
        client.put_object(Bucket="set", Key=f"a b/{i}.png", Body=png((i, i, i)))
    client.put_object(Bucket="set", Key="a b/half.jpg", Body=jpeg()[:300])
    rows = [*(f"a b/{i}.png,{i % 2}" for i in range(8)), "a b/half.jpg,0", "s3://set/gone.png,1"]
    client.put_object(Bucket="set", Key="list.csv", Body="\n".join(rows).encode())
    client.close()
    return {"endpoint_url": s3}


def jpeg() -> bytes:
    """A larger image."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_s3(bucket: dict[str, Any], num_workers: int) -> None:
    """The list and its images, in workers also after the parent has read some."""
    source = open_files("s3://set/list.csv", storage_options=bucket).train
    assert len(classes(source) or []) == 10
    assert source.name(0) == "s3://set/a b/0.png"
    assert source.read(3)[0, 0, 0] == 3
    found = colors(source, num_workers)
    assert found[:8] == [str(i) for i in range(8)]
    assert "truncated" in found[8].lower()
    assert "FileNotFoundError" in found[9]


def test_s3_credentials_from_named_variables(
    bucket: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`secret: $NAME` is looked up when it is used, and without credentials nothing hangs."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("MY_SECRET", "testing")
    options = bucket | {"key": "testing", "secret": "$MY_SECRET"}
    assert open_files("s3://set/list.csv", storage_options=options).train.read(1)[0, 0, 0] == 1
    assert "cannot be read" in sentence(open_files, "s3://nowhere/l.csv", storage_options=options)


def module(splits: Splits, num_workers: int, **settings: Any) -> DataModule:
    """Six steps of four images."""
    crops = MultiCrop(8, 4, 1)
    return DataModule(splits, crops, Normalize(), 4, num_workers, num_steps=6, **settings)
