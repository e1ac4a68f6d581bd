# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/$(if $(DATA),$(notdir $(DATA:/=)),demo)

.PHONY: demo test install clean

install: .venv/installed

.venv/installed: requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  (echo "qi2 needs Python 3.11 or newer, $(PYTHON) is older; name another with make PYTHON=..." && exit 1)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements-dev.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

# make demo                      the embedded pictures
# make demo DATA=folder          your own: images beside .txt captions, or with a metadata.jsonl
# make demo ENCODER=folder       with a real Qwen3-VL instead of the tiny random one
demo: install
	$(BIN)/qi2 run experiments/demo.py --out "$(RUN)" $(if $(DATA),--data "$(DATA)") $(if $(ENCODER),"encoder.folder=$(ENCODER)")

test: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest

clean:
	rm -rf .venv runs
