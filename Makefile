# Commands for a fresh machine with Python >= 3.10: `make demo`, `make demo-events`, `make demo-detection`,
# `make demo-segmentation` and `make test`. All reuse what is there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo demo-events demo-detection demo-segmentation test check test-long test-cuda docs lint clean

# Train configs/digits.yaml, test it, print a table.
demo: $(VENV)/.installed
	$(BIN)/qsd demo

# Train configs/digit_events.yaml, on digits that move in front of a simulated event camera.
demo-events: $(VENV)/.installed
	$(BIN)/qsd demo events

# Train configs/digits_det.py or configs/digits_seg.py on scenes of digits, test it, draw predictions, print a table.
demo-detection demo-segmentation: demo-%: $(VENV)/.installed-mm
	$(BIN)/qsd demo $*

# The linters, the type checker, the layers of the package, then the tests: what CI runs. They compare bits, on a CPU.
test: lint
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

# The core of it, in two minutes: the mathematics, the layers, the models, the conversion.
CORE := $(addprefix tests/,test_functional.py test_neurons.py test_quantizers.py lean layers models/test_models.py spiking)
check: lint
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal $(CORE) -k "not compile and not export and not test_frames"

# The same tests on every value and with many more tries than `make test` takes.
test-long: $(VENV)/.installed-dev
	QSD_TEST_LONG=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --timeout=3600

# What only a CUDA device can show; tests skip where there is none.
test-cuda: $(VENV)/.installed-dev
	$(BIN)/pytest $(wildcard tests/test_cuda*.py) tests/mm/test_cuda.py

# The documentation site; docs/_build/html/index.html is its first page.
docs: $(VENV)/.installed-dev
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "qsd needs Python 3.10 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-mm: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[mm]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e '.[dev,export,events,mm]'
	touch $@ $(VENV)/.installed $(VENV)/.installed-mm

# Remove the environment and caches, not the runs.
clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
