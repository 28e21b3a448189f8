#!/usr/bin/env bash
# Builds the python-numpy snapshot with FORKD, unless the one that is there was built from the same inputs.
set -euo pipefail
forkd=$1
here=$(cd "$(dirname "$0")/.." && pwd)
state=${XDG_DATA_HOME:-$HOME/.local/share}/forkd
stamp=$state/python-numpy.inputs

# The files that a snapshot is made of, and by. Crates count whole: where a part was left out, a stale snapshot passed.
sources() {
    shopt -s nullglob
    # The order must not depend on the file system.
    find recipes/python-numpy {abi,engine,vmm}/src/* -type f -print0 |
        LC_ALL=C sort -z
}
inputs=$({
    cat "$("$forkd" kernel path)" "$(dirname "$(readlink -f "$forkd")")/forkd-agent"
    cd "$here" && sources | xargs -0 cat
} | sha256sum)
if [ -f "$state/snapshots/python-numpy/manifest.toml" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$inputs" ]; then
    echo "snapshot python-numpy is up to date"
    exit 0
fi
"$forkd" build "$here/recipes/python-numpy" --tag python-numpy --force
echo "$inputs" >"$stamp"
