# Everything runs in one environment, $(VENV), made on first use and reused afterwards.
#   make test                         uses .venv, made with a Python 3.10, 3.11 or 3.12 that is found on PATH
#   make test PYTHON=python3.11       makes it with this interpreter
#   make test VENV=/path/to/env       uses (or makes) another environment; several clones may share one
#   make env REQUIREMENTS=requirements.in    the same versions without their hashes, for files of another index

VENV ?= .venv
PYTHON ?= python3
REQUIREMENTS ?= requirements.txt
PYTEST_ARGS ?=
# Processes that run tests; 0 runs them in pytest's own, for a debugger or a GPU.
WORKERS ?= 2

SHELL := /bin/bash
.DEFAULT_GOAL := help
# The tests of one module stay in one process, which makes what they share once.
PARALLEL := -n $(WORKERS) --dist loadscope

.PHONY: help quickstart quickstart-multilingual test test-all test-reliability lint env lock clean

# One environment can serve several clones, but its editable install points to one of them only.
# PYTHONPATH comes before site-packages: the code of this checkout is always the one that runs.
export PYTHONPATH := $(CURDIR)

# The stamp carries a checksum of what is installed, so changed $(REQUIREMENTS) or setup.py installs again,
# and an unchanged one does not, whatever the files' dates.
PINS := $(shell cat $(REQUIREMENTS) setup.py | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.installed-$(PINS)
IN_ENV := "$(VENV)/bin/python"
HASHES := $(if $(filter %.txt,$(REQUIREMENTS)),--require-hashes)

NEEDED := Python 3.10, 3.11 or 3.12
IS_SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
# A PYTHON given by the user is taken or refused; the default may be replaced by another one on PATH.
CANDIDATES := $(PYTHON) $(if $(filter file,$(origin PYTHON)),python3.11 python3.12 python3.10)

help:
	@echo 'make quickstart   prune, evaluate and compare a small real model on the CPU (scripts/quickstart.py)'
	@echo 'make quickstart-multilingual   the same with a BGE-M3 in small: 25 minutes on two cores'
	@echo 'make test         lint, import contracts and tests: 7 minutes on two cores'
	@echo 'make test-all     the same with the slow tests and more random examples: 20 minutes'
	@echo 'make test-reliability   kills, ranks and bad input: up to 35 minutes'
	@echo 'make lint         ruff and import contracts only'
	@echo 'make env          make or update the environment only'
	@echo 'make lock         write requirements.txt from requirements.in, with the hashes of all files'
	@echo 'make clean        remove caches and build artefacts (keeps the environment and results)'
	@echo
	@echo 'PYTEST_ARGS="-k gate" adds pytest arguments, WORKERS=$(WORKERS) is how many processes run tests.'
	@echo 'Needs $(NEEDED). Variables: VENV=$(VENV) PYTHON=$(PYTHON)'

quickstart: $(STAMP)
	$(IN_ENV) scripts/quickstart.py

quickstart-multilingual: $(STAMP)
	$(IN_ENV) scripts/quickstart.py --multilingual

test: lint
	$(IN_ENV) -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-all: lint
	$(IN_ENV) -m pytest $(PARALLEL) -m "not gpu and not reliability and not benchmark" \
	  --hypothesis-profile=nightly $(PYTEST_ARGS)

# One process: ranks and kills of several tests at once would only time each other out.
test-reliability: $(STAMP)
	$(IN_ENV) -m pytest -m reliability $(PYTEST_ARGS)

lint: $(STAMP)
	$(IN_ENV) -m ruff check .
	$(IN_ENV) -m ruff format --check .
	"$(VENV)/bin/lint-imports"

env: $(STAMP)
	@echo '$(VENV) is ready'

# pip is asked for rather than the folder: a venv made without ensurepip has the folder but no pip.
$(STAMP):
	@set -eu; \
	if ! $(IN_ENV) -m pip --version >/dev/null 2>&1; then \
	  for candidate in $(CANDIDATES); do \
	    if "$$candidate" -c '$(IS_SUPPORTED)' >/dev/null 2>&1; then found="$$candidate"; break; fi; \
	  done; \
	  if [ -z "$${found:-}" ]; then \
	    echo "$(PYTHON) is $$("$(PYTHON)" --version 2>&1 | head -n 1)." >&2; \
	    echo 'To fix, install $(NEEDED), or name one: make $(or $(MAKECMDGOALS),test) PYTHON=python3.11' >&2; \
	    exit 1; \
	  fi; \
	  echo "Making $(VENV) with $$("$$found" --version) ($$found)"; \
	  "$$found" -m venv "$(VENV)"; \
	fi; \
	if ! $(IN_ENV) -c '$(IS_SUPPORTED)'; then \
	  echo "$(VENV) has $$($(IN_ENV) --version), but $(NEEDED) is needed." >&2; \
	  echo 'To fix, remove that folder or choose another: make $(or $(MAKECMDGOALS),test) VENV=.venv311' >&2; \
	  exit 1; \
	fi
	rm -f "$(VENV)"/.installed-*
	$(IN_ENV) -m pip install --disable-pip-version-check $(HASHES) -r $(REQUIREMENTS)
	$(IN_ENV) -m pip install --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch "$@"

# pip install uv first; [tool.uv] in pyproject.toml says for which systems.
lock:
	UV_CUSTOM_COMPILE_COMMAND='make lock' uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-annotate requirements.in -o requirements.txt

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find bge_pruning scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
