#!/usr/bin/env bash
# Make everything ready that tests, demo and command need: the distribution's packages, and .venv.
#
#   tools/setup.sh            install what is missing
#   tools/setup.sh packages   print the names of the packages needed, and do nothing
#
# Cheap when nothing is missing (one dpkg-query, one comparison). Safe to run twice, also at once.
# Only missing packages need root.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=/usr/bin/python3   # the system's: the libnbd binding is built for it
VENV=$PWD/.venv
STAMP=$VENV/pullback-setup

qemu_package() {
    case $(uname -m) in
        x86_64) echo qemu-system-x86 ;;
        aarch64 | arm*) echo qemu-system-arm ;;
        ppc64*) echo qemu-system-ppc ;;
        s390x) echo qemu-system-s390x ;;
        *) echo qemu-system-misc ;;
    esac
}

packages() {
    # python3-venv, python3-libnbd: the virtual environment, and libnbd's binding (no package index has it)
    # qemu-system-common: qemu-storage-daemon; qemu-utils: qemu-img, qemu-nbd, qemu-io
    # fuse3: mounting exports of disks in an iothread, and restore points; libnbd-bin, nbdkit: clients and servers of tests
    # restic: forgets, prunes and copies in repositories of its format; swtpm: the TPM of test machines
    # e2fsprogs, cpio, mount, util-linux: test disks, setpriv; ca-certificates: pip; openssl: certificates of tests
    echo python3 python3-venv python3-libnbd \
        "$(qemu_package)" qemu-system-common qemu-utils fuse3 libnbd-bin nbdkit restic swtpm \
        e2fsprogs cpio mount util-linux ca-certificates openssl
}

say() { echo "setup: $*"; }

# Run a command without its output, which is shown if it fails.
quietly() {
    local log status=0
    log=$(mktemp)
    "$@" >"$log" 2>&1 </dev/null || status=$?
    [ "$status" = 0 ] || { echo "setup: failed: $*" >&2; tail -n 40 "$log" >&2; }
    rm -f "$log"
    return "$status"
}

# Libvirt's schemas, which tests compare documents with, moved to another package (Debian 13).
SCHEMAS=/usr/share/libvirt/schemas/domainbackup.rng
schema_package() {
    if apt-cache show libvirt-common >/dev/null 2>&1; then echo libvirt-common; else echo libvirt0; fi
}

missing_packages() {
    local installed name
    # dpkg-query fails for names it does not know, and still prints the others.
    installed=$(dpkg-query -W -f='${Package} ${db:Status-Status}\n' $(packages) 2>/dev/null || true)
    for name in $(packages); do
        grep -qx "$name installed" <<<"$installed" || echo -n "$name "
    done
    [ -e "$SCHEMAS" ] || schema_package
}

apt_install() {
    apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=600 "$@"
}

update_lists() {
    say "bringing the lists of packages up to date"
    quietly apt-get update -o DPkg::Lock::Timeout=600
}

install_packages() {
    local missing
    command -v dpkg-query >/dev/null || { say "this is neither Debian nor Ubuntu; needed: $(packages)"; exit 1; }
    missing=$(missing_packages)
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" != 0 ]; then
        say "packages are missing; as root run" >&2
        echo "  apt-get install --no-install-recommends" $missing >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    if ! compgen -G '/var/lib/apt/lists/*_Packages*' >/dev/null; then
        update_lists
        missing=$(missing_packages)
    fi
    say "installing packages:" $missing
    # With lists that are there and fresh, no update is needed.
    # shellcheck disable=SC2086
    apt_install $missing >/dev/null 2>&1 </dev/null || {
        update_lists
        quietly apt_install $missing
    }
}

# What the environment was made for: another path, Python or project file means another environment.
wanted_base() { echo "$VENV $("$PYTHON" -V)"; }
wanted_stamp() { echo "$(wanted_base) $(sha256sum <pyproject.toml)"; }

make_venv() {
    local wanted stamp=
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        say "$("$PYTHON" -V) is too old: Python 3.11 or later is needed (Debian 12, Ubuntu 24.04 or later)" >&2
        exit 1
    }
    wanted=$(wanted_stamp)
    [ ! -f "$STAMP" ] || stamp=$(<"$STAMP")
    if [ "$stamp" = "$wanted" ] && [ -x "$VENV/bin/pullback" ]; then return 0; fi
    # Not ours, half made, or made at another place: begin again.
    if [ "${stamp#"$(wanted_base) "}" = "$stamp" ]; then
        say "making .venv with $("$PYTHON" -V)"
        rm -rf "$VENV"
        quietly "$PYTHON" -m venv --system-site-packages "$VENV"
    fi
    rm -f "$STAMP"
    say "installing Python packages into .venv"
    quietly "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --quiet --editable '.[dev]'
    echo "$wanted" >"$STAMP"
    say "ready: .venv/bin/pullback"
}

case ${1-} in
    packages) echo "$(packages) $(schema_package)"; exit ;;
    '') ;;
    *) echo "usage: tools/setup.sh [packages]" >&2; exit 2 ;;
esac
exec 9<"$0"
flock 9   # another `make` may be here at the same time
install_packages
make_venv
