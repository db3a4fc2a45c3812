#!/usr/bin/env bash
# Runs the demo and the tests on the wheel in dist/, on this machine less its compilers, its libnuma and the checkout.
#
#   tests/wheel/bare.sh PYTHON
#
# The tests see this machine's own files through overlays, and what a node need not have is removed from the overlays
# alone. Only /usr, /etc and PYTHON's own folder can be seen: no checkout, no home. All of it runs in mount and pid
# namespaces of its own, and ends with them.
set -euo pipefail

python=$1
checkout=$(cd "$(dirname "$0")/../.." && pwd)
# Programs that compile, assemble or link, by the names that build systems look for; and those that need libnuma to run.
NOT_THERE=(cc c89 c99 gcc g++ c++ clang clang++ tcc cpp as ld ld.bfd ld.gold ld.lld lld rustc go cython
    numactl numastat "qemu-$(uname -m)")

if [ "${2:-}" != --inside ]; then
    if [ "$(id -u)" != 0 ] || ! unshare --mount --pid --fork true 2>/dev/null; then
        echo "make: test-wheel hides this machine's compilers and libnuma by mounts of its own, which root alone may"
        echo "make: make, and in a container only with CAP_SYS_ADMIN (docker run --cap-add SYS_ADMIN)."
        echo "make: Nothing was tested."
        exit 1
    fi
    scratch=$(mktemp -d)
    trap 'rmdir "$scratch"' EXIT
    # What the tests need is fetched here, outside, where there may be a network.
    rm -rf "$checkout/build/wheelhouse"
    "$python" -m pip wheel -q --wheel-dir "$checkout/build/wheelhouse" --group "$checkout/pyproject.toml:test"
    SCRATCH=$scratch unshare --mount --pid --fork --kill-child --propagation private "$0" "$python" --inside
    exit
fi

# ---- in the namespaces: the root file system that the tests will see -----------------------------------------------

mount -t tmpfs tmpfs "$SCRATCH"
root=$SCRATCH/root
mkdir "$root"
mount --bind "$root" "$root" # some tests make namespaces of their own, for which / must be a mount
layers=0

# layer DIR: shows this machine's DIR at the same place in the new root; what changes there leaves the machine's alone.
layer() {
    layers=$((layers + 1))
    mkdir -p "$root$1" "$SCRATCH/upper$layers" "$SCRATCH/work$layers"
    mount -t overlay overlay -o "lowerdir=$1,upperdir=$SCRATCH/upper$layers,workdir=$SCRATCH/work$layers" "$root$1" || {
        echo "make: test-wheel needs overlayfs to hide compilers and libnuma, and cannot mount one here."
        echo "make: Nothing was tested."
        exit 1
    }
}

for dir in /usr /etc /bin /sbin /lib*; do
    if [ -L "$dir" ]; then
        cp -P "$dir" "$root/"
    elif [ -d "$dir" ]; then
        layer "$dir"
    fi
done
base=$("$python" -c 'import sys; print(sys.base_prefix)')
case $base in /usr | /usr/*) base=/usr ;; *) layer "$base" ;; esac
mkdir -p "$root"/{proc,sys,dev,run,tmp,var/tmp,root,bare}
chmod 1777 "$root/tmp" "$root/var/tmp"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"

# Each folder once, because PYTHON's may be /usr.
mapfile -t trees < <(printf '%s\n' "$root"/{usr,*bin,lib*} "$root$base" | sort -u)
rm -rf "$root"/usr/{include,lib*/gcc*,libexec/gcc*,lib/llvm-*,*-linux-*}
names=$(IFS='|' && echo "${NOT_THERE[*]//+/\\+}")
# gcc, gcc-12, x86_64-linux-gnu-gcc, x86_64-linux-gnu-gcc-12, musl-gcc
find "${trees[@]}" -ignore_readdir_race -path '*bin/*' ! -type d -regextype posix-extended \
    -regex ".*/([a-z0-9_]+-linux-[a-z0-9]+-|musl-)?($names)(-[0-9.]+)?" -delete
find "${trees[@]}" -ignore_readdir_race -name 'libnuma*' -prune -exec rm -r {} +

cp -r "$checkout"/{tests,examples,pyproject.toml,README.md} "$root/bare/"
rm -rf "$root"/bare/tests/wheel
mkdir "$root/bare/wheels"
cp "$checkout"/build/wheelhouse/* "$checkout"/dist/*.whl "$root/bare/wheels/"

interpreter=$("$python" -c 'import os, sys; print(os.path.realpath(sys.executable))')
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
    PYTEST_ARGS="${PYTEST_ARGS:-}" ${RANKSPAWN_CI_MARK:+RANKSPAWN_CI_MARK="$RANKSPAWN_CI_MARK"} \
    chroot "$root" bash -euo pipefail -s "$interpreter" "${NOT_THERE[*]}" <<'BARE'
cd /bare
everywhere() { find / -ignore_readdir_race \( -path /proc -o -path /sys -o -path /dev \) -prune -o "$@" -print; }

echo "==== what is not here"
found=$(everywhere \( -name 'libnuma*' -o -name stdio.h -o -name cc1 -o -name '_spawn.*' -o -name spawn.c \))
for program in $2; do
    if command -v "$program"; then found="$found $program"; fi
done
[ -z "$found" ] || { echo "make: these should not be here: $found"; exit 1; }
"$1" -c '
import ctypes
try:
    ctypes.CDLL("libnuma.so.1")
except OSError as error:
    print(error)
else:
    raise SystemExit("libnuma.so.1 was found and loaded")'
echo "no program of: $2"
echo "no libnuma*, no C header, no source of rankspawn"

echo "==== the wheel, into an empty environment"
"$1" -m venv /bare/venv
PATH=/bare/venv/bin:$PATH
pip install -q --disable-pip-version-check --no-index --find-links wheels --only-binary :all: rankspawn
pip list --disable-pip-version-check
everywhere -name 'libnuma*'
python -c 'from rankspawn import _spawn; assert _spawn.HAVE_LIBNUMA, "a wheel without libnuma"'
rankspawn --version
rankspawn doctor

echo "==== the demo"
rankspawn run --nproc-per-node 4 --numa-binding node examples/ring_allreduce.py

echo "==== the tests"
pip install -q --disable-pip-version-check --no-index wheels/*.whl
python -m pytest -p no:cacheprovider $PYTEST_ARGS
BARE
