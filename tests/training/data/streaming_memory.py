"""Writes shards of a folder, streams an epoch and an evaluation, and prints the growth of the memory as JSON."""

from __future__ import annotations

import itertools
import json
import resource
import sys
from pathlib import Path

import numpy as np

from training.data import Split
from training.data.input_pipeline import evaluation_batches, steps_per_epoch, training_batches
from training.data.shard_writer import write_shards
from training.data.shards import load_shards


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def stream(split: Split) -> None:
    batches = training_batches(split, batch_size=64, seed=0, first_epoch=0)
    for images, _ in itertools.islice(batches, steps_per_epoch(split, 64)):
        assert images.shape[1:] == (128, 128, 3)
    for images, _ in evaluation_batches(split, batch_size=250):
        assert images.shape[1:] == (128, 128, 3)


def main() -> None:
    folder, out = map(Path, sys.argv[1:])
    small = np.zeros((256, 128, 128, 3), np.uint8)
    stream(Split(small, np.zeros(256, np.int64)))  # what TensorFlow needs for itself
    before = peak_bytes()
    write_shards(folder, out)
    dataset = load_shards(out, image_size=None, stream=True)
    stream(dataset.train)
    decoded = sum(int(np.prod(split.images.shape)) for split in (dataset.train, dataset.test))
    print(json.dumps({"growth": peak_bytes() - before, "decoded": decoded}))


if __name__ == "__main__":
    main()
