# make demo and make test do everything on a fresh machine: they set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup demo test lint validate accuracy bench seed clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

demo: setup
	$(BIN)/python tools/demo.py

test: setup
	$(BIN)/python -m pytest -n 2 -m "not validation and not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

validate: setup
	$(BIN)/python tools/validate_seed.py
	$(BIN)/python tools/validate_throughput.py
	$(BIN)/python tools/validate_collectives.py
	$(BIN)/python -m pytest -m "validation or slow"

# docs/accuracy.md anew, from the measured data beside this checkout.
accuracy: setup
	$(BIN)/python tools/accuracy.py

bench: setup
	$(BIN)/python tools/bench.py
	$(BIN)/python tools/bench_allocator.py

# The published table's workloads anew, with the transformers they ran with, in an environment of its own.
seed: .venv-seed/.installed
	.venv-seed/bin/python tools/make_seed_workloads.py

.venv-seed/.installed: constraints-seed.txt
	test -x .venv-seed/bin/python || $(PYTHON) -m venv .venv-seed
	.venv-seed/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-seed.txt
	touch $@

clean:
	rm -rf .venv .venv-seed build dist out *.egg-info
