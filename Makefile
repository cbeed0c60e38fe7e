# On a fresh machine: `make demo` or `make test`. Everything lives in .venv; the system's Python is left alone.
PYTHON ?= python3
VENV ?= .venv
ROW ?= galore_adamw8bit
BIN := $(VENV)/bin

.PHONY: demo test lint pytest dist golden chaos fuzz bench growth bench-7b clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[sample,dev,kernels]'
	touch $@

demo: $(VENV)/.installed            ## pretrain on the embedded text and say where the curve lies
	$(BIN)/python scripts/demo.py

test: lint pytest                   ## everything that CI checks

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck scripts/*.sh

pytest: $(VENV)/.installed
	$(BIN)/pytest -n 2 --dist worksteal

dist: $(VENV)/.installed            ## every optimizer in every way to share it, by 2 and 4 processes; all that is compiled
	FULL=1 $(BIN)/pytest tests/test_dist.py tests/test_profile.py tests/test_documents.py

golden: $(VENV)/.installed          ## write tests/golden anew
	$(BIN)/python tests/test_golden.py

chaos: $(VENV)/.installed           ## kill runs a hundred times, and every method's; they must end as if nothing had happened
	rm -rf runs/chaos
	$(BIN)/python tests/chaos.py runs/chaos --kills 100
	$(BIN)/python tests/chaos.py runs/chaos/rows --every-row both

fuzz: $(VENV)/.installed            ## 500 random command lines, model configs and run JSONs; 300 folders of files, tokenizers and published configs
	FUZZ=500 $(BIN)/pytest tests/test_fuzz.py
	FUZZ=300 $(BIN)/pytest tests/test_fuzz_inputs.py

bench: $(VENV)/.installed           ## every goal of speed beside its peer: an hour, of a machine that does nothing else
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[sample,dev,bench]'
	$(BIN)/python scripts/bench.py $(BENCH)

growth: $(VENV)/.installed          ## how the time of an update grows with model, length, batch, rank and T: half an hour
	$(BIN)/python scripts/bench_growth.py --picture docs/benchmarks/growth.png

bench-7b: $(VENV)/.installed        ## real updates of llama_7b, by ROW=q_galore or another: an hour, 20 GB of memory, 55 GB of disk
	rm -rf runs/bench-7b
	$(BIN)/python scripts/bench_7b.py runs/bench-7b --row $(ROW)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
