# Everything a fresh Debian 12 machine needs, and the commands that people and CI use.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := curl prometheus etcd-server etcd-client nats-server haproxy nginx-light iproute2 nftables slurm-wlm systemd munge openssh-server
STAMP := $(VENV)/.installed
LOCK := requirements.lock

.PHONY: setup demo demo-down test test-slow lint bench clean

setup: $(STAMP)

# Debian's packages are installed with service start-up switched off: gms-launch runs its own etcd and NATS.
.PHONY: packages
packages:
	@missing=$$(for p in $(PACKAGES); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || missing="$$missing python3-venv"; \
	if [ -n "$$missing" ]; then tests/install-packages.sh $$missing; fi

$(STAMP): pyproject.toml $(LOCK) | packages
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --require-hashes -r $(LOCK)
	$(BIN)/python -m pip install -q --no-deps -e .
	touch $@

# Newer versions into the lock file; then run the tests.
.PHONY: lock
LOCK_VENV := .venv-lock
lock:
	test -x $(LOCK_VENV)/bin/uv || { $(PYTHON) -m venv $(LOCK_VENV) && $(LOCK_VENV)/bin/pip install -q uv; }
	echo '# Every package that `make setup` installs, for Python 3.10 to 3.13, with hashes of its files. Made by `make lock`.' >$(LOCK).new
	$(LOCK_VENV)/bin/uv pip compile -q --universal --python-version 3.10 --generate-hashes --no-header \
	  --extra reference --extra dynamo --extra test pyproject.toml >>$(LOCK).new
	mv $(LOCK).new $(LOCK)

demo: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" tests/demo.sh

demo-down: setup
	$(BIN)/gms-launch down --run demo
	find "$${TMPDIR:-/tmp}" -maxdepth 1 -type d -user "$$(id -u)" -name 'gms-launch-demo-model.*' -exec rm -rf {} +

# The table of settings in docs/reference.md and the manual pages, from where they are declared.
.PHONY: reference
reference: setup
	$(BIN)/python -m tests.reference
	$(BIN)/python -m tests.man

# The documentation as a site in build/site; a link that leads nowhere is an error.
DOCS_VENV := .venv-docs
.PHONY: docs
docs: $(DOCS_VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict --quiet

$(DOCS_VENV)/.installed: pyproject.toml | packages
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install -q -e '.[docs]'
	touch $@

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Side by side, a file at a time: most of a test is waiting. In their order: unit tests fill up what is left at the end.
test: setup lint docs
	$(BIN)/python -m pytest -q -n 4 --dist loadfile --no-loadscope-reorder

test-slow: setup
	$(BIN)/python -m pytest -q -m slow -n 3 --dist loadfile

# The wheels of every Dynamo line that we drive, looked up in; part of `make test` too.
.PHONY: test-wheels test-releases test-vllm
test-wheels: setup
	$(BIN)/python -m pytest -q tests/wheels

# A failover on the native runtime of each: 75 MB a release, so not part of `make test`.
test-releases: setup
	$(BIN)/python -m pytest -q -m slow tests/wheels

# vLLM's own parser on our command lines, without a GPU: 9 GB and some minutes, so not part of `make test`.
VLLM_VENV := .venv-vllm
test-vllm: setup
	test -x $(VLLM_VENV)/bin/pip || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install -q vllm==0.23.0 ai-dynamo==1.3.1
	GMS_LAUNCH_VLLM_PYTHON=$(VLLM_VENV)/bin/python $(BIN)/python -m pytest -q tests/wheels/test_parser.py

# 300 faults at random moments against a real three-node deployment: half an hour.
.PHONY: chaos
chaos: setup
	$(BIN)/python -m tests.chaos.chaos --rounds 300 --seed $$RANDOM

# Beside torchrun and ft_launcher, with torch in an environment of its own (9 GB).
.PHONY: bench-peers
PEERS_VENV := .venv-peers
bench-peers: setup
	test -x $(PEERS_VENV)/bin/pip || $(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_VENV)/bin/pip install -q torch nvidia-resiliency-ext
	$(BIN)/python -m bench.peers --python $(PEERS_VENV)/bin/python

# On a machine with a GPU: the same contract tests, with its memory.
.PHONY: test-gpu kernels
test-gpu: setup
	GMS_LAUNCH_GPU_TESTS=1 $(BIN)/python -m pytest -q tests/gpu

# The reference engine's kernel; needs nvcc, its output is checked in.
kernels:
	cd gms_launch/engines/reference/compute && nvcc -ptx -arch=compute_75 -o kernels.ptx kernels.cu

bench: setup
	$(BIN)/python -m bench.watch
	$(BIN)/python -m bench.failover
	$(BIN)/python -m bench.rearm
	$(BIN)/python -m bench.fence
	$(BIN)/python -m bench.simulate
	$(BIN)/python -m bench.overhead
	$(BIN)/python -m bench.requests

clean:
	rm -rf $(VENV) $(DOCS_VENV) build *.egg-info
