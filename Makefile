# `make demo`: train a router for the digits DiT and look at what it does. `make study`: compare all methods on it
# (hours; `make study QUICK=--quick`: a quarter of an hour). `make test`: lint and tests. All make .venv first. Without make: the commands below, in any environment with the requirements installed.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo study test clean

demo: $(VENV)/installed
	$(VENV)/bin/python demo.py

study: $(VENV)/installed
	$(VENV)/bin/python -m digits.study $(QUICK)

test: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not timed"
	$(VENV)/bin/python -m pytest -m timed

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV)
