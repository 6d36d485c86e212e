# Two commands on a fresh machine with Python 3.11: make demo, make test.

PYTHON ?= $(or $(shell command -v python3.11 || command -v python3),python3.11)
BIN := .venv/bin

.PHONY: demo test lint checkpoint clean

# exports, serves with Triton, predicts a scene with its sound, leaves an overlay, a contact sheet and the maps in out/
demo: .venv/installed
	$(BIN)/mubic-deploy demo --out out

# processes that test at once, each on a core of its own: with more threads than cores they wait for each other; what was
# compiled for two threads has two all the same, and a thread that waits sleeps, so that the other process has its core
JOBS ?= 2

test: .venv/installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	for model in triton_models/*/1/model.py; do $(BIN)/mypy $$model || exit 1; done  # all have one name

# renders scenes, trains the checkpoint that ships, packs it, evaluates it on scenes of another seed
checkpoint: .venv/installed
	$(BIN)/mubic-deploy scenes data/train --videos 480 --seed 1 --seconds 5
	$(BIN)/mubic-deploy scenes data/held_out --videos 60 --seed 1001 --seconds 5
	mkdir -p runs
	$(BIN)/mubic-deploy listen runs/hearing.safetensors
	$(BIN)/mubic-deploy train data/train --recipe demo --vggish runs/hearing.safetensors --accelerator cpu --out runs/demo
	$(BIN)/mubic-deploy pack runs/demo/model.safetensors mubic_deploy/weights/demo.safetensors --fit-steps data/train --stride 24
	$(BIN)/python bench/checkpoint.py data/held_out

.venv/installed: requirements.txt requirements-dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v == (3, 11) else "Python 3.11 is needed, not %d.%d: make PYTHON=..." % v)'
	@echo "installing into .venv: 6.5 GB, some minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-build-isolation --no-deps -e .
	@# TensorRT's Python bindings, 1 MB each, without TensorRT: the tests hold our code against both major versions
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target .venv/tensorrt/10 tensorrt-cu13-bindings==10.15.1.29
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target .venv/tensorrt/11 tensorrt-cu13-bindings==11.4.0.106
	touch $@

clean:
	rm -rf .venv out
