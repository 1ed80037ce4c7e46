"""Sources of batch prediction: each kind gives the same images, from any row on, within bounded memory."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
import tracemalloc
from pathlib import Path
from typing import Literal

import pytest

from image_formats.files import MAX_FILE_BYTES
from image_formats.header import UnreadableImage
from tests.training.batch_prediction.pictures import encode, write_pictures
from training.batch_prediction import rows
from training.batch_prediction.listing import Listing, find_images
from training.batch_prediction.rows import Row, make_batches
from training.batch_prediction.sources import open_source
from training.errors import PredictionError

pa = pytest.importorskip("pyarrow", reason="needs pyarrow, of the extra [batch]")
parquet = pytest.importorskip("pyarrow.parquet")

COUNT = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, and the same in every other kind of source, beside it."""
    folder = tmp_path_factory.mktemp("sources") / "pictures"
    write_pictures(folder, COUNT)
    for name in (".hidden.png", "Thumbs.db", "notes.md"):
        (folder / name).write_bytes(encode() if name.endswith("png") else b"text")
    shutil.copy(folder / "0000.png", folder / "without-suffix")
    paths = list(find_images(str(folder)))
    beside = folder.parent
    (beside / "list.txt").write_text("\n".join(paths) + "\n\n")
    modes: dict[str, Literal["w", "w:gz"]] = {"archive.tar": "w", "archive.tar.gz": "w:gz"}
    for name, mode in modes.items():
        with tarfile.open(beside / name, mode) as archive:
            for path in (*map(Path, paths), folder / ".hidden.png", folder / "notes.md"):
                archive.add(path, path.relative_to(folder))
    data = [Path(path).read_bytes() for path in paths]
    numbers = list(range(len(data)))
    files = [{"bytes": each, "path": "x"} for each in data]
    for name, columns in {
        "bytes": {"number": numbers, "image": data, "name": paths},
        "large": {"image": pa.array(data, pa.large_binary())},
        "structs": {"image": files, "label": numbers},
        "paths": {"path": paths, "number": numbers},
    }.items():
        parquet.write_table(pa.table(columns), beside / f"{name}.parquet", row_group_size=5)
    return folder


KINDS = (
    "pictures",
    "pictures/**",
    "list.txt",
    "archive.tar",
    "archive.tar.gz",
    "bytes.parquet",
    "large.parquet",
    "structs.parquet",
    "paths.parquet",
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_has_the_same_images_from_any_row_on(kind: str, folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder.parent / kind), column=None, listing=tmp_path / "listing")
    expected = [Path(path) for path in find_images(str(folder))]
    if kind == "pictures/**":  # a pattern matches what it says
        expected = sorted([*expected, folder / "Thumbs.db", folder / "notes.md"])
    assert source.count == len(expected) == COUNT + (3 if "*" in kind else 1)
    for start in (0, 1, 5, source.count - 1, source.count):
        read = list(source.read(start))
        assert [row.read() for row in read] == [path.read_bytes() for path in expected[start:]]
        assert [row.size for row in read] == [path.stat().st_size for path in expected[start:]]
    names = [row.source for row in source.read(0)]
    if "bytes" in kind or "large" in kind or "structs" in kind:
        assert names == [str(number) for number in range(source.count)]
    elif "archive" in kind:
        assert names == [path.relative_to(folder).as_posix() for path in expected]
    else:
        assert names == [str(path) for path in expected]


def test_a_single_image_is_a_source(folder: Path, tmp_path: Path) -> None:
    (row,) = open_source(str(folder / "0000.png"), column=None, listing=tmp_path / "listing").read(0)
    assert row.read() == (folder / "0000.png").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_source_has_another_fingerprint(kind: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder.parent, tmp_path / "copy", copy_function=shutil.copy2)
    copy = tmp_path / "copy"
    (copy / "list.txt").write_text(
        (folder.parent / "list.txt").read_text().replace(str(folder), str(copy / "pictures"))
    )
    if kind == "paths.parquet":
        paths = list(find_images(str(copy / "pictures")))
        parquet.write_table(pa.table({"path": paths}), copy / kind)

    def fingerprint() -> object:
        return open_source(str(copy / kind), column=None, listing=tmp_path / "listing").fingerprint

    before = fingerprint()
    assert fingerprint() == before
    changed = (
        copy / kind if "archive" in kind or kind in ("bytes.parquet", "large.parquet", "structs.parquet") else None
    )
    os.utime(changed or copy / "pictures" / "0002.png", ns=(1, 1))
    assert fingerprint() != before


