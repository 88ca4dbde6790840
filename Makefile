# Everything a contributor needs. The environment lives in .venv, made once and again when its inputs change.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help env old-triton demo demo-ui readme test lint format bench gpu-bench wheel clean

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
OLD_TRITON := .venv-triton-3.6
# torchao is for tests alone: wherever it is installed, diffusers loads it and its complaints are printed

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(READY) ## make the environment in .venv

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cli,demo,dev,eval]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .venv/tests torchao
	touch $@

old-triton: env ## a second environment, with the Triton of torch 2.11, in which the compile report runs too
	$(PYTHON) -m venv $(OLD_TRITON)
	$(OLD_TRITON)/bin/python -m pip install --quiet 'triton==3.6.0' 'numpy<2.3'
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$($(OLD_TRITON)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_base.pth

FLUX := --model tiny-flux --seed 1 --prompt 'a fox at the top left on a blue striped background'
WAN := --model tiny-wan --seed 1 --prompt 'a fox moving left at the center on a blue striped background'

demo: env ## dense against accelerated: one image, one video, into outputs/demo
	$(BIN)/dit-accel compare $(FLUX) --recipe tiny-flux-clear --out outputs/demo/flux.png
	$(BIN)/dit-accel compare $(WAN) --recipe tiny-wan-neighborhood --out outputs/demo/wan.mp4

demo-ui: env ## the page: generate, compare, explore masks and heads, on this machine alone
	$(BIN)/dit-accel demo

readme: demo ## measure the demo and write its table and picture into the README
	$(BIN)/python -m dit_accel.evals.reports.readme outputs/demo/wan.json outputs/demo/flux.json
	$(BIN)/python -m dit_accel.evals.reports.front_picture

.PHONY: docs
docs: env ## write the tables of planned speed-ups and of several GPUs, and draw the patterns
	$(BIN)/python -m dit_accel.evals.reports.recipe_table
	$(BIN)/python -m dit_accel.evals.reports.pattern_pictures
	$(BIN)/python -m dit_accel.evals.reports.scaling

test: env ## all tests, on both cores
	PYTHONPATH=.venv/tests OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20

.PHONY: fuzz
fuzz: env ## the tests of properties, with new random examples each time
	PYTHONPATH=.venv/tests OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m hypothesis --hypothesis-profile random

lint: env ## what CI checks of style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typing && mkdir -p build/typing && cp -r dit_accel build/typing
	cp -r kernels pipelines demos evals build/typing/dit_accel
	$(BIN)/pyright --pythonpath $(BIN)/python

format: env ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: env ## block-sparse against scaled_dot_product_attention on this CPU, and how both scale
	$(BIN)/python -m dit_accel.evals.benchmarks.scaling
	$(BIN)/python -m dit_accel.evals.benchmarks.attention
	$(BIN)/python -m dit_accel.evals.benchmarks.backward
	$(BIN)/python -m dit_accel.evals.benchmarks.quantization

# from the bare checkout, with the python that has torch and triton: nothing is installed
gpu-bench: ## nine minutes on this GPU, by $(PYTHON); without one prints the schedule and exits with 3
	$(PYTHON) -m dit_accel.evals.gpu_bench --apply

wheel: env ## build a wheel into dist
	$(BIN)/python -m build --wheel

clean: ## remove build products, not the environment
	rm -rf build dist *.egg-info
