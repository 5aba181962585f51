# make demo, make test: both do their own set-up in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# OpenMP threads that spin for long slow a busy CPU many times down
export GOMP_SPINCOUNT ?= 2000
PIP_FLAGS ?= --disable-pip-version-check -q

.PHONY: demo test test-all test-browser lint lint-style figure compare tensorboard clean
.DEFAULT_GOAL := help

help:
	@echo "make demo        install, draw the data set 'scenes', train SEPS on it, evaluate"
	@echo "make test        install, run the tests (make test-all: the slow ones too)"
	@echo "make test-browser the page and the report in Debian's chromium, which it installs (as root)"
	@echo "make lint        ruff check, ruff format --check, mypy over lib"
	@echo "make figure      draw what the model sees into imgs/, from the demo's checkpoint"
	@echo "make compare     train and evaluate every method, five seeds (hours): runs/compare/README.md"
	@echo "make tensorboard curves of every run"

$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit(0 if sys.version_info >= (3, 10) else 'Python 3.10 or newer is needed: make PYTHON=python3.x')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(BIN)/python
	@echo "installing requirements.txt into $(VENV) (PyTorch: several GB, some minutes)"
	$(BIN)/python -m pip install $(PIP_FLAGS) -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements-extra.txt $(VENV)/.installed
	$(BIN)/python -m pip install $(PIP_FLAGS) -r requirements-dev.txt
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python train.py --dataset scenes --logger_name runs/demo --overwrite 1
	$(BIN)/python eval.py --checkpoint runs/demo/model_best.pth

# one thread a worker: two that share cores would only wait for each other
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

test: lint-style
	$(TEST)

test-all: lint-style
	$(TEST) -m "not gpu and not network"

BROWSER := command -v chromium >/dev/null && command -v chromedriver >/dev/null
INSTALL_BROWSER := apt-get update -q && DEBIAN_FRONTEND=noninteractive \
	apt-get install -y -q --no-install-recommends chromium chromium-driver

test-browser: $(VENV)/.installed-dev
	@$(BROWSER) || { $(INSTALL_BROWSER); } >$(VENV)/browser.log 2>&1 || true
	@if $(BROWSER); then $(TEST) -m browser -n 1; else \
	  echo "browser tests left out: no chromium and chromium-driver, and apt-get can't install" \
	    "them here ($(VENV)/browser.log says why)"; fi

lint-style: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint: lint-style
	$(BIN)/mypy lib

figure: $(VENV)/.installed-dev
	$(BIN)/python -m tools.visualize --checkpoint runs/demo/model_best.pth --image 4200 \
	  --captions 4 --out runs/figure --name demo
	cp runs/figure/demo_captions.png imgs/kept_patches.png
	cp runs/figure/demo_1.png imgs/pair.png

compare: $(VENV)/.installed-dev
	$(BIN)/python -m tools.compare --recipe recipes/compare/scenes.yaml

tensorboard: $(VENV)/.installed
	$(BIN)/tensorboard --logdir runs

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
