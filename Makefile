# Two commands need nothing before them: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

ROBOTS := .venv-robots
ROBOTS_BIN := $(ROBOTS)/bin
ROBOTS_STAMP := $(ROBOTS)/.installed
METAWORLD_STAMP := $(ROBOTS)/.metaworld-installed

.PHONY: install install-robots demo demo-robot demo-maniskill algorithms test test-slow test-robots lint types clean

install: $(STAMP)

# The constraints file pins what was tested; torch 2.13.0 resolves to the CPU build where an index offers one.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,math,data,lora,gymnasium]'
	touch $(STAMP)

# Simulators in an environment of their own: [env] python = ".venv-robots/bin/python". As root on Debian also the system
# packages that they draw with; otherwise it says which are missing.
install-robots: $(ROBOTS_STAMP)
	-$(ROBOTS_BIN)/python -m sim.drivers --install

$(ROBOTS_STAMP): pyproject.toml constraints.txt constraints-robots.txt
	$(PYTHON) -m venv $(ROBOTS)
	$(ROBOTS_BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints-robots.txt \
		-e '.[dev,gymnasium,metaworld,panda,maniskill,libero,video]'
	$(ROBOTS_BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints-robots.txt \
		rlinf-libero robosuite bddl
	touch $(ROBOTS_STAMP)

demo: install
	$(BIN)/python -m flowd.demo

# What the demo needs of install-robots; the rest can be added to the same environment later.
$(METAWORLD_STAMP): pyproject.toml constraints.txt constraints-robots.txt
	$(PYTHON) -m venv $(ROBOTS)
	$(ROBOTS_BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints-robots.txt \
		-e '.[metaworld,video]'
	touch $(METAWORLD_STAMP)

# A robot arm learns to close a drawer: success curve, picture, and a film of before and after.
demo-robot: install $(METAWORLD_STAMP)
	-$(ROBOTS_BIN)/python -m sim.drivers --install
	$(BIN)/python -m flowd.demo_robot

# Another one to push a cube.
demo-maniskill: install install-robots
	$(BIN)/python -m flowd.demo_robot configs/maniskill_pushcube_ppo.toml

# Every algorithm on one task, into docs/algorithms.md: within an hour on two idle cores, and resumable.
algorithms: install
	$(BIN)/python -m bench.algorithms

test: install lint types
	$(BIN)/python -m pytest -q -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -q -m slow

# Every simulator that is installed, ours too, through the contract check; and the shipped jobs that act in one.
test-robots: install-robots
	$(ROBOTS_BIN)/python -m pytest -q tests/sim tests/test_configs.py tests/actors/test_video.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(ROBOTS) build *.egg-info
