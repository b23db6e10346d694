# PYTHON is the Python behind a new virtual environment VENV; a torch that it imports is reused. See tools/setup.sh.
SHELL = bash
PYTHON ?= python3
VENV ?= .venv

# Shells set ENV to a start-up file: only `make train ENV=...` counts.
ifneq ($(origin ENV),command line)
ENV :=
endif
unexport ENV

# $(call quoted,TEXT): one word for the shell, whatever is in TEXT. $(value NAME) is a name as it was given.
quoted = '$(subst ','\'',$(1))'
SETUP = bash tools/setup.sh $(call quoted,$(value PYTHON)) $(call quoted,$(value VENV))
comma := ,
VENV_PYTHON = $(call quoted,$(value VENV)/bin/python)
RUN = $(VENV_PYTHON) -m
# One thread each: two processes with more would compete for two cores.
TWO_PROCESSES = OMP_NUM_THREADS=1 $(RUN) pytest --numprocesses 2

# $(call flag,NAME,option): `--option 'value of NAME'` if NAME is set.
flag = $(if $(value $(1)),--$(2) $(call quoted,$(value $(1))))
TRAIN_FLAGS = $(call flag,ENV,env) $(call flag,DEVICE,device) $(call flag,SEED,seed) $(call flag,STEPS,steps) \
	$(call flag,OUT,out) $(call flag,RESUME,resume) $(ARGS)
TRAIN_EXTRAS = $(if $(filter mettagrid,$(ENV)),$(comma)mettagrid)$(if $(filter gym:%,$(value ENV)),$(comma)gymnasium)$(if \
	$(findstring --tensorboard,$(value ARGS)),$(comma)tensorboard)

# The C++ operators for the CPU. A failure prints one line, and eager PyTorch runs instead.
BUILD = $(RUN) metta_fastagent build --quiet
KERNEL_TESTS = tests/kernels tests/ops tests/train/test_ratio.py
# Those whose kernels the others run too, and much PyTorch around them, are left out.
EMULATED_TESTS = $(KERNEL_TESTS) $(patsubst %,--ignore tests/ops/test_%.py,autograd every_operation tanh wrong_arguments)
# The tests that run operators; those of the build and of the vector header do not.
NATIVE_TESTS = tests/ops tests/native tests/test_mixin_tensordict.py tests/train/test_ratio.py \
	--ignore tests/native/test_build.py --ignore tests/native/test_vec.py
# The sanitizer's runtime is preloaded with the C++ library whose exceptions it intercepts. --capture=sys: a report that
# pytest captured would be lost when the process aborts.
SANITIZED = METTA_FASTAGENT_BACKEND=native ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
	$(TWO_PROCESSES) --capture=sys $(NATIVE_TESTS)
library = $$($${CXX:-c++} -print-file-name=$(1).so)

# The oldest Triton that compiles the kernels; constraints.txt pins the newest.
OLDEST_TRITON = 3.5.1
OLDEST_TRITON_FOLDER = $(value VENV)/triton-$(OLDEST_TRITON)

.PHONY: help setup train test test-slow test-oldest-triton test-versions bench gpu lint sanitize docs

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  PYTHON=python3  the Python (>= 3.11) of a new environment; its torch is reused"
	@echo "  VENV=.venv      the virtual environment"
	@echo "  train:          ENV=memory|mettagrid|gym:ID DEVICE=cpu|cuda SEED=0 STEPS=..."
	@echo "                  OUT=folder RESUME=checkpoint ARGS='...'"
	@echo "  test:           PYTEST_ARGS='-k clip'"
	@echo "  bench:          QUICK=1 OUT=folder ARGS='--only clip,sample --device cpu'"
	@echo "  gpu:            QUICK=1 OUT=folder ARGS='--only tests,bench'"

setup: ## a virtual environment with all for development
	@$(SETUP) triton,train,test,lint mettagrid

train: ## train an agent: make train ENV=gym:CartPole-v1
	@$(SETUP) triton,train$(TRAIN_EXTRAS)
	@$(BUILD) || true
	@$(RUN) metta_fastagent.train $(TRAIN_FLAGS)

# Status 3 of the build: no compiler. Any other failure to build fails in CI.
test: setup ## the tests, also on compiled kernels in an emulator, and in C++
	@METTA_FASTAGENT_BACKEND=$${METTA_FASTAGENT_BACKEND:-eager} $(TWO_PROCESSES) -m "not slow" $(PYTEST_ARGS)
	@$(if $(PYTEST_ARGS),,if command -v $${CXX:-c++} >/dev/null; then EMULATE=sm_90 $(TWO_PROCESSES) $(EMULATED_TESTS); \
	else TRITON_INTERPRET=1 $(TWO_PROCESSES) $(KERNEL_TESTS); fi)
	@$(if $(PYTEST_ARGS),,status=0; $(BUILD) || status=$$?; \
	if [ $$status = 0 ]; then METTA_FASTAGENT_BACKEND=native $(TWO_PROCESSES) $(NATIVE_TESTS); \
	else [ $$status = 3 ] || [ -z "$$CI" ]; fi)

