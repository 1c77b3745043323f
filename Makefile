# Everything runs in .venv, which needs only Python 3.11 and the package index. All targets can be run again.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# The environment is made again when one of these files changes.
READY := .venv/ready
# The same for the oldest versions that are allowed, in an environment of their own.
OLDEST := .venv-oldest/bin
OLDEST_READY := .venv-oldest/ready
# What the oldest versions could break, and needs no extra. `make oldest OLDEST_TESTS=...` runs other tests.
OLDEST_TESTS ?= tests/batches tests/varlen tests/shards tests/loading/test_sampler.py tests/loading/test_shard_stream.py tests/dynamic tests/planning tests/training tests/test_imports.py tests/test_facade.py
# Of these, what differs most between versions, in two minutes. CI runs it.
OLDEST_QUICK := tests/batches/test_batch.py tests/batches/test_func.py tests/batches/test_packing.py tests/varlen/test_varlen_batch.py tests/shards/test_shards_dataset.py tests/shards/test_shards_names.py tests/shards/test_http.py tests/loading/test_sampler.py tests/test_imports.py tests/test_facade.py
# The environments of other loaders, and more options of their benchmark, such as LOADING="--before CHECKOUT".
PEERS := .venv-peers
LOADING ?=
# Processes that run the tests.
JOBS ?= 2
# Options of the tests of frameworks: CI, which has run the others with `make test`, adds those of Ray.
FRAMEWORKS ?=

# The other files of the folder are shared by these, or are for GPUs (gpu) or peers (loading).
BENCHMARKS := collation packing transport rnn language_model planning scale shards bucketing packing_plans varlen packed_training block_masks inference

.PHONY: help demo test check format lint types coverage frameworks oldest oldest-quick fuzz storm bench bench-peers gpu docs docs-deploy clean

help:
	@echo "make demo        create the environment, then train the main job: a byte-level language model on Python's library"
	@echo "make test        create the environment, then run all tests and doctests in JOBS (2) processes"
	@echo "make check       format, lint, types, all tests with branch coverage"
	@echo "make oldest      the tests of both packages on the oldest versions of torch, NumPy and the others that are allowed"
	@echo "make oldest-quick  some of these, in a few minutes"
	@echo "make fuzz        20,000 mutated shards and indexes give the right data, or an error that names the file"
	@echo "make storm       all objects with state under random saves, copies, breaks and restores, for STORM_MINUTES (10)"
	@echo "make frameworks  test the examples of frameworks (Lightning, accelerate, transformers, datasets, Ray)"
	@echo "make bench       run the benchmarks; tables on the terminal, JSON in benchmarks/results"
	@echo "make bench-peers install other libraries in environments of their own, and measure loading next to them"
	@echo "make gpu         all tests and measurements that need a GPU, in a few minutes"
	@echo "make docs        build the documentation and the reference as a site: site/index.html"
	@echo "make docs-deploy VERSION=0.2.0  add the site of a version to the branch gh-pages (PUSH=--push: and push it)"
	@echo "make clean       remove the environment and all files that runs have made"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("lengthtrack needs Python 3.11 or newer, found %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/python examples/train_language_model.py

test: $(READY)
	$(BIN)/python -m coverage erase
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --cov --cov-report=

format: $(READY)
	$(BIN)/ruff format --check .

lint: $(READY)
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

# Reads the data of the last `make test`.
coverage: $(READY)
	$(BIN)/python -m coverage report --fail-under=90

check: format lint types test coverage

$(OLDEST_READY): pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST)/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt --editable '.[oldest]'
	@touch $(OLDEST_READY)

oldest: $(OLDEST_READY)
	$(OLDEST)/python -m pytest -n $(JOBS) --dist loadfile $(OLDEST_TESTS)

oldest-quick: $(OLDEST_READY)
	$(OLDEST)/python -m pytest -n $(JOBS) --dist loadfile $(OLDEST_QUICK)

fuzz: $(READY)
	$(BIN)/python tests/support/fuzz.py

storm: $(READY)
	cd tests/support && ../../$(BIN)/python -m storm

frameworks: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,frameworks]'
	$(BIN)/python -m pytest tests/docs/test_frameworks.py $(FRAMEWORKS)

bench: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench]'
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py || exit 1; done
	$(BIN)/python benchmarks/pages.py

# What does not install is printed, and the benchmark runs without it.
bench-peers: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[bench,convert]'
	$(BIN)/python benchmarks/loading_environments.py $(PEERS)
	$(BIN)/python benchmarks/loading.py --peers $(PEERS) $(LOADING)
	$(BIN)/python benchmarks/pages.py

gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py

docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict
	$(BIN)/python -m pytest -q tests/docs/test_site.py

# A site for each minor version: v0.2.1 replaces 0.2, and is the latest, to which the root of the site leads.
docs-deploy: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mike deploy --update-aliases $(PUSH) $(basename $(VERSION:v%=%)) latest
	$(BIN)/mike set-default $(PUSH) latest

clean:
	rm -rf .venv .venv-oldest $(PEERS) runs site .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
