# Everything one needs to work on BlindSight: `make help`.
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.blindsight-installed
# jax's CUDA plug-in, to compile the Pallas kernel without a GPU; it exists for Linux only
LANE := $(VENV)/cuda-lane
LANE_STAMP := $(if $(filter Linux,$(shell uname -s)),$(LANE)/.installed)
CODE := $(wildcard shared_profiles kernels torch_blindsight jax_blindsight scripts tests)

# Where a Python >= 3.12 may be, best first: the pinned stack is developed on 3.12.
PYENV := $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions
PYTHONS := $(strip $(PYTHON) \
  python3.12 $(wildcard $(PYENV)/3.12*/bin/python) \
  python3.13 $(wildcard $(PYENV)/3.13*/bin/python) python3)

.PHONY: help install demo test lint clean
.DEFAULT_GOAL := help

help: ## list these targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1 \t/p' $(MAKEFILE_LIST) | expand -t 18
	@echo "  VENV=folder (default .venv) and PYTHON=interpreter may be given."

install: $(STAMP) ## make the virtual environment with the pinned stack (about 4 minutes and 6 GB, once)

demo: $(STAMP) ## run the demonstration on a small model, on a CPU
	$(BIN)/blindsight demo

test: lint $(LANE_STAMP) ## lint, then run every test
	env -u TRITON_INTERPRET $(BIN)/pytest -n 2 --dist loadgroup

lint: $(STAMP) ## check style, formatting and types
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

clean: ## remove caches and build output; the virtual environment stays
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV): about 4 minutes the first time"
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[torch,jax,cli,dev]'
	@$(BIN)/python -W ignore -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true # on all cores; pip takes one
	@touch $@

$(LANE)/.installed: constraints-cuda.txt $(STAMP)
	@echo "Installing what compiles the Pallas kernel into $(LANE): about 20 seconds and 0.6 GB, once"
	@rm -rf $(LANE)
	$(BIN)/python -m pip install --quiet --no-deps --target $(LANE) -r constraints-cuda.txt
	@touch $@

# Each candidate is run, not just found: a pyenv shim may stand on PATH and fail, a system Python may lack venv.
$(BIN)/python:
	@for python in $(PYTHONS); do \
	  if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then \
	    echo "Making $(VENV) with $$("$$python" --version) ($$python)"; \
	    exec "$$python" -m venv "$(VENV)"; \
	  fi; \
	done; \
	echo "BlindSight needs Python 3.12 or later with venv. Tried: $(PYTHONS)." >&2; \
	echo "Install one (Debian, Ubuntu: apt-get install python3.12-venv; pyenv: pyenv install 3.12), or name it: make PYTHON=/path/to/python" >&2; \
	exit 1
