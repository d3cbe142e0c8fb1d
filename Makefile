# make demo   set up, then train, package, deploy and test SmolLM2-135M on the sample dataset
# make test   set up, then run every test
# make help   everything else
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := libs/chassis libs/llamacpp services/trainer services/packager services/deployer services/gateway cli
PROJECTS := pyproject.toml constraints.txt $(wildcard proto/*.py proto/pyproject.toml proto/web4/lora/v1/*.proto) $(PACKAGES:%=%/pyproject.toml)

# The state of what runs here stays in the checkout; what took long to make stays in ~/.cache/web4lora.
export WEB4LORA_HOME ?= $(CURDIR)/.web4lora
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

##@ Use
.PHONY: demo
demo: setup ## train, package, deploy and test SmolLM2-135M on the sample dataset
	@$(BIN)/web4lora demo examples/web4/demo.yaml

.PHONY: setup
setup: $(VENV)/.runtime llama.cpp ## Python packages and llama.cpp

.PHONY: llama.cpp
llama.cpp: $(VENV)/.runtime
	@$(BIN)/python -m web4lora_llamacpp build

##@ Develop
# Two files at a time: most tests wait, for a server, a time limit or a container. A file's tests stay together.
.PHONY: test
test: setup $(VENV)/.develop servers ## every test
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(TESTS)

RANDOM_SECONDS ?= 900
RANDOM_SEED ?= 0
.PHONY: soak
soak: setup $(VENV)/.develop ## what takes long and rarely finds anything: before a release
	@$(BIN)/python -m pytest -s tests/soak
	@WEB4LORA_RANDOM_SECONDS=$(RANDOM_SECONDS) WEB4LORA_RANDOM_SEED=$(RANDOM_SEED) \
	    $(BIN)/python -m pytest -s tests/integration/gateway/test_gateway_random.py

.PHONY: servers
servers: $(VENV)/.develop ## build the real servers that the tests talk to (once, into the cache)
	@$(BIN)/python tests/servers/build.py

SECONDS_EACH ?= 60
.PHONY: fuzz
fuzz: $(VENV)/.develop ## feed our parsers with changed files: PARSERS="gguf suite" SECONDS_EACH=60
	@$(BIN)/python -m pip install --quiet --group fuzz
	@for parser in $(or $(PARSERS),$$($(BIN)/python -m tests.fuzz.fuzz)); do \
	    nice $(BIN)/python -m tests.fuzz.fuzz $$parser $(SECONDS_EACH); done

.PHONY: lint
lint: $(VENV)/.develop ## ruff, mypy, buf, import rules
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy $(PACKAGES:%=%/src)
	@cd proto && ../$(BIN)/buf lint && ../$(BIN)/buf format -d --exit-code && ../$(BIN)/buf breaking --against released.binpb
	@$(BIN)/lint-imports

.PHONY: format
format: $(VENV)/.develop ## bring the code into form, and docs/api.md to what the contract says
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .
	@cd proto && ../$(BIN)/buf format -w
	@$(BIN)/python proto/make_docs.py

GATES := tests/unit/llamacpp tests/unit/packager tests/integration/test_packager.py tests/integration/test_planted_faults.py
.PHONY: llama-cpp-update
llama-cpp-update: setup $(VENV)/.develop ## move the pin of llama.cpp to VERSION, show what changed, run the gates
	@$(BIN)/python libs/llamacpp/update_pin.py $(VERSION)
	@$(MAKE) test TESTS="$(GATES)"

.PHONY: contract
contract: $(VENV)/.develop ## at a release: record its contract, which `make lint` holds every later one against
	@cd proto && ../$(BIN)/buf build --exclude-source-info --as-file-descriptor-set -o released.binpb

.PHONY: clean
clean: ## remove the environment and the stack's state; outputs/ and the cache stay
	@if [ -x $(BIN)/web4lora ]; then $(BIN)/web4lora down; fi
	@rm -rf $(VENV) .web4lora

.PHONY: help
help:
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z.]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Name another: make PYTHON=python3.12 ...")'
	@$(PYTHON) -m venv $(VENV) || { echo "The module venv is missing: on Debian and Ubuntu, apt install python3-venv."; exit 1; }

$(VENV)/.runtime: $(VENV)/bin/python $(PROJECTS)
	@echo "python packages: installing (the first time about 2 minutes and 5 GB, most of it torch)"
	@$(BIN)/python -m pip install --quiet pip
	@$(BIN)/python -m pip install --quiet ./proto $(PACKAGES:%=-e ./%)
	@touch $@

$(VENV)/.develop: $(VENV)/.runtime
	@$(BIN)/python -m pip install --quiet --group dev
	@touch $@
