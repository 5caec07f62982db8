# Needs Python 3.10 or newer, and make; everything else goes into .venv.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
WORKERS ?= 2
SOAK_MINUTES ?= 30
MINUTES ?= 14

.PHONY: gpu help demo test test-clients check docs results soak reliability clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo     train a small transformer with AdamW, default and tuned, and with LearnedOptimizer'
	@echo 'make test     run the tests'
	@echo 'make test-clients  the tests with transformers, accelerate and Lightning'
	@echo 'make check    lint, format and types'
	@echo 'make docs     build the documentation site into build/site'
	@echo 'make results  measure demo, step, limits and the cost of an iteration again; fill all tables'
	@echo 'make soak     half an hour of faults and interruptions (SOAK_MINUTES=30), writes docs/reliability.md'
	@echo 'make reliability  plant faults in a copy and see that the tests notice, writes docs/reliability.md'
	@echo 'make gpu      the queue for minutes with a GPU (MINUTES=14), into gpu-out: docs/gpu.md'
	@echo 'make clean    remove .venv and everything generated'

demo: $(VENV)/.demo
	$(PY) examples/demo.py --out demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal -m 'not slow' --ignore tests/clients tests

test-clients: $(VENV)/.clients
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal tests/clients

check: $(VENV)/.test
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m pyright --pythonpath $(PY)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

results: $(VENV)/.demo
	$(PY) examples/demo.py --out docs --json docs/results/demo.json
	$(PY) -m learned_optim bench --suite step --threads 2 --out docs/step
	$(PY) tools/measure_limits.py docs/results/limits.json
	$(PY) tools/measure_iteration.py docs/results/iteration.json
	$(PY) tools/model_cards.py
	$(PY) tools/readme_tables.py

soak: $(VENV)/.test
	$(PY) tools/soak.py --minutes $(SOAK_MINUTES) --out docs/results/reliability.json
	$(PY) tools/reliability_report.py

reliability: $(VENV)/.test
	$(PY) tools/mutation_check.py --out docs/results/mutations.json
	$(PY) tools/reliability_report.py

gpu: $(VENV)/.demo
	$(PY) tools/gpu_queue.py --minutes $(MINUTES) --out gpu-out

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(PY)
	$(PIP) -e '.[tasks]'
	@touch $@

$(VENV)/.clients: pyproject.toml constraints.txt | $(PY)
	$(PIP) -e '.[test,clients]'
	@touch $@ $(VENV)/.test $(VENV)/.demo

$(VENV)/.docs: pyproject.toml constraints.txt | $(PY)
	$(PIP) -e '.[docs]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(PY)
	$(PIP) -e '.[test]'
	@touch $@ $(VENV)/.demo

# The language model that learns while it reads: examples/dynamic_language_model/README.md
LANGUAGE_MODEL := examples/dynamic_language_model
TEXT ?= python
.PHONY: language-model language-model-full

language-model: $(VENV)/.demo
	$(PY) $(LANGUAGE_MODEL)/evaluate.py --quick --threads 2 --text $(TEXT) --out runs/language-model
	$(PY) $(LANGUAGE_MODEL)/plots.py runs/language-model

language-model-full: $(VENV)/.demo
	$(PY) $(LANGUAGE_MODEL)/evaluate.py --threads 2 --text $(TEXT) --out runs/language-model-full
	$(PY) $(LANGUAGE_MODEL)/plots.py runs/language-model-full
