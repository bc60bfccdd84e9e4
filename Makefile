# make demo   train a small GPT on real text          make test   run the tests
# make build  compile the extension                   make bench  time the kernels (GPU)
#
# PYTHON=python3.12   interpreter of the virtual environment
# TORCH=torch==2.11.0 which torch goes into it
# SYSTEM=1            use PYTHON as it is: no virtual environment, nothing installed, no network
# ARGS="..."          arguments of the script or of pytest
# The variables of setup.py (FLASH_ATTN_CUDA_ARCHS, MAX_JOBS, ...) work here too; `make build` reads them anew.
# Without a visible GPU only `make build` compiles the extension; the other targets do it if asked, by
# FLASH_ATTN_BUILD_WITHOUT_GPU=1 or by FLASH_ATTN_CUDA_ARCHS.

PYTHON ?= python3
VENV   ?= .venv
GPU    := $(shell nvidia-smi -L >/dev/null 2>&1 && echo 1)
TORCH  ?= $(if $(GPU),torch>=2.9,torch==2.13.0)
ARGS   ?=

export FLASH_ATTN_BUILD_WITHOUT_GPU ?= 0
build: export FLASH_ATTN_BUILD_WITHOUT_GPU := 1
# Part of a stamp's name, so that a GPU or a request that comes later is not overlooked.
WITH := $(if $(GPU)$(FLASH_ATTN_CUDA_ARCHS)$(filter-out 0,$(FLASH_ATTN_BUILD_WITHOUT_GPU)),-cuda)

SOURCES := setup.py pyproject.toml $(wildcard third_party/*.py csrc/*.* csrc/*/*.* csrc/*/*/*.* csrc/*/*/*/*.*)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

ifdef SYSTEM
RUN   := PYTHONPATH=$(CURDIR) $(PYTHON)
BIN   :=
READY := build/.ready-system$(WITH)
else
RUN   := $(VENV)/bin/python
BIN   := $(VENV)/bin/
READY := $(VENV)/.ready$(WITH)
endif

.PHONY: demo test build bench bench-build lint format clean

demo: $(READY)
	$(RUN) benchmarks/train.py $(ARGS)

test: $(READY)
	$(RUN) third_party/fetch_cutlass.py || echo "no CUTLASS: the tests that compile kernels are skipped"
	$(RUN) -m pytest tests $(ARGS)

bench: $(READY)
	$(RUN) benchmarks/bench_fwd_bwd.py $(ARGS)

bench-build: $(READY)
	$(RUN) benchmarks/bench_build.py $(ARGS)

build: $(READY)
	$(RUN) setup.py -q build_ext --inplace

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q "$(TORCH)" numpy "setuptools>=77" wheel ninja packaging
	touch $@

$(VENV)/.ready$(WITH): $(VENV)/.torch $(SOURCES)
	$(RUN) setup.py -q build_ext --inplace
	$(RUN) -m pip install -q --no-build-isolation -e ".[test,demo]"
	touch $@

build/.ready-system$(WITH): $(SOURCES)
	$(RUN) setup.py -q egg_info build_ext --inplace
	mkdir -p build && touch $@

lint: $(READY)
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(RUN) -m mypy
	$(BIN)clang-format --dry-run --Werror $$(find csrc tests studies -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

format: $(READY)
	$(BIN)ruff check --fix .
	$(BIN)ruff format .
	$(BIN)clang-format -i $$(find csrc tests studies -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

clean:
	rm -rf build dist *.egg-info *.so $(VENV)/.ready*
