# Everything below runs in a virtual environment of its own, which the first of these makes. README.md has the same
# commands without make.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --progress-bar off

.DEFAULT_GOAL := help
.PHONY: help demo study test test-all clean

help: ## list these targets
	@echo 'make TARGET, where TARGET is one of'
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | while IFS="$$(printf '\t')" read -r name job; do \
		printf '  %-8s %s\n' "$$name" "$$job"; done
	@echo 'Set PYTHON=python3.12 for another Python, VENV=DIR for another place of the environment.'

demo: demo-begins $(VENV)/installed ## train a router for handwritten digits, sample with and without it: minutes
	$(VENV)/bin/python demo.py

study: $(VENV)/installed ## compare all methods on the digits: hours; QUICK=--quick: a quarter of an hour
	$(VENV)/bin/python -m study.run $(QUICK)

test: $(VENV)/installed-dev ## lint and tests: eight minutes on two cores
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m "not timed and not exhaustive"
	$(VENV)/bin/python -m pytest -m timed

test-all: test ## the same, with sweeps and long compilations: two minutes more
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal -m exhaustive

clean: ## remove the virtual environment
	rm -rf $(VENV)

.PHONY: demo-begins
demo-begins:
	@echo 'The demo trains a caching router for a small DiT on two processes (600 steps), draws 2,000 digits with and'
	@echo 'without it, and leaves a table and two pictures in results/demo. It takes a few minutes on two cores.'

$(VENV)/installed: requirements.txt
	@echo 'First, once: installing the requirements into $(VENV). It takes minutes and up to 6 GB of disk; pip is quiet.'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -r requirements.txt
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	@echo 'Installing what the tests need into $(VENV).'
	@$(PIP) -r requirements-dev.txt
	@touch $@
