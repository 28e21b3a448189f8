#!/usr/bin/env bash
# Builds the python-numpy snapshot with FORKD, unless the one that is there was built from the same inputs.
set -euo pipefail
forkd=$1
here=$(cd "$(dirname "$0")/.." && pwd)
state=${XDG_DATA_HOME:-$HOME/.local/share}/forkd
stamp=$state/python-numpy.inputs
inputs=$(cd "$here" && cat recipes/python-numpy/* "$("$forkd" kernel path)" "$(dirname "$(readlink -f "$forkd")")/forkd-agent" vmm/src/*.rs \
    vmm/src/devices/*.rs vmm/src/devices/virtio/*.rs vmm/src/devices/virtio/vsock/*.rs src/machine_build.rs src/machine_build/*.rs | sha256sum)
if [ -f "$state/snapshots/python-numpy/manifest.toml" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$inputs" ]; then
    echo "snapshot python-numpy is up to date"
    exit 0
fi
"$forkd" build "$here/recipes/python-numpy" --tag python-numpy --force
echo "$inputs" >"$stamp"
