#!/usr/bin/env bash
# Everything that is checked without running it: format, lint, types, import layers, spelling, shell.
set -euo pipefail
unset CDPATH
cd "$(dirname "$0")/.."

ruff format --check .
ruff check .
mypy
mypy --config-file tests/mypy.ini
lint-imports
typos
mapfile -t scripts < <(git ls-files '*.sh' '.ci/run')
shellcheck --external-sources --source-path=SCRIPTDIR "${scripts[@]}"
mapfile -t sources < <(git ls-files '*.cpp' '*.h')
clang-format --dry-run -Werror "${sources[@]}"
