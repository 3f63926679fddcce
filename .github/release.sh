#!/usr/bin/env bash
# Builds what is released of the commit that is checked out: the source distribution, and from it a
# wheel with the compiled CPU kernel, whose name says on which Linux it runs. The same commit, Python
# and compiler give the same bytes.
#
#   .github/release.sh [folder]         dist by default
set -euo pipefail
unset CDPATH
unset PYTHONPATH  # nothing but what is pinned
umask 022  # archives hold the modes of files
out=$(realpath -m "${1:-dist}")
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Nothing but the tools: torch is not needed to build.
python3 -m venv --without-pip "$work/tools"
python3 -m pip --python "$work/tools/bin/python" install --quiet --no-deps \
  --requirement .github/release.txt
export PATH=$work/tools/bin:$PATH

SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
export SOURCE_DATE_EPOCH
# Not the work tree, which may hold what was never committed and what earlier builds left.
mkdir "$work/source"
git archive HEAD | tar -x --no-same-permissions -C "$work/source"
python -m build --no-isolation --outdir "$work/built" "$work/source"

# Fails if the kernel needs a newer C or C++ library than this, which is what torch's wheels ask for.
# Adds none: OpenMP's functions are those of torch, which is loaded before the kernel.
wheel=$(find "$work/built" -name '*-linux_x86_64.whl')
[ -n "$wheel" ] || { echo "a release needs a C++ compiler on x86-64 Linux" >&2; exit 1; }
auditwheel repair --plat manylinux_2_28_x86_64 --only-plat --wheel-dir "$out" "$wheel"
cp "$work"/built/*.tar.gz "$out"
