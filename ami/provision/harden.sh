#!/bin/bash
# What an instance in a fleet does not need is closed.
set -euo pipefail

# put FILE: its text is standard input.
put() {
    mkdir -p "$(dirname "$1")"
    cat >"$1"
    chmod 644 "$1"
}

# Only where there is a server: an image without one has no need of the file.
if [ -d /etc/ssh ]; then
    put /etc/ssh/sshd_config.d/10-hardened.conf <<'TEXT'
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin no
X11Forwarding no
TEXT
fi

# EC2 alone is asked: other clouds' addresses are waited for at every boot.
put /etc/cloud/cloud.cfg.d/10-datasource.cfg <<'TEXT'
datasource_list: [ Ec2, None ]
datasource:
  Ec2: { strict_id: false }
TEXT

put /etc/sysctl.d/60-hardened.conf <<'TEXT'
kernel.dmesg_restrict = 1
kernel.kptr_restrict = 2
kernel.unprivileged_bpf_disabled = 1
net.ipv4.conf.all.accept_redirects = 0
net.ipv4.conf.default.accept_redirects = 0
net.ipv6.conf.all.accept_redirects = 0
net.ipv6.conf.default.accept_redirects = 0
TEXT

# A dump of the agent has credentials in it.
put /etc/systemd/coredump.conf.d/10-none.conf <<'TEXT'
[Coredump]
Storage=none
TEXT

# What an instance logs is there after a reboot, and never fills its disk.
put /etc/systemd/journald.conf.d/10-bounded.conf <<'TEXT'
[Journal]
Storage=persistent
SystemMaxUse=500M
TEXT

passwd --lock root >/dev/null
