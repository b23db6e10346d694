# PYTHON is the Python behind a new virtual environment VENV; a torch that it imports is reused. See tools/setup.sh.
SHELL = bash
PYTHON ?= python3
VENV ?= .venv

# Shells set ENV to a start-up file: only `make train ENV=...` counts.
ifneq ($(origin ENV),command line)
ENV :=
endif
unexport ENV

SETUP = bash tools/setup.sh "$(PYTHON)" "$(VENV)"
comma := ,
RUN = "$(VENV)/bin/python" -m
# One thread each: two processes with more would compete for two cores.
TWO_PROCESSES = OMP_NUM_THREADS=1 $(RUN) pytest --numprocesses 2

# $(call flag,NAME,option): `--option "$(NAME)"` if NAME is set.
flag = $(if $($(1)),--$(2) "$($(1))")
TRAIN_FLAGS = $(call flag,ENV,env) $(call flag,DEVICE,device) $(call flag,SEED,seed) $(call flag,STEPS,steps) \
	$(call flag,OUT,out) $(call flag,RESUME,resume) $(ARGS)

# The C++ operators for the CPU. A failure prints one line, and eager PyTorch runs instead.
BUILD = $(RUN) metta_fastagent build --quiet
KERNEL_TESTS = tests/kernels tests/ops/test_masking.py tests/train/test_ratio.py
# The tests that run operators; those of the build and of the vector header do not.
NATIVE_TESTS = tests/ops tests/native tests/test_mixin_tensordict.py tests/train/test_ratio.py \
	--ignore tests/native/test_build.py --ignore tests/native/test_vec.py
# The sanitizer's runtime is preloaded with the C++ library whose exceptions it intercepts. --capture=sys: a report that
# pytest captured would be lost when the process aborts.
SANITIZED = METTA_FASTAGENT_BACKEND=native ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
	$(RUN) pytest --capture=sys $(NATIVE_TESTS)
library = $$($${CXX:-c++} -print-file-name=$(1).so)

# The oldest Triton that compiles the kernels; constraints.txt pins the newest.
OLDEST_TRITON = 3.5.1
OLDEST_TRITON_FOLDER = $(VENV)/triton-$(OLDEST_TRITON)

.PHONY: help setup train test test-slow test-oldest-triton test-versions bench gpu lint sanitize

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PYTHON=python3  the Python (>= 3.11) behind a new virtual environment; a torch that it imports is reused"
	@echo "  VENV=.venv      the virtual environment"
	@echo "  train:          ENV=memory|mettagrid DEVICE=cpu|cuda SEED=0 STEPS=... OUT=folder RESUME=checkpoint ARGS='...'"
	@echo "  test:           PYTEST_ARGS='-k clip'"
	@echo "  bench:          QUICK=1 OUT=folder ARGS='--only clip,sample --device cpu'"
	@echo "  gpu:            QUICK=1 OUT=folder ARGS='--only tests,bench'"

setup: ## the virtual environment with everything for development
	@$(SETUP) triton,train,test,lint mettagrid

train: ## train the Fast agent, for example: make train ENV=mettagrid DEVICE=cuda
	@$(SETUP) triton,train$(if $(filter mettagrid,$(ENV)),$(comma)mettagrid)
	@$(BUILD) || true
	@$(RUN) metta_fastagent.train $(TRAIN_FLAGS)

# Status 3 of the build: no compiler. Any other failure to build fails in CI.
test: setup ## run the tests, then the kernels' in Triton's interpreter, then the operators' in C++
	@METTA_FASTAGENT_BACKEND=$${METTA_FASTAGENT_BACKEND:-eager} $(TWO_PROCESSES) -m "not slow" $(PYTEST_ARGS)
	@$(if $(PYTEST_ARGS),,TRITON_INTERPRET=1 $(TWO_PROCESSES) $(KERNEL_TESTS))
	@$(if $(PYTEST_ARGS),,status=0; $(BUILD) || status=$$?; \
	if [ $$status = 0 ]; then METTA_FASTAGENT_BACKEND=native $(TWO_PROCESSES) $(NATIVE_TESTS); \
	else [ $$status = 3 ] || [ -z "$$CI" ]; fi)

