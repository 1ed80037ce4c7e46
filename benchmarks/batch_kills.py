"""`.venv/bin/python -m benchmarks.batch_kills`: batch prediction that is killed at random times gives the same file.

One run is undisturbed. Others are killed by SIGKILL at random times and started again with the same command. Whenever
one ends, its file is compared with that of the undisturbed run, byte by byte, and removed.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from benchmarks.batch import write_small
from benchmarks.serve import PROJECT, export_article_model

DAMAGED_EVERY = 1_000


def start(version: Path, source: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "training", "predict", str(version), str(source), "--out", str(out)]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@click.command(context_settings={"show_default": True})
@click.option("--images", type=click.IntRange(1), default=100_000)
@click.option("--kills", type=click.IntRange(1), default=10)
@click.option("--seed", type=int, default=0, help="Of the times.")
def main(images: int, kills: int, seed: int) -> None:
    """Kill and continue predictions until one has survived its kills; fail if a file differs."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        click.echo(f"writing {images:,} images ...")
        write_small(folder / "pictures", images)
        for path in sorted((folder / "pictures").iterdir())[::DAMAGED_EVERY]:
            path.write_bytes(path.read_bytes()[:100])
        version = export_article_model(folder / "models")
        started_s = time.monotonic()
        assert start(version, folder / "pictures", folder / "undisturbed.parquet").wait() == 5  # some are damaged
        seconds = time.monotonic() - started_s
        expected = digest(folder / "undisturbed.parquet")
        click.echo(f"undisturbed: {seconds:.1f} s, {expected}")
        out = folder / "predictions.parquet"
        killed = files = 0
        while killed < kills or not files:
            process = start(version, folder / "pictures", out)
            try:
                delay_s = rng.uniform(0, seconds) if killed < kills else None
                code = process.wait(timeout=delay_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                killed += 1
                parts = len(list(folder.glob("predictions.parquet.parts/part-*.parquet")))
                click.echo(f"killed {killed} after {delay_s:.1f} s, {parts} finished parts")
                continue
            assert code == 5, code
            files += 1
            assert digest(out) == expected, "the file differs from that of the undisturbed run"
            assert not list(folder.glob("predictions.parquet.parts"))
            click.echo("complete: the same file")
            out.unlink()
    click.echo(f"{images:,} images, killed {killed} times: {files} files, all the same as undisturbed")


if __name__ == "__main__":
    main()
