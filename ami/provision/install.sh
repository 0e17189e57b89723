#!/bin/bash
# Installs registry-agent, docker and cloud-init into the image that is being made, from the package
# in the folder $PACKAGES. Debian and Amazon Linux 2023: decided by what is there.
set -euo pipefail

die() {
    echo "install.sh: $*" >&2
    exit 1
}

packages=${PACKAGES:-/tmp/registry-agent}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# one NAME...: the one package of this kind.
one() {
    if [ $# != 1 ] || [ ! -f "$1" ]; then
        die "$packages must hold one package for this system, and has: $*"
    fi
    realpath "$1"
}

# Nothing is started in an image: what a daemon writes at its first start (keys, identities) would
# be the same on every instance.
without_starting() {
    local policy=/usr/sbin/policy-rc.d status=0
    [ ! -e $policy ] || die "$policy is there already"
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
    "$@" || status=$?
    rm $policy
    return $status
}

if command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    package=$(one "$packages"/registry-agent_*_"$(dpkg --print-architecture)".deb)
    wanted=()
    for name in cloud-init docker.io ca-certificates; do
        dpkg-query --show --showformat '${db:Status-Status}\n' "$name" 2>/dev/null |
            grep -q '^installed$' || wanted+=("$name")
    done
    # The package by dpkg: an image that has the rest already needs no network.
    if [ ${#wanted[@]} -gt 0 ]; then
        apt-get --quiet update
        without_starting apt-get --quiet --yes install --no-install-recommends "${wanted[@]}"
    fi
    without_starting dpkg --install "$package"
elif command -v dnf >/dev/null; then
    package=$(one "$packages"/registry-agent-*."$(uname -m)".rpm)
    dnf --quiet --assumeyes install docker cloud-init ca-certificates "$package"
else
    die "neither apt-get nor dnf is here"
fi

# These three follow the configuration, which an image has not: the setup unit enables them on the
# instance.
systemctl disable registry-agent.socket registry-agent.service registry-agent-host.service
install -m 644 "$here/../registry-agent-setup.service" /etc/systemd/system/
systemctl enable registry-agent-setup.service docker.service
