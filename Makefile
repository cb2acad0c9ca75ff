# The project's commands. Python 3.11 or newer, pip and make are all they need; the rest is installed into .venv.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
PROTOS := $(shell find protos -name '*.proto')
UV_COMPILE := $(BIN)/uv pip compile --quiet --generate-hashes --no-header --no-emit-index-url --universal --python-version 3.11
PACKAGES := secrets_service serving_service gateway servicekit tessera

.DEFAULT_GOAL := help
.PHONY: help demo up test test-long faults fuzz check lint format format-check types contracts protos bench lock

help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | awk -F '\t' '{printf "  make %-13s %s\n", $$1, $$2}'

# Installed anew when what it is made from has changed. Hashes are required for every package that is downloaded.
$(INSTALLED): requirements/dev.txt pyproject.toml tools/hatch_build.py $(PROTOS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

demo: $(INSTALLED) ## from nothing to a prediction that used a secret, in a minute
	$(BIN)/tessera demo

up: $(INSTALLED) ## run the platform until Ctrl-C; ARGS="--port 9090" passes options
	$(BIN)/tessera up $(ARGS)

# Most of the time is spent waiting. A file's tests stay together, in their order; the long files come first as it is.
test: $(INSTALLED) ## every test, two files at a time; T=path/or::name runs some
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(T)

test-long: $(INSTALLED) ## the tests that take minutes: timing, many more random cases; T=path runs some
	$(BIN)/pytest -m long --hypothesis-profile=anew -s $(T)

faults: $(INSTALLED) ## plant bugs in a copy and look whether the tests notice; F="name ..." plants some
	$(BIN)/python -m tests.faults $(F)

fuzz: $(INSTALLED) ## parsers against what a fuzzer makes up, ten minutes each; F="--seconds 60 name" otherwise
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/fuzz.txt
	$(BIN)/python -m tests.fuzz $(F)

check: format-check lint types contracts ## everything that is checked without running it

lint: $(INSTALLED) ## ruff's rules
	$(BIN)/ruff check .

format: $(INSTALLED) ## write the one format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix-only --quiet .

format-check: $(INSTALLED) ## whether everything has the one format
	$(BIN)/ruff format --check .

types: $(INSTALLED) ## mypy, strict: the packages, then the tests
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases tests

contracts: $(INSTALLED) ## who may import whom
	$(BIN)/lint-imports

protos: $(INSTALLED) ## compile protos/ into tessera/ again
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .

bench: $(INSTALLED) ## start a platform, measure, print the tables
	$(BIN)/python -m tests.bench

lock: $(INSTALLED) ## bring requirements/*.txt up to date with pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(UV_COMPILE) pyproject.toml -o requirements/runtime.txt
	$(UV_COMPILE) --extra dev pyproject.toml -o requirements/dev.txt
	$(UV_COMPILE) requirements/fuzz.in -o requirements/fuzz.txt
