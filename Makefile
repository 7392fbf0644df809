# make demo: from a fresh clone to a score.  make test: all fast tests.  make tables: the papers' tables again.  make cards: docs/protocols again.  make claims-quick: claims that ten minutes can test.  All need Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
LIMIT ?= 40

.PHONY: demo test slow lint tables cards claims-quick clean

demo: $(VENV)/.installed
	$(BIN)/mmalign eval --model tiny-janus --suite shapes --limit $(LIMIT) --results results/demo

test: $(VENV)/.tested
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

slow: $(VENV)/.tested
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layers.py

tables: $(VENV)/.installed
	$(BIN)/mmalign table --render leaderboards/rendered

cards: $(VENV)/.installed
	$(BIN)/mmalign explain --render docs/protocols

claims-quick: $(VENV)/.installed
	$(BIN)/mmalign claims run --budget 10 --out build/claims

clean:
	rm -rf $(VENV) build dist *.egg-info results/demo

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"mmalign needs Python 3.11 or newer, this is {sys.version}"'
	$(PYTHON) -m venv $(VENV)
# PyPI's Linux build of torch brings CUDA packages. Without an NVIDIA driver the CPU build is taken: from pip's own sources, else PyTorch's index.
	if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then \
	  $(PIP) "torch==$(TORCH)+cpu" 2>/dev/null \
	  || $(PIP) "torch==$(TORCH)+cpu" --index-url https://download.pytorch.org/whl/cpu --extra-index-url https://pypi.org/simple; \
	fi
	$(PIP) -e .
	touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(PIP) -e '.[test,ocr,safety,attribution]'
	touch $@
