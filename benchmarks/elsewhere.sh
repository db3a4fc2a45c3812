#!/bin/sh
# The table of many ranks, and of whole commands, on a machine that is at hand for some minutes: `sh benchmarks/elsewhere.sh`.
#
# Nothing is fetched and nothing installed. The machine has a C compiler, and a Python with its headers, setuptools,
# Cython and psutil; PYTHON names it. The engine is built in the checkout. It takes about 4 minutes on 16 CPUs; what is
# given after the name goes to run.py: `--effort 0.2` is a quick look.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
RANKSPAWN_REQUIRE_EXTENSION=1 "$python" setup.py -q build_ext --inplace
PYTHONPATH="$PWD/src" exec "$python" benchmarks/run.py ranks spawn groups commands "$@"
