# Each target sets itself up: .venv is made and requirements.txt installed where that is missing, was interrupted, or changed.
#
#   PYTHON=FILE    makes the .venv (default: python3.11, or else python3)
#   DALI=PACKAGE   installs this instead of the DALI in requirements.txt: DALI=nvidia-dali-cuda130==2.4.0
#   OUT=DIR        the --out folder that `make board` shows (default: here)

SHELL := bash
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
DALI ?=
OUT ?= .
RUN := .venv/bin/python
PIP := $(RUN) -m pip -q --disable-pip-version-check
READY := .venv/.ready

.PHONY: help demo test test-all lint board audit clean

help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / {printf "make %-9s %s\n", $$1, $$2}' Makefile
	@sed -n 's/^#   //p' Makefile

demo: $(READY)  ## the four commands on the bundled images, ends with a table; 15 minutes on two cores
	@$(RUN) bench/demo.py

test: lint  ## lint and the test suite, at most 15 minutes
	@$(RUN) -m pytest -q

test-all: lint  ## the slow tests too, logged to bench/results/test-all.log
	@mkdir -p bench/results
	@set -o pipefail; $(RUN) -m pytest -q -m "" 2>&1 | tee bench/results/test-all.log

lint: $(READY)  ## ruff
	@$(RUN) -m ruff check

board: $(READY)  ## TensorBoard on 127.0.0.1 over OUT/checkpoints (after make demo, OUT=demo)
	@$(RUN) -m tensorboard.main --host 127.0.0.1 --logdir "$(OUT)/checkpoints"

# pip-audit asks for the vulnerabilities; in an environment of its own, since it brings some twenty packages.
AUDIT := pip-audit==2.10.1

audit: $(READY)  ## known vulnerabilities of what is installed, and whether our use reaches them
	@[ -x .venv/audit/bin/pip-audit ] || { $(RUN) -m venv .venv/audit && \
	    .venv/audit/bin/python -m pip -q --disable-pip-version-check install $(AUDIT); }
	@$(RUN) bench/audit.py

clean:  ## removes what make made: .venv, demo/, the unpacked images, caches; never your checkpoints
	@rm -rf .venv demo data/fashion-mnist data/cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# .ready says which DALI was asked for. Another one now, or no Python any more, and the set-up is done again.
ifneq ($(shell [ -x $(RUN) ] && cat $(READY) 2>/dev/null),DALI=$(DALI))
.PHONY: $(READY)
endif

# .installing marks a set-up that has not ended: where it is found, one was interrupted, and all is made anew. All DALI
# packages own the same files, so the old one leaves before another comes.
$(READY): requirements.txt
	@if [ -e .venv/.installing ] || ! $(RUN) -m pip --version >/dev/null 2>&1; then \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' || \
	        { echo "make: needs Python 3.11.4 or newer, not $(PYTHON); name one with PYTHON=FILE" >&2; exit 2; }; \
	    $(PYTHON) -m venv --clear .venv; \
	fi
	@echo "make: installing requirements.txt into .venv: some minutes; 7 GB where torch comes with CUDA"
	@touch .venv/.installing
	@old=$$($(PIP) freeze | grep -o '^nvidia-dali-cuda[0-9]*'); \
	    [ -z "$$old" ] || [ "$$(cat $(READY) 2>/dev/null)" = "DALI=$(DALI)" ] || $(PIP) uninstall -y $$old
	@rm -f $(READY)
	@$(if $(DALI),{ grep -v '^nvidia-dali' requirements.txt; echo '$(DALI)'; },cat requirements.txt) >.venv/requirements.txt
	@$(PIP) install -r .venv/requirements.txt
	@echo "DALI=$(DALI)" >$(READY)
	@rm .venv/.installing
