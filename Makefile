# The two commands of a newcomer: make quickstart, make test. Everything is installed into .venv, from the lock.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/quickstart
# Of the tests; more than two cores need, because some only wait.
WORKERS ?= 3
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# A test run starts Python a hundred times: what it has compiled it keeps, whatever the shell says.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-fast test-full test-gpu lint types imports clean

quickstart: $(VENV)/.runtime
	$(PYTHON) launch/run --python $(BIN)/python -- --deepspeed_config ds_configs/fp32_zero0_muon.json --config tiny --out_dir $(RUN)
	$(BIN)/chatgot sample $(RUN) --prompt "KING RICHARD:" --max_new_tokens 300
	@echo "the report of this run, for a browser: $(RUN)/report.html"

test: $(VENV)/.development lint types imports
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-fast: $(VENV)/.development
	$(BIN)/python -m pytest -m "not gpu and not slow and not launches" -n $(WORKERS) --dist loadfile

lint: $(VENV)/.development
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.development
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: $(VENV)/.development
	$(BIN)/lint-imports

test-full: $(VENV)/.development
	$(BIN)/python -m pytest -m "not gpu" -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-gpu:
	bash tests/gpu/run.sh

$(VENV)/.runtime: requirements.lock setup.py
	$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q -r requirements.lock
	$(BIN)/python -m pip install -q --no-deps -r requirements-corpora.lock
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.development: $(VENV)/.runtime requirements-dev.lock
	$(BIN)/python -m pip install -q -r requirements-dev.lock
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
