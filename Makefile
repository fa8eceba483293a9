# Every command of the project. `make` alone lists them. Nothing is installed outside .venv.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
MODEL ?=
DATA ?=
ARGS ?=
OUT ?=
SEED ?= 0
SEEDS ?= 0 1 2 3 4
DELTAS ?= 0 0.05 0.1 0.2
RUN ?= $(patsubst %/metrics.jsonl,%,$(wildcard runs/*/metrics.jsonl))
NUM_NODES ?= 1
NODE_RANK ?= 0
MASTER_ADDR ?= 127.0.0.1

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
BENCH_INSTALLED := $(VENV)/.installed-bench
COLD_START := runs/cold-start-adaptthink
COLD_MODEL := $(COLD_START)/model/config.json

# DeepSpeed compiles a small extension for ZeRO-3 on the CPU; it belongs to this .venv, not to the home directory.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
# Installed scripts such as ninja are found by the programs that call them.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# GPUs: those CUDA_VISIBLE_DEVICES names, else all that nvidia-smi lists.
comma := ,
FOUND_GPUS := $(if $(filter undefined,$(origin CUDA_VISIBLE_DEVICES)),\
  $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU '),$(words $(subst $(comma), ,$(CUDA_VISIBLE_DEVICES))))
FOUND_GPUS := $(strip $(FOUND_GPUS))
NUM_GPUS ?= $(FOUND_GPUS)

# Without a GPU, and for the tiny models of the chain task, everything runs in one process on the CPU.
# Waiting OpenMP threads spin for milliseconds by default: on a busy machine two threads are then slower than one.
ON_CPU := CUDA_VISIBLE_DEVICES= ACCELERATE_USE_CPU=true GOMP_SPINCOUNT=10000
ifeq ($(NUM_GPUS),0)
  LAUNCH = $(ON_CPU) $(PY) -m
  PRECISION = --dtype fp32
else ifneq ($(NUM_NODES),1)
  LAUNCH = $(VENV)/bin/accelerate launch --config_file experiments/launch/zero3_2nodes.yaml \
    --num_machines $(NUM_NODES) --num_processes $$(($(NUM_NODES) * $(NUM_GPUS))) --machine_rank $(NODE_RANK) \
    --main_process_ip $(MASTER_ADDR) -m
else ifeq ($(NUM_GPUS),1)
  LAUNCH = $(PY) -m
else
  LAUNCH = $(VENV)/bin/accelerate launch --config_file experiments/launch/zero3_8gpu.yaml \
    --num_processes $(NUM_GPUS) -m
endif
PRECISION ?=

# Options from the command line of make; what is not given stays as the YAML file has it. ARGS comes last and wins.
WHAT = $(strip $(PRECISION) $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)"))
TOY_MODEL = --model "$(or $(MODEL),$(COLD_START)/model)"
ABLATION = $(or $(OUT),runs/toy-ablation)
TOY_NEEDS = $(INSTALLED) $(if $(MODEL),,$(COLD_MODEL))

.PHONY: help
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / {printf "  \033[1m%-24s\033[0m %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  Options: MODEL= DATA= NUM_GPUS= (now $(NUM_GPUS)) OUT= SEED= ARGS="--max_steps 2 ..."'
	@echo '  Several machines: NUM_NODES= NODE_RANK= MASTER_ADDR=   Interpreter of .venv: PYTHON='

# --- install

# pip's own output, one short line for each package.
PROGRESS = awk '/^ *(Collecting|Downloading|Using|Building|Installing|Success)/ {print "  " substr($$0, 1, 100); fflush()}'

# Runs once, and again when a file that decides what is installed changes.
$(INSTALLED): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	  f"error: {sys.executable} is Python {sys.version.split()[0]}, 3.10 or newer is needed. Give one with PYTHON=")'
	@$(PY) -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	@echo "installing into $(VENV) ($$($(PY) --version)); the first time this downloads about 500 MB, more for GPUs"
	@$(PY) -m pip install -e ".[test]" -c constraints.txt \
	  | $(PROGRESS)
	@touch $@

# liger-kernel is Triton code, of no use without a GPU.
$(BENCH_INSTALLED): $(INSTALLED)
	@echo "installing what the benchmarks compare with"
	@$(PY) -m pip install $(if $(filter 0,$(FOUND_GPUS)),trl,-e ".[bench]") -c constraints.txt \
	  | $(PROGRESS)
	@touch $@

.PHONY: install
install: $(INSTALLED)  ## make .venv with the exact versions of constraints.txt

.PHONY: install-gpu
install-gpu: $(INSTALLED)  ## add flash-attn and triton (compiles; needs the CUDA toolkit)
	$(PY) -m pip install wheel
	$(PY) -m pip install --no-build-isolation -e ".[gpu]" -c constraints.txt

# --- see it work

.PHONY: quickstart
quickstart: $(TOY_NEEDS)  ## install, teach a tiny model when to think, show where it learned to (CPU, minutes)
	@$(ON_CPU) $(PY) -m adaptive_reasoning.adaptthink --config experiments/quickstart.yaml $(TOY_MODEL) \
	  --output_dir "$(or $(OUT),runs/quickstart)" $(ARGS)
	@echo "open $(or $(OUT),runs/quickstart)/report.html to see what happened"

# The folder appears whole or not at all, so an interrupted cold start is not mistaken for a finished one.
$(COLD_MODEL): | $(INSTALLED)
	@$(ON_CPU) $(PY) -m adaptive_reasoning.sft --config experiments/cold_start_adaptthink.yaml \
	  --output_dir $(COLD_START)
	@test -f $@

.PHONY: cold-start
cold-start: $(COLD_MODEL)  ## supervised start of the tiny model (runs/cold-start-adaptthink; skipped if it is there)

.PHONY: toy-adaptthink
toy-adaptthink: $(TOY_NEEDS)  ## AdaptThink on arithmetic chains (CPU); SEED=0
	@$(ON_CPU) $(PY) -m adaptive_reasoning.adaptthink --config experiments/toy_adaptthink.yaml $(TOY_MODEL) \
	  --seed $(SEED) --output_dir "$(or $(OUT),runs/toy-adaptthink-seed$(SEED))" $(ARGS)

.PHONY: toy-ablation
toy-ablation: $(TOY_NEEDS)  ## toy-adaptthink for all DELTAS="0 0.05 0.1 0.2" and SEEDS="0 1 2 3 4"
	@for delta in $(DELTAS); do for seed in $(SEEDS); do \
	  echo "delta $$delta, seed $$seed"; \
	  $(ON_CPU) $(PY) -m adaptive_reasoning.adaptthink --config experiments/toy_adaptthink.yaml $(TOY_MODEL) \
	    --delta $$delta --seed $$seed --output_dir "$(ABLATION)/delta$$delta-seed$$seed" $(ARGS); \
	done; done
	@$(PY) -m adaptive_reasoning.report "$(ABLATION)"/delta*-seed* --by delta --plot "$(ABLATION)/ablation.png"

# --- the paper's runs

.PHONY: train-adaptthink-1.5b
train-adaptthink-1.5b: $(INSTALLED)  ## AdaptThink, R1-Distill-Qwen-1.5B on DeepScaleR (8 GPUs, ZeRO-3)
	@$(LAUNCH) adaptive_reasoning.adaptthink --config experiments/adaptthink_1_5b.yaml $(WHAT) \
	  --output_dir "$(or $(OUT),runs/adaptthink-1.5b)" $(ARGS)

.PHONY: train-adaptthink-7b
train-adaptthink-7b: $(INSTALLED)  ## AdaptThink, R1-Distill-Qwen-7B on DeepScaleR (8 GPUs or several machines)
	@$(LAUNCH) adaptive_reasoning.adaptthink --config experiments/adaptthink_7b.yaml $(WHAT) \
	  --output_dir "$(or $(OUT),runs/adaptthink-7b)" $(ARGS)

.PHONY: eval-adaptthink-1.5b
eval-adaptthink-1.5b: $(INSTALLED)  ## GSM8K, MATH-500, AIME24 in all three settings, beside the paper's row
	@$(LAUNCH) adaptive_reasoning.evaluate --config experiments/eval_adaptthink_1_5b.yaml $(WHAT) \
	  --output_dir "$(or $(OUT),runs/eval-adaptthink-1.5b)" $(ARGS)

.PHONY: report
report: $(INSTALLED)  ## write curves.png and report.html anew; RUN="runs/a runs/b" (all runs if not given)
	@$(if $(strip $(RUN)),$(PY) -m adaptive_reasoning.report $(RUN) $(ARGS),echo "there is no run in runs/ yet")

# --- develop

.PHONY: test
test: $(INSTALLED)  ## install and run the tests (all but the slow ones)
	@$(PY) -m pytest -m "not slow" $(ARGS)

.PHONY: lint
lint: $(INSTALLED)  ## check style and format
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

.PHONY: format
format: $(INSTALLED)  ## mend style and format
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

.PHONY: bench
bench: $(BENCH_INSTALLED)  ## rollout against generate, training step against TRL, memory of log-probs
	@$(PY) experiments/bench/bench_rollout.py $(ARGS)
	@$(PY) experiments/bench/bench_step.py $(ARGS)
	@$(PY) experiments/bench/bench_memory.py $(ARGS)

.PHONY: clean
clean:  ## remove caches and build folders; runs/ and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

.PHONY: dist-clean
dist-clean: clean  ## clean, and remove .venv; runs/ stays
	rm -rf $(VENV)
