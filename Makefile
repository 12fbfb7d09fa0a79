# `make test` on a bare machine builds .venv once and runs every test; the others need nothing more.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
# Processes that share the tests, a thread each.
WORKERS ?= 2
BENCHMARKS := $(wildcard benchmarks/[a-z]*.py)

.PHONY: demo test check bench

demo: $(STAMP)
	rm -rf demo
	$(VENV)/bin/python -m ronna.demo --out demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist loadfile

check: $(STAMP)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy src
	$(VENV)/bin/python -m pytest -q tests/rules

bench: $(STAMP)
	@echo "benchmarks: $(or $(BENCHMARKS),none yet)"
	@set -e; for file in $(BENCHMARKS); do echo "== $$file"; $(VENV)/bin/python $$file; done

$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@
