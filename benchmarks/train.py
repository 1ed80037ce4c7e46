"""`make bench-train`: the article's own code, this package's loops on the same network, and airbench, in one run.

Each is a process of its own. Accuracy and time of this package come from its run directory. The
table is printed and, with every single figure, written as JSON after each of them.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from training.run_dir import RunDir

ONEDNN = {"TF_ENABLE_ONEDNN_OPTS": "1"}
ARTICLE_EPOCHS = 10
Figures = dict[str, float]


def run_json(command: Sequence[str], env: Mapping[str, str]) -> Any:
    """Run a Python module; return the last line it prints, read as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", *command], env={**os.environ, **env}, stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout.strip().rpartition("\n")[2])


def run_article(style: str, data: Sequence[str], seed: int, *, epochs: int, env: Mapping[str, str]) -> Figures:
    command = ["benchmarks.article", "--style", style, "--epochs", str(epochs), "--seed", str(seed), "--json", *data]
    result = run_json(command, env)
    figures = {"seconds": result["seconds"], "s_per_epoch": result["seconds"] / epochs}
    return figures if epochs < ARTICLE_EPOCHS else {**figures, "test_accuracy": result["test_accuracy"]}


def run_ours(options: Sequence[str], data: Sequence[str], seed: int) -> Figures:
    """Train, evaluate with and without horizontal-flip TTA, and read the run directory."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        train = ["train", *data, *options, "--seed", str(seed), "--run", str(run), "--no-export"]
        for command in (train, ["evaluate", "--mirror", str(run)]):
            subprocess.run([sys.executable, "-m", "training", *command], stdout=sys.stderr, check=True)
        folder = RunDir.open(run)
        epochs, judged = folder.read_history(), folder.read_evaluation()
    seconds = [epoch.seconds for epoch in epochs]
    return {
        "seconds": sum(seconds),
        "s_per_epoch": sum(seconds) / len(seconds),
        "images_per_s": statistics.median(epoch.images_per_s for epoch in epochs),
        "test_accuracy": judged["test"]["accuracy"],
        "mirror_accuracy": judged["mirror"]["accuracy"],
        "calibration_error": judged["test"]["calibration"]["expected_calibration_error"],
        "uncalibrated_error": judged["test"]["uncalibrated"]["expected_calibration_error"],
    }


def run_step(*options: str) -> Figures:
    figures: Figures = run_json(["benchmarks.step", *options], ONEDNN)
    return figures


def make_ways(data: Sequence[str], epochs: int) -> dict[str, Callable[[int], Figures]]:
    """Return what can be measured: each takes a seed."""
    article = ["--variant", "sequential", "--epochs", str(epochs)]
    return {
        "article, fit": lambda seed: run_article("fit", data, seed, epochs=epochs, env={}),
        "article, tape": lambda seed: run_article("tape", data, seed, epochs=epochs, env={}),
        "article, fit, oneDNN on": lambda seed: run_article("fit", data, seed, epochs=2, env=ONEDNN),
        "article, tape, oneDNN on": lambda seed: run_article("tape", data, seed, epochs=2, env=ONEDNN),
        "sequential, bare step": lambda _: run_step(),
        "sequential, fit": lambda seed: run_ours([*article, "--loop", "fit"], data, seed),
        "sequential, custom": lambda seed: run_ours([*article, "--loop", "custom"], data, seed),
        "airbench quick, bare step": lambda _: run_step("--variant", "airbench"),
        "airbench quick": lambda seed: run_ours(["--variant", "airbench"], data, seed),
        "airbench quick, float32": lambda seed: run_ours(["--variant", "airbench", "--dtype", "float32"], data, seed),
        "airbench best": lambda seed: run_ours(["--variant", "airbench", "--preset", "best"], data, seed),
    }


def format_table(results: Mapping[str, Sequence[Figures]]) -> str:
    """Return a row for each way: means over the seeds, accuracies with the range."""
    lines = [
        "| way | seeds | s | s an epoch | ratio | images/s | test accuracy | mirrored | ECE raw | ECE |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    base = _mean(results.get("article, fit", ()), "s_per_epoch")
    for way, runs in results.items():
        per_epoch = _mean(runs, "s_per_epoch")
        cells = [
            _number(_mean(runs, "seconds"), "{:,.0f}"),
            _number(per_epoch, "{:.1f}"),
            _number(per_epoch and base and per_epoch / base, "{:.2f}"),
            _number(_mean(runs, "images_per_s"), "{:,.0f}"),
            _share(runs, "test_accuracy"),
            _share(runs, "mirror_accuracy"),
            _number(_mean(runs, "uncalibrated_error"), "{:.3f}"),
            _number(_mean(runs, "calibration_error"), "{:.3f}"),
        ]
        lines.append(f"| {way} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(runs: Sequence[Figures], figure: str) -> float | None:
    values = [run[figure] for run in runs if figure in run]
    return statistics.mean(values) if values else None


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _share(runs: Sequence[Figures], figure: str) -> str:
    values = [run[figure] for run in runs if figure in run]
    if not values:
        return ""
    mean = f"{statistics.mean(values):.2%}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2%} to {max(values):.2%})"


@click.command(context_settings={"show_default": True, "max_content_width": 110})
@click.option("--data", help="Where CIFAR-10 lies.  [default: as in training]")
@click.option("--epochs", type=click.IntRange(1), default=ARTICLE_EPOCHS, help="Of the article's network.")
@click.option("--seeds", type=click.IntRange(1), default=3, help="Runs of each way; one for airbench best.")
@click.option("--way", "chosen", multiple=True, help="Only these; may be repeated.  [default: all]")
@click.option("--output", type=click.Path(path_type=Path), default=Path("benchmarks/results/train.json"))
@click.option("--resume", is_flag=True, help="Keep what OUTPUT holds, and measure what is missing.")
def main(data: str | None, epochs: int, seeds: int, chosen: Sequence[str], output: Path, *, resume: bool) -> None:
    """Measure training: time, ratio to the article's own code, accuracy, calibration. Hours, with all seeds."""
    ways = make_ways(["--data", data] if data else [], epochs)
    if unknown := set(chosen) - ways.keys():
        raise click.UsageError(f"no such way: {', '.join(unknown)}; there are {'; '.join(ways)}")
    results: dict[str, list[Figures]] = {}
    if resume:
        if not output.exists():
            raise click.UsageError(f"there is no {output} to go on with: leave out --resume")
        before = json.loads(output.read_text())
        if before["epochs"] != epochs:
            raise click.UsageError(f"{output} holds runs of {before['epochs']} epochs: --epochs {before['epochs']}")
        results = before["ways"]
    output.parent.mkdir(parents=True, exist_ok=True)
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    for seed in range(seeds):
        for way, measure in ways.items():
            once = way.endswith(("best", "step", "on"))
            if (chosen and way not in chosen) or (once and seed) or len(results.get(way, ())) > seed:
                continue
            click.echo(f"{way}, seed {seed} ...", err=True)
            try:
                figures = measure(seed)
            except subprocess.CalledProcessError as error:  # it has said why
                raise click.ClickException(
                    f"{way}, seed {seed}: {' '.join(error.cmd)} failed; --resume keeps what was measured before"
                ) from None
            results.setdefault(way, []).append(figures)
            click.echo(f"  {results[way][-1]}", err=True)
            output.write_text(json.dumps({"machine": machine, "epochs": epochs, "ways": results}, indent=2) + "\n")
    click.echo(format_table(results))


if __name__ == "__main__":
    main()
