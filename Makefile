# `make help` lists the targets. `make quickstart` and `make test` set a fresh Debian machine up by themselves (as root).
# What stands behind `##` is what `make help` says of the target below it.

.DEFAULT_GOAL := build
SHELL := /bin/bash
TARGET := $(or $(CARGO_TARGET_DIR),target)
TRIPLE := x86_64-unknown-linux-gnu
STATIC := -C target-feature=+crt-static
SHIPPED := $(abspath $(TARGET))/static
FORKD := $(SHIPPED)/forkd
PACKAGES := build-essential pkg-config libclang-dev linux-libc-dev zstd tar fuse3 jq bsdextrautils \
	linux-source-6.12 flex bison bc libelf-dev xz-utils mmdebstrap erofs-utils git rsync attr python3 \
	qemu-system-x86 busybox-static cpio iproute2 openssl curl python3-pip dnsmasq-base postgresql-client tmux \
	$(if $(shell command -v npm),,npm)
# Programs that tests run themselves, of packages that would start a service when they are installed.
UNPACKED := nginx postgresql-15
# Snapshots that are built; each is called as its folder is.
MACHINES ?= recipes/python-numpy

.PHONY: help build install deps machine hub quickstart demo-branch test test-packs test-packs-lazily test-hwvirt lint doc deny bench-machines bench-ttfi \
	bench-fanout bench-branch bench-packs bench-fault bench-mount bench-net bench-forward bench-criterion soak fuzz clean

## this list
help:
	@awk '/^## /{said = substr($$0, 4)} /^[a-z-]+:/{if (said) printf "%-17s%s\n", $$1, said; said = ""}' $(MAKEFILE_LIST)

# The agent runs as the only program of a root disk. Both are copies without debug information: cargo builds the dynamic
# ones of its tests over its own, and a file that was written in one go starts 0.15 ms faster than what a linker wrote
# piece by piece.
## forkd and, beside it, the guest's agent and the daemon, all static, in target/static
build:
	RUSTFLAGS="$(STATIC) -C relocation-model=static -C strip=symbols" cargo build --release -p forkd-guest --target $(TRIPLE) \
		--target-dir $(TARGET)/guest
	cargo rustc --release -p forkd --bin forkd -- $(STATIC)
	cargo rustc --release -p forkd-daemon --bin forkd-daemon -- $(STATIC)
	install -m 755 $(TARGET)/guest/$(TRIPLE)/release/forkd-agent $(TARGET)/release/forkd-agent
	install -d $(SHIPPED)
	strip -o $(TARGET)/forkd.stripped $(TARGET)/release/forkd
	install -m 755 $(TARGET)/forkd.stripped $(SHIPPED)/forkd
	strip -o $(TARGET)/forkd.stripped $(TARGET)/release/forkd-daemon
	install -m 755 $(TARGET)/forkd.stripped $(SHIPPED)/forkd-daemon
	install -m 755 $(TARGET)/guest/$(TRIPLE)/release/forkd-agent $(SHIPPED)/forkd-agent

## puts forkd, the agent and the daemon into PREFIX/bin (/usr/local/bin)
PREFIX ?= /usr/local
install: build
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 $(FORKD) $(SHIPPED)/forkd-agent $(SHIPPED)/forkd-daemon $(DESTDIR)$(PREFIX)/bin

## installs the system packages that are missing
deps:
	@scripts/install-packages.sh $(PACKAGES)
	@scripts/unpack-packages.sh $(TARGET)/unpacked $(UNPACKED)

## the guest kernel, the python-numpy snapshot, and the tests' own; all are kept and reused
machine: deps build
	$(FORKD) kernel build
	@scripts/build-machine.sh $(FORKD) $(MACHINES)

## the main job, end to end: build, publish, serve, mount, fork lazily, compare
quickstart: machine
	@scripts/quickstart.sh $(FORKD)

## an agent's work branched five ways, and the way that works kept as a delta pack
demo-branch: MACHINES := recipes/coding-agent
demo-branch: machine
	@scripts/demo-branch.sh $(FORKD) $(notdir $(MACHINES))

