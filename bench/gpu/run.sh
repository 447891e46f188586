#!/bin/bash
# Run a command on a GPU machine without a network, with what was brought along in .gpu (bench/gpu/README.md).
set -euo pipefail
cd "$(dirname "$0")/../.."
site=/tmp/gms-launch-site
if [ ! -e $site/ready ]; then
  mkdir -p $site/bin
  tar -xJf .gpu/site.tar.xz -C $site
  for b in .gpu/*.xz; do
    n=$(basename "$b" .xz)
    [ "$n" = site.tar ] || { xz -dc "$b" >$site/bin/"$n" && chmod +x $site/bin/"$n"; }
  done
  touch $site/ready
fi
export PYTHONPATH=$PWD:$site PATH=$site/bin:$PATH PYTHONUNBUFFERED=1
exec "$@"
