PYTHON ?= $(or $(shell command -v python3.11),python3)
TORCH ?= torch==2.13.0
VENV := .venv
COMPAT := 5.16.1 4.57.6
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint types bench bench-llama bench-scale compat llama llamba harness load package docs clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## */\t/' | expand -t 10

demo: $(VENV)/.demo-installed  ## distil, sample, grade and compare: writes runs/demo/report/index.html
	$(BIN)/thinkfast demo

test: lint types $(VENV)/.dev-installed  ## lint, types and every test
	$(BIN)/pytest -n auto --dist loadfile

lint: $(VENV)/.dev-installed  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev-installed  ## mypy --strict
	$(BIN)/mypy

RESULTS := benchmarks/results
SHAPE := random:smollm2-135m
bench: $(VENV)/.dev-installed  ## decoding and feeding prompts, ours and transformers', beside the machine's limit: JSON and figures
	$(BIN)/thinkfast convert bundled runs/bench/pure >/dev/null
	$(BIN)/thinkfast convert bundled runs/bench/hybrid --attention 1 >/dev/null
	$(BIN)/thinkfast bench bundled runs/bench/hybrid runs/bench/pure --batches 128 --contexts 128,1000,4096 --out $(RESULTS)/decode.json
	$(BIN)/thinkfast bench runs/bench/pure --batches 128 --contexts 128,512,2048,8192 --out $(RESULTS)/decode-flat.json
	$(BIN)/thinkfast bench bundled --batches 128 --contexts 1000 --backends native,transformers --out $(RESULTS)/decode-transformers.json
	$(BIN)/thinkfast bench bundled runs/bench/pure --batches 64 --contexts 600 --shared 0,512 --prompts 512 --out $(RESULTS)/decode-shared.json
	$(BIN)/thinkfast bench $(SHAPE) $(SHAPE)-hybrid $(SHAPE)-pure --batches 32 --contexts 512 --out $(RESULTS)/decode-135m.json
	$(BIN)/python benchmarks/compile_or_cpp.py bundled runs/bench/pure --out $(RESULTS)/compile-or-cpp.json

bench-llama: $(VENV)/.dev-installed  ## decoding of an exported student beside llama.cpp, which is compiled for it (some minutes)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[llama]"
	$(BIN)/thinkfast convert bundled runs/bench/pure >/dev/null
	$(BIN)/thinkfast bench bundled runs/bench/pure --batches 1,128 --contexts 1000 --backends native,llama.cpp --out $(RESULTS)/decode-llama.json

compat: $(VENV)/.dev-installed  ## exports in transformers 5.16 and 4.57, each in an environment of its own
	for version in $(COMPAT); do \
		test -x .venv-compat/$$version/bin/python || $(PYTHON) -m venv .venv-compat/$$version; \
		.venv-compat/$$version/bin/python -m pip install -q "$(TORCH)" transformers==$$version || exit 1; \
	done
	THINKFAST_COMPAT="$(COMPAT:%=.venv-compat/%/bin/python)" $(BIN)/pytest -m compat tests/export

llama: $(VENV)/.dev-installed  ## exports in llama.cpp itself, which is compiled for it (some minutes)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[llama]"
	$(BIN)/pytest -m llama tests/export

llamba: $(VENV)/.dev-installed  ## Llamba checkpoints in their public implementation (cartesia-mlx, on mlx for CPUs)
	test -x .venv-llamba/bin/python || $(PYTHON) -m venv .venv-llamba
	.venv-llamba/bin/python -m pip install -q "mlx[cpu]" transformers requests
	.venv-llamba/bin/python -m pip install -q --no-deps cartesia-mlx==0.0.2
	THINKFAST_LLAMBA=.venv-llamba/bin/python $(BIN)/pytest -m llamba tests/model

harness: $(VENV)/.dev-installed  ## the evaluation harness on thinkfast and on transformers: same scores
	test -x .venv-harness/bin/python || $(PYTHON) -m venv .venv-harness
	.venv-harness/bin/python -m pip install -q "$(TORCH)"
	.venv-harness/bin/python -m pip install -q -e ".[dev,eval]"
	.venv-harness/bin/pytest -m harness tests/test_harness.py

load: $(VENV)/.dev-installed  ## a server under two minutes of load: deadlines, memory, throughput
	$(BIN)/python benchmarks/serve_load.py --out benchmarks/results/serve-load.json

bench-scale: $(VENV)/.demo-installed  ## live adaptive sampling, a verifier, the planner, retention with the models of `make demo`
	$(BIN)/python scripts/bench_scale.py runs/demo --out benchmarks/results/scale

package: $(VENV)/.dev-installed  ## wheel and sdist in dist/, checked
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

docs: $(VENV)/.dev-installed  ## the documentation site in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove what make and the tests wrote, but no runs
	rm -rf $(VENV) .venv-compat .venv-llamba .venv-harness build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes in before whatever depends on it, so that a build chosen by TORCH or by pip's settings stays.
$(VENV)/.torch-installed:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt "$(TORCH)"
	@touch $@

$(VENV)/.demo-installed: $(VENV)/.torch-installed pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.dev-installed: $(VENV)/.torch-installed pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.demo-installed
