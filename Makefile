# PYTHON makes the virtual environment VENV; a torch that PYTHON can import is reused. See tools/setup_env.py.
PYTHON ?= python3
VENV ?= .venv

# Shells use ENV for a start-up file, so only `make train ENV=...` sets it, never the surrounding environment.
ifneq ($(origin ENV),command line)
ENV :=
endif
unexport ENV

SETUP = $(PYTHON) tools/setup_env.py --venv "$(VENV)"
RUN = "$(VENV)/bin/python" -m
# One thread each: torch's threads of two processes on two cores wait for each other.
TWO_PROCESSES = OMP_NUM_THREADS=1 $(RUN) pytest --numprocesses 2
DEV_EXTRAS = --extras triton,train,test,lint --optional mettagrid
TRAIN_EXTRAS = --extras triton,train$(if $(filter mettagrid,$(ENV)),$(comma)mettagrid)
comma := ,

# $(call flag,NAME,option): `--option "$(NAME)"` where NAME is set.
flag = $(if $($(1)),--$(2) "$($(1))")
TRAIN_FLAGS = $(call flag,ENV,env) $(call flag,DEVICE,device) $(call flag,SEED,seed) $(call flag,STEPS,steps) \
	$(call flag,OUT,out) $(call flag,RESUME,resume) $(ARGS)

.PHONY: help setup train test test-slow bench lint

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PYTHON=python3  the Python (>= 3.11) behind the virtual environment; a torch that it imports is reused"
	@echo "  VENV=.venv      where the virtual environment goes"
	@echo "  train:          ENV=memory|mettagrid DEVICE=cpu|cuda SEED=0 STEPS=... OUT=folder RESUME=checkpoint ARGS='...'"
	@echo "  test:           PYTEST_ARGS='-k clip'"
	@echo "  bench:          QUICK=1 ARGS='--only clip,sample --device cpu'"

setup: ## the virtual environment with everything that development needs
	@$(SETUP) $(DEV_EXTRAS)

train: ## train the Fast agent, for example: make train ENV=mettagrid DEVICE=cuda
	@$(SETUP) $(TRAIN_EXTRAS)
	@$(RUN) metta_fastagent.train $(TRAIN_FLAGS)

test: setup ## run the tests, then those of the kernels in Triton's interpreter
	@$(TWO_PROCESSES) -m "not slow" $(PYTEST_ARGS)
	@$(if $(PYTEST_ARGS),,TRITON_INTERPRET=1 $(TWO_PROCESSES) tests/kernels)

test-slow: setup ## run the slow tests: learning on three seeds, with memory and without
	@$(TWO_PROCESSES) -m slow $(PYTEST_ARGS)

bench: setup ## measure and report, for example: make bench QUICK=1 ARGS='--only clip,sample'
	@$(RUN) benchmarks run $(if $(QUICK),--quick) $(ARGS)

lint: setup ## ruff and pyright
	@$(RUN) ruff check .
	@$(RUN) pyright --pythonpath "$(VENV)/bin/python"
