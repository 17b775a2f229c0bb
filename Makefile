# Every target sets up what it needs in .venv by itself, and again when pyproject.toml or constraints.txt changed.
# Needs Python 3.11+ with pip, and make; neither the venv package's ensurepip nor administrator rights.
#
# PYTHON=python3.12                    another interpreter
# TORCH=2.11.0                         another torch than the tested one; a torch that .venv has is always kept
# VENV_FLAGS=--system-site-packages    use the torch that the interpreter has

VENV ?= .venv
ifneq ($(VIRTUAL_ENV),)
ifeq ($(abspath $(VENV)),$(VIRTUAL_ENV))  # activated: its own python has no pip, the one that made it has
PYTHON ?= $(shell $(VENV)/bin/python -c 'import sys; print(sys._base_executable)')
endif
endif
PYTHON ?= python3
VENV_FLAGS ?=
PIP_FLAGS ?= --quiet
PYTEST_FLAGS ?=
ARGS ?=

STAMPS := $(VENV)/stamps
BIN := $(VENV)/bin
PIP := $(PYTHON) -m pip --python $(BIN)/python --disable-pip-version-check
INSTALL = $(PIP) install $(PIP_FLAGS) --constraint $(STAMPS)/constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo add test test-all check format proto bench docs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

demo: $(STAMPS)/base ## train a small MemoryFormer on this machine's Python sources (2-3 minutes) into a new runs/demo-N
	@mkdir -p runs; n=1; while [ -e runs/demo-$$n ]; do n=$$((n + 1)); done; \
	$(BIN)/mfdist train demo --out runs/demo-$$n $(ARGS) && echo 'Here mfdist is $(BIN)/mfdist.'

add: ## install an extra of pyproject.toml into .venv: make add EXTRA=ray
	@$(if $(EXTRA),,echo 'EXTRA must name an extra of pyproject.toml, as in: make add EXTRA=ray'; exit 2)
	@$(MAKE) --no-print-directory $(STAMPS)/$(EXTRA)

test: $(STAMPS)/test ## run the tests (about 35 minutes on 2 cores)
	@$(BIN)/python -m pytest $(PYTEST_FLAGS)

test-all: $(STAMPS)/test ## run the slow and the large tests too, property tests on examples of their own
	@$(BIN)/python -m pytest -m "" --hypothesis-profile=search $(PYTEST_FLAGS)

check: $(STAMPS)/check ## formatting, lint, types, import order, shape of the tree
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_structure.py

format: $(STAMPS)/check ## format the sources and mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: $(STAMPS)/test ## generate table_server/proto/*_pb2* from the .proto file
	cd $(CURDIR) && $(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. mfdist/table_server/proto/table_v1.proto

bench: $(STAMPS)/base ## check the kernels against the reference, then time them
	@$(BIN)/mfdist bench kernels $(ARGS)

docs: $(STAMPS)/docs ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove what the targets made, .venv included; runs/ stays
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or later is needed; got "$(PYTHON)": name another one, as in: make PYTHON=python3.12'; exit 1; }
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || \
	  { echo 'pip is needed and "$(PYTHON)" has none: install it, on Debian with: apt install python3-pip'; exit 1; }
	@$(PYTHON) -m venv --without-pip $(VENV_FLAGS) $(VENV)

$(STAMPS)/constraints.txt: constraints.txt .ci/torch.sh | $(BIN)/python
	@mkdir -p $(STAMPS)
	@PIP='$(PIP)' PIP_FLAGS='$(PIP_FLAGS)' TORCH='$(TORCH)' sh .ci/torch.sh $(BIN)/python $@

$(STAMPS)/base: pyproject.toml $(STAMPS)/constraints.txt
	@echo 'Installing mfdist into $(VENV), with what reports, exports and table servers need'
	@$(INSTALL) --editable '.[report,safetensors,server]'
	@touch $@

$(STAMPS)/%: pyproject.toml $(STAMPS)/constraints.txt
	@echo 'Installing mfdist and what "make $*" needs into $(VENV)'
	@$(INSTALL) --editable '.[$*]'
	@touch $@
