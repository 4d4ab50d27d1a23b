# make course | test | lab | site | browse | bench | gpu    each sets up .venv by itself and sets it
#                     up again only when pyproject.toml or constraints.txt changed
# make lab            opens copies to work in, without the stored results (ARGS=--with-outputs: with
#                     them), and updates them without touching what you changed
# make clean                          removes .venv and the caches; runs/ stays
#
# ARGS goes to the command:   make course ARGS="--only 03"      make test ARGS="-k course"
# SPREAD= (empty) runs the tests one after the other, -n 8 on eight cores
# PYTHON picks another one:   make test PYTHON=/path/to/python3.12
# CONSTRAINTS= (empty)        installs the newest versions instead of the tested ones

PYTHON ?=
CONSTRAINTS ?= constraints.txt
ARGS ?=
SPREAD ?= -n 2 --dist loadscope --no-loadscope-reorder
BIN := .venv/bin
READY := .venv/.ready
MEASURING := benchmarks/extract.py benchmarks/probing.py benchmarks/refine_step.py \
  benchmarks/views.py benchmarks/explorer.py benchmarks/refine_controls.py benchmarks/memory.py
PIP := $(BIN)/python -m pip install --disable-pip-version-check \
  $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS),--upgrade)

# The notebooks' kernel is this environment's Python, whatever kernels a user has installed.
export JUPYTER_PREFER_ENV_PATH := 1
unexport JUPYTER_PATH PYTHONHOME

.PHONY: help course test lab site browse bench gpu clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

course: $(READY)
	@echo "Running the course's notebooks (progress and an estimate follow)"
	@$(BIN)/refiner course $(ARGS)

test: $(READY)
	@echo "Checking style, then running the tests and every notebook of the course"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python -m pytest $(SPREAD) $(ARGS)

lab: $(READY)
	@echo "Opening your copies of the notebooks, in my_course, in JupyterLab; stop it with Ctrl-C"
	@$(BIN)/refiner course --copies my_course $(filter --with-outputs,$(ARGS))
	@$(BIN)/jupyter lab my_course/00_tour.ipynb $(filter-out --with-outputs,$(ARGS))

site: $(READY)
	@echo "Building the site of the notebooks as they ran: build/site/index.html"
	@$(PIP) --quiet --editable '.[site]'
	@$(BIN)/python docs/build.py $(ARGS)

browse: $(READY)
	@echo "Pressing Run All in JupyterLab and Chromium, notebook by notebook"
	@RUN_ALL=1 $(BIN)/python -m pytest tests/test_run_all.py $(ARGS)

bench: $(READY)
	@echo "Running the measuring scripts of benchmarks/ (minutes to half an hour each)"
	@$(PIP) --editable '.[bench]'
	@for script in $(MEASURING); do $(BIN)/python "$$script" $(ARGS) || exit 1; done

# Everything that waits for a GPU: one script for the most valuable (docs/gpu.md; it needs neither make
# nor .venv), then the long studies. CIFAR is what torchvision downloads, or a folder train/…, test/….
CIFAR ?= cifar10
gpu: $(READY)
	@$(PIP) --quiet --editable '.[bench]'
	-$(BIN)/python benchmarks/one_gpu.py --cifar $(CIFAR) $(ARGS)
	$(BIN)/python benchmarks/probing.py --device cuda --blocks 12
	$(BIN)/python benchmarks/refine_step.py --full
	$(BIN)/python benchmarks/views.py
	$(BIN)/python benchmarks/cifar10.py --preset gpu --split test --data $(CIFAR)
	$(BIN)/python benchmarks/evaluate_pair.py toybox --preset gpu
	$(BIN)/python benchmarks/evaluate_pair.py cifar10 --preset gpu --data $(CIFAR)
	$(BIN)/refiner course --preset gpu --out runs/course_gpu

$(READY): pyproject.toml constraints.txt
	@python=; for p in $(PYTHON) python3.11 python3; do \
	  if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    python=$$p; break; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "No Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python" >&2; \
	  exit 1; \
	fi; \
	echo "Setting up .venv with $$($$python --version)"; \
	echo "The first time downloads several GB (PyTorch with CUDA): about 5 to 20 minutes"; \
	"$$python" -m venv .venv
	@$(PIP) --no-compile --editable '.[test]'  # Python compiles what it imports
	@touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
