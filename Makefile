# Every target sets up what it needs; a fresh clone needs Python >= 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ROOMS := cli dht_schemas expert router swarm

.PHONY: setup demo test lint test-slow test-full reproduce-small kills gpu transfer-faults typing fuzz wheel clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(STAMP)  ## make .venv and install everything, pinned by constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("paris-swarm needs Python 3.11 or newer; found %s. Set PYTHON=/path/to/python3.11" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (two to five minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-script-location -c constraints.txt torch -e '.[data,dev]' 2>$(VENV)/pip.log || { cat $(VENV)/pip.log; exit 1; }
	@touch $@

typing: $(STAMP)  # the link farm that lets mypy see the folders as paris_swarm.*
	@mkdir -p .typing/paris_swarm && for room in $(ROOMS); do ln -sfn ../../$$room .typing/paris_swarm/$$room; done

demo: $(STAMP)  ## a real swarm on this machine: four peers train, a home that trained nothing assembles and draws (DEMO_ARGS="--minutes 5")
	@$(BIN)/paris-swarm demo $(DEMO_ARGS)

lint: typing  ## ruff, mypy and the import laws
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint  ## lint, then the tests that CI runs
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(STAMP)  ## the tests that take minutes each
	@$(BIN)/python -c 'import ray.data' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt '.[ray]'
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

test-full: $(STAMP)  ## the demo itself, at its full size, held to its own figures
	$(BIN)/python -m pytest -m full $(PYTEST_ARGS)

transfer-faults: $(STAMP)  ## downloads under every fault, and the table of what each cost (docs/results)
	@rm -f build/faults.md build/faults.md.relay build/faults.md.stingy; mkdir -p build
	PARIS_SWARM_FAULTS_TABLE=$(CURDIR)/build/faults.md $(BIN)/python -m pytest -m 'slow or not slow' \
		tests/swarm/test_transfer_faults.py tests/swarm/test_transfer_relayed.py $(PYTEST_ARGS)
	@cat build/faults.md build/faults.md.relay build/faults.md.stingy

reproduce-small: $(STAMP)  ## K experts against one dense model of the same FLOPs, 90 minutes on 2 cores, resumable (REPRODUCE_ARGS="--budget-minutes 30")
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/reproduce.py build/reproduce-small --scale small $(REPRODUCE_ARGS)
	$(BIN)/python benchmarks/reproduce.py build/reproduce-small --scale small --report build/reproduce-small/tables.md
	@echo "Tables: build/reproduce-small/tables.md"

kills: $(STAMP)  ## a training process killed 200 times at random moments: what is lost (a few minutes)
	$(BIN)/python -m pytest -m kills -s tests/expert/test_kills.py $(PYTEST_ARGS)

gpu: $(STAMP)  ## on a machine with a CUDA card: the GPU tests, then XL/2's speed, MFU and memory (docs/results)
	$(BIN)/python -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "this torch (%s) sees no CUDA card; install the CUDA build of torch into $(VENV) first" % torch.__version__)'
	CUBLAS_WORKSPACE_CONFIG=:4096:8 $(BIN)/python -m pytest -m gpu tests/expert/test_on_gpu.py $(PYTEST_ARGS)
	$(BIN)/python benchmarks/gpu.py

fuzz: $(STAMP)  ## coverage-guided fuzzing of every parser, hours at full budget (FUZZ_ARGS="claim --seconds 60")
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check 'atheris>=3.0'
	$(BIN)/python tests/fuzz/fuzz_run.py $(FUZZ_ARGS)

wheel: $(STAMP)  ## build dist/*.whl
	$(BIN)/python -m build --wheel

clean:
	rm -rf .venv .typing build dist demo-out *.egg-info
