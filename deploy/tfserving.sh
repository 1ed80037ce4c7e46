#!/usr/bin/env bash
# `make tfserving`: TensorFlow Serving's container on the exported models, the Flask service in front. Ctrl-C ends both.
set -euo pipefail
cd "$(dirname "$0")"

fail() {
    echo "error: $1" >&2
    exit 1
}

python3 write_models_config.py "${MODELS:-../models}" models.config
command -v docker >/dev/null || fail "docker is not installed; the same models are served without it by \`make serve\`"
docker compose version >/dev/null 2>&1 || fail "docker has no compose plugin; install docker-compose-plugin (Compose v2)"
docker info >/dev/null 2>&1 || fail "the docker daemon cannot be reached; start it, or add yourself to the group docker"
echo "the page and the API: http://127.0.0.1:8501/   TensorFlow Serving itself: REST on 8601, gRPC on 8600"
BACKEND=tensorflow-serving exec docker compose -p image-classifier -f compose.yaml up --build tensorflow-serving service
