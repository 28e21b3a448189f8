#!/usr/bin/env bash
# build-machine.sh FORKD RECIPE...: builds each recipe's snapshot with FORKD, tagged as its folder is called, unless the one
# that is there was built from the same inputs.
set -euo pipefail
forkd=$1
shift
here=$(cd "$(dirname "$0")/.." && pwd)
state=${XDG_DATA_HOME:-$HOME/.local/share}/forkd

# The files that a snapshot is made of, and by. Crates count whole: where a part was left out, a stale snapshot passed.
sources() {
    shopt -s nullglob
    # The order must not depend on the file system.
    find "$1" {abi,engine,vmm}/src/* guest/workers -type f -print0 |
        LC_ALL=C sort -z
}
for recipe in "$@"; do
    tag=$(basename "$recipe")
    stamp=$state/$tag.inputs
    inputs=$({
        cat "$("$forkd" kernel path)" "$(dirname "$(readlink -f "$forkd")")/forkd-agent"
        cd "$here" && sources "$recipe" | xargs -0 cat
    } | sha256sum)
    if [ -f "$state/snapshots/$tag/manifest.toml" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$inputs" ]; then
        echo "snapshot $tag is up to date"
        continue
    fi
    "$forkd" build "$here/$recipe" --tag "$tag" --force
    echo "$inputs" >"$stamp"
done
