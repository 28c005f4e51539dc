VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
# What pip is asked for where there is no torch yet.
PIP_TORCH ?= torch==2.13.0
# Further requirements, such as another version of transformers.
PIP_ALSO ?=
# Extra arguments: make test ARGS="-k cli", make demo ARGS="--context 1000".
ARGS ?=

.PHONY: setup demo test test-all test-matrix bench-check sanitize bench-kernels bench-decode bench-quality coverage gpu fuzz check
.PHONY: format clean

setup: $(STAMP)

# torch comes first and is then pinned to what is there: pip would otherwise be free to replace it
# with a newer build that brings gigabytes of CUDA libraries.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install $(PIP_TORCH)
	$(BIN)/python -c 'import torch; print("torch==" + torch.__version__.partition("+")[0])' > $(VENV)/torch.txt
	$(BIN)/python -m pip install -c $(VENV)/torch.txt -e '.[dev]' $(PIP_ALSO)
	touch $@

demo: setup
	$(BIN)/spark-optimize demo $(ARGS)

test: setup
	$(BIN)/pytest -q -n 2 --dist worksteal -m "not slow" --durations=15 $(ARGS)

test-all: setup
	$(BIN)/pytest -q -n 2 --dist worksteal --durations=15 $(ARGS)

# The fast tests with the oldest and newest torch and transformers that pyproject.toml allows, and what lies
# between, each pair in an environment of its own; gigabytes where pip finds no CPU build of a torch.
MATRIX ?= 'torch==2.11.*,transformers==5.5.*' 'torch==2.13.0,transformers==5.5.*' \
	'torch==2.13.0,transformers<6' 'torch<2.16,transformers<6'
test-matrix:
	for pair in $(MATRIX); do \
		torch=$${pair%,*} transformers=$${pair#*,}; \
		echo "== $$torch, $$transformers"; \
		$(MAKE) test VENV=".matrix/$$(echo $$pair | tr -dc 'a-z0-9.')" PIP_TORCH="'$$torch'" \
			PIP_ALSO="'$$transformers'" || failed="$$failed $$pair"; \
	done; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# What the rewriting gives and how many instructions kernels and passes take, against
# benchmarks/expected; needs valgrind. ARGS=--update expects from now on what is measured now.
bench-check: setup
	$(BIN)/python -m benchmarks check $(ARGS)

# Several minutes each, on an otherwise idle machine; results go to benchmarks/results.
bench-kernels: setup
	$(BIN)/python -m benchmarks kernels $(ARGS)

bench-decode: setup
	$(BIN)/python -m benchmarks decode $(ARGS)

# Quality of the cache formats at equal bytes, ours and others', on two real models; an hour or more. Goes
# on where it was stopped; ARGS='--model smollm2 --context 1024 --windows 2 --only "int8,KIVI*"' is short.
# With '.[bench]' installed, optimum-quanto is compared too.
bench-quality: setup
	$(BIN)/python -m benchmarks quality $(ARGS)

# Every causal language model of transformers, tiny; an hour or more. Goes on where it was stopped;
# ARGS="--fresh" starts again, ARGS="--jobs 2" runs two at a time. Also writes docs/coverage.md.
coverage: setup
	$(BIN)/python -m benchmarks coverage $(ARGS)

# Needs a GPU: numerics first, then the sweep.
gpu: setup
	$(BIN)/pytest -q tests/gpu tests/kernels/test_triton_numerics.py
	$(BIN)/python -m benchmarks gpu

# The CPU kernels' tests under AddressSanitizer and UBSan, for every level this machine can run; "amx"
# with emulated tiles: what is read and written is the same.
SANITIZE := -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -DSPARK_EMULATED_TILES
sanitize: setup
	SPARK_COMPILE_CXXFLAGS="$(SANITIZE)" $(BIN)/python -c \
		'from spark_compile.kernels.cpu.build import supported; print(*supported())' \
	| xargs -n 1 | while read -r level; do \
		echo "level $$level"; \
		SPARK_COMPILE_CPU=$$level SPARK_COMPILE_CXXFLAGS="$(SANITIZE)" ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
		$(BIN)/python -m pytest -q -s -p no:cacheprovider tests/kernels/test_cpu.py \
		tests/kernels/test_cpu_edges.py tests/kernels/test_cpu_evict.py || exit 1; \
	done

# Random attention programs, others each time; those that failed are tried first the next time.
fuzz: setup
	SPARK_FUZZ_EXAMPLES=$${SPARK_FUZZ_EXAMPLES:-3000} \
	$(BIN)/pytest -q tests/passes/test_random_programs.py -k other_programs $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +
