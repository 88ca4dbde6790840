# Everything a contributor needs. The environment lives in .venv, made once and again when its inputs change.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help env demo readme test lint format bench gpu-bench wheel clean

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# torchao is for tests alone: wherever it is installed, diffusers loads it and its complaints are printed

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(READY) ## make the environment in .venv

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,eval,train]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .venv/tests torchao
	touch $@

FLUX := --model tiny-flux --seed 1 --prompt 'a red circle at the top left on a striped background'
WAN := --model tiny-wan --seed 1 --prompt 'a blue square moving left at the center on a plain background'

demo: env ## dense against accelerated: one image, one video, into outputs/demo
	$(BIN)/dit-accel compare $(FLUX) --recipe tiny-flux-clear --out outputs/demo/flux.png
	$(BIN)/dit-accel compare $(WAN) --recipe tiny-wan-neighborhood --out outputs/demo/wan.mp4

readme: demo ## measure the demo and write its table and picture into the README
	$(BIN)/python -m dit_accel.evals.readme outputs/demo/wan.json outputs/demo/flux.json

test: env ## all tests, on both cores
	PYTHONPATH=.venv/tests OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --durations 10

lint: env ## what CI checks of style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: env ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: env ## block-sparse against scaled_dot_product_attention on this CPU, and how both scale
	$(BIN)/python -m dit_accel.evals.scaling
	$(BIN)/python -m dit_accel.evals.bench

gpu-bench: env ## the Triton kernel on this GPU; without one prints the plan and exits with 3
	$(BIN)/python -m dit_accel.evals.gpu_bench

wheel: env ## build a wheel into dist
	$(BIN)/python -m build --wheel

clean: ## remove build products, not the environment
	rm -rf build dist *.egg-info
