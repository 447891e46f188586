#!/bin/bash
# Install Debian packages without letting their daemons start: gms-launch starts its own.
set -euo pipefail
[ "$(id -u)" = 0 ] || { echo "missing Debian packages: $* (install them, or run this as root)" >&2; exit 1; }
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
  printf '#!/bin/sh\nexit 101\n' >$policy
  chmod +x $policy
  trap 'rm -f $policy' EXIT
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -o DPkg::Lock::Timeout=300 update -qq
apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "$@" >/dev/null
