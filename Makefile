PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --jaxtyping-packages=triglot,beartype.beartype

.PHONY: demo docs install browser test test-slow lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make install    set up .venv and nothing more"
	@echo "make demo       set up .venv and run the main job (four minutes on two cores)"
	@echo "make test       set up .venv, then lint, types, architecture and tests"
	@echo "make test-slow  the tests that take longer"
	@echo "make docs       build the guide and the reference into site/ (some minutes)"
	@echo "make format     rewrite the code as the linter wants it"

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[all,dev,docs]"
	touch $@

install: .venv/installed

demo: install
	$(BIN)/triglot demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "Read it: open site/index.html, or $(BIN)/python -m http.server -d site for the search, too"

test: lint
	$(PYTEST) -n 2 -m "not slow"
	ATEN_CPU_CAPABILITY=avx2 $(PYTEST) -q tests/generation/test_kernels.py

browser: install
	$(BIN)/python -m pip install --quiet -c constraints.txt playwright
	command -v chromium || apt-get install -y -q chromium || $(BIN)/playwright install chromium

test-slow: browser
	$(PYTEST) -m slow

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist site .pytest_cache .mypy_cache .ruff_cache
