# `make demo` and `make test` do all their set-up: a virtual environment in .venv, made once and brought up to date when
# the requirements change. They need Python 3.11 or newer with its venv module.
#   make demo DATA=path/to/text     the demo on your own text
#   make trials TEXT=path/to/books  the trials with those that read books; TRIALS="--only 'variants/*'" for some of them
#   make test PYTEST="-m slow"      the tests that take minutes; any pytest options
#   make test WORKERS=0             the tests one after another in one process, instead of two at a time
PYTHON ?= python3
VENV := .venv
WORKERS ?= 2
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo trials test lint clean
.DELETE_ON_ERROR:

help: ## show the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## text to a trained, resumed, exported model on the CPU, in about five minutes
	$(RUN) -m tools.demo $(if $(DATA),--data "$(DATA)") $(DEMO)

trials: $(VENV)/.installed ## what each part of the memory is worth: 98 small trainings, just under an hour on two cores
	$(RUN) -m tools.trials run $(if $(TEXT),--text "$(TEXT)") $(TRIALS)
	$(RUN) -m tools.trials report

test: $(VENV)/.installed-dev ## the tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist loadfile $(PYTEST)

lint: $(VENV)/.installed-dev ## ruff
	$(RUN) -m ruff check .

clean: ## remove the virtual environment and caches (runs/ stays)
	rm -rf $(VENV) .pytest_cache .ruff_cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "error: $(PYTHON) -m venv failed; on Debian: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.installed: requirements.txt | $(VENV)/bin/python
	@echo "installing requirements.txt into $(VENV), a minute or so ..."
	$(RUN) -m pip install --disable-pip-version-check --quiet -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements-eval.txt $(VENV)/.installed
	$(RUN) -m pip install --disable-pip-version-check --quiet -r requirements-dev.txt
	@touch $@
