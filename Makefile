# Everything runs in .venv, which `make` sets up by itself. Needs Python 3.10 or later, and g++ for
# the kernels. `make help` lists the targets.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=
STAGES ?= build,smoke,test,sanitize,tune,bench
OUT ?= build/gpu-check

BIN := $(VENV)/bin
HAS_TORCH := -c 'import sys, torch; sys.exit(torch.__version__ < "2.11")'
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := setup.py build_cuda.py pyproject.toml $(shell find csrc -type d -o -type f -name '[!.]*')
CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

.DEFAULT_GOAL := help
.PHONY: help demo test sanitize avx512-check mutants triton-mutants cuda-check triton-check bench \
  bench-layers gpu-check gpu-bench install lint format wheel clean distclean

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed ## train a ResNet-18 on digits, fuse it, compare answers and speed
	$(BIN)/resnet-fused demo $(ARGS)

test: $(VENV)/.installed ## run the tests (ARGS="-k build" picks some)
	$(BIN)/python -m pytest --numprocesses auto $(ARGS)

sanitize: $(VENV)/.installed ## run kernels under gcc's address, undefined and thread sanitizers
	@$(PIP) 'setuptools>=77' ninja
	$(BIN)/python tests/run_variant.py $(ARGS)

avx512-check: $(VENV)/.installed ## run the AVX-512 kernels' tests, under emulation where the CPU lacks AVX-512
	@$(PIP) 'setuptools>=77' ninja
	$(BIN)/python tests/run_variant.py avx512 $(ARGS)

mutants: $(VENV)/.installed ## plant bugs in the CUDA kernels: 95% must show under emulation (ARGS="fence" picks)
	$(BIN)/python tests/run_mutants.py $(ARGS)

triton-mutants: $(VENV)/.installed ## plant bugs in the Triton kernels: each must fail a test (ARGS="split" picks)
	$(BIN)/python tests/planted_triton.py $(ARGS)

cuda-check: $(VENV)/.installed ## compile the CUDA kernels for every GPU, hold registers and instructions
	$(BIN)/python tests/check_cuda_sm80.py
	$(BIN)/python tests/check_cuda_sm90.py
	$(BIN)/python tests/check_oldest_torch.py build/cuda-check/_C_cuda.abi3.so

triton-check: $(VENV)/.installed ## compile the Triton kernels for sm_80, sm_90, sm_100: no spills, 10 minutes
	$(BIN)/python tests/check_triton.py

bench: $(VENV)/.peers ## time fused nets beside other engines (ARGS="--check" holds the goals), then ResNet-18's layers
	$(BIN)/python -m benchmarks.bench_engines $(ARGS)
	@$(MAKE) --no-print-directory bench-layers ARGS='--net resnet18'

install: $(VENV)/.installed ## set up .venv and compile the kernels, nothing more

bench-layers: $(VENV)/.installed ## time every convolution against the peak and oneDNN (ARGS="--check")
	$(BIN)/python -m benchmarks.bench_layers $(ARGS)
	@$(PIP) 'pytest-benchmark>=5'
	$(BIN)/python -m pytest benchmarks/test_layers.py --benchmark-max-time 0.3

# With PYTHON as it is, no .venv: where a GPU is, torch with CUDA is, and perhaps no network.
gpu-check: ## on a GPU: STAGES=build,smoke,test,sanitize,tune,bench in 8 minutes (or slow), records to OUT
	$(PYTHON) -m benchmarks.gpu_check --stages $(STAGES) --out $(OUT) $(ARGS)

gpu-bench: ## on a GPU: CASES=resnet18-bfloat16-32,... beside other engines; goes on where it ended
	@$(PYTHON) -m benchmarks.gpu_check.built >/dev/null 2>&1 || \
	  $(PYTHON) -m pip install --quiet --no-index --no-build-isolation --no-deps --editable .
	RESNET_FUSED_TUNE_FILE=$(abspath $(OUT))/tune.json \
	  $(PYTHON) -m benchmarks.bench_gpu --json $(OUT)/gpu.json --resume $(and $(CASES),--cases $(CASES)) $(ARGS)

lint: $(VENV)/.linters ## check style: ruff and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.linters ## bring all files into that style
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

wheel: $(VENV)/.torch ## build the sdist, and from it the abi3 wheel, into dist/
	@rm -rf dist
	@$(PIP) 'setuptools>=77'
	@$(BIN)/python -c 'from setuptools.build_meta import build_sdist; build_sdist("dist")' >/dev/null
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist dist/*.tar.gz
	@ls dist

clean: ## delete what was built
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -f resnet_fused/_C*.so resnet_fused/_build_info.json $(VENV)/.installed
	find resnet_fused tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## delete .venv too
	rm -rf $(VENV)

# The environment: sees the system's packages if torch is among them, else gets a torch of its own.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "error: $(PYTHON) was not found; install Python 3.10 or later, or say: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: Python 3.10 or later is needed, $(PYTHON) is $$($(PYTHON) -V); say: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $$($(PYTHON) $(HAS_TORCH) 2>/dev/null && echo --system-site-packages) $(VENV)

$(VENV)/.torch: | $(BIN)/python
	@$(BIN)/python $(HAS_TORCH) 2>/dev/null || { echo "installing $(TORCH) into $(VENV)"; $(PIP) '$(TORCH)'; }
	@touch $@

$(VENV)/.installed: $(SOURCES) $(VENV)/.torch
	@echo "installing resnet_fused into $(VENV): compiles the kernels"
	@$(PIP) --editable '.[demo,test]'
	@$(BIN)/python resnet_fused/_build_info.py
	@touch $@

$(VENV)/.peers: pyproject.toml | $(VENV)/.installed
	@echo "installing ONNX Runtime, OpenVINO, ncnn and MNN into $(VENV), to compare with"
	@$(PIP) --editable '.[demo,test,bench]' && touch $@ || echo "those that are missing are skipped"

$(VENV)/.linters: pyproject.toml | $(VENV)/.installed
	@$(PIP) --editable '.[demo,test,dev]'
	@touch $@
