#!/usr/bin/env bash
# unpack-packages.sh DIR PACKAGE...: Debian packages as files in DIR, without installing them, so that none starts a service.
set -euo pipefail
dir=$1
shift
missing=()
for package in "$@"; do
    [ -e "$dir/.$package" ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
if ! command -v apt-get >/dev/null; then
    echo "not Debian: the tests of networks need the programs of ${missing[*]} in PATH" >&2
    exit 0
fi
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
download() { apt-get -o APT::Sandbox::User=root download -q "${missing[@]}"; }
download || { apt-get update -q && download; }
for package in "${missing[@]}"; do
    dpkg-deb -x "$package"_*.deb "$dir"
    touch "$dir/.$package"
done
