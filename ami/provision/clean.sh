#!/bin/bash
# Removes what is this machine's own, so that every instance of the image gets its own. The last to
# run before validate.sh.
set -euo pipefail

if command -v apt-get >/dev/null; then
    apt-get clean
    rm -rf /var/lib/apt/lists/*
elif command -v dnf >/dev/null; then
    dnf --quiet clean all
    rm -rf /var/cache/dnf
fi

rm -f /etc/ssh/ssh_host_*
rm -rf /var/lib/cloud /run/cloud-init
# Empty, and there: systemd makes a new one at the first boot. "uninitialized" would let it apply its
# presets over what this image enables.
: >/etc/machine-id
rm -f /var/lib/dbus/machine-id /var/lib/systemd/random-seed /var/lib/systemd/credential.secret
rm -rf /var/lib/docker/* /var/lib/containerd/* /etc/docker/key.json
rm -rf /var/lib/registry-agent/* /var/lib/registry-agent-host

for home in /root /home/*; do
    [ -d "$home" ] || continue
    rm -rf "$home"/.ssh "$home"/.aws "$home"/.docker "$home"/.cache
    rm -f "$home"/.*_history "$home"/.lesshst "$home"/.netrc "$home"/.wget-hsts
done

rm -rf /var/log/journal/*
find /var/log -xdev -type f -name '*.[0-9]*' -delete
find /var/log -xdev -type f -exec truncate --size=0 {} +
find /tmp /var/tmp -xdev -mindepth 1 -delete
