#!/usr/bin/env bash
# The main job as a user does it, with FORKD: pack, publish, serve as over 20 ms and 50 MB/s, mount, fork three
# machines while the pack is still at the hub, and the same after a whole download and with everything cached.
set -euo pipefail
forkd=$1
children=${CHILDREN:-3}
rtt=${RTT:-20ms}
bandwidth=${BANDWIDTH:-50MB/s}
code='numpy.zeros(5).tolist()'

work=$(mktemp -d)
mountpoint=$work/mnt
server=
finish() {
    "$forkd" umount "$mountpoint" >/dev/null 2>&1 || true
    [ -z "$server" ] || kill "$server" 2>/dev/null || true
    rm -rf "$work"
}
trap finish EXIT
export XDG_RUNTIME_DIR=$work/run
mkdir -p "$mountpoint" "$XDG_RUNTIME_DIR"

step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

step "pack and publish"
"$forkd" pack --tag python-numpy --out "$work/python-numpy.forkd-snapshot.tar.zst" \
    --description "Debian's Python 3 with numpy imported"
"$forkd" hub publish "$work/python-numpy.forkd-snapshot.tar.zst" --hub "$work/hub" --name deeplethe/python-numpy

step "serve it with $rtt round trips and $bandwidth"
"$forkd" hub serve "$work/hub" --listen 127.0.0.1:0 --rtt "$rtt" --bandwidth "$bandwidth" >"$work/serve.log" &
server=$!
for _ in $(seq 100); do
    url=$(sed -n 's/^listening on \(.*\)$/\1/p' "$work/serve.log")
    [ -z "$url" ] || break
    sleep 0.1
done
[ -n "$url" ] || { cat "$work/serve.log" >&2; exit 1; }
export FORKD_HUB_URL=$url
echo "listening on $url"

step "browse it as files; nothing is downloaded yet"
XDG_CACHE_HOME=$work/cache-mount "$forkd" mount "$mountpoint"
ls -l "$mountpoint/deeplethe/python-numpy/latest/"
cat "$mountpoint/deeplethe/python-numpy/latest/snapshot.json"
jq -r '"fetched \(.bytes_fetched) of \(.bytes_total) bytes in \(.requests) requests"' \
    "$mountpoint/deeplethe/python-numpy/latest/.forkd/stats.json"
"$forkd" umount "$mountpoint"

fork() { # NAME CACHE ARGS...
    local name=$1 cache=$2
    shift 2
    XDG_CACHE_HOME=$work/$cache "$forkd" --json fork deeplethe/python-numpy -n "$children" --eval "$code" "$@" \
        >"$work/$name.json"
}

step "fork $children machines from the pack while it is at the hub"
XDG_CACHE_HOME=$work/cache-shown "$forkd" fork deeplethe/python-numpy -n "$children" --eval "$code"

step "the same three ways: lazily with nothing cached, after a whole download, lazily with everything cached"
fork lazy cache-lazy
fork eager cache-eager --eager
fork cached cache-eager
row() { # NAME LABEL
    jq -r --arg start "$2" '
        def ms: if . == null then "-" else "\(. * 10 | round / 10)" end;
        def kib: if . == null then "-" else "\(. / 1024 | round)" end;
        [$start,
         ([.children[].first_instruction_ms] | min | ms),
         ([.children[].answered_ms] | min | ms),
         ([.children[].answered_ms] | max | ms),
         (.fetched.at_first_instruction | kib),
         (.fetched.at_answered | kib),
         (.pack.bytes_total | kib),
         ([.children[] | select(.answer == "[0.0, 0.0, 0.0, 0.0, 0.0]")] | length)] | @tsv' "$work/$1.json"
}
{
    printf 'start\tfirst instruction ms\tfirst answer ms\tlast answer ms\tKiB fetched by then (instruction)\t(answer)\tof KiB\tright answers\n'
    row lazy lazy
    row eager "download first"
    row cached "lazy, cached"
} | column -t -s $'\t'
jq -rn --slurpfile lazy "$work/lazy.json" --slurpfile eager "$work/eager.json" '
    def first: [.[0].children[].first_instruction_ms] | min;
    "first instruction: \(($eager | first) / ($lazy | first) * 10 | round / 10) times sooner than after a whole download"'
for name in lazy eager cached; do
    right=$(jq '[.children[] | select(.answer == "[0.0, 0.0, 0.0, 0.0, 0.0]")] | length' "$work/$name.json")
    [ "$right" = "$children" ] || { echo "only $right of $children right answers ($name)" >&2; exit 1; }
done
