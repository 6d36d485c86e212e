# Two commands on a fresh machine with Python 3.11: make demo, make test.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test lint clean

# exports, serves with Triton, predicts a real clip, leaves an overlay, a contact sheet and the maps in out/
demo: .venv/installed
	$(BIN)/mubic-deploy demo --out out

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v == (3, 11) else "Python 3.11 is needed, not %d.%d: make PYTHON=..." % v)'
	@echo "installing into .venv: 5.6 GB, some minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf .venv out
