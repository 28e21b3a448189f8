#!/usr/bin/env bash
# Runs forkd on real hardware virtualisation, emulated: QEMU's TCG emulates an AMD processor with SVM, Debian's stock
# kernel with kvm_amd runs on it ("layer 1"), and forkd runs there. See README.md beside this file.
#
# usage: [FORKD_GUEST_KERNEL=VMLINUX] run.sh FORKD CACHE [STAGE...]
# As root; FORKD and forkd-agent beside it are built, CACHE is kept.
set -euo pipefail

forkd=$1 cache=$2
shift 2
here=$(cd "$(dirname "$0")" && pwd)
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(vmm-tests our-kernel debian-kernel limits)

# A layer 1 that says nothing for this long has hung, seconds. Its heartbeat comes every 3.
SILENCE=40
# No stage takes a third of this on a host at rest, seconds: a guest that hangs in a living layer 1 ends here.
STAGE_LIMIT=480
# One try of ten is lost on some hosts, and losses come in rows.
TRIES=5
LAYER1_MIB=2560
cpu=0
# This emulator lets a guest of layer 1 set XCR0 without asking KVM, which goes on believing the old value and puts it
# back: the guest loses its SSE registers. Five-level page tables only cost time.
CPU=max,xsave=off,la57=off

mkdir -p "$cache"
cache=$(cd "$cache" && pwd)
exec 9>"$cache/lock"
flock 9

say() { echo "hwvirt: $*"; }

# Downloads the kernel package that a metapackage names today and unpacks it. Prints its folder.
fetch_kernel() {
    local meta=$1 package folder
    [ -n "$(apt-cache depends "$meta" 2>/dev/null)" ] || apt-get update -q >&2
    package=$(apt-cache depends "$meta" | sed -n 's/^ *Depends: \(linux-image-[0-9][^ ]*\)$/\1/p' | head -n 1)
    [ -n "$package" ] || { say "apt knows no kernel package behind $meta" >&2; return 1; }
    folder=$cache/$package
    if [ ! -e "$folder/complete" ]; then
        rm -rf "$folder" "$folder.new"
        mkdir -p "$folder.new"
        # Lists that are days old name packages that are gone.
        (cd "$folder.new" && apt-get download -q -o APT::Sandbox::User=root "$package" >&2) || {
            [ "${2:-}" != again ] || return 1
            apt-get update -q >&2
            rm -rf "$folder.new"
            fetch_kernel "$meta" again
            return
        }
        dpkg-deb -x "$folder.new"/*.deb "$folder.new/tree" >&2
        rm "$folder.new"/*.deb
        touch "$folder.new/complete"
        mv "$folder.new" "$folder"
    fi
    echo "$folder/tree"
}

# Copies kernel modules and what they need from TREE to ROOT, with the index that modprobe reads.
copy_modules() {
    local tree=$1 root=$2 version file needed
    shift 2
    version=$(basename "$tree"/lib/modules/*)
    local to=$root/lib/modules/$version
    mkdir -p "$to"
    while [ $# -gt 0 ]; do
        # File names have - or _ where module names have _.
        file=$(find "$tree/lib/modules" -name "${1//[-_]/[-_]}.ko" | head -n 1)
        [ -n "$file" ] || { say "no module $1 in $tree" >&2; return 1; }
        cp "$file" "$to/"
        needed=$(tr '\0' '\n' <"$file" | sed -n 's/^depends=//p')
        shift
        # shellcheck disable=SC2086
        set -- "$@" ${needed//,/ }
    done
    busybox depmod -b "$root" "$version"
}

# Copies programs to ROOT/bin without debug information, and the libraries they are linked with.
copy_programs() {
    local root=$1 program library
    shift
    for program in "$@"; do
        strip -o "$root/bin/$(basename "$program")" "$program"
        for library in $(ldd "$program" 2>/dev/null | grep -o '/[^ ]*'); do
            mkdir -p "$root$(dirname "$library")"
            cp -L "$library" "$root$library"
        done
    done
}

pack_cpio() {
    (cd "$1" && find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0) >"$2"
}

# The small Linux that runs inside layer 1: busybox, the agent and a warm worker, as an EROFS image.
make_guest_disk() {
    local root=$cache/guest-disk applet
    rm -rf "$root"
    mkdir -p "$root"/{bin,dev,etc,forkd,proc,run,sys,tmp}
    cp "$(command -v busybox)" "$root/bin/busybox"
    for applet in $(busybox --list | grep -vx busybox); do ln -s busybox "$root/bin/$applet"; done
    cp "$(dirname "$forkd")/forkd-agent" "$root/forkd/agent"
    install -m 755 "$here/worker.sh" "$root/bin/worker"
    mkfs.erofs --quiet "$cache/guest-disk.erofs" "$root" >/dev/null
}

# The initramfs of Debian's cloud kernel: busybox, the modules a forkd machine needs, and an /init.
make_guest_initramfs() {
    local tree=$1 root=$cache/guest-initramfs
    rm -rf "$root"
    mkdir -p "$root"/{bin,dev,proc,root,sys}
    cp "$(command -v busybox)" "$root/bin/busybox"
    install -m 755 "$here/layer2.init" "$root/init"
    copy_modules "$tree" "$root" virtio_mmio virtio_pmem nd_pmem virtio_rng erofs overlay vmw_vsock_virtio_transport
    pack_cpio "$root" "$cache/guest-initramfs.cpio"
}

make_layer1() {
    local tree=$1 cloud=$2 root=$cache/layer1 test_binaries
    rm -rf "$root"
    mkdir -p "$root"/{bin,dev,guest,proc,sys,tests,tmp}
    cp "$(command -v busybox)" "$root/bin/busybox"
    install -m 755 "$here/layer1.init" "$root/init"
    cp "$here/layer1.stages" "$root/stages"
    cc -shared -fPIC -O2 -Wall -Werror -o "$root/bin/tss.so" "$here/tss.c"
    copy_modules "$tree" "$root" kvm-amd tun
    copy_programs "$root" "$forkd" "$(command -v jq)"
    # First: building tests puts an agent that is not static in the place of ours.
    make_guest_disk
    mapfile -t test_binaries < <(cd "$here/../.." && cargo test -q --no-run --release --workspace --message-format json |
        jq -r 'select(.reason == "compiler-artifact" and .profile.test and .executable != null
            and (.package_id | test("forkd-vmm"))) | .executable')
    [ ${#test_binaries[@]} -gt 0 ] || { say "cargo names no test binary of forkd-vmm" >&2; return 1; }
    copy_programs "$root" "${test_binaries[@]}"
    (cd "$root/bin" && mv "${test_binaries[@]##*/}" ../tests/)
    make_guest_initramfs "$cloud"
    cp "$cache/guest-disk.erofs" "$cache/guest-initramfs.cpio" "$root/guest/"
    cp "${FORKD_GUEST_KERNEL:-$("$forkd" kernel path)}" "$root/guest/vmlinux"
    cp "$cloud"/boot/vmlinuz-* "$root/guest/vmlinuz"
    pack_cpio "$root" "$cache/layer1.cpio"
}