test-slow: setup ## run the slow tests: learning on three seeds, with memory and without
	@$(TWO_PROCESSES) -m slow $(PYTEST_ARGS)

# In a folder of its own that precedes the environment's Triton for this command only.
test-oldest-triton: setup ## compile the kernels with the oldest supported Triton; needs no GPU
	@test -d "$(OLDEST_TRITON_FOLDER)" || { rm -rf "$(OLDEST_TRITON_FOLDER).unfinished" && \
	$(RUN) pip install --quiet --no-deps --target "$(OLDEST_TRITON_FOLDER).unfinished" triton==$(OLDEST_TRITON) && \
	mv "$(OLDEST_TRITON_FOLDER).unfinished" "$(OLDEST_TRITON_FOLDER)"; }
	@export PYTHONPATH="$(abspath $(OLDEST_TRITON_FOLDER))$${PYTHONPATH:+:$$PYTHONPATH}"; \
	"$(VENV)/bin/python" -c 'import triton; assert triton.__version__ == "$(OLDEST_TRITON)", triton.__version__' && \
	$(RUN) pytest tests/test_kernel_report.py

# Python:PyTorch:what else, comma-separated: the oldest, a GPU machine's, the newest. docs/versions.md has the results.
VERSIONS = 3.11:2.9.1:tensordict==0.10.0 3.12:2.11.0:triton==3.6.0,numpy==2.5.0 3.13:2.15.0:tensordict
VERSION_TESTS = -m "not slow" --ignore tests/test_setup.py --ignore tests/test_gpu_script.py

test-versions: ## run the tests with the oldest and the newest PyTorch; downloads several gigabytes for each
	@echo "WARNING: this downloads builds of PyTorch with CUDA, several gigabytes each: $(VERSIONS)"
	@set -e; for version in $(VERSIONS); do IFS=: read -r python torch others <<<"$$version"; \
	folder="$(VENV)-torch-$$torch"; run="$$folder/bin/python -m"; \
	"python$$python" -m venv "$$folder"; \
	$$run pip install --quiet torch==$$torch $$(echo $$others | tr , ' ') -e '.[train,test]'; \
	export OMP_NUM_THREADS=1; \
	METTA_FASTAGENT_BACKEND=eager $$run pytest --numprocesses 2 $(VERSION_TESTS); \
	TRITON_INTERPRET=1 $$run pytest --numprocesses 2 $(KERNEL_TESTS); \
	if $(subst $(RUN),$$run,$(BUILD)); then METTA_FASTAGENT_BACKEND=native $$run pytest --numprocesses 2 $(NATIVE_TESTS); fi; \
	done

bench: setup ## measure and print the ratios, for example: make bench QUICK=1 ARGS='--only clip,sample'
	@$(BUILD) || true
	@$(RUN) benchmarks $(if $(QUICK),--quick) $(call flag,OUT,out) $(ARGS)

gpu: ## on a CUDA machine, without installing anything: tests, sanitizers, a training, benchmarks, one summary
	@PYTHON="$(firstword $(wildcard $(VENV)/bin/python) $(PYTHON))" bash tools/gpu.sh $(if $(QUICK),--quick) $(ARGS) \
	"$(or $(OUT),runs/gpu-$(shell date +%Y-%m-%d-%H%M%S))"

sanitize: setup ## run the operators' tests in C++ built with AddressSanitizer, then UndefinedBehaviorSanitizer (gcc)
	@$(RUN) metta_fastagent build --sanitize address
	@METTA_FASTAGENT_SANITIZE=address LD_PRELOAD="$(call library,libasan) $(call library,libstdc++)" $(SANITIZED)
	@$(RUN) metta_fastagent build --sanitize undefined
	@METTA_FASTAGENT_SANITIZE=undefined LD_PRELOAD="$(call library,libubsan) $(call library,libstdc++)" $(SANITIZED)

lint: setup ## ruff and pyright
	@$(RUN) ruff check .
	@$(RUN) pyright --pythonpath "$(VENV)/bin/python"
