# Everything a person, or the project's CI, runs. `make help` explains each target.

PYTHON := .venv/bin/python
# Tests run at once. Many wait more than they work; with too many the timed ones wait for each other.
JOBS ?= 3
# Words for pytest: make test TESTS=tests/unit, make test TESTS='-k guard'.
TESTS ?=
# How long each test of `make fuzz` goes on. PULLBACK_HISTORY_STEPS=5000 ends the random histories by their steps,
# PULLBACK_HISTORY_SEED=7 says which.
HOURS ?= 0.25

SOURCES := $(wildcard src tests bench demo)

.DEFAULT_GOAL := help
.PHONY: help setup check test fuzz bench demo docs clean

help:  ## Show this
	@echo 'Usage: make TARGET. On Debian 12+ or Ubuntu 24.04+; `setup` installs packages and then wants root.'
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## Install what is missing (packages of the distribution, .venv); the command is .venv/bin/pullback then
	@tools/setup.sh

check: setup  ## Look for mistakes without running anything: style, format, types (less than a minute)
	@$(PYTHON) -m ruff check $(SOURCES)
	@$(PYTHON) -m ruff format --check $(SOURCES)
	@$(PYTHON) -m mypy $(SOURCES)

test: setup  ## Run the tests on real QEMU (minutes); TESTS='…' are words for pytest, JOBS=3 run at once
	@$(PYTHON) -m pytest -q -n $(JOBS) -m 'not slow' $(TESTS)

fuzz: setup  ## Run the long tests with random input for HOURS=0.25
	@PULLBACK_FUZZ_SECONDS=$$(awk 'BEGIN { print int($(HOURS) * 3600) }') \
	    $(PYTHON) -m pytest -q -m slow --hypothesis-show-statistics --timeout $$(awk 'BEGIN { print int($(HOURS) * 3600 + 600) }') $(TESTS)

bench: setup  ## Measure speed against nbdcopy and restic, and print ratios
	@$(PYTHON) bench/api.py
	@$(PYTHON) bench/run.py
	@$(PYTHON) bench/restic.py
	@$(PYTHON) bench/serve.py

demo: setup  ## Boot a small guest, back it up while it writes, restore each point, and prove it (minutes)
	@$(PYTHON) demo/demo.py

docs: setup  ## Write the generated pages again (docs/exit-codes.md, docs/commands.md, man/)
	@$(PYTHON) -m pullback.cli.exitcodes docs/exit-codes.md
	@$(PYTHON) -m pullback.cli.reference docs/commands.md
	@$(PYTHON) -m pullback.cli.manpages man

clean:  ## Remove what was made here: .venv and caches (packages of the distribution stay)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build src/*.egg-info
	find src tests bench tools -name __pycache__ -type d -prune -exec rm -rf {} +
