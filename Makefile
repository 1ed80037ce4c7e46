# `make help` lists what there is to type.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

# The first Python on the PATH that is supported, 3.11 to 3.13; `make PYTHON=...` names another.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3 python; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& { echo $$python; break; }; done)
BIN := .venv/bin
INSTALLED := .venv/.installed
MADE := .venv/.made-by-make
# What else is there is not ours to clear or to remove: only what make has made, or an empty folder.
OWNS_VENV = test ! -L .venv && { test ! -e .venv || test -e $(MADE) || test -e $(INSTALLED) || test -z "$$(ls -A .venv)"; }
# What `make` installs: all but Ray, which brings a cluster's runtime and is needed only there.
EXTRAS := training serving tracing signing convert batch dev
# Dependencies of TensorFlow that the service does not import: the image is made without them. For `tensorflow` it has
# `tensorflow-cpu`.
NOT_IN_IMAGE := tensorflow keras h5py libclang markdown markdown-it-py mdurl namex optree pygments rich setuptools \
	tensorboard tensorboard-data-server wheel
LOCK := --quiet --universal --python-version 3.11 --no-emit-index-url --generate-hashes

DATASET ?= cifar10
DATA ?=
VARIANT ?= sequential
LOOP ?= fit
PRESET ?=
BACKBONE ?=
WEIGHTS ?=
EPOCHS ?=
BATCH_SIZE ?=
IMAGE_SIZE ?=
STREAM ?=
SEED ?= 0
RESUME ?=
RUN ?=
MODELS ?= models
NAME ?=
HOST ?= 127.0.0.1
PORT ?= 8501
GRPC_PORT ?= 8500
URL ?=
GRPC ?=
BUILD_OPTIONS ?=
CONTAINER_IMAGE ?=
IMAGE ?=
MODEL ?=
TO ?=
OUTPUT ?=
LABELS ?=
INPUT_SCALE ?=
# Folders of unit tests; the marker `slow` takes out those of their modules that start processes or measure.
FAST_TESTS := $(wildcard tests/client tests/training/data \
	tests/serving/api tests/serving/images tests/serving/inference)
# A variable as one word of the shell, whatever is in it: a path may have spaces, quotes and dollar signs.
quoted = '$(subst ','\'',$(value $(1)))'
export TF_CPP_MIN_LOG_LEVEL ?= 3

# Tests that measure latency, throughput or the memory of a whole service: one at a time, after all others, which run two
# at a time. With them those that log what is not Unicode: pytest's processes cannot send it to each other.
TIMED_TESTS := $(addprefix tests/serving/,test_soak.py test_memory_budget.py test_fairness.py test_overload.py \
	test_budget_limits.py test_greenlets.py http/test_many_connections.py http/test_slow_clients.py \
	test_fault_isolation.py test_quoting.py)

.PHONY: help install demo train shard import serve tfserving predict convert test test-fast test-workers test-openapi test-clients test-tfserving image test-containers bench-serve bench-client bench-train bench-compare bench-exported bench-runtimes bench-batch bench-typicality bench-scale bench-soak check coverage format screenshots dashboard-picture lock clean

help:  ## list these commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | while IFS=$$'\t' read -r name does; do \
		printf '  make %-16s %s\n' "$$name" "$$does"; done

install: $(INSTALLED)  ## create .venv with the locked dependencies

