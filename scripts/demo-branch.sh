#!/usr/bin/env bash
# Branching as an agent uses it, with FORKD and the snapshot TAG, whose machine has pytest: a child works on a failing
# test, is branched five ways at the moment of decision, each branch tries its own patch, and the first that passes is
# kept as a delta pack and forked elsewhere. The agent is this script; no model is asked.
set -euo pipefail
forkd=$1
tag=$2

work=$(mktemp -d)
export XDG_RUNTIME_DIR=$work/run XDG_CACHE_HOME=$work/cache FORKD_HUB_URL=file://$work/hub/registry.json
kept=demo-$$
mkdir -p "$XDG_RUNTIME_DIR" "$work/project/mathy" "$work/project/patches" "$work/project/tests"
finish() {
    "$forkd" kill --all >/dev/null 2>&1 || true
    "$forkd" rmi "$kept" >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap finish EXIT
step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

: >"$work/project/mathy/__init__.py"
cat >"$work/project/tests/test_median.py" <<'PYTHON'
from mathy.median import median


def test_odd():
    assert median([3, 1, 2]) == 2


def test_even():
    assert median([4, 1, 3, 2]) == 2.5


def test_the_argument_stays_as_it_is():
    values = [3, 1, 2]
    median(values)
    assert values == [3, 1, 2]
PYTHON
patch() { # NUMBER BODY...
    local number=$1
    shift
    { echo 'def median(values):'; printf '    %s\n' "$@"; } >"$work/project/patches/$number.py"
}
patch 1 'return sorted(values)[len(values) // 2]'
patch 2 'return sum(values) / len(values)'
patch 3 'half = len(values) // 2' 'values.sort()' 'return (values[half] + values[~half]) / 2'
patch 4 'half, values = len(values) // 2, sorted(values)' 'return (values[half] + values[~half]) / 2'
patch 5 'half, values = len(values) // 2, sorted(values)' 'return (values[half] + values[half + 1]) / 2'
cp "$work/project/patches/1.py" "$work/project/mathy/median.py"
pytest='cd /root/project && PYTHONPATH=. python3 -m pytest -q -p no:cacheprovider tests'

step "a pack of $tag, and a child of it"
"$forkd" pack --tag "$tag" --out "$work/base.forkd-snapshot.tar.zst"
"$forkd" hub publish "$work/base.forkd-snapshot.tar.zst" --hub "$work/hub" --name demo/base
child=$("$forkd" --json fork demo/base --detach | jq -r '.children[0].id')
echo "$child runs"

step "it gets a project, whose tests fail"
"$forkd" cp "$work/project" "$child:/root/project"
if "$forkd" exec "$child" -- sh -c "$pytest"; then
    echo "the tests pass before anything was mended" >&2
    exit 1
fi

step "five branches, each with another patch"
"$forkd" --json branch "$child" -n 5 --vary PATCH=1,2,3,4,5 --detach \
    --exec -- sh -c "cp /root/project/patches/\$PATCH.py /root/project/mathy/median.py; $pytest" >"$work/branches.json" || true
jq -r '"\(.parent) stood still for \(.pause_ms * 10 | round / 10) ms; \(.copied_bytes / 1048576 * 10 | round / 10) MiB copied",
    (.children | to_entries[] | "\(.value.id): patch \(.key + 1): \(
        if .value.exit_code == 0 then "passes after \(.value.answered_ms | round) ms" else "fails" end)")' "$work/branches.json"
winner=$(jq -r '[.children[] | select(.exit_code == 0)] | min_by(.answered_ms) | .id' "$work/branches.json")
[ "$winner" != null ] || { cat "$work/branches.json" >&2; exit 1; }

step "$winner wins and is kept"
"$forkd" snapshot --child "$winner" --tag "$kept"
"$forkd" pack --tag "$kept" --delta --out "$work/mended.forkd-snapshot.tar.zst" --description "the median is mended"
"$forkd" hub publish "$work/mended.forkd-snapshot.tar.zst" --hub "$work/hub" --name demo/mended
size() { stat -c %s "$work/$1.forkd-snapshot.tar.zst" | numfmt --to=iec-i --suffix=B; }
echo "the pack is of $(size base), what was worked out in it of $(size mended)"

step "anywhere else"
"$forkd" kill --all
XDG_DATA_HOME=$work/elsewhere XDG_CACHE_HOME=$work/elsewhere-cache "$forkd" fork demo/mended --exec -- sh -c "$pytest"
