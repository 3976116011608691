# `make quickstart` fine-tunes a model on this machine; `make test` runs the whole suite. Needs Python 3.11+ and pip.
PYTHON ?= python3
TORCH  := torch==2.13.0
LOCK   := infrastructure/environments/job-cpu.txt

# Whole stacks, whose limits are in seconds: two at a time wait for each other less than they wait for themselves.
APART  := tests/cookbook tests/faults tests/stack tests/test_wheel.py
# In virtual time: nothing is waited for, and any process may have any of them.
SEEDS  := tests/simulation
# What fails once on a busy machine and then passes is no failure; the report names it all the same.
AGAIN  := --reruns 1 -r aR
# The job interpreter runs the tests of training itself: it has torch and TRL, and nothing else of ours.
TRAINING := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-job/bin/python -m pytest --confcutdir=tests/training

.PHONY: help quickstart up down test check attacks faults parity format bench-dispatch bench-ledger bench-files bench-fleet bench-training clean

help:
	@echo 'make quickstart      fine-tune SmolLM2-135M on this machine (ARGS=--tiny for a toy model)'
	@echo 'make down            stop the local stack; nothing is lost'
	@echo 'make test            the whole suite, in a fresh virtual environment'
	@echo 'make check           format, lint, types and tests, in the environment at hand'
	@echo 'make attacks         what hostile callers, tokens, names and jobs may not do'
	@echo 'make bench-dispatch  how fast jobs start, against the stock Prefect worker (ARGS=--full: 50 pods)'
	@echo 'make bench-ledger    the ledger, against bare PostgreSQL (ARGS=--full: 100 k jobs, 1 M events)'
	@echo 'make parity          training against bare TRL and a float64 reference, step by step'
	@echo 'make faults          what dies, lies or hangs, and what must hold all the same'
	@echo 'make bench-fleet     the scheduler at scale, the cost of a day of jobs, cancels (ARGS=--full: 50 pods)'
	@echo 'make bench-files     hash and upload, against sha256sum and cp'
	@echo 'make bench-training  a step of training, against bare TRL; the second job on a warm pod'

# The control environment: SDK, CLI, Prefect, the local stack.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -e '.[local]'
	@touch $@

# The job environment: torch and TRL, which cannot live beside Prefect.
.venv-job/installed: $(LOCK)
	$(PYTHON) -m venv .venv-job
	.venv-job/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	.venv-job/bin/pip install --quiet --disable-pip-version-check --no-deps -r $(LOCK)
	@touch $@

quickstart: .venv/installed .venv-job/installed
	.venv/bin/ow up --job-python .venv-job/bin/python
	.venv/bin/python cookbook/fine_tuning/quickstart.py $(ARGS)
	@echo
	@echo 'The stack goes on running. Look at it with'
	@echo '  .venv/bin/ow status       the services, and the address of the Prefect UI'
	@echo '  .venv/bin/ow ls           your jobs'
	@echo '  .venv/bin/ow logs JOB     what a job printed (-f follows it)'
	@echo 'and stop it with'
	@echo '  .venv/bin/ow down'

up: .venv/installed .venv-job/installed
	.venv/bin/ow up --job-python .venv-job/bin/python

down:
	.venv/bin/ow down

test: .venv-job/tested
	rm -rf .venv-test
	$(PYTHON) -m venv .venv-test
	.venv-test/bin/pip install --quiet --disable-pip-version-check -e '.[dev]'
	.venv-test/bin/ruff format --check .
	.venv-test/bin/ruff check .
	.venv-test/bin/mypy
	OW_JOB_PYTHON=$(CURDIR)/.venv-job/bin/python .venv-test/bin/python -m pytest -n 2 --dist loadfile $(AGAIN) \
	    $(APART:%=--ignore=%) $(SEEDS:%=--ignore=%) $(ARGS)
	$(TRAINING) -n 2 --dist loadfile $(AGAIN) tests/training $(ARGS)
	.venv-test/bin/python -m pytest -n 2 $(SEEDS) $(ARGS)
	OW_JOB_PYTHON=$(CURDIR)/.venv-job/bin/python .venv-test/bin/python -m pytest -n 2 --dist loadfile $(AGAIN) $(APART) $(ARGS)

check:
	ruff format --check .
	ruff check .
	mypy
	python -m pytest $(ARGS)

attacks:
	python -m pytest tests/attacks tests/faults/test_canary.py tests/files/test_path_corpus.py \
	    tests/ledger/test_jwt_attacks.py tests/ledger/test_exchange.py $(ARGS)

.venv-job/tested: .venv-job/installed
	.venv-job/bin/pip install --quiet --disable-pip-version-check \
	    'pytest>=8.3' 'pytest-timeout>=2.3' 'pytest-xdist>=3.6' 'pytest-rerunfailures>=15' 'hypothesis>=6.110'
	@touch $@

parity: .venv-job/tested
	$(TRAINING) tests/training/test_parity.py $(ARGS)

format:
	ruff format .
	ruff check --fix .

bench-dispatch: .venv/installed
	.venv/bin/python benchmarks/dispatch.py $(ARGS)

bench-ledger: .venv/installed
	.venv/bin/python benchmarks/ledger.py $(ARGS)

bench-fleet: .venv/installed
	.venv/bin/python benchmarks/fleet.py $(ARGS)

faults:
	python -m pytest tests/faults tests/simulation $(ARGS)

bench-files: .venv/installed
	.venv/bin/python benchmarks/files.py $(ARGS)

bench-training: .venv/installed .venv-job/installed
	OW_JOB_PYTHON=$(CURDIR)/.venv-job/bin/python .venv/bin/python benchmarks/training.py $(ARGS)

clean:
	rm -rf .venv .venv-job .venv-test build dist .mypy_cache .ruff_cache .pytest_cache