# Boots layer 1 once for one stage. 0: the stage passed. 1: it failed. 2: layer 1 or the emulator hung or died.
try_stage() {
    local stage=$1 log=$2 vmlinuz=$3 qemu started age used
    started=$SECONDS
    : >"$log"
    # One CPU, because two have been seen to wait for each other for ever while a guest of layer 1 ran.
    qemu-system-x86_64 -nodefaults -no-user-config -no-reboot -display none -machine q35,usb=off \
        -accel tcg,thread=single -cpu "$CPU" -smp 1 -m "$LAYER1_MIB" \
        -serial "file:$log" -kernel "$vmlinuz" -initrd "$cache/layer1.cpio" \
        -append "console=ttyS0 loglevel=6 panic=-1 nowatchdog no_timer_check mitigations=off hwvirt.stage=$stage" 9>&- &
    qemu=$!
    trap 'kill -9 $qemu 2>/dev/null' EXIT
    local verdict=""
    cpu=0
    while kill -0 "$qemu" 2>/dev/null; do
        sleep 0.5
        # User and system time, in hundredths of a second.
        used=$(cut -d ' ' -f 14,15 "/proc/$qemu/stat" 2>/dev/null | awk '{ print int(($1 + $2) / 100) }')
        cpu=${used:-$cpu}
        age=$(($(date +%s) - $(stat -c %Y "$log")))
        if [ "$age" -ge "$SILENCE" ]; then
            verdict="silent for $age s, $((SECONDS - started)) s after its start"
        elif [ $((SECONDS - started)) -ge "$STAGE_LIMIT" ]; then
            verdict="not done after $STAGE_LIMIT s"
        fi
        if [ -n "$verdict" ]; then
            kill -9 "$qemu" 2>/dev/null || true
            break
        fi
    done
    wait "$qemu" 2>/dev/null || true
    trap - EXIT
    case $(sed -n "s/^hwvirt-result: $stage \([a-z]*\).*/\1/p" "$log" | tail -n 1) in
        ok) return 0 ;;
        failed) return 1 ;;
    esac
    say "$stage: layer 1 ${verdict:-ended without a result}"
    return 2
}

run_stage() {
    local stage=$1 vmlinuz=$2 try log outcome started
    rm -f "$cache/$stage".[0-9].log
    for try in $(seq "$TRIES"); do
        log=$cache/$stage.$try.log started=$SECONDS outcome=0
        try_stage "$stage" "$log" "$vmlinuz" || outcome=$?
        tr -d '\r' <"$log" | sed -n "s/^hwvirt-note: /hwvirt:   /p"
        case $outcome in
            0) say "$stage ok in $((SECONDS - started)) s ($cpu s of CPU)$([ "$try" = 1 ] || echo ", at try $try")"; return 0 ;;
            1) say "$stage FAILED in $((SECONDS - started)) s; the end of $log:"; tail -n 60 "$log"; return 1 ;;
            *) say "$stage: try $try of $TRIES was lost after $((SECONDS - started)) s; the end of $log:"; tail -n 15 "$log" ;;
        esac
    done
    say "$stage FAILED: layer 1 was lost $TRIES times"
    return 1
}

started=$SECONDS
host=$(fetch_kernel linux-image-amd64)
cloud=$(fetch_kernel linux-image-cloud-amd64)
make_layer1 "$host" "$cloud"
vmlinuz=$(echo "$host"/boot/vmlinuz-*)
say "prepared in $((SECONDS - started)) s: $(du -h "$cache/layer1.cpio" | cut -f 1) of initramfs, $(basename "$vmlinuz")"
failed=()
for stage in "${stages[@]}"; do
    run_stage "$stage" "$vmlinuz" || failed+=("$stage")
done
# Once more at the end, which is what a reader of a long log sees first.
for stage in "${failed[@]}"; do
    for log in "$cache/$stage".[0-9].log; do
        say "what $stage said in ${log##*/}:"
        tr -d '\r' <"$log" | grep -v -e '^\[ ' -e '^hwvirt-beat' | tail -n 25
    done
done
say "all in $((SECONDS - started)) s"
[ ${#failed[@]} -eq 0 ] || { say "FAILED: ${failed[*]}"; exit 1; }
