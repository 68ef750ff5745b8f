# One command each. `make demo` and `make test` set up what they need on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEPLOY_INSTALLED := $(VENV)/.installed-deploy
LISTEN ?= 127.0.0.1:50051

.PHONY: demo serve test test-slow test-prometheus test-deploy test-docker check bench protos dashboards sbom install clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

# torch first and alone: an open range would pull the CUDA build's gigabytes onto a CPU machine.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[server,dev]'
	touch $@

$(DEPLOY_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install -q -c constraints.txt -c deploy/constraints.txt -e '.[deploy]'
	touch $@

install: $(INSTALLED)  ## set up .venv

demo: install  ## serve the default model, stream an answer, show its internals
	$(BIN)/python bench/demo.py

serve: install  ## serve the default model on LISTEN
	$(BIN)/cutaway-server --listen $(LISTEN)

test: install  ## every test that needs no GPU, no Docker and little time
	$(BIN)/python -m pytest

test-slow: install  ## the tests marked slow
	$(BIN)/python -m pytest -m slow

test-prometheus: install  ## dashboards and rules against a real Prometheus, which has to be installed
	$(BIN)/python -m pytest -m prometheus

test-deploy: $(DEPLOY_INSTALLED)  ## Kubernetes files, Dockerfile and scripts of deploy/, without an engine or a cluster
	$(BIN)/python -m pytest -m deploy

test-docker: install  ## images and compose.yaml in a Docker engine; sets one up on a Debian machine without (root)
	$(BIN)/python -m pytest -m docker

check: install  ## format, lint, types, arrows between rooms, wire, what is generated
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf format --diff --exit-code && ../$(BIN)/buf breaking --against released.binpb
	$(BIN)/python protos/generate.py --check
	$(BIN)/python deploy/grafana/generate.py --check
	$(BIN)/python docs/generate.py --check

dashboards: install  ## regenerate deploy/grafana/dashboards, Kubernetes' copy of the rules, docs/metrics.md, docs/options.md
	$(BIN)/python deploy/grafana/generate.py
	$(BIN)/python deploy/kubernetes/generate.py
	$(BIN)/python docs/generate.py

# Of an environment with the server and nothing else: what `pip install 'cutaway[server]'` gives on this machine.
sbom: $(DEPLOY_INSTALLED)  ## list what the server is made of: build/sbom.cdx.json, build/licences.md; refuses unknown licences
	rm -rf build/served && $(PYTHON) -m venv --without-pip build/served
	$(BIN)/python -m pip --python build/served install -q -c constraints.txt '.[server]'
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o build/sbom.cdx.json build/served
	cd build && ../$(BIN)/pip-licenses --python served/bin/python --from mixed --with-urls -f markdown --output-file licences.md
	$(BIN)/pip-licenses --python build/served/bin/python >/dev/null # the rule: [tool.pip-licenses] in pyproject.toml
	rm -r build/served

bench: install  ## what this machine allows, and what the engine and the server do on it; minutes
	$(BIN)/python bench/limits.py
	$(BIN)/python bench/step.py
	$(BIN)/python bench/serve.py

protos: install  ## regenerate client/cutaway/v1 from protos/
	$(BIN)/python protos/generate.py

clean:  ## remove what was built
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
