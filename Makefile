# `make run` and `make test` need Python 3.11 or newer and make their own environments.
PYTHON ?= python3
# Installed before the rest, so that pip does not choose another build of it.
TORCH ?= torch==2.13.0
OLDEST := .venv-oldest
NEWEST := .venv-newest
export HF_HUB_DISABLE_TELEMETRY := 1
# The two environments are tested side by side: either alone leaves a core idle now and then, and at its end.
MAKEFLAGS += --jobs=2

.PHONY: run test test-newest test-oldest lint clean

run: .venv/installed
	.venv/bin/python examples/generate.py

# The whole suite on the newest Transformers, and on the oldest that is supported what depends on it.
test: lint test-newest test-oldest

test-newest: $(NEWEST)/installed
	$(NEWEST)/bin/python -m pytest

test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest -m "not once"

lint: $(NEWEST)/installed
	$(NEWEST)/bin/ruff check
	$(NEWEST)/bin/ruff format --check

.venv/installed: EXTRAS :=
$(NEWEST)/installed: EXTRAS := [test]
$(OLDEST)/installed: EXTRAS := [test]
$(OLDEST)/installed: PINS := "transformers==5.17.*"

# One after the other: both write this package's metadata here. The second finds its downloads in pip's cache.
$(OLDEST)/installed: | $(NEWEST)/installed

.PRECIOUS: %/torch
%/torch:
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --upgrade pip
	$*/bin/python -m pip install --quiet "$(TORCH)"
	touch $@

%/installed: %/torch pyproject.toml
	$*/bin/python -m pip install --quiet $(PINS) -e ".$(EXTRAS)"
	touch $@

clean:
	rm -rf .venv $(OLDEST) $(NEWEST)
