# make train, test, check, lab: each installs into .venv first if that is not there. `make` alone explains.

PYTHON ?= python3
PROMPT ?= a red circle above a blue square
OUT    ?= runs/shapes
ARGS   ?=
# PyPI's torch for Linux brings several GB of CUDA. Without an NVIDIA GPU, take pytorch.org's CPU build.
# If that host cannot be reached, pip says so and takes the build that PyPI has.
TORCH_INDEX ?= $(shell [ "`uname -s`" != Linux ] || command -v nvidia-smi >/dev/null || echo https://download.pytorch.org/whl/cpu)

RUN   := .venv/bin/python
TORCH := $(shell grep '^torch==' requirements.txt)
# Both declare a dependency on torchvision, which these tests do not need: installed with --no-deps.
ALONE := lpips==0.1.4 open_clip_torch==3.3.0
# Test files side by side, a process for each core (at most four) and a thread for each process:
# two processes with two threads each on two cores would slow each other tenfold.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout 300

.PHONY: help train test test-gpu check lint lab clean

help:
	@echo 'make train     train a text-to-image model on your machine, then draw "$(PROMPT)"'
	@echo 'make test      run all tests, then every chapter'
	@echo 'make test-gpu  the tests that need a GPU, then every chapter, eight at once (16 cores)'
	@echo 'make check     for contributors: lint, format and the fast tests (three minutes)'
	@echo 'make lint      lint and format only (seconds)'
	@echo 'make lab       open the chapters in JupyterLab'
	@echo 'make clean     remove .venv and caches (trained models in runs/ and data sets stay)'
	@echo
	@echo 'The first of these to run installs everything into .venv (about 2 GB with the CPU build of torch).'
	@echo 'ARGS="..."       more arguments for the command:   make train ARGS="--steps-denoiser 100"'
	@echo 'PROMPT="..."     what make train draws:            make train PROMPT="a green triangle"'
	@echo 'OUT=...          where make train writes:          make train OUT=runs/mine'
	@echo 'PYTHON=...       another Python, 3.11 or newer:    PYTHON=python3.12 make test'
	@echo 'TORCH_INDEX=...  where torch comes from:           make test TORCH_INDEX=https://download.pytorch.org/whl/cu126'
	@echo '                 (default: PyPI; on Linux without an NVIDIA GPU https://download.pytorch.org/whl/cpu)'

train: .venv/installed
	$(RUN) -m ldm_minimal train --out "$(OUT)" $(ARGS)
	$(RUN) -m ldm_minimal sample "$(PROMPT)" --model "$(OUT)" --out "$(OUT)/sample.png"

test: .venv/installed
	$(PYTEST) $(ARGS)
	$(RUN) -m pytest $(NBVAL) chapters

test-gpu: .venv/installed
	$(RUN) -m pytest -m gpu tests/gpu $(ARGS)
	OMP_NUM_THREADS=2 $(RUN) -m pytest --numprocesses 8 --dist loadfile $(NBVAL) chapters

check: lint
	$(PYTEST) -m "not slow" $(ARGS)

lint: .venv/installed
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check

lab: .venv/installed
	$(RUN) -m jupyterlab --ServerApp.root_dir="$(or $(wildcard chapters),.)" $(ARGS)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# .venv/installing becomes .venv/installed when all went well: an interrupted install starts afresh.
.venv/installed: requirements.txt pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || { echo "There is no $(PYTHON): install Python 3.11 or newer (Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python@3.12)."; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is older than Python 3.11: install a newer one (Debian, Ubuntu: apt install python3.12-venv; macOS: brew install python@3.12) and name it: PYTHON=python3.12 make $(MAKECMDGOALS)"; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian, Ubuntu: apt install python3-venv)."; exit 1; }
	@if [ -e .venv/installing ] && kill -0 "`cat .venv/installing`" 2>/dev/null; then echo "Another make is installing into .venv: wait for it. (If there is none, remove .venv.)"; exit 1; fi
	@if [ -e .venv/installing ]; then rm -rf .venv; fi
	@echo "Installing into .venv, once: some minutes."
	@mkdir -p .venv && rm -f $@ && echo $$PPID > .venv/installing
	"$(PYTHON)" -m venv .venv
	$(if $(TORCH_INDEX),$(RUN) -m pip install --no-deps --timeout 15 --retries 2 --extra-index-url $(TORCH_INDEX) $(TORCH))
	$(RUN) -m pip install -r requirements.txt
	$(RUN) -m pip install --no-deps $(ALONE)
	@mv .venv/installing $@
