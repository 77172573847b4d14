# make demo   the whole idea on real data, in out/demo      make test   everything that is checked
# Both make .venv and build the kernels first; the second run is fast.
#
#   TORCH=torch==2.13.0     the torch to install      VQK_CUDA=auto|0|1, VQK_ARCHS, MAX_JOBS: see setup.py
#   WORKERS=2               processes that run the tests

PYTHON ?= python3
TORCH ?= torch==2.13.0
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin

SOURCES := setup.py pyproject.toml $(wildcard csrc/*/* csrc/include/vqk/*)

.PHONY: demo test incumbent-tests triton-versions downstream bench lint build cpp-test cpp-bench products clean

demo: $(VENV)/installed
	$(BIN)/vqkernels demo --out out/demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# The tests of vector-quantize-pytorch against ours: make incumbent-tests SUITE="--all --source CHECKOUT"
incumbent-tests: $(VENV)/installed
	$(BIN)/python tests/incumbent_suite.py $(SUITE)

# The Triton kernels' tests with another Triton than the one installed
TRITON ?= 3.8.0
triton-versions: $(VENV)/installed
	$(BIN)/pip install -q --no-deps --upgrade --target build/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=$(CURDIR)/build/triton-$(TRITON) $(BIN)/python -c "import triton; assert triton.__version__ == '$(TRITON)', triton.__version__"
	PYTHONPATH=$(CURDIR)/build/triton-$(TRITON) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile tests/test_triton*.py tests/test_ptx*.py tests/test_tuning.py

# Projects that depend on vector-quantize-pytorch, trained with it and with ours
downstream: $(VENV)/installed
	$(BIN)/python tests/downstream.py $(CASES)

bench: $(VENV)/installed
	$(BIN)/vqkernels bench

lint: $(VENV)/installed
	$(BIN)/ruff check .

build: $(VENV)/installed
	$(BIN)/python setup.py -q build_ext --inplace

$(VENV)/tools:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)" setuptools wheel ninja pybind11 numpy
	touch $@

$(VENV)/installed: $(VENV)/tools $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e ".[all]"
	@$(BIN)/python -c "import json; print(json.load(open('vqkernels/_build_info.json'))['summary'])"
	touch $@

# The kernels without torch: against a naive oracle, then under the sanitizers.
cpp-test:
	tests/cpp/run
	tests/cpp/run sanitize

# The memory-bound kernels alone, against memcpy.
THREADS ?= 2
MEMORY_BOUND := $(foreach op,simd rotation_trick residual_quantize_backward codeword_sums codebook_usage,$(wildcard csrc/cpu/$(op).cpp csrc/cpu/$(op)_avx2.cpp))
cpp-bench:
	mkdir -p build
	$(CXX) -std=c++20 -O3 -ffp-contract=off -Wall -Wextra -Wno-psabi -Icsrc/include bench/memory_bound.cpp $(MEMORY_BOUND) -pthread -o build/memory_bound
	build/memory_bound $(THREADS)

# What a core multiplies, by kind of product.
products:
	mkdir -p build
	$(CXX) -std=c++20 -O3 -Wall -Wextra -Wno-psabi bench/products.cpp -o build/products
	build/products

clean:
	rm -rf build dist *.egg-info vqkernels/*.so vqkernels/_build_info.json out
