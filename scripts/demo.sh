#!/usr/bin/env bash
# `make demo`: train on drawn shapes, export, serve, classify a few pictures. Nothing is fetched and nothing is left running.
set -euo pipefail
cd "$(dirname "$0")/.."
port=${PORT:-8501}
python=.venv/bin/python
url=http://127.0.0.1:$port
pictures=runs/demo-pictures

printf '\n== Train on drawn shapes, evaluate, export\n'
$python -m training train --dataset shapes --epochs 8 --batch-size 32

printf '\n== Serve it\n'
$python -m serving --models-dir models --rest-port "$port" --grpc-port 0 &
server=$!
trap 'kill $server 2>/dev/null; wait $server 2>/dev/null || true' EXIT
trap 'exit 130' INT TERM
until $python -m client status --url "$url" >/dev/null 2>&1; do
    kill -0 $server 2>/dev/null || { echo "error: the service ended; see its message above" >&2; exit 1; }
    sleep 0.3
done

printf '\n== Ask it about pictures it has never seen\n'
rm -rf $pictures
$python -m training samples --dataset shapes --per-class 1 $pictures
$python -m client predict --url "$url" --model shapes $pictures

if [ -t 1 ]; then
    printf '\nThe page: %s/  (drop one of the pictures in %s on it; Ctrl-C stops the service)\n' "$url" $pictures
    wait $server
else
    printf '\nThe page: %s/  (while `make serve` runs)\n' "$url"
fi
