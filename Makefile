# Every target works in a fresh clone: it sets up the virtual environment that it needs.
PYTHON  ?= python3
WORKERS ?= 2
TORCH   ?= $(shell grep '^torch==' constraints.txt)
# The versions of torch that a release is tested with: the oldest that pyproject.toml allows, to the newest.
TORCHES ?= 2.9.1 2.11.0 2.13.0 2.14.1
# uv chooses the build of torch for the machine. Without it, pip takes the default: with CUDA, on Linux.
UV      ?= $(shell command -v uv 2>/dev/null)
BIN     := .venv/bin
RACE    := $(if $(wildcard .venv/.ready),.venv,.venv-race)
PYTEST   = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help race quick test docs lint types slow integrations torch-versions $(TORCHES:%=torch-%) wheel clean

help:
	@echo 'make race    train the contenders of the default race, and write runs/race/report.html'
	@echo 'make quick   lint, and the tests of the core'
	@echo 'make test    lint, types, all tests, and all examples in the documentation'
	@echo 'make docs    the documentation as a site, build/site/index.html'
	@echo 'make slow    the long tests, and many examples of what is drawn'
	@echo 'make integrations   the tests of trainers of others, with those installed'
	@echo 'make torch-versions   the tests of the optimizers with each of torch $(TORCHES)'
	@echo 'make wheel   the archives of a release, dist/, and that they work'
	@echo 'make clean   delete what the others have made'

race: $(RACE)/.ready
	$(RACE)/bin/steepest race

# Without what takes long: compilers, mypy, the documentation.
LONG := compiled_graphs graphs types docs soap_refresh
quick: lint
	$(PYTEST) tests/core tests/reference $(LONG:%=--ignore=tests/core/test_%.py)

test: lint types
	$(PYTEST)

# Strict: a link that leads nowhere, a page without a place, and an address outside the site are errors.
docs: .venv-docs/.ready
	.venv-docs/bin/python -m doctest docs/site/hooks/docstrings.py
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build

slow: .venv/.ready
	$(PYTEST) -m slow
	$(PYTEST) -m 'hypothesis and not slow' --hypothesis-profile=many

integrations: .venv-integrations/.ready
	$(PYTEST) tests/integrations

integrations: BIN = .venv-integrations/bin

torch-versions: $(TORCHES:%=torch-%)

$(TORCHES:%=torch-%): torch-%: .venv-torch-%/.ready
	$(PYTEST) tests/core tests/reference tests/contract tests/curvature tests/linalg tests/distributed

$(TORCHES:%=torch-%): BIN = .venv-$@/bin

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.ready
	$(BIN)/mypy

.venv/.ready: EXTRAS := lab,dev
.venv/.ready: SIZE   := 0.4 GB to download, 1.5 GB on disk
.venv-race/.ready: EXTRAS := race
.venv-race/.ready: SIZE   := 0.1 GB to download, 0.4 GB on disk

.venv-integrations/.ready: EXTRAS := lab,dev,integrations
.venv-integrations/.ready: SIZE   := 0.5 GB to download, 1.7 GB on disk
# timm needs torchvision, whose build has to be that of torch: so both come from one index.
.venv-integrations/.ready: BESIDE  = $(shell grep '^torchvision==' constraints.txt)

VERSIONED := $(TORCHES:%=.venv-torch-%/.ready)
$(VERSIONED): EXTRAS := lab,dev
$(VERSIONED): SIZE   := 0.4 GB to download, 1.5 GB on disk
$(VERSIONED): TORCH   = torch==$(@D:.venv-torch-%=%)
$(VERSIONED): PINS    = $(@D)/pins.txt
$(VERSIONED): .venv-torch-%/.ready: .venv-torch-%/pins.txt

.venv-torch-%/pins.txt: constraints.txt
	mkdir -p $(@D)
	grep -vE '^(torch|triton)==' $< > $@

PINS := constraints.txt
PIP   = $(@D)/bin/python -m pip install --disable-pip-version-check -c $(PINS)
ADD_TORCH = $(if $(UV),$(UV) pip install --python $(@D)/bin/python --torch-backend=auto,$(PIP)) '$(TORCH)' $(BESIDE)

# torch goes first and exactly: a range would fetch the newest build with its GPU libraries.
.venv/.ready .venv-race/.ready .venv-integrations/.ready $(VERSIONED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else \
		"Python 3.11 or newer is needed; name one: make $(MAKECMDGOALS) PYTHON=python3.12")'
	@echo '== 1/3 A virtual environment in $(@D)'
	$(PYTHON) -m venv $(@D)
	@echo '== 2/3 $(TORCH): 0.2 GB to download for CPUs, up to 3 GB with CUDA (on Linux, unless uv is installed)'
	$(ADD_TORCH)
	@echo '== 3/3 steepest[$(EXTRAS)]: $(SIZE)'
	$(PIP) -e '.[$(EXTRAS)]'
	touch $@

# Neither torch nor steepest is installed: the reference is read from the source.
DOCS := 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])'
.venv-docs/.ready: pyproject.toml constraints.txt
	@echo '== A virtual environment in $(@D): 0.03 GB to download, 0.15 GB on disk'
	$(PYTHON) -m venv $(@D)
	$(PIP) $$($(PYTHON) -c $(DOCS))
	touch $@

wheel: .venv-wheel/.checked

# Made anew each time: nothing may be there that the wheel could lean on.
.PHONY: .venv-wheel/.checked
.venv-wheel/.checked:
	rm -rf dist src/steepest.egg-info  # a list of files from an earlier build would be believed
	$(PYTHON) -m venv --clear $(@D)
	$(PIP) build
	$(@D)/bin/python -m build
	$(@D)/bin/python .ci/wheel.py archives
	$(PYTHON) -m venv --clear $(@D)
	$(ADD_TORCH)
	$(PIP) dist/*.whl
	$(@D)/bin/python .ci/wheel.py torch
	$(PIP) "$$(echo dist/*.whl)[race]"
	$(@D)/bin/python .ci/wheel.py race

clean:
	rm -rf .venv .venv-race .venv-docs .venv-wheel .venv-integrations .venv-torch-* build dist runs .pytest_cache .mypy_cache .ruff_cache
