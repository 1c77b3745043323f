# Everything runs in .venv, made from nothing but Python 3.11 and the package index. Safe to run twice.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# A change of these files makes the environment anew.
READY := .venv/ready

# The other files of the folder are what these share.
BENCHMARKS := collation packing transport rnn language_model planning scale shards bucketing varlen

.PHONY: help demo test check format lint types coverage frameworks fuzz storm bench gpu docs clean

help:
	@echo "make demo        environment, install, and the main job: a byte-level language model on Python's own library"
	@echo "make test        environment, install, and all tests, doctests among them"
	@echo "make check       format, lint, types, all tests with branch coverage"
	@echo "make fuzz        20,000 mutated shards and indexes: the right data, or an error that names the file"
	@echo "make storm       for STORM_MINUTES (10): everything that has state, in any order of saves, copies, breaks and restores"
	@echo "make frameworks  the examples of frameworks (Lightning, accelerate, transformers, datasets, Ray), each run by a test"
	@echo "make bench       the benchmarks, their tables on the terminal and as JSON in benchmarks/results"
	@echo "make gpu         all tests and measurements that need a GPU, in some minutes; without one it says so"
	@echo "make docs        the documentation as a site, with the reference of every public name: site/index.html"
	@echo "make clean       remove the environment and what runs have left"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("lengthtrack needs Python 3.11 or newer, found %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/python examples/train_language_model.py

test: $(READY)
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run -m pytest

format: $(READY)
	$(BIN)/ruff format --check .

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

# Reads what the last `make test` has measured.
coverage: $(READY)
	$(BIN)/python -m coverage combine --quiet --keep
	$(BIN)/python -m coverage report --fail-under=90

check: format lint types test coverage

fuzz: $(READY)
	$(BIN)/python tests/support/fuzz.py

storm: $(READY)
	cd tests/support && ../../$(BIN)/python -m storm

frameworks: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,frameworks]'
	$(BIN)/python -m pytest tests/docs/test_frameworks.py

bench: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit 1; done
	$(BIN)/python benchmarks/pages.py

gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py

docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
