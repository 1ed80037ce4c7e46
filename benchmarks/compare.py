"""`make bench-compare BEFORE=commit`: this service beside the same service at an earlier commit.

Both run at the same time and are measured in turn, so that a slow moment of the machine meets both. Printed are the
medians of the ratios of the rounds, with their quartiles. `python -m benchmarks.compare HEAD --tokens-and-log` measures
what access control and the request log cost.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path

import click

from benchmarks.load import run_closed_loop, run_closed_loop_grpc
from benchmarks.serve import FORMS, PROJECT, Contestant, export_article_model, start_ours

WARM_S = 1
TOKEN = "0123456789abcdef0123456789abcdef"  # of the benchmark's own service
DEFAULT_FORMS = ("json", "base64", "upload", "v2")


def check_out(commit: str, folder: Path) -> None:
    """Write the files of a commit to a folder.

    Raises:
        click.ClickException: the repository has no such commit.
    """
    archive = subprocess.run(["git", "archive", commit], cwd=PROJECT, capture_output=True, check=False)
    if archive.returncode:
        raise click.ClickException(f"{commit} cannot be read from the repository: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")


def compare(before: Contestant, now: Contestant, *, form: str, connections: int, rounds: int, seconds: int) -> str:
    """Measure both in alternating rounds; returns a row of the table."""
    run = run_closed_loop_grpc if form.startswith("grpc") else run_closed_loop
    for contestant in (before, now):
        run(contestant.target, connections=connections, seconds=WARM_S)
    for number in range(rounds):
        for contestant in (before, now) if number % 2 == 0 else (now, before):
            contestant.measure(
                connections, lambda c=contestant: run(c.target, connections=connections, seconds=seconds)
            )
    pairs = list(zip(before.rounds[connections], now.rounds[connections], strict=True))
    if errors := sum(measured.errors for pair in pairs for measured in pair):
        raise click.ClickException(f"{form} at {connections} connections: {errors} requests failed")
    rates = [[measured.requests_per_s for measured in rounds] for rounds in zip(*pairs, strict=True)]
    low, median, high = statistics.quantiles([new / old for old, new in zip(*rates, strict=True)], n=4)
    cpu = [new / old for old, new in zip(before.cpu_ms[connections], now.cpu_ms[connections], strict=True)]
    return (
        f"| {form} | {connections} | {statistics.median(rates[0]):,.0f} | {statistics.median(rates[1]):,.0f} | "
        f"{median:.2f} | {low:.2f} to {high:.2f} | {statistics.median(cpu):.2f} |"
    )


@click.command(context_settings={"show_default": True})
@click.argument("commit")
@click.option("--form", "forms", type=click.Choice(FORMS), multiple=True, default=DEFAULT_FORMS)
@click.option("--connections", type=int, multiple=True, default=(1, 32, 256))
@click.option("--rounds", type=click.IntRange(3), default=9, help="Alternating.")
@click.option("--seconds", type=click.IntRange(1), default=1, help="Of each round.")
@click.option("--tokens-and-log", is_flag=True, help="This service checks a token, and logs each request as JSON.")
def main(
    commit: str, forms: Sequence[str], connections: Sequence[int], rounds: int, seconds: int, tokens_and_log: bool
) -> None:
    """Measure this service beside the one at COMMIT, in requests a second."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        check_out(commit, folder / "before")
        models = folder / "models"
        export_article_model(models)
        options: list[str] = []
        headers: dict[str, str] = {}
        if tokens_and_log:
            tokens = folder / "tokens"
            tokens.write_text(f"benchmark predict sha256:{hashlib.sha256(TOKEN.encode()).hexdigest()}\n")
            tokens.chmod(0o600)
            options = ["--auth-token-file", str(tokens), "--access-log", "--log-format", "json"]
            headers = {"Authorization": f"Bearer {TOKEN}"}
        click.echo("| form | connections | before | now | ratio | quartiles | CPU for each request |")
        click.echo("|---|---:|---:|---:|---:|---|---:|")
        for form in forms:
            with ExitStack() as stack:
                before = start_ours(form, models, folder / "before.log", project=folder / "before")
                now = start_ours(form, models, folder / "now.log", options=options)
                for contestant in (before, now):
                    contestant.target = dataclasses.replace(
                        contestant.target, headers={**contestant.target.headers, **headers}
                    )
                    if contestant.process:
                        stack.enter_context(contestant.process)
                for count in [4] if form.endswith("x64") else connections:
                    row = compare(before, now, form=form, connections=count, rounds=rounds, seconds=seconds)
                    click.echo(row)
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
