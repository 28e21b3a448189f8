#!/usr/bin/env bash
# make-hub.sh FORKD HUB RECIPE...: builds each recipe unless its snapshot is up to date, packs it, and publishes it into the
# folder HUB as deeplethe/NAME. Says how long each took and what it weighs.
set -euo pipefail
forkd=$1
hub=$2
shift 2
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for recipe in "$@"; do
    name=$(basename "$recipe")
    started=$SECONDS
    "$here/scripts/build-machine.sh" "$forkd" "$recipe"
    pack=$work/$name.forkd-snapshot.tar.zst
    "$forkd" pack --tag "$name" --out "$pack"
    "$forkd" hub publish "$pack" --hub "$hub" --name "deeplethe/$name" --recipe-path "recipes/$name"
    printf '%s: %s bytes, %s s\n' "$name" "$(stat --format=%s "$pack")" $((SECONDS - started))
    rm "$pack"
done
"$forkd" images --hub "$hub"