test-slow: setup ## the slow tests: learning on three seeds
	@$(TWO_PROCESSES) -m slow $(PYTEST_ARGS)

# In a folder of its own that precedes the environment's Triton for this command only.
test-oldest-triton: setup ## compile kernels with the oldest Triton; no GPU
	@folder=$(call quoted,$(OLDEST_TRITON_FOLDER)); test -d "$$folder" || { rm -rf "$$folder.unfinished" && \
	$(RUN) pip install --quiet --no-deps --target "$$folder.unfinished" triton==$(OLDEST_TRITON) && \
	mv "$$folder.unfinished" "$$folder"; }
	@export PYTHONPATH="$$(realpath $(call quoted,$(OLDEST_TRITON_FOLDER)))$${PYTHONPATH:+:$$PYTHONPATH}"; \
	$(VENV_PYTHON) -c 'import triton; assert triton.__version__ == "$(OLDEST_TRITON)", triton.__version__' && \
	$(RUN) pytest tests/test_kernel_report.py

# Python:PyTorch:what else, comma-separated: the oldest, a GPU machine's, the newest. docs/versions.md has the results.
VERSIONS = 3.11:2.9.1:tensordict==0.10.0 3.12:2.11.0:triton==3.6.0,numpy==2.5.0 3.13:2.15.0:tensordict
VERSION_TESTS = -m "not slow" --ignore tests/test_setup.py --ignore tests/test_gpu_script.py

test-versions: ## tests with other PyTorch versions; big downloads
	@echo "WARNING: this downloads builds of PyTorch with CUDA, several gigabytes each: $(VERSIONS)"
	@set -e; for version in $(VERSIONS); do IFS=: read -r python torch others <<<"$$version"; \
	folder=$(call quoted,$(value VENV))"-torch-$$torch"; run="$$folder/bin/python -m"; \
	"python$$python" -m venv "$$folder"; \
	$$run pip install --quiet torch==$$torch $$(echo $$others | tr , ' ') -e '.[train,test]'; \
	export OMP_NUM_THREADS=1; \
	METTA_FASTAGENT_BACKEND=eager $$run pytest --numprocesses 2 $(VERSION_TESTS); \
	TRITON_INTERPRET=1 $$run pytest --numprocesses 2 $(KERNEL_TESTS); \
	if $(subst $(RUN),$$run,$(BUILD)); then METTA_FASTAGENT_BACKEND=native $$run pytest --numprocesses 2 $(NATIVE_TESTS); fi; \
	done

bench: setup ## print ratios: make bench QUICK=1 ARGS='--only clip'
	@$(BUILD) || true
	@$(RUN) benchmarks $(if $(QUICK),--quick) $(call flag,OUT,out) $(ARGS)

gpu: ## on a CUDA machine: tests, training, benchmarks
	@python=$(VENV_PYTHON); test -e "$$python" || python=$(call quoted,$(value PYTHON)); \
	PYTHON="$$python" bash tools/gpu.sh $(if $(QUICK),--quick) $(ARGS) \
	$(call quoted,$(or $(value OUT),runs/gpu-$(shell date +%Y-%m-%d-%H%M%S)))

sanitize: setup ## the C++ operators' tests under two sanitizers (gcc)
	@$(RUN) metta_fastagent build --sanitize address
	@METTA_FASTAGENT_SANITIZE=address LD_PRELOAD="$(call library,libasan) $(call library,libstdc++)" $(SANITIZED)
	@$(RUN) metta_fastagent build --sanitize undefined
	@METTA_FASTAGENT_SANITIZE=undefined LD_PRELOAD="$(call library,libubsan) $(call library,libstdc++)" $(SANITIZED)

# Whole modules that users import; pdoc follows __all__.
DOCUMENTED = metta_fastagent metta_fastagent.ops metta_fastagent.testing metta_fastagent.train metta_fastagent.weight_metrics

docs: ## API pages from the docstrings, in build/docs
	@$(SETUP) triton,train,docs
	@$(RUN) pdoc --docformat google --output-directory build/docs $(DOCUMENTED)
	@echo build/docs/index.html

lint: setup ## ruff (rules and format) and pyright
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) pyright --pythonpath $(VENV_PYTHON)
