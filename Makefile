# `make quickstart` and `make test` set a fresh Debian machine up by themselves (as root).

.DEFAULT_GOAL := build
SHELL := /bin/bash
TARGET := $(or $(CARGO_TARGET_DIR),target)
TRIPLE := x86_64-unknown-linux-gnu
STATIC := -C target-feature=+crt-static
SHIPPED := $(abspath $(TARGET))/static
FORKD := $(SHIPPED)/forkd
PACKAGES := build-essential pkg-config libclang-dev linux-libc-dev zstd tar fuse3 jq bsdextrautils \
	linux-source-6.12 flex bison bc libelf-dev xz-utils mmdebstrap erofs-utils git rsync attr python3 \
	qemu-system-x86 busybox-static cpio

.PHONY: build install deps machine quickstart test lint clean bench-ttfi bench-fanout bench-fault bench-criterion bench-mount bench-machines \
	fuzz soak test-hwvirt

## forkd and, beside it, the guest's agent (it runs as the only program of a root disk), both static, as copies without debug
## information: cargo builds the dynamic ones of its tests over its own, and a file that was written in one go starts 0.15 ms
## faster than what a linker wrote piece by piece.
build:
	RUSTFLAGS="$(STATIC) -C relocation-model=static -C strip=symbols" cargo build --release -p forkd-guest --target $(TRIPLE) \
		--target-dir $(TARGET)/guest
	cargo rustc --release -p forkd --bin forkd -- $(STATIC)
	install -m 755 $(TARGET)/guest/$(TRIPLE)/release/forkd-agent $(TARGET)/release/forkd-agent
	install -d $(SHIPPED)
	strip -o $(TARGET)/forkd.stripped $(TARGET)/release/forkd
	install -m 755 $(TARGET)/forkd.stripped $(SHIPPED)/forkd
	install -m 755 $(TARGET)/release/forkd-agent $(SHIPPED)/forkd-agent

## forkd and the agent that it puts into the machines it builds
PREFIX ?= /usr/local
install: build
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 $(FORKD) $(SHIPPED)/forkd-agent $(DESTDIR)$(PREFIX)/bin

## the system packages, when they are missing and we may install them
deps:
	@scripts/install-packages.sh $(PACKAGES)

## the guest kernel and the python-numpy snapshot; both are kept and reused
machine: deps build
	$(FORKD) kernel build
	@scripts/build-machine.sh $(FORKD)

## the main job, end to end: build, publish, serve, mount, fork lazily, compare
quickstart: machine
	@scripts/quickstart.sh $(FORKD)

## every test, the one on a real Linux guest among them
test: machine
	FORKD_UNDER_TEST=$(FORKD) cargo nextest run --workspace --release --no-fail-fast

## forkd on hardware virtualisation: kvm_amd of Debian's stock kernel on an emulated processor (tests/hwvirt/README.md)
## The forkd of these is dynamic: a library that mends the emulator is loaded before its own.
test-hwvirt: deps build
	$(FORKD) kernel build
	cargo build --release -p forkd
	tests/hwvirt/run.sh $(TARGET)/release/forkd $(TARGET)/hwvirt

## benches/README.md says what each of these measures; BENCH passes options on, e.g. BENCH="--quick --runs 3"
bench-machines: deps build
	cargo build --release --example synthetic_machine

bench-ttfi bench-fanout bench-fault: bench-%: bench-machines
	benches/$*.py $(FORKD) --csv $(TARGET)/bench-$*.csv --svg $(TARGET)/bench-$*.svg $(BENCH)

bench-criterion:
	cargo bench -p forkd-fs --bench chunks --bench index $(BENCH)
	cargo bench -p forkd-vmm --bench faults $(BENCH)

## sequential and random reads through the mount beside zstd -d, tar and ratarmount (which pip fetches)
bench-mount: deps build
	benches/mount.py $(FORKD) --csv $(TARGET)/bench-mount.csv --svg $(TARGET)/bench-mount.svg $(BENCH)

## the soaks at full size, one after the other: 1000 kills, 10 minutes of readers with faults at 5 %, 5 of replaced tags
soak:
	FORKD_SOAK=full cargo test --release --workspace --test soak -- --nocapture --test-threads 1
	FORKD_SOAK=full cargo test --release --test linux_copies -- --nocapture --test-threads 1
	FORKD_SOAK=full cargo test --release --test linux kills -- --nocapture
	FORKD_SOAK=full cargo test --release --test linux remains -- --nocapture
	FORKD_SOAK=full cargo test --release --test linux_registers -- --nocapture --test-threads 1

## every parser of outside input under libFuzzer, SECONDS each; finds land in fuzz/artifacts (needs a nightly toolchain)
SECONDS ?= 60
FUZZ_TARGETS := index manifest registry trace vmstate legacy pack erofs xsave
fuzz:
	cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz
	cd fuzz && for target in $(FUZZ_TARGETS); do mkdir -p found/$$target && nice -n 19 cargo +nightly fuzz run $$target \
		found/$$target corpus/$$target -- -max_total_time=$(SECONDS) -rss_limit_mb=2048 -malloc_limit_mb=512 -timeout=10 \
		-max_len=65536 -print_final_stats=1 || exit 1; done

lint:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings

clean:
	cargo clean
