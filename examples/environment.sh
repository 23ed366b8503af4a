# Sourced by quickstart.sh, docs/build.sh and tests/run.sh: makes .venv with the pinned, tested versions of
# constraints.txt, installs this package into it, and puts it on the PATH. With uv, where there is one
# and it can.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "The pinned versions need Python 3.11 or newer; name one with PYTHON=..." >&2
    exit 2
}
pins="$root/examples/constraints.txt"
install() {
    local target="$root/.venv/bin/python"
    command -v uv >/dev/null && uv pip install --quiet --compile-bytecode --python "$target" "$@" && return
    "$target" -m pip install --quiet --disable-pip-version-check "$@" # uv does not read pip's settings
}
if ! cmp -s "$pins" "$root/.venv/constraints.txt"; then
    echo "Making $root/.venv (downloads about 1 GB the first time, more where torch brings CUDA) ..."
    "$python" -m venv --clear "$root/.venv"
    install --constraint "$pins" torch
    install --constraint "$pins" "$root[test]"
    cp "$pins" "$root/.venv/constraints.txt"
fi
# the package itself anew each time: what is installed is what is in the checkout
"$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --no-deps --no-build-isolation --force-reinstall "$root"
export PATH="$root/.venv/bin:$PATH"
