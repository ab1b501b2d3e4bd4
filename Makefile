# make demo PROMPT="red wool coat"   creates .venv, installs, writes out/red-wool-coat.png
# make test lint types               what .ci/run runs
#
# PYTHON=python3.12       another interpreter for .venv
# PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"    torch without CUDA on Linux (saves gigabytes)

PYTHON ?= python3
VENV ?= .venv
PROMPT ?= red wool coat
export PROMPT

BIN := $(VENV)/bin
USER_STAMP := $(VENV)/.installed-user
DEV_STAMP := $(VENV)/.installed-dev
PINS := pyproject.toml constraints.txt

.PHONY: demo test test-slow lint types clean

demo: $(USER_STAMP)
	@$(BIN)/gigdiff generate "$$PROMPT" --output out --overwrite

# Two processes of one thread each: most tests are too small to keep two threads busy.
test: $(DEV_STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(DEV_STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(DEV_STAMP)
	$(BIN)/ruff check .

types: $(DEV_STAMP)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gigdiff needs Python 3.11 or newer; $(PYTHON) is older. Run: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps make the second call quick; they are older than a changed pin, so that one installs again.
# "test -x" and not a dependency on the interpreter: that is a link, dated when Python was installed.
$(USER_STAMP): $(PINS)
	@test -x $(BIN)/python || $(MAKE) --no-print-directory $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e .
	@touch $@

$(DEV_STAMP): $(PINS)
	@test -x $(BIN)/python || $(MAKE) --no-print-directory $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@touch $@ $(USER_STAMP)
