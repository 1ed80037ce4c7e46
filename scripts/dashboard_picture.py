"""Draws deploy/observability/dashboard.json from a run under load: docs/images/dashboard.png.

It is not a Grafana screenshot, because Debian has no Grafana. A stock Prometheus scrapes the service, each panel's
own queries are sent to Prometheus's HTTP API, and matplotlib draws the results in the dashboard's layout.
"""

from __future__ import annotations

import io
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import grpc
import httpx
import matplotlib.dates
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator
from PIL import Image
from tensorflow_serving.apis import predict_pb2

from scripts.prometheus import Prometheus, fill_in, find_missing, read_panels
from serving import Server

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "dashboard.png"
RATE_INTERVAL = "10s"
UNIT_INCHES = (0.5, 0.26)  # of Grafana's grid
COLOURS_OF_FILE = 256
COLOURS = ("#3274d9", "#e0752d", "#56a64b", "#a352cc", "#e02f44", "#c9a000", "#1f9aa8", "#7c7c7c")
SHADES = {
    "green": ("#56a64b", "#96d98d"),
    "blue": ("#3274d9",),
    "orange": ("#e0752d", "#ffb357"),
    "red": ("#c4162a", "#f2495c"),
}
CHARACTERS_PER_INCH = 21  # of a legend
STATES = {"green": "#2f8f3a", "orange": "#d9730d", "red": "#c4162a", "text": "#24292e"}

Line = tuple[str, np.ndarray, np.ndarray]  # label, times, values


