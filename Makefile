# `make demo` and `make test` do all of their own set-up: a virtual environment in $(VENV), made once.

PYTHON ?= python3
VENV ?= .venv
WEIGHTS ?=
CONSTRAINTS ?=

bin := $(VENV)/bin
stamp := $(VENV)/.installed

.PHONY: help demo test soak compatibility lint types pytest clean

help:
	@echo "make demo [WEIGHTS=FILE]  train on rendered images, export to OpenVINO, draw heat maps"
	@echo "make test                 ruff, mypy and pytest (or one of: make lint, make types, make pytest)"
	@echo "make soak                 the long form of the tests that fuzz, kill and repeat: thousands of cases"
	@echo "make compatibility        pytest with the oldest and the newest supported versions, in new environments"
	@echo "make clean                remove the virtual environment, caches and results"

demo: $(stamp)
	$(bin)/python -m anomalib_cfa.demo $(if $(WEIGHTS),--weights-path "$(WEIGHTS)")

test: lint types pytest

lint: $(stamp)
	$(bin)/ruff check .
	$(bin)/ruff format --check .

types: $(stamp)
	$(bin)/mypy

# A process for each core, with a thread each; who has nothing left takes over from the others.
pytest: $(stamp)
	OMP_NUM_THREADS=1 $(bin)/python -m pytest --numprocesses auto --dist worksteal

soak: $(stamp)
	ANOMALIB_CFA_SOAK=1 $(bin)/python -m pytest -s

# Both ends of the supported ranges, each in a new environment of its own.
compatibility:
	rm -rf .venv-oldest .venv-newest
	$(MAKE) pytest VENV=.venv-oldest CONSTRAINTS=constraints/oldest.txt
	$(MAKE) pytest VENV=.venv-newest

$(stamp): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or later is needed: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --upgrade pip
	$(bin)/python -m pip install --quiet $(if $(CONSTRAINTS),-c "$(CONSTRAINTS)") --editable '.[cpu,demo,openvino,test]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest results .mypy_cache .pytest_cache .ruff_cache .hypothesis
