# Needs python3 (3.11 or newer, with its venv module) and make; everything else is installed into .venv.
#
#     make train    first run: installs, trains on Pendulum-v1, reports, draws the learning curve and a GIF
#     make test     what CI runs
#     make help     the rest

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Byte-code is left to the first import of what is really used: compiling everything takes as long again.
PIP_FLAGS ?= --quiet --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE

# What `make train` trains, and how it looks at it; e.g. make train ENV=InvertedPendulum-v5 EXTRAS=zoo,mujoco
ENV ?= Pendulum-v1
EXTRAS ?= zoo
SEED ?= 1
LOGS ?= logs
THREADS ?= 1
EVAL_FREQ ?= 500
EVAL_EPISODES ?= 3
TRAIN_ARGS ?=
# Test processes: one a core; WORKERS=0 for none beside pytest's own, e.g. to debug
WORKERS ?= auto
PYTEST_ARGS ?=

comma := ,
TRAIN_STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
TEST_STAMP := $(VENV)/.installed-test
SOURCES := sb3_mbdpo tests $(wildcard hub)

.DEFAULT_GOAL := help
.PHONY: help train install test lint format types pytest benchmark clean test-dmcontrol test-metaworld test-myosuite

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(TRAIN_STAMP) ## install, train (ENV=..., by default Pendulum-v1), report: returns, learning curve, GIF
	$(BIN)/python -m sb3_mbdpo.zoo train --algo mbdpo --env $(ENV) --seed $(SEED) --num-threads $(THREADS) \
		--eval-freq $(EVAL_FREQ) --eval-episodes $(EVAL_EPISODES) --n-eval-envs $(EVAL_EPISODES) \
		-f $(LOGS) -P $(TRAIN_ARGS)
	$(BIN)/python -m sb3_mbdpo.quickstart report --env $(ENV) -f $(LOGS) --num-threads $(THREADS)

install: $(TEST_STAMP) ## install everything for development, without running anything

test: lint types pytest ## ruff, mypy, pytest: what CI runs

lint: $(TEST_STAMP) ## ruff: rules and formatting, changing nothing
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: $(TEST_STAMP) ## ruff: format and fix what can be fixed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

types: $(TEST_STAMP) ## mypy over the package
	$(BIN)/mypy

# One thread per process: for networks this small a second thread costs more than it brings.
pytest: $(TEST_STAMP) ## the tests alone; e.g. make pytest PYTEST_ARGS="-k zoo"
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

benchmark: $(TEST_STAMP) ## learning curves of MBDPO and SAC on ENV (one seed, about ten minutes)
	$(BIN)/python -m tests.benchmarks.learning --task $(ENV) --algos mbdpo sac --seeds $(SEED) --threads $(THREADS)

test-dmcontrol: $(TEST_STAMP) ## whole episodes of all 39 DMControl tasks, with Gymnasium's checker
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m sb3_mbdpo tasks dmcontrol --check

test-metaworld: .venv-metaworld/.installed ## Meta-World's 50 tasks, in an environment of their own
	$(call SUITE_TESTS,metaworld)

test-myosuite: .venv-myosuite/.installed ## MyoSuite's 10 tasks, in an environment of their own
	$(call SUITE_TESTS,myosuite)

SUITE_TESTS = OMP_NUM_THREADS=$(THREADS) .venv-$(1)/bin/python -m pytest tests/test_suites_$(1).py $(PYTEST_ARGS) && \
	OMP_NUM_THREADS=$(THREADS) .venv-$(1)/bin/python -m sb3_mbdpo tasks $(1) --check

# What fits beside each suite's own demands; the rest of constraints.txt would contradict them.
SUITE_PINS_metaworld := mujoco==3.3.0 dm_control==1.0.28
SUITE_PINS_myosuite :=
.venv-%/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -m venv --clear .venv-$*
	@grep -E '^(torch|stable-baselines3|sb3-contrib|safetensors|huggingface-hub|pytest)==' constraints.txt > .venv-$*/constraints.txt
	@echo "Installing into .venv-$*: a few minutes the first time"
	.venv-$*/bin/python -m pip install $(PIP_FLAGS) -c .venv-$*/constraints.txt -e ".[$*]" $(SUITE_PINS_$*) pytest
	@touch $@

clean: ## remove the virtual environment, caches and builds (keeps the logs)
	rm -rf $(VENV) .venv-metaworld .venv-myosuite build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: installed again only when pyproject.toml or constraints.txt change.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; choose one with PYTHON=..., e.g. make PYTHON=python3.12 train"; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) \
		|| { echo "Could not create $(VENV): Python's venv module is missing (Debian, Ubuntu: the package python3-venv)"; exit 1; }
	@touch $@

$(VENV)/.installed-%: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing into $(VENV): a few minutes the first time"
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e ".[$(subst -,$(comma),$*)]"
	@touch $@