@click.command()
@click.argument("models", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--seconds", default=150, show_default=True, help="How long the service is under load.")
@click.option("--output", type=click.Path(path_type=Path), default=IMAGE, help="[default: docs/images/dashboard.png]")
def main(models: Path, *, seconds: int, output: Path) -> None:
    """Serve a models folder with one model of images under load, and draw the dashboard."""
    if problem := find_missing():
        sys.exit(f"error: {problem}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(models, folder / "models")
        with Server(folder / "models", max_queue_size=48) as server:
            target = server.url.removeprefix("http://")
            with Prometheus(target, folder) as prometheus:
                prometheus.wait_until_scraped()
                started_s = time.time()
                put_under_load(server, folder / "models", seconds)
                draw(prometheus, started_s, time.time(), output)


def put_under_load(server: Server, models: Path, seconds: int) -> None:
    """Send requests of all protocols; in this order, a burst, a new version and a damaged one."""
    (model,) = (folder.name for folder in models.iterdir())
    inputs = httpx.get(f"{server.url}/v2/models/{model}").json()["inputs"]
    shape = [int(size) for size in next(each for each in inputs if each["datatype"] == "UINT8")["shape"][1:]]
    end_s = time.monotonic() + seconds
    burst = threading.Event()
    threads = [threading.Thread(target=send, args=(server, model, shape, end_s, kind, None)) for kind in KINDS * 2]
    threads += [threading.Thread(target=send, args=(server, model, shape, end_s, kind, burst)) for kind in KINDS * 6]
    for thread in threads:
        thread.start()
    newest = max((models / model).glob("[0-9]*"), key=lambda version: int(version.name))
    for share, action in (
        (0.35, burst.set),
        (0.55, burst.clear),
        (0.7, lambda: shutil.copytree(newest, newest.with_name(f"{int(newest.name) + 1}"))),
        (0.85, lambda: newest.with_name(f"{int(newest.name) + 2}").mkdir()),
        (0.85, lambda: (newest.with_name(f"{int(newest.name) + 2}") / "saved_model.pb").write_bytes(b"damaged")),
    ):
        time.sleep(max(0.0, end_s - (1 - share) * seconds - time.monotonic()))
        action()
    for thread in threads:
        thread.join()


KINDS = ("REST", "V2", "gRPC", "invalid")


def send(server: Server, model: str, shape: list[int], end_s: float, kind: str, burst: threading.Event | None) -> None:
    """Send requests of one kind until the end, or while there is a burst."""
    images = np.random.default_rng(0).integers(0, 256, (16, *shape), np.uint8)
    with httpx.Client(base_url=server.url, timeout=30) as client, grpc.insecure_channel(server.grpc_address) as channel:
        call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
        while time.monotonic() < end_s:
            if burst is not None and not burst.wait(0.2):
                continue
            batch = images[: 16 if burst else random.choice((1, 1, 1, 4, 16))]
            if kind == "REST":
                client.post(f"/v1/models/{model}:predict", json={"instances": batch.tolist()})
            elif kind == "V2":
                tensor = {"name": "images", "shape": batch.shape, "datatype": "UINT8", "data": batch.ravel().tolist()}
                client.post(f"/v2/models/{model}/infer", json={"inputs": [tensor]})
            elif kind == "gRPC":
                request = predict_pb2.PredictRequest()
                request.model_spec.name = model
                tensor_proto = request.inputs["images"]
                tensor_proto.dtype = 4  # DT_UINT8
                for size in batch.shape:
                    tensor_proto.tensor_shape.dim.add().size = size
                tensor_proto.tensor_content = batch.tobytes()
                with suppress(grpc.RpcError):  # refused in the burst
                    call(request.SerializeToString(), timeout=30)
            elif burst is None:
                client.post("/predict", content=b"no image", headers={"Content-Type": "image/png"})
                time.sleep(0.5)
            else:
                return
            time.sleep(0 if burst else random.uniform(0.005, 0.05))


def draw(prometheus: Prometheus, start_s: float, end_s: float, output: Path) -> None:
    """Draw all panels at their places."""
    panels = read_panels()
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    plt.rcParams.update({"font.size": 8, "font.family": "DejaVu Sans", "axes.titlesize": 9})
    width, height = 24 * UNIT_INCHES[0], rows * UNIT_INCHES[1]
    figure = plt.figure(figsize=(width, height), facecolor="#f4f5f5")
    for panel in panels:
        place = panel["gridPos"]
        left, bottom = place["x"] / 24, 1 - (place["y"] + place["h"]) / rows
        size = place["w"] / 24, place["h"] / rows
        if panel["type"] == "row":
            figure.text(left + 0.008, bottom + size[1] / 2, panel["title"], va="center", weight="bold", size=10)
            continue
        gap = 0.04 / width, 0.04 / height
        figure.add_artist(
            plt.Rectangle(
                (left + gap[0], bottom + gap[1]), size[0] - 2 * gap[0], size[1] - 2 * gap[1],
                transform=figure.transFigure, facecolor="white", edgecolor="#d8dadd", linewidth=0.8, zorder=-1,
            )
        )  # fmt: skip
        figure.text(
            left + 0.09 / width, bottom + size[1] - 0.09 / height, panel["title"],
            va="top", size=8.5, weight="medium", color="#24292e",
        )  # fmt: skip
        if panel["type"] == "stat":
            draw_stat(figure, panel, prometheus, end_s, (left + size[0] / 2, bottom + 0.42 * size[1]))
        else:
            lines = query_series(panel, prometheus, start_s, end_s)
            columns = count_columns([label for label, *_ in lines], place["w"])
            below = (0.38 + 0.13 * -(-len(lines) // columns)) / height
            inner = left + 0.62 / width, bottom + below, size[0] - 0.84 / width, size[1] - below - 0.3 / height
            axes = figure.add_axes(inner)
            draw_series(axes, lines, panel, start_s, end_s)
            if lines:
                axes.legend(
                    loc="lower left", bbox_to_anchor=(left + 0.1 / width, bottom + 0.02 / height), ncols=columns,
                    bbox_transform=figure.transFigure, frameon=False, fontsize=6.5, handlelength=1, columnspacing=1,
                    labelspacing=0.2,
                )  # fmt: skip
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    Image.open(picture).convert("RGB").quantize(COLOURS_OF_FILE).save(output, optimize=True)
    click.echo(f"{output} is written")


def draw_stat(
    figure: Any, panel: dict[str, Any], prometheus: Prometheus, end_s: float, at: tuple[float, float]
) -> None:
    """Draw the last value, in the colour of its threshold."""
    defaults = panel["fieldConfig"]["defaults"]
    query = fill_in(panel["targets"][0]["expr"], rate_interval=RATE_INTERVAL)
    result = prometheus.get("query", query=query, time=end_s)["result"]
    value = float(result[0]["value"][1]) if result else float("nan")
    colour = "text"
    for step in defaults["thresholds"]["steps"]:
        if step["value"] is None or value >= step["value"]:
            colour = step["color"]
    text = format_value(round(value, 4), defaults["unit"])
    figure.text(*at, text, size=20, weight="bold", ha="center", va="center", color=STATES[colour])


def query_series(panel: dict[str, Any], prometheus: Prometheus, start_s: float, end_s: float) -> list[Line]:
    """Return the series of all queries of a panel."""
    lines: list[Line] = []
    for target in panel["targets"]:
        query = fill_in(target["expr"], rate_interval=RATE_INTERVAL)
        for series in prometheus.get("query_range", query=query, start=start_s, end=end_s, step=1)["result"]:
            label = target["legendFormat"]
            for name, value in series["metric"].items():
                label = label.replace("{{" + name + "}}", value)
            values = np.array(series["values"], float)
            lines.append((label, values[:, 0], values[:, 1]))
    return lines


def count_columns(labels: list[str], width: int) -> int:
    """Return how many columns of a legend fit into a panel of this width."""
    characters = width * UNIT_INCHES[0] * CHARACTERS_PER_INCH
    longest = max((len(label) for label in labels), default=1) + 5  # the line before a label, and the gap after it
    return max(1, min(len(labels), int(characters / longest)))


def draw_series(axes: Axes, lines: list[Line], panel: dict[str, Any], start_s: float, end_s: float) -> None:
    """Draw series over time, as lines or stacked."""
    if not lines:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", color="#8e9297")
    colours = choose_colours([label for label, *_ in lines], panel["fieldConfig"]["overrides"])
    defaults = panel["fieldConfig"]["defaults"]
    if lines and defaults["custom"]["stacking"]["mode"] == "normal":
        times = np.arange(start_s, end_s + 1)
        heights = [np.interp(times, at, values, left=0, right=0) for _, at, values in lines]
        dates = [datetime.fromtimestamp(each) for each in times]
        axes.stackplot(dates, heights, labels=[label for label, *_ in lines], colors=colours, alpha=0.75, linewidth=0)
    else:
        for (label, at, values), colour in zip(lines, colours, strict=True):
            dates = [datetime.fromtimestamp(each) for each in at]
            axes.plot(dates, values, label=label, color=colour, linewidth=1.3)
    style(axes, defaults["unit"], start_s, end_s)


def choose_colours(labels: list[str], overrides: list[dict[str, Any]]) -> list[str]:
    """Return a colour for each series: a shade of the override whose expression matches, or the next colour."""
    colours: list[str] = []
    for position, label in enumerate(labels):
        colour = COLOURS[position % len(COLOURS)]
        for override in overrides:
            if re.search(override["matcher"]["options"].strip("/"), label):
                shades = SHADES[override["properties"][0]["value"]["fixedColor"]]
                colour = next((shade for shade in shades if shade not in colours), shades[0])
        colours.append(colour)
    return colours


def style(axes: Axes, unit: str, start_s: float, end_s: float) -> None:
    """Set the axes' limits, ticks and lines."""
    axes.set_xlim(datetime.fromtimestamp(start_s), datetime.fromtimestamp(end_s))
    axes.set_ylim(0, 1.06 * max(axes.get_ylim()[1], 1e-9))
    axes.xaxis.set_major_locator(matplotlib.dates.AutoDateLocator(minticks=3, maxticks=4))
    axes.xaxis.set_major_formatter(matplotlib.dates.DateFormatter("%H:%M:%S"))
    # Whole numbers where there are counts, and powers of two for memory.
    is_count = unit == "short" and all(np.all(np.mod(line.get_ydata(), 1) == 0) for line in axes.get_lines())
    is_memory = unit == "bytes" and axes.get_ylim()[1] < 2**31
    axes.yaxis.set_major_locator(MultipleLocator(2**28) if is_memory else MaxNLocator(4, integer=is_count))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value, unit)))
    axes.grid(visible=True, color="#e8eaed", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors="#5b6066", labelsize=7)
    for side in axes.spines.values():
        side.set_visible(False)


def format_value(value: float, unit: str) -> str:
    """Write a value in one of Grafana's units."""
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"
    if unit == "percentunit":
        return f"{100 * value:.2f}".rstrip("0").rstrip(".") + " %"
    if unit == "bytes":
        return f"{value / 2**20:,.0f} MiB"
    suffix = {"reqps": " req/s", "cps": " /s"}.get(unit, "")
    return (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") + suffix


if __name__ == "__main__":
    main()