def test_missing_and_odd_files_become_rows_with_the_reason(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty.png").touch()
    (tmp_path / "large.png").write_bytes(b"")
    os.truncate(tmp_path / "large.png", MAX_FILE_BYTES + 1)
    names = ("missing.png", ".", "large.png", "empty.png", "pipe", "a\0b", "caf\udce9.png")
    listing = Listing([*(str(tmp_path / name) for name in names), None], tmp_path / "listing")
    (tmp_path / "empty.png").write_bytes(b"changed")
    writer = os.open(tmp_path / "pipe", os.O_RDWR)
    os.write(writer, b"text")
    problems = []
    for row in listing.read(0):
        try:
            problems.append(str(len(row.read())))
        except UnreadableImage as error:
            problems.append(str(error))
    assert problems == [
        "file not found",
        "is a folder, not an image",
        "the file has 67,108,865 bytes; the maximum is 67,108,864",
        "7",
        "is not a regular file",  # a pipe would be waited for
        "invalid file name: embedded null byte",
        "file not found",
        "the row has no path",
    ]
    os.close(writer)
    assert [row.source for row in listing.read(6)] == [f"{tmp_path}/caf\\xe9.png", "7"]


def test_null_and_large_values_of_a_table_and_large_members_become_rows_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("archive", "table", "rows"):
        monkeypatch.setattr(f"training.batch_prediction.{module}.MAX_FILE_BYTES", 1000)
    png, large = encode(size=(8, 8)), encode(size=(40, 40))
    values = [png, None, large]
    structs = [{"bytes": png}, None, {"bytes": large}]
    for column in (pa.array(values), pa.array(structs)):
        parquet.write_table(pa.table({"image": column}), tmp_path / "t.parquet")
        read = list(open_source(str(tmp_path / "t.parquet"), column=None, listing=tmp_path / "listing").read(0))
        assert [row.problem for row in read] == [
            "",
            "the column image is null",
            f"the file has {len(large):,} bytes; the maximum is 1,000",
        ]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (("a.png", png), ("b.png", large)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    first, second = open_source(str(tmp_path / "a.tar"), column=None, listing=tmp_path / "listing").read(0)
    assert (first.read(), second.content, second.problem[:12]) == (png, b"", "the file has")


def test_what_cannot_be_a_source_is_explained(tmp_path: Path, folder: Path) -> None:
    def explain(name: str | Path, column: str | None = None) -> str:
        with pytest.raises(PredictionError) as error:
            open_source(str(name), column=column, listing=tmp_path / "listing")
        return str(error.value)

    beside = folder.parent
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "pictures.zip").write_bytes(b"PK\x03\x04 damaged")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    archive = (beside / "archive.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(archive[: len(archive) // 2 + 100])
    packed = gzip.compress(archive)
    (tmp_path / "cut.tar.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "cut.parquet").write_bytes((beside / "bytes.parquet").read_bytes()[:-100])
    parquet.write_table(pa.table({"number": [1]}), tmp_path / "numbers.parquet")
    parquet.write_table(pa.table({"a": [b"x"], "b": [b"y"]}), tmp_path / "two.parquet")
    assert "missing does not exist; expected a folder, a pattern such as" in explain(tmp_path / "missing")
    assert "has no images: no file in it or below is an image; expected JPEG" in explain(tmp_path / "nothing")
    assert "has no images: no file matches the pattern" in explain(tmp_path / "*.jpg")
    assert "empty.txt has no images: it is empty" in explain(tmp_path / "empty.txt")
    assert "has no images: nothing in it is an image" in explain(tmp_path / "empty.tar")
    assert "table.csv is of no known kind; expected a folder" in explain(tmp_path / "table.csv")
    assert "pictures.zip is a zip archive, and damaged" in explain(tmp_path / "pictures.zip")
    for name in ("cut.tar", "cut.tar.gz"):
        assert f"{name} is damaged or cut off (" in explain(tmp_path / name)
    assert "cut.parquet is damaged, or not a Parquet file" in explain(tmp_path / "cut.parquet")
    assert "has no column of encoded images (bytes) or of paths" in explain(tmp_path / "numbers.parquet")
    assert "several columns that could have the images: choose --column a, b" in explain(tmp_path / "two.parquet")
    assert "has no column 'c'; columns of bytes or text: a, b" in explain(tmp_path / "two.parquet", "c")
    assert "in the column 'number'; columns of bytes or text: image, name" in explain(
        beside / "bytes.parquet", "number"
    )
    assert "--column is for Parquet files" in explain(folder, "image")


def test_a_named_column_is_read(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder.parent / "bytes.parquet"), column="name", listing=tmp_path / "listing")
    assert [row.source for row in source.read(0)] == list(find_images(str(folder)))


def test_the_memory_of_a_listing_and_of_an_archive_does_not_grow_with_the_images(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        with tarfile.open(tmp_path / "many.tar", "w") as archive:
            for number in range(count):
                archive.addfile(tarfile.TarInfo(f"{number:0100}.png"))
        tracemalloc.start()
        paths = (f"{number:0100}.png" for number in range(count))
        read = sum(1 for _ in Listing(paths, tmp_path / "listing").read(0))
        read += sum(
            1 for _ in open_source(str(tmp_path / "many.tar"), column=None, listing=tmp_path / "listing").read(0)
        )
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert read == 2 * count
        return highest

    peak(10)  # imports and caches
    assert peak(600) < 1.5 * peak(150)


def test_a_row_group_is_not_read_at_once(tmp_path: Path) -> None:
    """A page is, which has up to 1,024 values."""
    values = [os.urandom(5_000) for _ in range(8 * 1024)]
    parquet.write_table(pa.table({"image": values}), tmp_path / "t.parquet", compression="none")
    del values
    assert parquet.read_metadata(tmp_path / "t.parquet").num_row_groups == 1
    source = open_source(str(tmp_path / "t.parquet"), column=None, listing=tmp_path / "listing")
    before = pa.total_allocated_bytes()
    highest = max(pa.total_allocated_bytes() - before for _ in source.read(0))
    assert highest < 20_000_000  # of 41 MB


def test_batches_depend_only_on_the_rows_since_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "BATCH_BYTES", 1000)
    sizes = [1, 400, 400, 400, 1, 1, 1, 1, 1, 5000, 0, 0, 999, 1, 1]
    listed = [Row(str(number), b"", size) for number, size in enumerate(sizes)]
    batches = list(make_batches(listed, 4))
    assert [[row.size for row in batch] for batch in batches] == [
        [1, 400, 400, 400],
        [1, 1, 1, 1],
        [1, 5000],
        [0, 0, 999, 1],
        [1],
    ]
    for done in range(len(batches)):
        start = sum(map(len, batches[:done]))
        assert list(make_batches(listed[start:], 4)) == batches[done:]
