#!/usr/bin/env bash
# What the unmodified cryodrgn makes of our run folders, oldest and newest supported version:
# tests/host_matrix. Needs Chromium (Debian: chromium); CHROMIUM names another browser of that kind.
#
#   bash tests/host_matrix.sh [--write-readme] [--screenshot FOLDER] [--only RUN ...]
#
# Makes two environments per version under .hosts and uses them again: `host` is cryodrgn alone, as
# pip installs it, but for torch: TORCH (default 2.13.0) everywhere, because versions that old hosts
# allow (4.2: below 2.10) may bring gigabytes of CUDA. `ours` is this package, on top of the other.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${PYTHON:-python3}
hosts=${HOSTS:-4.2.0 4.3.1}
torch=torch==${TORCH:-2.13.0}
install="-m pip install --quiet --disable-pip-version-check"

# The requirements in a METADATA file or pyproject.toml on stdin, but for torch and cryodrgn.
requirements() {
    "$python" -c '
import re, sys
text = sys.stdin.read()
found = re.findall(r"^Requires-Dist: ([^;\n]+)$", text, re.M)
found = found or re.findall(r"\"(.+?)\"", text.split("\ndependencies = [")[1].split("\n]")[0])
print(*(r.replace(" ", "") for r in found if not re.match("(torch|cryodrgn)\\b", r)), sep="\n")'
}

for host in $hosts; do
    here="$root/.hosts/$host"
    if [ ! -f "$here/made" ]; then
        echo "Making $here (about 2.5 GB) ..."
        mkdir -p "$here"
        "$python" -m venv --clear "$here/host"
        "$python" -m venv --clear "$here/ours"
        site=$("$here/host/bin/python" -c 'import site; print(site.getsitepackages()[0])')
        echo "$site" > "$("$here/ours/bin/python" -c 'import site; print(site.getsitepackages()[0])')/host.pth"
        pins=()
        case $host in # 4.2 calls what matplotlib 3.9 has dropped
            4.2.*) echo "matplotlib<3.9" > "$here/pins.txt"; pins=(--constraint "$here/pins.txt") ;;
        esac
        if grep -q "^cryodrgn==$host$" examples/constraints.txt; then
            pins=(--constraint examples/constraints.txt)
        fi
        "$here/host/bin/python" $install "$torch"
        "$here/host/bin/python" $install --no-deps "cryodrgn==$host"
        requirements < "$(echo "$site"/cryodrgn-*.dist-info/METADATA)" > "$here/requirements.txt"
        "$here/host/bin/python" $install "${pins[@]}" "$torch" -r "$here/requirements.txt"
        requirements < pyproject.toml > "$here/ours.txt"
        "$here/ours/bin/python" $install "${pins[@]}" "$torch" -r "$here/ours.txt"
        touch "$here/made"
    fi
    "$here/ours/bin/python" $install --no-deps --force-reinstall "$root"
done
export OMP_NUM_THREADS=1
cd tests
exec "$root/.hosts/${hosts##* }/ours/bin/python" -m host_matrix $(for host in $hosts; do echo "$root/.hosts/$host"; done) "$@"
