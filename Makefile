# `make help` lists the targets. Each of them makes its own virtual environment and installs what it needs.
SHELL = /bin/bash
PYTHON ?= python3
VENV ?= .venv
# On Linux, pip may take the CUDA build of another version of PyTorch; it is installed first and pinned
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check
LINT_PATHS = sb3_m3po tests benchmarks examples docs/conf.py setup.py

# Small networks gain nothing from more threads, and the tests run in parallel
export OMP_NUM_THREADS ?= 1
# Nothing is drawn in a window
export MUJOCO_GL ?= disable
export MPLBACKEND ?= Agg

.DEFAULT_GOAL = help
# A recipe that fails leaves no stamp behind
.DELETE_ON_ERROR:
.PHONY: help demo test format lint check-format type docs conformance conformance-zoo benchmark benchmark-report build clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# -- the virtual environment: one folder, one stamp for each set of extras, renewed when setup.py changes

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	@echo "Installing $(TORCH) in $(VENV) ..."
	$(PIP) install --quiet "$(TORCH)"
	@touch $@

$(VENV)/.%: setup.py sb3_m3po/version.txt $(VENV)/.torch
	@echo "Installing sb3_m3po[$*] in $(VENV) ..."
	$(PIP) install --quiet "$(TORCH)" -e ".[$*]"
	@touch $@

# install-EXTRA, for each of the extras of setup.py
install-%: $(VENV)/.% ;

# `make` must not delete the stamps as intermediate files
.SECONDARY:
# One pip at a time
.NOTPARALLEL:

# -- for everyone

demo: $(VENV)/.demo ## train M3PO and PPO side by side, on HalfCheetah-v5 and on three tasks at once (4 minutes on 2 cores)
	$(BIN)/python examples/demo.py

test: $(VENV)/.tests ## run the test suite; PYTEST_ARGS="-k name" for a part of it
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

# -- for developers

format: $(VENV)/.dev ## sort imports, fix what ruff can fix, format
	$(BIN)/ruff check --fix $(LINT_PATHS)
	$(BIN)/black --quiet $(LINT_PATHS)

lint: $(VENV)/.dev ## ruff
	$(BIN)/ruff check $(LINT_PATHS)

check-format: $(VENV)/.dev ## black, without writing
	$(BIN)/black --check $(LINT_PATHS)

type: $(VENV)/.dev ## mypy
	$(BIN)/mypy $(LINT_PATHS)

docs: $(VENV)/.docs ## build docs/_build/html, every warning an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

conformance: $(VENV)/.tests ## run Stable-Baselines3's own tests on M3PO
	$(BIN)/python tests/conformance/run.py

conformance-zoo: $(VENV)/.tests ## run rl-zoo3's own tests with m3po
	$(BIN)/python tests/conformance_zoo/run.py

benchmark: $(VENV)/.tests ## time updates, predictions and planned steps
	$(BIN)/python -m benchmarks.speed

benchmark-report: $(VENV)/.tests ## make all tables and figures of the benchmarks from the committed results
	$(BIN)/python -m benchmarks.report
	$(BIN)/python -m benchmarks.ablations --dry-run
	$(BIN)/python -m benchmarks.task_table --images docs/images
	$(BIN)/python -m benchmarks.table

build: $(VENV)/.dev ## make the source distribution and the wheel in dist/
	$(BIN)/python -m build

clean: ## delete what tools and builds wrote
	rm -rf build dist docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage .coverage.* htmlcov
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## also delete the virtual environment
	rm -rf $(VENV)
