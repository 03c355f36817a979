# Every target sets itself up: a virtual environment in .venv, made again only when pyproject.toml
# changes.
#   make train [ARGS="--workdir=runs/short --config.steps=100"]      make test [ARGS="-k balance"]
#   make fast PYTHON=python3.12 VENV=.venv-312
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 2
PY = $(VENV)/bin/python
# Tests that share a run are marked as a group, which one worker takes.
PYTEST = $(PY) -m pytest -n $(WORKERS) --dist loadgroup
install = $(PY) -m pip install --quiet --disable-pip-version-check -e

.PHONY: train test fast aot aot-cuda parity certify mutants families meshes faults bench lint

train: $(VENV)/.dev
	$(PY) train.py $(ARGS)

test: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PYTEST) --durations=25 $(ARGS)

fast: $(VENV)/.dev
	$(PYTEST) -m "not slow" $(ARGS)

# Ahead-of-time compilation for TPUs: no accelerator is needed.
aot: $(VENV)/.tpu
	$(PYTEST) --durations=5 tests/plan/test_tpu_aot.py $(ARGS)

# The same for NVIDIA GPUs: the CUDA libraries take 5 GB of disk.
aot-cuda: $(VENV)/.cuda
	$(PYTEST) --durations=5 tests/plan/test_cuda_aot.py tests/model/test_cudnn_aot.py \
	  tests/moe/experts/test_triton_aot.py $(ARGS)

# What transformers reads and computes of the files that are written here, which `make test` skips.
# Where pip would take torch for CUDA, of some GB, install its build for CPUs first.
parity: $(VENV)/.parity
	$(PYTEST) tests/hf/test_transformers.py tests/system/test_docs.py \
	  -k "test_transformers or python_of_a_page" $(ARGS)

certify: $(VENV)/.dev
	$(PY) -m moejax.certify $(ARGS)

# Every wrong program against its line: some minutes. `ARGS=--readme` rewrites docs/certificate.md.
mutants: $(VENV)/.dev
	$(PY) -m tests.support.mutant_table $(ARGS)

# Eight virtual devices, and a schedule in which none of them waits forever.
DEVICES = JAX_PLATFORMS=cpu XLA_FLAGS="--xla_force_host_platform_device_count=8 \
  --xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"

# `ARGS=--readme` also rewrites the table in docs/: of these two, and of the faults.
families: $(VENV)/.dev
	$(DEVICES) $(PY) -m tests.support.family_table $(ARGS)

# All cases; `make test` takes those that together have every mesh, dispatcher and pair of axes.
meshes: $(VENV)/.dev
	$(DEVICES) $(PY) -m tests.support.mesh_table $(ARGS)

# What a run survives, as real processes: some minutes.
faults: $(VENV)/.dev
	$(PY) -m tests.support.fault_table --workers=$(WORKERS) $(ARGS)

bench: $(VENV)/.bench
	$(PY) -m benchmarks.moe_layer
	$(PY) -m benchmarks.train_step
	$(PY) -m benchmarks.start_up
	$(PY) -m benchmarks.metrics_cost
	$(PY) -m benchmarks.balance_rules
	$(PY) -m benchmarks.decode
	$(PY) -m benchmarks.processes

lint: $(VENV)/.dev
	$(PY) -m ruff check .

$(VENV)/.dev: pyproject.toml
	@echo "setting up $(VENV) with $(PYTHON): a minute or two, once"
	$(PYTHON) -m venv $(VENV)
	$(install) '.[dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(install) '.[bench]'
	@touch $@

$(VENV)/.parity: $(VENV)/.dev
	$(install) '.[parity]'
	@touch $@

$(VENV)/.tpu: $(VENV)/.dev
	$(install) '.[tpu]'
	@touch $@

$(VENV)/.cuda: $(VENV)/.dev
	$(install) '.[cuda]'
	@touch $@
