# One command each. The first use of any target makes .venv from requirements.lock.
PYTHON ?= python3
VENV := .venv
WORKERS ?= 2
BIN := $(VENV)/bin
export DO_NOT_TRACK := true

.DEFAULT_GOAL := help
.PHONY: help setup run test test-all shows check format bench docs docs-viz viz ui serve clean-old lock

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

# Where Python must not write bytecode (containers), each command would compile torch and MLflow anew,
# 10 s for a `kedro run`: then once, here.
COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)

setup: $(VENV)/.installed ## make .venv (again when the lock is newer)

$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet $(COMPILE) --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@$(BIN)/python -c 'import torchvision' || { echo "torch and torchvision do not fit together; delete .venv and run make setup again."; exit 1; }
	@touch $@

run: setup ## set up, then the main job on generated road scenes
	$(BIN)/kedro run --pipeline=distill_tse

# A file's tests stay together (they share what its fixtures train), the longest files go first.
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: setup ## set up, then the tests, in WORKERS=2 processes
	$(BIN)/python -m pytest $(PARALLEL)

test-all: setup ## the slow tests too
	$(BIN)/python -m pytest $(PARALLEL) -m 'not gpu'

shows: setup ## what people look at: the documentation, the notebooks, the pages in a browser
	$(BIN)/python -m pytest $(PARALLEL) -m shows $$(grep -rl --include="test_*.py" mark.shows tests)

check: setup ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup ## let ruff rewrite
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup ## the benchmarks that README and docs quote
	$(BIN)/python benchmarks/losses.py

docs: setup ## the documentation site, site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

docs-viz: docs ## the pipelines in it, site/viz, with previews of what was trained (ENV=scenes)
	@KEDRO_ENV=$(or $(ENV),scenes) $(BIN)/kedro viz build --include-previews > site/viz.log 2>&1 || { tail -20 site/viz.log; exit 1; }
	@rm -rf site/viz && mv build site/viz && mv site/viz.log site/viz/build.log
	@echo 'A browser needs a server for it: $(BIN)/python -m http.server --bind 127.0.0.1 -d site, then http://127.0.0.1:8000/viz/index.html'

viz: setup ## see the pipelines on 127.0.0.1:4141
	$(BIN)/kedro viz run --host 127.0.0.1

ui: setup ## compare the runs on 127.0.0.1:5000
	@echo 'The runs: http://127.0.0.1:5000/#/experiments?workflowType=machine_learning'
	$(BIN)/kedro mlflow ui --host 127.0.0.1

MODEL ?= models:/scenes@best
PORT ?= 5001

serve: setup ## answer requests with the best student on 127.0.0.1:5001 (MODEL=models:/scenes@best, PORT)
	PATH="$(CURDIR)/$(BIN):$$PATH" MLFLOW_TRACKING_URI="$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}" \
		$(BIN)/mlflow models serve -m $(MODEL) --env-manager local --host 127.0.0.1 --port $(PORT)

KEEP ?= 3

clean-old: setup ## what old versions and work that nothing names take (KEEP=3); DELETE=yes removes it
	@$(BIN)/python -m rdd_pipeline.datasets.prune --keep $(KEEP) $(if $(DELETE),--delete)

lock: setup ## new pins from pyproject.toml (omegaconf 2.4 makes Kedro warn at every start)
	echo 'omegaconf<2.4' | $(BIN)/uv pip compile --quiet --universal --python-version 3.11 \
		--extra viz --extra export --extra teachers --extra docs --extra dev --no-header --no-annotate --no-emit-index-url \
		--constraint - pyproject.toml --output-file requirements.lock
