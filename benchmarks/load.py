"""Load generators in a closed loop: by wrk, and over gRPC by h2load. `open_loop.py` has the open loop."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Sends the bodies in turn; prints one line of JSON at the end.
_WRK_SCRIPT = """
local bodies, headers = {}, {}
for name in os.getenv("WRK_BODIES"):gmatch("[^,]+") do
  local file = io.open(name, "rb"); bodies[#bodies + 1] = file:read("*a"); file:close()
end
for name, value in os.getenv("WRK_HEADERS"):gmatch("([^=\\n]+)=([^\\n]+)") do headers[name] = value end
local requests, position = {}, 0
init = function()
  for index, body in ipairs(bodies) do requests[index] = wrk.format("POST", wrk.path, headers, body) end
end
request = function()
  position = position % #requests + 1
  return requests[position]
end
done = function(summary, latency)
  local errors = summary.errors
  io.write(string.format('\\nRESULT {"requests": %d, "us": %d, "p50_us": %d, "p99_us": %d, "errors": %d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""

_GRPC_METHOD = "/tensorflow.serving.PredictionService/Predict"
_GRPC_HEAD_BYTES = 5  # before each message: whether it is compressed, and its length


@dataclass(frozen=True)
class Target:
    """Where requests go, and what they are: the bodies are sent in turn."""

    url: str  # http://host:port/path, or host:port for gRPC
    headers: Mapping[str, str]
    bodies: Sequence[bytes]
    images: int = 1  # in each


@dataclass(frozen=True)
class Measured:
    """One round of load."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    errors: int

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.seconds


def run_closed_loop(target: Target, *, connections: int, seconds: float, threads: int = 1) -> Measured:
    """Send the next request on each of so many connections when the last is answered, by wrk."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "script.lua").write_text(_WRK_SCRIPT)
        for index, body in enumerate(target.bodies):
            (folder / f"{index}").write_bytes(body)
        command = ["wrk", f"-t{threads}", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "30s"]
        env = {
            "WRK_BODIES": ",".join(str(folder / str(index)) for index in range(len(target.bodies))),
            "WRK_HEADERS": "\n".join(f"{name}={value}" for name, value in target.headers.items()),
        }
        script = [*command, "-s", str(folder / "script.lua"), target.url]
        done = subprocess.run(script, env={**os.environ, **env}, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.rpartition("RESULT ")[2])
    return Measured(
        result["requests"], result["us"] / 1e6, result["p50_us"] / 1e3, result["p99_us"] / 1e3, result["errors"]
    )


def run_closed_loop_grpc(target: Target, *, connections: int, seconds: float, threads: int = 1) -> Measured:
    """As `run_closed_loop`, calling Predict, by h2load: a client in Python takes as long for a call as the service.

    It sends the first body only, and does not know gRPC, where a refusal has the status 200: but no data.
    """
    import grpc

    body = target.bodies[0]
    with grpc.insecure_channel(target.url, options=[("grpc.max_send_message_length", -1)]) as channel:
        metadata = [(name.lower(), value) for name, value in target.headers.items()]
        reply_bytes = _GRPC_HEAD_BYTES + len(channel.unary_unary(_GRPC_METHOD)(body, metadata=metadata, timeout=30))
    with tempfile.TemporaryDirectory() as name:
        message, log = Path(name, "message"), Path(name, "log")
        message.write_bytes(bytes([0]) + len(body).to_bytes(4) + body)
        command = ["h2load", f"-t{threads}", f"-c{connections}", "-m1", f"-D{seconds:g}", "-d", str(message)]
        headers = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
        headers += [part for name, value in metadata for part in ("-H", f"{name}: {value}")]
        url = f"http://{target.url}{_GRPC_METHOD}"
        done = subprocess.run(
            [*command, *headers, f"--log-file={log}", url], capture_output=True, text=True, check=True
        )
        rows = np.loadtxt(log, dtype=np.int64, ndmin=2)  # of each request: start, status, microseconds
    data = re.search(r"\((\d+)\) data", done.stdout)
    assert data
    return _summarize(rows[:, 2] / 1e6, seconds, len(rows) - int(data[1]) // reply_bytes)


def _summarize(latencies_s: Sequence[float] | np.ndarray, elapsed_s: float, errors: int) -> Measured:
    p50_ms, p99_ms = np.percentile(latencies_s, [50, 99]) * 1e3
    return Measured(len(latencies_s), elapsed_s, float(p50_ms), float(p99_ms), errors)
