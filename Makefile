# Every target first creates .venv and installs requirements.txt if that is missing, was interrupted, or changed.
#
#   PYTHON=FILE    Python that creates .venv (default: python3.11, else python3)
#   DALI=PACKAGE   DALI to install instead of that in requirements.txt, as nvidia-dali-cuda130==2.4.0
#   OUT=DIR        --out folder that `make board` shows (default: the current one)

SHELL := bash
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
DALI ?=
OUT ?= .
RUN := .venv/bin/python
PIP := $(RUN) -m pip -q --disable-pip-version-check
READY := .venv/.ready

.PHONY: help demo test test-all lint board audit clean

help:  ## lists the targets
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / {printf "make %-9s %s\n", $$1, $$2}' Makefile
	@sed -n 's/^#   //p' Makefile

demo: $(READY)  ## runs the four commands on the bundled images, at most 700 CPU-seconds
	@$(RUN) -m bench.demo

test: lint  ## lint and the test suite, some 450 CPU-seconds (9 minutes on two cores)
	@$(RUN) -m pytest -q

test-all: lint  ## test and the slow tests, with requirements-all.txt, logged to bench/results/test-all.log
	@$(PIP) install -r requirements-all.txt
	@mkdir -p bench/results
	@set -o pipefail; $(RUN) -m pytest -q -m "" 2>&1 | tee bench/results/test-all.log

lint: $(READY)  ## ruff check and ruff format --check
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check

board: $(READY)  ## shows OUT/checkpoints in TensorBoard on 127.0.0.1 (after make demo: OUT=demo)
	@$(RUN) -m tensorboard.main --host 127.0.0.1 --logdir "$(OUT)/checkpoints"

# pip-audit has an environment of its own, because it installs about twenty packages.
AUDIT := pip-audit==2.10.1

audit: $(READY)  ## lists known vulnerabilities of the installed packages
	@[ -x .venv/audit/bin/pip-audit ] || { $(RUN) -m venv .venv/audit && \
	    .venv/audit/bin/python -m pip -q --disable-pip-version-check install $(AUDIT); }
	@.venv/audit/bin/pip-audit --path "$$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

clean:  ## removes .venv, demo/, unpacked images and caches, not your checkpoints
	@rm -rf .venv demo data/fashion-mnist data/cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# .ready holds the requested DALI: if another is requested, or Python is gone, everything is set up again.
ifneq ($(shell [ -x $(RUN) ] && cat $(READY) 2>/dev/null),DALI=$(DALI))
.PHONY: $(READY)
endif

# .installing exists during the set-up: if it exists before, a set-up was interrupted, and .venv is created again. An
# installed DALI is removed before another is installed, because all DALI packages own the same files.
$(READY): requirements.txt
	@if [ -e .venv/.installing ] || ! $(RUN) -m pip --version >/dev/null 2>&1; then \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' || \
	        { echo "make: needs Python 3.11.4 or newer, not $(PYTHON); choose one with PYTHON=FILE" >&2; exit 2; }; \
	    $(PYTHON) -m venv --clear .venv; \
	fi
	@echo "make: installing requirements.txt into .venv: takes minutes, and 7 GB if torch includes CUDA"
	@touch .venv/.installing
	@old=$$($(PIP) freeze | grep -o '^nvidia-dali-cuda[0-9]*'); \
	    [ -z "$$old" ] || [ "$$(cat $(READY) 2>/dev/null)" = "DALI=$(DALI)" ] || $(PIP) uninstall -y $$old
	@rm -f $(READY)
	@$(if $(DALI),{ grep -v '^nvidia-dali' requirements.txt; echo '$(DALI)'; },cat requirements.txt) >.venv/requirements.txt
	@$(PIP) install -r .venv/requirements.txt
	@echo "DALI=$(DALI)" >$(READY)
	@rm .venv/.installing