$(INSTALLED): requirements.lock
	@test -n "$(PYTHON)" || { echo "error: Python 3.11, 3.12 or 3.13 is needed; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "installing into .venv (TensorFlow is large: a minute or two) ..."
	@$(OWNS_VENV) || { echo "error: .venv was not made by make, or is a symbolic link, so it stays as it is; move it away, and run make again" >&2; exit 1; }
	@$(PYTHON) -m venv --clear .venv
	@touch $(MADE)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	@touch $@

demo: $(INSTALLED)  ## everything once, offline: train on drawn shapes, export, serve, classify
	@PORT=$(PORT) scripts/demo.sh

train: $(INSTALLED)  ## train, evaluate and export: DATASET= DATA= IMAGE_SIZE=HxW VARIANT= PRESET= BACKBONE= WEIGHTS= LOOP= EPOCHS= BATCH_SIZE= SEED= STREAM=1 NAME= or RESUME=runs/... EPOCHS= DATA= WEIGHTS=
	@$(BIN)/python -m training train --models-dir $(call quoted,MODELS) $(if $(NAME),--name $(call quoted,NAME)) \
		$(if $(DATA),--data $(call quoted,DATA)) $(if $(WEIGHTS),--weights $(call quoted,WEIGHTS)) \
		$(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(STREAM),--stream) \
		$(if $(RESUME),--resume $(call quoted,RESUME),\
		--dataset $(DATASET) $(if $(IMAGE_SIZE),--image-size $(IMAGE_SIZE)) \
		--variant $(VARIANT) $(if $(PRESET),--preset $(PRESET)) --loop $(LOOP) \
		$(if $(BACKBONE),--backbone $(BACKBONE)) \
		$(if $(BATCH_SIZE),--batch-size $(BATCH_SIZE)) --seed $(SEED))

shard: $(INSTALLED)  ## a folder of images as TFRecord shards, to train on with STREAM=1: DATA=folder OUTPUT=folder IMAGE_SIZE=HxW SEED=
	@{ test -n $(call quoted,DATA) && test -n $(call quoted,OUTPUT); } || { echo "error: name two folders: make shard DATA=photos OUTPUT=shards" >&2; exit 2; }
	@$(BIN)/python -m training shard --out $(call quoted,OUTPUT) $(if $(IMAGE_SIZE),--image-size $(IMAGE_SIZE)) \
		--seed $(SEED) -- $(call quoted,DATA)

import: $(INSTALLED)  ## export a Keras model for serving: MODEL=model.keras LABELS=file-or-list INPUT_SCALE= DATA= IMAGE_SIZE=HxW NAME=
	@test -n $(call quoted,MODEL) || { echo "error: name a model: make import MODEL=model.keras LABELS=cat,dog" >&2; exit 2; }
	@$(BIN)/python -m training import --models-dir $(call quoted,MODELS) $(if $(NAME),--name $(call quoted,NAME)) \
		$(if $(LABELS),--labels $(call quoted,LABELS)) $(if $(INPUT_SCALE),--input-scale $(INPUT_SCALE)) \
		$(if $(DATA),--data $(call quoted,DATA)) $(if $(IMAGE_SIZE),--image-size $(IMAGE_SIZE)) \
		-- $(call quoted,MODEL)

serve: $(INSTALLED)  ## serve the newest version of every model: MODELS= HOST= PORT= GRPC_PORT=
	@$(BIN)/python -m serving --models-dir $(call quoted,MODELS) --host $(HOST) --rest-port $(PORT) --grpc-port $(GRPC_PORT)

tfserving:  ## TensorFlow Serving's container on the exported models, the service in front (needs docker): MODELS=
	@models=$(call quoted,MODELS); case "$$models" in /*) ;; *) models="$$PWD/$$models";; esac; MODELS="$$models" deploy/tfserving.sh

predict: $(INSTALLED)  ## classify with the running service: IMAGE=file-or-folder MODEL=
	@test -n $(call quoted,IMAGE) || { echo "error: name an image or a folder of them: make predict IMAGE=cat.png" >&2; exit 2; }
	@$(BIN)/python -m client predict --url http://$(HOST):$(PORT) $(if $(MODEL),--model $(call quoted,MODEL)) \
		-- $(call quoted,IMAGE)

convert: $(INSTALLED)  ## an exported model for another runtime: MODEL=models/NAME TO=onnx or litert, OUTPUT=file
	@{ test -n $(call quoted,MODEL) && test -n "$(TO)"; } || { echo "error: name a model and a format: make convert MODEL=models/pets TO=onnx (or litert)" >&2; exit 2; }
	@$(BIN)/python -m training convert --to $(TO) $(if $(OUTPUT),--output $(call quoted,OUTPUT)) -- $(call quoted,MODEL)

test: $(INSTALLED)  ## every test; those on real CIFAR-10 need CIFAR10_DATA=folder
	@failed=0; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(addprefix --ignore=,$(TIMED_TESTS)) || failed=1; \
	$(BIN)/python -m pytest $(TIMED_TESTS) || failed=1; \
	exit $$failed

test-fast: $(INSTALLED)  ## the unit tests that are quick, in under a minute
	@$(BIN)/python -m pytest -m "not slow" $(FAST_TESTS)

test-workers: $(INSTALLED)  ## training with four processes, one of them killed (minutes on two cores)
	@FOUR_WORKERS=1 $(BIN)/python -m pytest tests/training/test_distribution.py -k workers_train

test-openapi: $(INSTALLED)  ## 2,000 generated requests against /openapi.json, with all checks of schemathesis
	@OPENAPI_REQUESTS=2000 $(BIN)/python -m pytest -s tests/contract/test_schemathesis.py

coverage: $(INSTALLED)  ## lines and branches that the fast tests run
	@$(BIN)/python -m coverage run -m pytest -q -m "not slow" $(FAST_TESTS)
	@$(BIN)/python -m coverage report

test-clients: $(INSTALLED)  ## clients of others, each in an environment of its own, against the service (installs them once)
	@$(BIN)/python -m tests.clients.environments

test-tfserving: $(INSTALLED)  ## the recorded exchanges against any running TensorFlow Serving: URL=http://... GRPC=host:port
	@test -n "$(URL)$(GRPC)" || { echo "error: name the server: make test-tfserving URL=http://127.0.0.1:8501 GRPC=127.0.0.1:8500" >&2; exit 2; }
	@$(if $(URL),TFSERVING_URL=$(URL) $(BIN)/python -m pytest tests/contract/test_golden_exchanges.py)
	@$(if $(GRPC),TFSERVING_GRPC=$(GRPC) $(BIN)/python -m pytest tests/contract/test_grpc_exchanges.py)

image:  ## build deploy/Dockerfile as image-classifier-serving (needs docker with BuildKit): BUILD_OPTIONS=
	@scripts/base_image.sh
	@DOCKER_BUILDKIT=1 docker build $(BUILD_OPTIONS) -f deploy/Dockerfile -t image-classifier-serving .

test-containers: $(INSTALLED)  ## the image in hardened containers: shutdown, kills, limits (needs docker): CONTAINER_IMAGE= or BUILD_OPTIONS=
	@test -n "$(CONTAINER_IMAGE)" || $(MAKE) --no-print-directory image
	@CONTAINER_IMAGE=$(or $(CONTAINER_IMAGE),image-classifier-serving) $(BIN)/python -m pytest tests/deploy/test_containers.py

bench-serve: $(INSTALLED)  ## this service beside the plain Flask script, LitServe, BentoML (needs wrk and h2load; installs the peers once)
	@$(BIN)/python -m benchmarks.serve

bench-client: $(INSTALLED)  ## 10,000 images from a folder through the service, by the client's two ways (needs wrk and h2load)
	@$(BIN)/python -m benchmarks.client

bench-train: $(INSTALLED)  ## the article's own code, the loops and airbench: time, accuracy, calibration (hours): DATA=
	@$(BIN)/python -m benchmarks.train $(if $(DATA),--data $(call quoted,DATA))

bench-compare: $(INSTALLED)  ## this service beside itself at an earlier commit (needs wrk and h2load): BEFORE=commit
	@test -n "$(BEFORE)" || { echo "error: name a commit: make bench-compare BEFORE=HEAD~1" >&2; exit 2; }
	@$(BIN)/python -m benchmarks.compare $(BEFORE)

bench-exported: $(INSTALLED)  ## exported models beside the same networks saved as they are
	@$(BIN)/python -m benchmarks.exported

bench-runtimes: $(INSTALLED)  ## exported models in TensorFlow, ONNX Runtime and LiteRT
	@$(BIN)/python -m benchmarks.runtimes

bench-batch: $(INSTALLED)  ## batch prediction beside the bare model and beside the decoder
	@$(BIN)/python -m benchmarks.batch

bench-typicality: $(INSTALLED)  ## how well an evaluated run tells outliers, and what that costs: RUN=runs/...
	@test -n $(call quoted,RUN) || { echo "error: name an evaluated run: make bench-typicality RUN=runs/..." >&2; exit 2; }
	@$(BIN)/python -m benchmarks.typicality $(call quoted,RUN)

bench-scale: $(INSTALLED)  ## requests a second against cores, workers and TensorFlow's threads (needs wrk and h2load)
	@$(BIN)/python -m benchmarks.scale

bench-soak: $(INSTALLED)  ## ten minutes of hostile and normal traffic under 2 GiB (needs Linux memory cgroups: root, or delegation)
	@$(BIN)/python -m benchmarks.soak

check: $(INSTALLED)  ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(INSTALLED)  ## put the code into the one format
	@$(BIN)/ruff check --fix --exit-zero --quiet .
	@$(BIN)/ruff format .

screenshots: $(INSTALLED)  ## the README's screenshots, taken again (needs chromium and chromedriver)
	@$(BIN)/python -m scripts.screenshots

dashboard-picture: $(INSTALLED)  ## the picture of the dashboard in docs/, drawn again from a run under load (needs Prometheus): MODELS=
	@$(BIN)/python -m scripts.dashboard_picture $(call quoted,MODELS)

lock: $(INSTALLED)  ## choose dependency versions anew (needs uv)
	@uv pip compile $(LOCK) $(addprefix --extra ,$(EXTRAS)) pyproject.toml -o requirements.lock
	@uv pip compile $(LOCK) --extra serving --extra tracing --constraint requirements.lock \
		$(addprefix --no-emit-package ,$(NOT_IN_IMAGE)) pyproject.toml deploy/requirements-image.in -o requirements-image.lock

clean:  ## remove .venv and caches; runs/ and models/ stay
	@if $(OWNS_VENV); then rm -rf .venv; else echo ".venv was not made by make, so it stays"; fi
	rm -rf .venv-peers build/clients .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
