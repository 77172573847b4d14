# make demo   the whole idea on real data, in out/demo      make test   everything that is checked
# Both make .venv and build the kernels first; the second run is fast.
#
#   TORCH=torch==2.13.0     the torch to install      VQK_CUDA=auto|0|1, VQK_ARCHS, MAX_JOBS: see setup.py

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
CXX ?= g++

SOURCES := setup.py pyproject.toml $(wildcard csrc/*/* csrc/include/vqk/*)
CPP_TEST := $(wildcard tests/cpp/*.cpp)
CPP_FLAGS := -std=c++20 -O1 -g -ffp-contract=off -Wall -Wextra -Icsrc/include -Icsrc/cpu -pthread

.PHONY: demo test bench lint build cpp-test clean

demo: $(VENV)/installed
	$(BIN)/vqkernels demo --out out/demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

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

# The kernels without torch, under the address, undefined-behaviour and thread sanitizers.
cpp-test:
	mkdir -p build/cpp
	$(CXX) $(CPP_FLAGS) -fsanitize=address,undefined -fno-sanitize-recover=all $(CPP_TEST) csrc/cpu/*.cpp -o build/cpp/asan
	build/cpp/asan
	$(CXX) $(CPP_FLAGS) -fsanitize=thread $(CPP_TEST) csrc/cpu/*.cpp -o build/cpp/tsan
	build/cpp/tsan

clean:
	rm -rf build dist *.egg-info vqkernels/*.so vqkernels/_build_info.json out
