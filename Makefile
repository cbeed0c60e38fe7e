# On a fresh machine: `make demo` or `make test`. Everything lives in .venv; the system's Python is left alone.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint pytest golden clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[sample,dev]'
	touch $@

demo: $(VENV)/.installed            ## pretrain on the embedded text and say where the curve lies
	$(BIN)/python scripts/demo.py

test: lint pytest                   ## everything that CI checks

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: $(VENV)/.installed
	$(BIN)/pytest -n 2

golden: $(VENV)/.installed          ## write tests/golden anew
	$(BIN)/python tests/test_golden.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
