# Two commands do all the setup: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# The job's folder is named after the data folder, wherever that is. The embedded images use `demo`.
DATA_NAME = $(shell cd "$(DATA)" && basename "$$PWD")
RUN ?= runs/$(if $(DATA),$(patsubst demo,demo-data,$(DATA_NAME)),demo)

.PHONY: demo test test-data hooks install clean

install: .venv/installed

.venv/installed: requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  (echo "qi2 needs Python 3.11 or newer, $(PYTHON) is older; name another one with make PYTHON=..." && exit 1)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements-dev.txt
	$(BIN)/pip install --quiet --no-deps lpips==0.1.4 --editable .  # lpips would replace the tested torch
	touch $@

# make demo                      the embedded images
# make demo DATA=folder          your own: images beside .txt captions, or with a metadata.jsonl
# make demo ENCODER=folder       with a real Qwen3-VL instead of the tiny random one
demo: install
	$(BIN)/qi2 run experiments/demo.py --out "$(RUN)" $(if $(DATA),--data "$(DATA)") $(if $(ENCODER),"encoder.folder=$(ENCODER)")

test: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# Some tests need more than Python packages, and skip with a message without it. Debian's packages need root.
test-data: install
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	  apt-get update -qq; sed 's/ *#.*//' apt-packages.txt | xargs apt-get install --yes -qq > /dev/null; \
	else \
	  echo "as root: sed 's/ *#.*//' apt-packages.txt | xargs apt-get install --yes"; \
	fi
	$(BIN)/python -m tests.pillow_source

# Runs the checks of `make test` before each commit, and its tests before each push.
hooks: install
	$(BIN)/pre-commit install

clean:
	rm -rf .venv runs
