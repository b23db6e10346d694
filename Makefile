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

# The virtual environment's where there is one.
GPU_PYTHON = $(firstword $(wildcard $(VENV)/bin/python) $(PYTHON))

# The C++ operators for the CPU. Where this fails it says why in one line, and eager PyTorch does their work.
BUILD = $(RUN) metta_fastagent build --quiet
# Those of the build and of the vector header need no run with the operators.
NATIVE_TESTS = tests/ops tests/native tests/test_mixin_tensordict.py tests/train/test_ratio.py \
	--ignore tests/native/test_build.py --ignore tests/native/test_vec.py
# A sanitizer's runtime goes into the process first, and with it the C++ library whose exceptions it watches. Captured by
# pytest, a report would be lost with the process.
SANITIZED = METTA_FASTAGENT_BACKEND=native ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
	$(RUN) pytest --capture=sys $(NATIVE_TESTS)
library = $$($${CXX:-c++} -print-file-name=$(1).so)

# The oldest Triton whose compiler the kernels are held to, beside the one of constraints.txt.
OLDEST_TRITON = 3.6.0
OLDEST_TRITON_FOLDER = $(VENV)/triton-$(OLDEST_TRITON)

.PHONY: help setup train test test-slow test-oldest-triton bench gpu lint sanitize

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PYTHON=python3  the Python (>= 3.11) behind the virtual environment; a torch that it imports is reused"
	@echo "  VENV=.venv      where the virtual environment goes"
	@echo "  train:          ENV=memory|mettagrid DEVICE=cpu|cuda SEED=0 STEPS=... OUT=folder RESUME=checkpoint ARGS='...'"
	@echo "  test:           PYTEST_ARGS='-k clip'"
	@echo "  bench:          QUICK=1 ARGS='--only clip,sample --device cpu'"
	@echo "  gpu:            QUICK=1 OUT=folder ARGS='--only tests,bench'"

setup: ## the virtual environment with everything that development needs
	@$(SETUP) $(DEV_EXTRAS)

train: ## train the Fast agent, for example: make train ENV=mettagrid DEVICE=cuda
	@$(SETUP) $(TRAIN_EXTRAS)
	@$(BUILD) || true
	@$(RUN) metta_fastagent.train $(TRAIN_FLAGS)

# The last step: 3 means that this machine has no compiler; in CI, any other failure to build is a failure.
test: setup ## run the tests, then the kernels' in Triton's interpreter, then the operations' in C++
	@METTA_FASTAGENT_BACKEND=$${METTA_FASTAGENT_BACKEND:-eager} $(TWO_PROCESSES) -m "not slow" $(PYTEST_ARGS)
	@$(if $(PYTEST_ARGS),,TRITON_INTERPRET=1 $(TWO_PROCESSES) tests/kernels tests/train/test_ratio.py)
	@$(if $(PYTEST_ARGS),,status=0; $(BUILD) || status=$$?; \
	case $$status in \
	(0) METTA_FASTAGENT_BACKEND=native $(TWO_PROCESSES) $(NATIVE_TESTS) ;; \
	(3) ;; \
	(*) test -z "$$CI" ;; \
	esac)

test-slow: setup ## run the slow tests: learning on three seeds, with memory and without
	@$(TWO_PROCESSES) -m slow $(PYTEST_ARGS)

# Into a folder of its own, which replaces the environment's Triton for this one command.
test-oldest-triton: setup ## compile the kernels with the oldest Triton that they support, for GPUs that need not be there
	@test -d "$(OLDEST_TRITON_FOLDER)" || { rm -rf "$(OLDEST_TRITON_FOLDER).unfinished" && \
	$(RUN) pip install --quiet --no-deps --target "$(OLDEST_TRITON_FOLDER).unfinished" triton==$(OLDEST_TRITON) && \
	mv "$(OLDEST_TRITON_FOLDER).unfinished" "$(OLDEST_TRITON_FOLDER)"; }
	@export PYTHONPATH="$(abspath $(OLDEST_TRITON_FOLDER))$${PYTHONPATH:+:$$PYTHONPATH}"; \
	"$(VENV)/bin/python" -c 'import triton; assert triton.__version__ == "$(OLDEST_TRITON)", triton.__version__' && \
	$(RUN) pytest tests/test_kernel_report.py

bench: setup ## measure and report, for example: make bench QUICK=1 ARGS='--only clip,sample'
	@$(BUILD) || true
	@$(RUN) benchmarks run $(if $(QUICK),--quick) $(ARGS)

gpu: ## on a CUDA machine, without installing anything: tests, sanitizers, a training, benchmarks, one report
	@PYTHON="$(GPU_PYTHON)" bash tools/gpu.sh $(if $(QUICK),--quick) $(ARGS) "$(if $(OUT),$(OUT),runs/gpu-$$(date +%Y-%m-%d-%H%M%S))"

sanitize: setup ## run the operations' tests in C++ built with AddressSanitizer, then UndefinedBehaviorSanitizer (gcc)
	@$(RUN) metta_fastagent build --sanitize address
	@METTA_FASTAGENT_SANITIZE=address LD_PRELOAD="$(call library,libasan) $(call library,libstdc++)" $(SANITIZED)
	@$(RUN) metta_fastagent build --sanitize undefined
	@METTA_FASTAGENT_SANITIZE=undefined LD_PRELOAD="$(call library,libubsan) $(call library,libstdc++)" $(SANITIZED)

lint: setup ## ruff and pyright
	@$(RUN) ruff check .
	@$(RUN) pyright --pythonpath "$(VENV)/bin/python"
