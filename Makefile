# Two commands are enough: `make demo` and `make test`. `make help` lists the rest.
#
#   VENV=path        the environment to use; made if it is not there (default .venv)
#   PYTHON=python3   which Python makes it, 3.11 or newer
#   CONSTRAINTS=     install the newest versions in place of the tested ones

VENV ?= .venv
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
JOBS ?= 2
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

BIN := $(VENV)/bin
# the stamp names the checkout that was installed, so one environment can serve several checkouts in turn
STAMP := $(VENV)/.diptych
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif
PIP := $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
BENCHMARKS := loader shards remote shuffle_quality order_scale train_step end_to_end loss grad_cache compile time_to_accuracy fusion_cv saving overhead faults soak

export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

.PHONY: demo
demo: install ## the whole road on real pictures: fetch, pretrain, evaluate, fine-tune, report
	@$(BIN)/diptych demo

.PHONY: test
test: lint ## lint, types and the fast tests
	@echo "==> fast tests ($(JOBS) at a time, some 8 minutes on 2 cores)"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n $(JOBS) --dist loadfile

.PHONY: test-slow
test-slow: install ## the long tests: kill and resume, real corpus, the demo in small
	@echo "==> slow tests (some 20 minutes on 2 cores)"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow -n $(JOBS) --dist loadfile

.PHONY: lint
lint: install ## ruff, pyright (strict) and codespell
	@echo "==> lint and types (about a minute)"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "run: $(BIN)/ruff format ."; exit 1; }
	@mkdir -p .links && ln -sfn .. .links/diptych
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@git ls-files -z -- '*.py' '*.md' '*.yaml' '*.toml' Makefile .ci | xargs -0 $(BIN)/codespell
	@echo "==> lint and types: clean"

.PHONY: bench
bench: install ## side-by-side measurements; rows go to benchmarks/results (an hour or two)
	@for name in $(BENCHMARKS); do echo "==> benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py; done

.PHONY: clean
clean: ## remove what the tools left here; runs/, the environment and the cache stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .coverage* .links
	find . -path ./.venv -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

.PHONY: install
install: $(STAMP) ## make the environment and install Diptych into it (done by the others when needed)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: Diptych needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) -V 2>&1 || echo not there); give one with PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "error: this Python has no venv module; install it (Debian: apt install python3-venv) or give an environment with VENV=..." >&2; exit 2; }
	@echo "==> making the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> installing PyTorch into $(VENV) (once; 3 to 10 minutes, about 6 GB on Linux)"
	@$(PIP) -q torch torchvision
	@echo "==> installing Diptych and the rest (once; about a minute)"
	@$(PIP) -q -e '.[demo,test,fast]'
	@printf '%s' '$(CURDIR)' > $(STAMP)
