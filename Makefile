# Every target but gpu makes its own environment in .venv when it is missing: no set-up comes before them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PEERS := $(VENV)/peers
PAGES := $(VENV)/pages
TOO_OLD := "DSMR needs Python 3.11 or newer, but this is Python %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2]
DEMO ?= demo
# Rounds and shapes of `make bench`: full (five minutes on two cores), or quick (two).
BENCH ?= full

.PHONY: demo test test-quick test-soak bench gpu docs matrix lint format clean
.DELETE_ON_ERROR:

demo: $(READY)  ## compose a corpus, train two models on it, measure them, continue a piece, draw
	$(BIN)/dsmr demo --out $(DEMO)

test: $(READY)  ## the test suite
	$(BIN)/python -m pytest tests -n auto --dist worksteal -q -m "not soak"

test-soak: $(READY)  ## what takes longest: compiled kernels on the virtual GPU, runs killed again and again, hostile files
	$(BIN)/python -m pytest $$(grep -rl --include='test_*.py' mark.soak tests) -n auto --dist worksteal -q -m soak

test-quick: $(READY)  ## without what takes seconds (marked slow): whole programs, compilers, the virtual GPU, real time
	$(BIN)/python -m pytest tests -n auto --dist worksteal -q -m "not slow and not soak"

bench: $(PEERS)  ## the benchmarks, each checked before it is timed, and a table for each question
	$(BIN)/python -m dsmr_kernels.costing.ceilings
	mkdir -p .benchmarks
	DSMR_BENCH=$(BENCH) $(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-quiet -q -rf \
		--benchmark-json=.benchmarks/last.json; status=$$?; \
	$(BIN)/python -m benchmarks.report .benchmarks/last.json --out .benchmarks/report && exit $$status

gpu:  ## tests, measurements and goals on this machine's GPU, ten minutes; uses PYTHON as it is: torch, triton, pytest
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu

docs: $(PAGES)  ## the pages as a site in site/, every link checked, nothing asked of another host
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	$(BIN)/python docs/check_site.py site

matrix:  ## the quick tests on the wheel, in a fresh environment for each Python and PyTorch of .ci/matrix
	.ci/matrix

lint: $(READY)  ## style, unused code, types, who imports whom, and the drawing of it
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python docs/draw_architecture.py --check
	$(BIN)/python docs/draw_concepts.py --check

format: $(READY)  ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python docs/draw_architecture.py
	$(BIN)/python docs/draw_concepts.py

clean:  ## remove the environment and what the tools leave behind
	rm -rf $(VENV) site .matrix .mypy_cache .ruff_cache .import_linter_cache .pytest_cache .hypothesis .benchmarks build *.egg-info

$(PEERS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench]"
	touch $@

$(PAGES): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

$(READY): setup.py pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and $(TOO_OLD))'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps tinysoundfont
	touch $@
