# Everything runs in a virtual environment that is made on first use; nothing else has to be installed or set.
#
#   make demo    train, test and predict on real handwritten digits; writes runs/demo/demo.png
#   make test    the test suite             make test ARGS="-k resume"
#   make test-slow  what takes longer: thousands of kills, damages and endings
#   make test-services  Weights & Biases, MLflow and Comet, offline, from an environment of their own; installs them
#   make test-compat  libraries written for Lightning, unmodified, on fulmen and on Lightning; installs them
#   make test-pythons   the core of the suite on every Python from 3.10 on that is here; installs torch for each
#   make test-dist  builds the archives, and trains from them where nothing else is installed
#   make dist    wheel and source archive in dist/
#   make shim    wheels that stand in for a version of Lightning, in dist/     make shim VERSION=2.5.0
#   make check   lint, format, types, layers
#   make bench   every row of benchmarks/README.md
#   make bench-exact  evaluation on 1..4 processes, every size and batch size
#   make bench-kill   1,000 processes killed while they save, and what is left
#   make bench-interchange  checkpoints to and from other versions, each by its own package; installs them
#   make docs    this documentation as pages in site/

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
VERSION ?= 2.6.6

# Many tests wait for processes, so that two cores have time for one worker more. Files in the order of tests/conftest.py.
WORKERS := -n 3 --dist loadfile --no-loadscope-reorder

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check --constraint constraints.txt
STAMPS := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-services test-compat test-pythons test-dist dist shim check format bench bench-exact bench-kill bench-interchange docs clean

help:
	@sed -n 's/^#   //p' Makefile

# One stamp per set of extras: made once, made again when the requirements change.
$(STAMPS)/%: pyproject.toml constraints.txt
	@test -x $(PY) || { echo "making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing fulmen[$*] into $(VENV)"
	@$(PIP) --editable '.[$*]'
	@mkdir -p $(STAMPS) && touch '$@'

demo: $(STAMPS)/examples,tensorboard
	@$(PY) examples/mnist_autoencoder.py $(ARGS)

test: $(STAMPS)/test
	@$(PY) -m pytest $(WORKERS) -m 'not slow' $(ARGS)

test-slow: $(STAMPS)/test
	@$(PY) -m pytest $(WORKERS) -m slow $(ARGS)

# The clients bring many packages, so they get an environment of their own.
test-services:
	@$(MAKE) --no-print-directory VENV=.venv-services test-services-here

.PHONY: test-services-here
test-services-here: $(STAMPS)/test,services
	@$(PY) -m pytest -n 0 tests/loggers/test_services.py tests/loggers/test_service_files.py $(ARGS)

# The libraries bring Lightning along, so they get an environment of their own.
test-compat:
	@$(MAKE) --no-print-directory VENV=.venv-compat test-compat-here

.PHONY: test-compat-here
test-compat-here: $(STAMPS)/test $(STAMPS)/programs
	@FULMEN_COMPAT_PROGRAMS=1 $(PY) -m pytest -n 0 -rP tests/compat/programs $(ARGS)

$(STAMPS)/programs: tests/compat/programs/requirements.txt $(STAMPS)/test
	@echo "installing the libraries of $< into $(VENV)"
	@$(PIP) --requirement $<
	@touch '$@'

test-pythons:
	@$(PYTHON) -m trials.pythons $(ARGS)

test-dist: $(STAMPS)/test,dist
	@$(PY) -m pytest -n 0 tests/console/test_dist.py $(ARGS)

dist: $(STAMPS)/dist
	@rm -rf dist && $(PY) -m build --outdir dist

shim: $(STAMPS)/dist
	@$(PY) shim/build_wheels.py $(VERSION) --out dist

check: $(STAMPS)/check
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports

format: $(STAMPS)/check
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

bench: $(STAMPS)/test
	@$(PY) -m benchmarks $(ARGS)

bench-exact: $(STAMPS)/test
	@$(PY) -m trials.exact $(ARGS)

bench-interchange: $(STAMPS)/test
	@$(PY) -m trials.interchange $(ARGS)

bench-kill: $(STAMPS)/test
	@$(PY) -m trials.kill $(ARGS)

docs: $(STAMPS)/docs
	@$(PY) -m mkdocs build --strict --quiet && echo "site/index.html"

clean:
	rm -rf $(VENV) .venv-services .venv-compat .venv-3.* dist runs site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
