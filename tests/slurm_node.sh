#!/usr/bin/env bash
# A one-node Slurm in a scratch folder (as root; Debian's slurm-wlm and munge), then a small grid
# through sbatch, with a requeue. make test-slurm
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
dir="$(mktemp -d)"
export SLURM_CONF="$dir/slurm.conf"
cleanup() {
    pkill -f "slurmd -f $SLURM_CONF" || true
    pkill -f "slurmctld -f $SLURM_CONF" || true
    pkill -F "$dir/munge.pid" 2>/dev/null || true
    rm -rf "$dir" || { sleep 3; rm -rf "$dir"; } # the daemons may still write as they end
}
trap cleanup EXIT

chmod 755 "$dir"
dd if=/dev/urandom of="$dir/munge.key" bs=1024 count=1 status=none
chmod 400 "$dir/munge.key"
munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munge.pid" \
    --log-file="$dir/munge.log" --seed-file="$dir/munge.seed"
cat > "$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
CryptoType=crypto/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
ReturnToService=2
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
SlurmctldPort=16817
SlurmdPort=16818
JobRequeue=1
MinJobAge=300
NodeName=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
mkdir "$dir/state" "$dir/spool"
slurmctld -f "$SLURM_CONF"
slurmd -f "$SLURM_CONF"
for _ in $(seq 600); do
    sinfo -h -o %T 2>/dev/null | grep -q idle && break
    sleep 1
done
sinfo -h -o %T | grep -q idle || { tail -20 "$dir"/slurm*.log; exit 1; }
cd "$here"
SLURM_TEST=1 "${PYTHON:-python}" -m pytest -q tests/test_slurm.py
