# make train   environment, build, then the main job: a small model learns from demonstrations, then
#              by GRPO on real vLLM
# make test    environment, build, then the whole test suite
# make bench   environment, build, peers, then every kernel against PyTorch, other trainers and the
#              limits of the machine: a table, plots and a page in OUT
# make bench-train  the same, then a training step against TRL's by phase, weight sync, and how the
#              learner's step grows: tables, goals, and pictures in OUT
# make bench-control  the same, then control with gymnasium against Stable-Baselines3 and
#              sb3-contrib, and in OUT
# make bench-dropin  the same, then each function of another trainer that warpo replaces, against the
#              trainer's own, as a table and in OUT
# make test-integrations  environment, build, peers, then the drop-ins against the real trainers
# make test-upstream      the same, then the trainers' own tests without and with the drop-ins
# make docs    the site of docs/ in build/site, by MkDocs in an environment of its own; fails on a link
#              that leads nowhere
# make sanitize  environment, build, then the kernel tests on CPU kernels built with the address and
#              undefined-behaviour sanitizers
# make torture environment, build, then attacks: damaged configs, data and checkpoints, hostile rewards,
#              runs killed at any moment; prints how many were survived
# make gpu     on a CUDA machine that has torch, in at most 8 minutes: versions, build for this GPU
#              alone, smoke test, times beside goals, hardware counters, tests on CUDA, training end to
#              end; all of it in OUT as it is measured
# make gpu-sanitize  after it, in at most 200 seconds: compute-sanitizer's tools beside the tests of
#              the Triton kernels, then the goals with longer timings, in OUT/sanitize
# make gpu-wheels    here, for a CUDA machine without a network: the wheels that `make gpu` needs there
#              beside torch and transformers, in .wheels, to be carried to it
PYTHON ?= python3
PIP_FLAGS ?=
OUT ?= bench/results/latest
SEED ?= 0
PYTEST_FLAGS ?= -m "not slow and not timing"
TEST_JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: docs train test test-integrations test-upstream bench bench-train bench-control bench-dropin peers gpu gpu-sanitize gpu-wheels links sanitize torture lint types clean
.DELETE_ON_ERROR:

train: $(VENV)/built
	rm -rf runs/arithmetic
	$(BIN)/python examples/arithmetic.py runs/arithmetic --seed $(SEED)
	$(BIN)/warpo train examples/sft.yaml --seed $(SEED)
	$(BIN)/warpo train examples/grpo.yaml --seed $(SEED)

# Files in the order of tests/conftest.py, not those with most tests first.
test: $(VENV)/built
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_FLAGS)

bench: $(VENV)/built peers
	$(BIN)/warpo bench --compile --out $(OUT)

bench-train: $(VENV)/built peers
	$(BIN)/warpo bench train --out $(OUT)

bench-control: $(VENV)/built peers
	$(BIN)/warpo bench control --out $(OUT)

bench-dropin: $(VENV)/built peers
	$(BIN)/warpo bench dropin --out $(OUT)

docs: .docs/installed links
	NO_MKDOCS_2_WARNING=1 .docs/bin/mkdocs build --quiet

.docs/installed: docs/requirements.txt
	$(PYTHON) -m venv .docs
	.docs/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_FLAGS) --requirement $<
	touch $@

sanitize: $(VENV)/built
	$(BIN)/python -m pytest tests/kernels/test_sanitizers.py

torture: $(VENV)/built
	$(BIN)/python -m tests.torture

# Each library with its own versions of what it needs; flash-attn, which OpenRLHF imports, installs
# on a CUDA machine alone.
test-integrations: $(VENV)/built peers
	status=0; \
	$(foreach library,$(PEERS), \
	    PYTHONPATH=$(CURDIR)/bench/stand_ins:$(CURDIR)/.peers/$(library)/site-packages \
	    $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile $(PYTEST_FLAGS) \
	    $(wildcard tests/integrations/$(library) tests/integrations/test_$(library).py) || status=1;) \
	exit $$status

test-upstream: $(VENV)/built peers
	$(BIN)/python -m tests.integrations.upstream verl
	$(BIN)/python -m tests.integrations.upstream openrlhf

# Each library in a folder of its own, since their pins exclude one another; without dependencies,
# which would bring another torch. site-packages: dill, by which `datasets` makes fingerprints, pickles
# a module by name only where its path has that in it. DS_BUILD_OPS: DeepSpeed's kernels are not
# compiled.
PEERS := $(basename $(notdir $(wildcard bench/requirements/*.txt)))
peers: $(PEERS:%=.peers/%/built)

.peers/%/built: bench/requirements/%.txt | $(VENV)/installed
	rm -rf $(@D)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-deps --no-build-isolation --target $(@D)/site-packages $(PIP_FLAGS) -r $<
	touch $@

# Without an installation, which a read-only environment would refuse: `warpo` is the folder of links.
GPU_PYTHON ?= 3.12
GPU_RUN = PYTHONPATH=$(CURDIR)/.typing:$$PYTHONPATH $(PYTHON) -m warpo.bench.gpu
gpu: links
	$(GPU_RUN) --out $(OUT)

gpu-sanitize: links
	$(GPU_RUN) sanitize --out $(OUT)

gpu-wheels:
	rm -rf .wheels
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) \
	    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
	    --dest .wheels $(PIP_FLAGS) --requirement bench/gpu/requirements.txt

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The mapping of folders to packages that setup.py makes, for who does not see that.
links:
	mkdir -p .typing/warpo
	for folder in kernels engine bench; do ln -sfn ../../$$folder .typing/warpo/$$folder; done

types: $(VENV)/built
	$(BIN)/mypy

clean:
	rm -rf build .typing runs kernels/*.so *.egg-info

# The stamps are written last, so that an interrupted attempt is taken up again.
$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "warpo needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps $(PIP_FLAGS) --requirement requirements.txt
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES) | links
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-build-isolation --no-deps --editable .
	touch $@
