# One target per habit. Every target sets up what it needs, once.

PYTHON ?= python3
PROMPT ?= To be
export PROMPT

BIN := .venv/bin
# two at a time: each test is mostly one thread, and each process has TensorFlow's gigabyte; a process without work takes
# half of what the other has still to do, so files and what they set up stay together until the end
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal --durations=25
# these compile nothing, or next to nothing
QUICK := tests/test_config.py tests/checkpoint tests/tokenizer/test_encoder.py tests/text/test_pieces.py \
  tests/model/test_arithmetic.py tests/model/test_param_tree.py \
  $(addprefix tests/test_docs.py::test_, commands_of_the_readme_exist links_lead_somewhere functions_are_where_documents_say \
    quoted_tables_and_help_texts_are_current)
BEAM := apache-beam-2.77
SETUP := setup.cfg setup.py pyproject.toml $(wildcard tf_gpt2/runtime/native/*)

.DEFAULT_GOAL := help
.PHONY: help run check test test-only test-one test-serving test-peers test-jobs test-native-sanitized test-native-arm lint format types layers fuzz bench bench-store bench-peers docs build clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

run: .venv/run.stamp  ## text from the embedded checkpoint: make run PROMPT="To be"
	@$(BIN)/tf-gpt2 generate --model_size tiny -- "$$PROMPT"

test: lint types layers test-only  ## all checks that need no peer

check: lint types layers  ## style, types, layers, and tests that compile nothing: minutes, for while you write
	$(PYTEST) $(QUICK)

test-only: .venv/test.stamp
	$(PYTEST) --ignore tests/serving --ignore tests/jobs/engines

test-one: .venv/test.stamp  ## some tests: make test-one T="tests/model/test_layers.py -k attention"
	$(BIN)/python -m pytest $(T)

test-serving: .venv/test.stamp  ## the SavedModel in the loader of TensorFlow Serving, and without Python; takes minutes
	$(PYTEST) tests/serving

test-peers: .venv/test.stamp  ## compare with Hugging Face's GPT-2 on the same weights
	$(BIN)/python -m benchmarks.environments huggingface
	TF_GPT2_PEERS_DIR=.peers $(PYTEST) tests/peers

test-native-sanitized:  ## the native kernels under the address and undefined-behaviour sanitizers
	mkdir -p build
	$(CXX) -std=c++17 -O1 -g -ffp-contract=off -Wno-psabi -fsanitize=address,undefined -fno-sanitize-recover=all -pthread \
	  tests/native/driver.cc -o build/native_sanitized
	build/native_sanitized

test-native-arm:  ## the native kernels of Arm in an emulator (Debian: g++-aarch64-linux-gnu, qemu-user-static)
	mkdir -p build
	aarch64-linux-gnu-g++ -std=c++17 -O2 -ffp-contract=off -Wno-psabi -static -pthread tests/native/driver.cc -o build/native_arm
	qemu-aarch64-static -cpu max build/native_arm

test-jobs: .venv/jobs.stamp  ## jobs on a Spark cluster of this machine (needs Java), and in Beam's local runner
	$(BIN)/python -m pytest -rs --durations=5 tests/jobs/engines/test_spark.py
	TF_GPT2_PEERS_DIR=.peers $(BIN)/python -m benchmarks.environments $(BEAM)
	.peers/$(BEAM)/bin/python -m pytest -rs --durations=5 tests/jobs/engines/test_beam_runner.py

fuzz: .venv/test.stamp  ## compare the tokenizer in the graph with Encoder on 200,000 random strings
	$(BIN)/python tests/tokenizer/fuzz_in_graph.py

lint: .venv/test.stamp  ## style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/test.stamp  ## mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: .venv/test.stamp  ## static types
	$(BIN)/mypy

layers: .venv/test.stamp  ## which module may import which
	$(BIN)/lint-imports

bench: .venv/test.stamp  ## measure, and say what got slower since the stored results (generation: of this kind of processor)
	for name in tokenizer in_graph_tokenizer; do \
	  $(BIN)/python -m benchmarks.$$name --output build/bench/$$name.json --against benchmarks/results/$$name.json || failed=1; \
	done; \
	$(BIN)/python -m benchmarks.compare --against benchmarks/results/compare || failed=1; exit $${failed:-0}

bench-store: .venv/test.stamp  ## measure, and store the results in benchmarks/results
	$(BIN)/python -m benchmarks.tokenizer
	$(BIN)/python -m benchmarks.in_graph_tokenizer
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.prompt_lookup
	$(BIN)/python -m benchmarks.streaming
	$(BIN)/python -m benchmarks.pages_threads
	$(BIN)/python -m benchmarks.serving
	$(BIN)/python -m benchmarks.compare --output benchmarks/results/compare

bench-peers:  ## build the other engines' environments in .peers; compiles llama.cpp
	$(PYTHON) -m benchmarks.environments

docs: .venv/test.stamp  ## renew what the documents quote: tables, help texts, the chart
	$(BIN)/python docs/renew.py
	$(BIN)/python -m benchmarks.chart
	$(BIN)/python -m benchmarks.growth_chart

build: .venv/test.stamp  ## wheel and source archive in dist/
	$(BIN)/python -m build

clean:  ## remove environments and everything that was made
	rm -rf .venv .peers build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.venv/run.stamp: $(SETUP)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing tf_gpt2 and TensorFlow into .venv, once …" >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/jobs.stamp: .venv/test.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[spark]'
	@touch $@

.venv/test.stamp: .venv/run.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@
