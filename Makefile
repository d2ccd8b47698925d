# `make demo` and `make test` install what they need into .venv; the rest assumes it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check bench clean

demo: .venv/engine
	$(BIN)/kvpilot demo $(DEMO)

test: .venv/dev
	$(BIN)/python -m pytest $(PYTEST)

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/kvpilot check policies
	$(BIN)/kvpilot test policies

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

clean:
	rm -rf .venv dist build