## every recipe, or those of PACKS="nodejs ...", built, packed and published into the folder HUB (./hub)
PACKS ?= $(notdir $(wildcard recipes/*))
HUB ?= hub
hub: deps build
	$(FORKD) kernel build
	@scripts/make-hub.sh $(FORKD) $(HUB) $(PACKS:%=recipes/%)

## every test, those on real Linux guests among them
test: MACHINES += tests/recipes/tools
test: machine
	FORKD_UNDER_TEST=$(FORKD) cargo nextest run --workspace --release --no-fail-fast

## every pack of recipes/ built and proved (hours where KVM emulates the guest's kernel)
test-packs: MACHINES := $(wildcard recipes/*)
test-packs: machine
	FORKD_UNDER_TEST=$(FORKD) cargo nextest run --release --no-fail-fast --ignore-default-filter -E 'binary(linux_packs)'

## the same proofs, each from its pack in the folder HUB over 20 ms and 50 MB/s (after `make hub`)
test-packs-lazily: deps build
	FORKD_UNDER_TEST=$(FORKD) FORKD_PACKS_HUB=$(abspath $(HUB)) cargo nextest run --release --no-fail-fast \
		--ignore-default-filter -E 'binary(linux_packs)'

# tests/hwvirt/README.md says more. Their forkd is dynamic: a library that mends the emulator is loaded before its own.
## forkd on hardware virtualisation: kvm_amd of Debian's stock kernel on an emulated processor
test-hwvirt: deps build
	$(FORKD) kernel build
	cargo build --release -p forkd
	tests/hwvirt/run.sh $(TARGET)/release/forkd $(TARGET)/hwvirt

# In the release profile, as the tests are: macros and build scripts are compiled once for all.
## format and clippy, without warnings
lint:
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings

## the documentation of all crates, without warnings, in target/doc
doc:
	RUSTDOCFLAGS="-D warnings" cargo doc --release --workspace --no-deps

# Its list of advisories is not to be had without the net, which the gate lacks: deny.toml.
## licences, sources and versions of the dependencies
deny:
	scripts/cargo-deny.sh $(TARGET)/cargo-deny check --hide-inclusion-graph bans licenses sources

# benches/README.md says more. BENCH passes options on, e.g. BENCH="--quick --runs 3".
bench-machines: deps build
	cargo build --release --example synthetic_machine

define bench
benches/$(@:bench-%=%).py $(FORKD) --csv $(TARGET)/$@.csv --svg $(TARGET)/$@.svg $(BENCH)
endef

## first instruction, ready and answer of one fork, over links (an hour; BENCH=--quick some minutes)
bench-ttfi: bench-machines
	$(bench)

## 1 to 300 children of one fork
bench-fanout: bench-machines
	$(bench)

## what a guest waits for a page
bench-fault: bench-machines
	$(bench)

## reads through the mount beside zstd -d, tar and ratarmount (which pip fetches)
bench-mount: deps build
	$(bench)

## forks with a network beside forks without, and what the gateway carries
bench-net: machine
	$(bench)

## ports of copies through forkd forward, beside the same in the guest
bench-forward: machine
	$(bench)

## how long a child that is branched stands still, and how soon its branches run
bench-branch: machine
	$(bench)

## the packs of ./hub (`make hub`), lazily over 20 ms and 50 MB/s: the table of docs/PACKS.md
bench-packs: build
	$(bench)

## chunks, index and pager, in process
bench-criterion:
	cargo bench -p forkd-fs --bench chunks --bench index $(BENCH)
	cargo bench -p forkd-vmm --bench faults $(BENCH)

# 1000 kills, 10 minutes of readers with faults at 5 %, 5 of replaced tags.
## the soaks at full size, one after the other
soak:
	FORKD_SOAK=full cargo test --release --workspace --test soak -- --nocapture --test-threads 1
	FORKD_SOAK=full cargo test --release --test linux_copies -- --nocapture --test-threads 1
	FORKD_SOAK=full cargo test --release --test linux kills -- --nocapture
	FORKD_SOAK=full cargo test --release --test linux remains -- --nocapture
	FORKD_SOAK=full cargo test --release --test linux_registers -- --nocapture --test-threads 1

# Finds land in fuzz/artifacts.
## every parser of outside input under libFuzzer, SECONDS each (needs a nightly toolchain)
SECONDS ?= 60
FUZZ_TARGETS := index manifest registry trace vmstate legacy pack erofs xsave
fuzz:
	cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz
	cd fuzz && for target in $(FUZZ_TARGETS); do mkdir -p found/$$target && nice -n 19 cargo +nightly fuzz run $$target \
		found/$$target corpus/$$target -- -max_total_time=$(SECONDS) -rss_limit_mb=2048 -malloc_limit_mb=512 -timeout=10 \
		-max_len=65536 -print_final_stats=1 || exit 1; done

## removes all that was built
clean:
	cargo clean
