#!/usr/bin/env bash
# The documents as a site: build/site/index.html. Offline, but for the installation.
#
#   bash docs/build.sh [ARGUMENTS OF mkdocs build]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../examples/environment.sh"
cd "$root"
NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet "$@"
echo "$root/build/site/index.html"
