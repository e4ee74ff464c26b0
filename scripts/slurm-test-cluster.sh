#!/usr/bin/env bash
# A real Slurm of two nodes on this host, for the tests: munged, slurmctld and two slurmd, all below one folder.
#
#     scripts/slurm-test-cluster.sh start DIR     then: export SLURM_CONF=DIR/slurm.conf
#     scripts/slurm-test-cluster.sh stop DIR
#
# DIR must be short (a socket's path has at most 107 characters). Needs slurmctld, slurmd and munged, for instance
# Debian's slurm-wlm and munge. Any user may start it; jobs then run as that user.
set -euo pipefail
[ $# = 2 ] || { sed -n 's/^#     //p' "$0" >&2; exit 2; }
dir=$2 host=$(hostname -s) user=$(id -un)
export SLURM_CONF=$dir/slurm.conf PATH=$PATH:/usr/sbin:/sbin

configure() {
  rm -rf "$dir/state"
  mkdir -p "$dir/state" "$dir/n1" "$dir/n2"
  [ -e "$dir/munge.key" ] || (umask 077; head -c 1024 /dev/urandom >"$dir/munge.key")
  # Ports and job numbers (which are ports too, see train.sbatch) keep out of the way of another such cluster, and of
  # those from 32768 on that the kernel gives to anybody.
  local port=$((30000 + RANDOM % 900 * 3))
  cat >"$dir/slurm.conf" <<CONF
ClusterName=mlc-test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdSpoolDir=$dir/%n
SlurmdPidFile=$dir/%n.pid
SlurmdLogFile=$dir/%n.log
# More cores than the host has, and GPUs that are only counted: so the shipped headers fit.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
# Signals and kills come soon after each other, jobs start at once, and one that ended is remembered for a day (not for
# 300 s): a test waits for them and looks back. A host that is slow or
# busy gets all the time it needs.
KillWait=2
MinJobAge=86400
SchedulerParameters=batch_sched_delay=0,sched_interval=2
MessageTimeout=60
BatchStartTimeout=600
FirstJobId=$((1 + RANDOM % 15000))
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=64 Gres=gpu:4
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=64 Gres=gpu:4
PartitionName=all Nodes=ALL Default=YES State=UP
CONF
  printf 'Name=gpu File=%s\n' /dev/null /dev/zero /dev/full /dev/random >"$dir/gres.conf"
}

start() {
  configure
  munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munged.log" --seed-file="$dir/munged.seed"
  slurmctld
  slurmd -N n1
  slurmd -N n2
  for _ in $(seq 3000); do
    [ "$(sinfo --noheader --format '%D %T' 2>/dev/null)" = "2 idle" ] && return
    sleep 0.2
  done
  tail -n 20 "$dir"/*.log >&2
  echo "the nodes did not come up; the logs are above" >&2
  stop
  exit 1
}

stop() {
  if [ -s "$dir/slurmctld.pid" ] && kill -0 "$(cat "$dir/slurmctld.pid")" 2>/dev/null; then
    scancel --user "$user" || true
    for _ in $(seq 50); do
      [ -n "$(squeue --noheader)" ] || break
      sleep 0.2
    done
  fi
  for daemon in n1 n2 slurmctld munged; do
    [ ! -s "$dir/$daemon.pid" ] || kill "$(cat "$dir/$daemon.pid")" 2>/dev/null || true
  done
  for _ in $(seq 50); do # they write their state and take their .pid away when they end
    compgen -G "$dir/*.pid" >/dev/null || break
    sleep 0.2
  done
  # What no daemon knows of any more: processes that have a job of this cluster in their environment.
  local file pid
  for file in /proc/[0-9]*/environ; do
    if { grep -qzxF "SLURM_CONF=$SLURM_CONF" "$file" && grep -qz '^SLURM_JOB_ID=' "$file"; } 2>/dev/null; then
      pid=${file#/proc/} && kill -9 "${pid%/environ}" 2>/dev/null || true
    fi
  done
}

case $1 in
  start) start ;;
  stop) stop ;;
esac
