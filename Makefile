# Every target does its own set-up; set-up does nothing when nothing is to do.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

BIN := .venv/bin
BPFFS := /run/turnout/bpf
BATCHES ?= 0:9000
OPERATIONS ?= 100000000
SOAK_S ?= 200
PREFIX ?= /usr/local
FLOWS ?= 5000
RESULTS ?= results/$(shell date +%Y%m%d-%H%M%S)
# bcc comes from Debian and is seen through the system's site packages; the rest is tools that tests and perf call.
PACKAGES := python3-bpfcc python3-venv iproute2 iptables nftables ethtool procps curl gcc libc6-dev \
    bind9-dnsutils dnsmasq-base nginx iperf3 iputils-ping iputils-tracepath
# Most of a test's time is waiting, for clients, daemons and the kernel: two CPUs have room for four at once, a group each (tests/conftest.py).
WORKERS ?= 4
SPREAD := --dist loadgroup --no-loadscope-reorder
# Tests start hundreds of processes: what one of them has compiled the others are to find, whoever forbids it elsewhere.
export PYTHONDONTWRITEBYTECODE :=
# The environment belongs to these very files, in this very folder: a change of either makes another stamp.
STAMP := .venv/.ready-$(shell { pwd; cat requirements.lock pyproject.toml; } | sha256sum | cut -c 1-16)

.PHONY: help setup install uninstall demo test test-unit fuzz stress soak lint type perf clean packages bpffs as-root

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) bpffs  ## Debian packages, .venv and the bpffs mount: all that the others need

install: $(STAMP)  ## turnout from here in PREFIX/bin, a unit for systemd, a configuration; PREFIX=/usr/local
	install -d "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)/etc/systemd/system" "$(DESTDIR)/etc/turnout/services"
	ln -sfn "$(CURDIR)/.venv/bin/turnout" "$(DESTDIR)$(PREFIX)/bin/turnout"
	sed "s|/usr/local/bin|$(PREFIX)/bin|" examples/turnout.service > "$(DESTDIR)/etc/systemd/system/turnout.service"
	[ -e "$(DESTDIR)/etc/turnout/turnout.yaml" ] || \
	    install -m 0644 examples/turnout.yaml "$(DESTDIR)/etc/turnout/turnout.yaml"

uninstall:  ## take back what `make install` put there; /etc/turnout stays
	rm -f "$(DESTDIR)$(PREFIX)/bin/turnout" "$(DESTDIR)/etc/systemd/system/turnout.service"

demo: setup  ## see it work: a node, clients and endpoints in network namespaces
	@$(BIN)/turnout demo

test: as-root setup  ## all tests, as root: namespaces, XDP, real packets
	REQUIRE_ROOT=1 $(BIN)/pytest -n $(WORKERS) $(SPREAD)

test-unit: $(STAMP)  ## the tests that need no root
	$(BIN)/pytest -n $(WORKERS) $(SPREAD) -m "not root"

fuzz: as-root setup  ## a million random packets through XDP, compiled code and plain Python; BATCHES=FIRST:END
	BATCHES=$(BATCHES) REQUIRE_ROOT=1 $(BIN)/pytest tests/xdp/test_fuzz.py

stress: as-root setup  ## a hundred million operations of writers and XDP on one flow table; OPERATIONS=N
	OPERATIONS=$(OPERATIONS) REQUIRE_ROOT=1 $(BIN)/pytest tests/xdp/test_race.py

soak: as-root setup  ## ten minutes of kills, changes and questions under load; SOAK_S=SECONDS FLOWS=N
	SOAK_S=$(SOAK_S) FLOWS=$(FLOWS) REQUIRE_ROOT=1 $(BIN)/pytest tests/scenarios/test_soak.py -k "not xdp-6"

lint: $(STAMP)  ## ruff: rules, then format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP)  ## mypy, strict
	$(BIN)/mypy

perf: as-root setup  ## measure against bare programs, iptables and nftables; results below results/
	$(BIN)/python -m perf --out $(RESULTS)

clean:  ## remove what was built here: .venv and the tools' caches, not results/
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The steps of set-up.

packages:
	@missing=$$(comm -23 <(printf '%s\n' $(PACKAGES) | sort) \
	    <(dpkg-query -W -f '$${db:Status-Abbrev} $${Package}\n' $(PACKAGES) 2>/dev/null | sed -n 's/^ii  *//p' | sort)); \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then \
	    echo "make: set-up knows Debian 12 only; install what corresponds to:" $$missing >&2; exit 77; fi; \
	if [ "$$(id -u)" != 0 ]; then \
	    echo "make: these Debian packages are missing; run \`make setup\` as root once:" $$missing >&2; exit 77; fi; \
	case " $$missing " in *" nginx "*)  # a server that tests start: it is not to serve this machine \
	    echo "make: nginx.service is masked: tests start nginx by themselves (systemctl unmask nginx)"; \
	    mkdir -p /etc/systemd/system; ln -sfn /dev/null /etc/systemd/system/nginx.service;; esac; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get update -qq; apt-get install -qq --no-install-recommends $$missing </dev/null

$(STAMP): | packages
	@grep -qsF -- "--system-site-packages $(CURDIR)/.venv" .venv/pyvenv.cfg || \
	    /usr/bin/python3 -m venv --clear --system-site-packages "$(CURDIR)/.venv"
	@rm -f .venv/.ready-*
	$(BIN)/pip install -q --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

bpffs: | $(STAMP)
	@if [ "$$(stat -f -c %T $(BPFFS) 2>/dev/null)" = bpf_fs ]; then exit 0; fi; \
	if [ "$$(id -u)" != 0 ]; then \
	    echo "make: no bpffs is mounted at $(BPFFS); run \`make setup\` as root once" >&2; exit 77; fi; \
	$(BIN)/python -c 'from pathlib import Path; from xdp.mounts import mount_bpffs; mount_bpffs(Path("$(BPFFS)"))'

as-root:
	@if [ "$$(id -u)" != 0 ]; then \
	    echo "make: this needs root, for network namespaces and XDP; \`make test-unit\` does not" >&2; exit 77; fi
