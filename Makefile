# Every target sets up what it needs. `make help` lists them.
#
#   PYTHON=python3.12    the interpreter that .venv is made from
#   PYTHON=... VENV=     use that interpreter as it is: nothing is installed or downloaded
#   ARGS="-k adamw"      passed on by demo, test, test-all and bench

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
PY := $(if $(strip $(VENV)),$(VENV)/bin/python,$(PYTHON))
# The tools that come with the interpreter: $(call tool,ruff)
tool = "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')/$(1)"
# The tests are shared out among processes where pytest-xdist is installed: $(call workers,how)
workers = $$($(PY) -c 'import os, xdist; \
  print("-n", min(4, len(os.sched_getaffinity(0))), "--dist $(1)")' 2>/dev/null)
SOURCES = $(shell find csrc tests -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

.PHONY: help env integrations trainers build demo test test-all test-trainers matrix test-arm bench bench-quick lint format check-binary check-tables tables gpu-check dist clean

help:  ## list the targets
	@echo 'Each sets up what it needs. PYTHON=python3.12 chooses what .venv is made from;'
	@echo 'PYTHON=... VENV= uses that interpreter as it is and installs nothing; ARGS=... is passed on.'
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 24

ifeq ($(strip $(VENV)),)
env:
else
env: $(VENV)/installed.txt
endif

# What pyproject.toml lists under a name: $(call wanted,name)
wanted = $(PY) -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  print(*project["optional-dependencies"]["$(1)"], sep="\n")' > $(VENV)/wanted.txt

# pip runs only when the list of development requirements, in pyproject.toml, has changed.
$(VENV)/installed.txt: pyproject.toml
	@test -x $(PY) || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'fusedopt: $(PYTHON) is no Python 3.11 or newer; give one: make PYTHON=python3.12 ...' >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo 'fusedopt: $(PYTHON) cannot make a virtual environment; install python3-venv' >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(call wanted,dev)
	@cmp -s $(VENV)/wanted.txt $@ || $(PY) -m pip install --requirement $(VENV)/wanted.txt
	@mv $(VENV)/wanted.txt $@

# What the slow tests train with, where it is not there yet.
ifeq ($(strip $(VENV)),)
integrations:
else
integrations: env
	@$(call wanted,integrations)
	@cmp -s $(VENV)/wanted.txt $(VENV)/integrations.txt || \
	  $(PY) -m pip install --no-build-isolation --requirement $(VENV)/wanted.txt
	@mv $(VENV)/wanted.txt $(VENV)/integrations.txt
endif

# What trainers' tests need, likewise.
ifeq ($(strip $(VENV)),)
trainers:
else
trainers: env
	@$(call wanted,trainers)
	@cmp -s $(VENV)/wanted.txt $(VENV)/trainers.txt || { \
	  $(PY) -m pip install --requirement $(VENV)/wanted.txt --constraint $(VENV)/installed.txt && \
	  $(PY) -m pip install --no-deps timm==1.0.31; }
	@mv $(VENV)/wanted.txt $(VENV)/trainers.txt
endif

demo: build  ## train two real models with torch.optim and with fusedopt, side by side
	$(PY) -m benchmarks.demo $(ARGS)

test: build  ## run the tests, but those that are slow
	$(PY) -m pytest -m "not slow" $(call workers,worksteal) $(ARGS)

test-all: build integrations  ## run all tests; ARGS="-m slow": those that make test leaves out
	$(PY) -m pytest $(call workers,loadfile) $(ARGS)

test-trainers: build trainers  ## run the tests of trainers: transformers, Accelerate, Lightning and others
	$(PY) -m pytest tests/trainers $(call workers,worksteal) $(ARGS)

# What is committed, in an environment of its own. Requirements have no versions there, as those that
# are pinned are not for every Python.
TORCH ?= 2.14.1
MATRIX = build/matrix/torch-$(TORCH)-$(notdir $(PYTHON))
MATRIX_PY = $(CURDIR)/$(MATRIX)/env/bin/python
matrix:  ## build and test with another torch and Python: TORCH=2.14.1 PYTHON=python3.13
	@test -x $(MATRIX_PY) || $(PYTHON) -m venv $(MATRIX)/env
	@$(MATRIX_PY) -c 'import importlib, sys; \
	  toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "pip._vendor.tomli"); \
	  dev = toml.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dev"]; \
	  print("torch==$(TORCH)", *(d.split("==")[0] for d in dev if not d.startswith("torch==")), sep="\n")' \
	  > $(MATRIX)/wanted.txt
	@cmp -s $(MATRIX)/wanted.txt $(MATRIX)/installed.txt || \
	  $(MATRIX_PY) -m pip install --requirement $(MATRIX)/wanted.txt
	@mv $(MATRIX)/wanted.txt $(MATRIX)/installed.txt
	@test -d $(MATRIX)/tree || git clone --quiet . $(MATRIX)/tree
	@git -C $(MATRIX)/tree pull --quiet --ff-only
	$(MAKE) -C $(MATRIX)/tree test VENV= PYTHON=$(MATRIX_PY)

test-arm: build  ## run the loops of the CPU on 64-bit ARM, in an emulator
	@{ command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64-static; } > /dev/null || \
	  { echo 'This needs Debian'"'"'s g++-aarch64-linux-gnu and qemu-user-static; first:' \
	    'apt-get install g++-aarch64-linux-gnu qemu-user-static'; exit 1; }
	$(PY) -m pytest tests/arm $(ARGS)

build: env  ## build the compiled module in place (quick when nothing changed)
	@$(PY) setup.py --quiet build_ext --inplace

bench: build  ## run all benchmarks (about 40 minutes)
	$(PY) -m benchmarks.run --scaling --training $(ARGS)
	$(PY) -m benchmarks.sharded
	$(PY) -m benchmarks.losses

bench-quick: build  ## run the most telling benchmarks (under 2 minutes)
	$(PY) -m benchmarks.run --quick $(ARGS)

lint: env  ## check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(call tool,clang-format) --dry-run -Werror $(SOURCES)
	$(PY) -m mypy

format: env  ## format all sources
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(call tool,clang-format) -i $(SOURCES)

RESULTS = benchmarks/results/cpu.json
GPU_RESULTS = $(sort $(wildcard benchmarks/results/nvidia-*.json))
check-tables: env  ## check that the tables in the documentation are those of the results
	$(PY) -m benchmarks.report $(RESULTS) --check
	$(PY) -m benchmarks.report $(RESULTS) --check --readme-file docs/performance.md
	$(PY) -m benchmarks.report $(RESULTS) --check --readme-file docs/optimizers.md
	$(PY) -m benchmarks.report --gpu $(GPU_RESULTS) --check
	$(PY) -m benchmarks.studies.precision --check
	$(PY) -m benchmarks.studies.convergence --check
	$(PY) -m benchmarks.studies.muon --check
	$(PY) -m benchmarks.studies.averages --check
	$(PY) -m benchmarks.studies.measured --check
	$(PY) -m benchmarks.studies.release --check
	$(PY) -m benchmarks.studies.stable_abi --check
	$(PY) -m benchmarks.sharded --check
	$(PY) -m benchmarks.losses --check
	$(PY) -m benchmarks.gpu.model --check
	$(PY) -m benchmarks.gpu.loss_model --check

tables: env  ## write the tables of the results into the documentation
	$(PY) -m benchmarks.report $(RESULTS) --readme
	$(PY) -m benchmarks.report $(RESULTS) --readme --readme-file docs/performance.md
	$(PY) -m benchmarks.report $(RESULTS) --readme --readme-file docs/optimizers.md
	$(PY) -m benchmarks.report --gpu $(GPU_RESULTS) --readme
	$(PY) -m benchmarks.report $(RESULTS) --plots docs/images
	$(PY) -m benchmarks.studies.precision --tables
	$(PY) -m benchmarks.studies.convergence --tables
	$(PY) -m benchmarks.studies.muon --tables
	$(PY) -m benchmarks.studies.averages --tables
	$(PY) -m benchmarks.studies.measured --tables
	$(PY) -m benchmarks.studies.release --tables
	$(PY) -m benchmarks.studies.stable_abi --tables
	$(PY) -m benchmarks.sharded --tables
	$(PY) -m benchmarks.losses --tables

check-binary: build  ## check in the disassembly that the loops are packed
	$(PY) tests/binary/check_binary.py

gpu-check: env  ## build, test, sanitize and measure on this machine's GPU; OUT=folder also keeps the results there
	$(PY) -m benchmarks.gpu.check $(ARGS)

# The wheel is built from the sdist; both are then tried where nothing else of fusedopt is.
CLEAN = build/clean-env
dist: env  ## build sdist and wheel, and try each in a clean environment
	rm -rf dist $(CLEAN)
	$(PY) -m build --no-isolation
	$(PY) -m venv $(CLEAN)
	$(CLEAN)/bin/pip install $$(grep '^torch==' $(VENV)/installed.txt)
	$(CLEAN)/bin/pip install dist/*.whl
	$(CLEAN)/bin/python tests/project/smoke.py
	$(CLEAN)/bin/pip uninstall --yes fusedopt
	$(CLEAN)/bin/pip install $$(grep -E '^(setuptools|wheel|ninja)==' $(VENV)/installed.txt)
	$(CLEAN)/bin/pip install --no-build-isolation --no-cache-dir dist/*.tar.gz
	$(CLEAN)/bin/python tests/project/smoke.py
	rm -rf $(CLEAN)

clean:  ## remove everything built, but not .venv
	rm -rf build dist *.egg-info fusedopt/*.so fusedopt/_build_info.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
