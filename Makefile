# Each target sets up everything that it needs in .venv; nothing is installed twice.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: train test test-slow lint clean

train: $(VENV)/ready
	$(RUN) train.py experiment=quickstart

test: lint
	$(RUN) -m pytest -n 2 -m "not slow"

test-slow: $(VENV)/ready
	$(RUN) -m pytest -n 2 -m slow

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# The stamp is newer than the requirements once they are installed.
$(VENV)/ready: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -c "import sys; sys.version_info[:2] in ((3, 11), (3, 12)) or sys.exit('Strider needs Python 3.11 or 3.12, this is ' + sys.version.split()[0] + '; call make with PYTHON=python3.12')"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV)
