"""CIFAR-10's original files with few images in them, for tests."""

import pickle
import tarfile

import numpy as np

FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
COUNT = 20  # images in a batch


def make_batch(number, count=COUNT):
    """The dictionary that the batch of this number holds; its pixels and labels are random."""
    rng = np.random.default_rng(number)
    return {
        b"batch_label": b"a batch",
        b"labels": rng.integers(0, 10, count).tolist(),
        b"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
        b"filenames": [b"some.png"] * count,
    }


def write_batches(folder):
    """Write all batches as Python 2 did, in pickle's protocol 2; return the folder that holds them."""
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number, name in enumerate(FILES):
        (folder / name).write_bytes(pickle.dumps(make_batch(number), protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"num_vis": 3072}, protocol=2))
    return folder


def write_archive(path):
    """Write an archive of the same batches, as the original is laid out; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        archive.add(write_batches(path.parent / f"{path.name}-contents"), "cifar-10-batches-py")
    return path


def check(dataset):
    """Assert that this is what `write_batches` wrote."""
    assert dataset.name == "cifar10"
    assert dataset.class_names[::9] == ("airplane", "truck")
    assert dataset.train.images.shape == (5 * COUNT, 32, 32, 3)
    assert dataset.test.images.shape == (COUNT, 32, 32, 3)
    third = make_batch(2)
    # A row holds 1,024 red values, then green, then blue, each row by row.
    assert dataset.train.images[2 * COUNT, 1, 3].tolist() == third[b"data"][0, [35, 1059, 2083]].tolist()
    assert dataset.train.labels[2 * COUNT : 3 * COUNT].tolist() == third[b"labels"]
    assert dataset.test.labels.tolist() == make_batch(5)[b"labels"]
