"""Walk a wave of program.md through Slurm, or through a plain machine's cores, by README's lines.

    uv run python tools/waves.py slurm    # as root, with slurmctld, slurmd, slurm-client and munge
    uv run python tools/waves.py taskset  # two cores and a shell

By hand, about ten minutes; neither pytest nor CI runs it. A cluster of one node with two devices
and two cores is started on loopback, in a scratch folder. The training is the real one, but small,
eager and short. Its waves have two ideas that run, one that crashes and one that hangs past the
wall while the controller is restarted, one that is cancelled.
"""

import argparse
import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
WAVE = re.search(r"^## Many devices\n.*?\n\n((?:    [^\n]*\n)+)", README, re.M | re.S)[1]
RUN_A_BLOCK = """bash -c "$(awk '/^```/ { on = 0 } /^# NAME$/ { on = 1 } on' program.md)\""""
JOBS = {"slurm": "srun --gpus 1 --time TIME", "taskset": "taskset -c $((n++ % 2))"}
SMALLER = {  # the budget, and a training that starts in seconds
    "prepare.py": [
        ("TIME_BUDGET = 300", "TIME_BUDGET = 15"),
        ("HARD_LIMIT = 600", "HARD_LIMIT = 90"),
        ("2**18  # tokens scored", "2**13  # tokens scored"),
    ],
    "train.py": [("else 4  # layers", "else 2  # layers"), ('device.type != "mps"', "False")],
}
SLURM_CONF = """\
ClusterName=night
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
KillWait=5
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 Gres=gpu:2 State=UNKNOWN
PartitionName=night Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def sh(command, **options):
    """Run a shell command and return its standard output."""
    return subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True, **options).stdout


@contextlib.contextmanager
def cluster(folder):
    """Start munge, the controller and the node; stop them at the end."""
    host = socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    (folder / "slurm.conf").write_text(SLURM_CONF.format(host=host, folder=folder))
    devices = (f"NodeName={host} Name=gpu File=/dev/{name}\n" for name in ("null", "zero"))
    (folder / "gres.conf").write_text("".join(devices))
    sh("mkdir -p /run/munge && chown munge /run/munge && runuser -u munge munged", check=True)
    sh("slurmctld && slurmd", check=True)
    try:
        while "idle" not in sh("sinfo --noheader --format %t"):
            time.sleep(1)
        yield
    finally:
        sh("scontrol shutdown; pkill -u munge munged")


class Night:
    """A night in a scratch clone, one step after the other."""

    def __init__(self, repo, job):
        self.repo, self.job, self.failures = repo, job, 0
        self.alone = job.replace("TIME", "20").replace("$((n++ % 2))", "0")

    def check(self, label, ok):
        self.failures += not ok
        print("ok  " if ok else "FAIL", label, flush=True)

    def bash(self, script, **variables):
        env = os.environ | {name: str(value) for name, value in variables.items()}
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=self.repo,
            env=env,
            stdout=subprocess.PIPE,
            stderr=2,
            text=True,
        )
        return done.stdout

    def block(self, name, **variables):
        return self.bash(RUN_A_BLOCK.replace("NAME", name), **variables)

    def idea(self, subject, old, new):
        """Commit an idea on the kept commit, go back, and return its hash."""
        train = self.repo / "train.py"
        text = train.read_text()
        assert text.count(old) == 1, old
        train.write_text(text.replace(old, new))
        commit = f'git commit -q -m "{subject}" --no-verify --no-gpg-sign train.py'
        return self.bash(
            f"{commit} && git rev-parse --short=7 HEAD && git reset -q --keep HEAD~1"
        ).strip()

    def wave(self, ideas, wall=20, meanwhile=None):
        """Run README's lines; return each idea's last line, and what `meanwhile` returned."""
        lines = WAVE.replace("autoresearch/nov21", "autoresearch/trial")
        lines, count = re.subn(
            r'job="[^"]*"', f'job="{self.job.replace("TIME", str(wall))}"', lines
        )
        assert count == 1
        started, seen = time.monotonic(), []
        helper = Thread(target=lambda: seen.append(meanwhile()) if meanwhile else None)
        helper.start()
        self.bash(lines, ideas=" ".join(ideas))
        helper.join()
        print(f"     a wave of {len(ideas)} in {time.monotonic() - started:.0f} s", flush=True)
        ends = []
        for idea in ideas:
            log = self.repo / f"run-{idea}.log"
            ends.append(log.read_text().splitlines()[-1] if log.exists() else "no log")
            print(f"     {ends[-1]}")
        return ends, *seen

    def log(self, idea, **variables):
        self.bash(f"git reset -q --keep {idea}")
        said = self.block("Log", **variables)
        if said.endswith(": repeat\n"):
            self.block("Repeat", job=self.alone)
            said += self.block("Log")
        print(f"     {said.strip()}")
        if "discard" in said or variables.get("verdict") == "crash":
            self.block("Reset")

    def rows(self):
        return [
            line.split("\t") for line in (self.repo / "results.tsv").read_text().splitlines()[1:]
        ]


def both_running(slurm):
    """Wait until two trainings run at once; return whether that came."""
    for _ in range(100):
        time.sleep(0.5)
        running = sh("squeue --noheader --states RUNNING") if slurm else sh("pgrep -f ' train.py$'")
        if len(running.splitlines()) >= 2:
            return True
    return False


def restart_controller():
    """Wait for two jobs, then take the controller away for a while."""
    both = both_running(slurm=True)
    sh("pkill slurmctld; sleep 10; slurmctld; sleep 2; scontrol ping >&2")
    return both


def cancel_one():
    """Wait for two jobs, then cancel the first."""
    both = both_running(slurm=True)
    sh("scancel $(squeue --noheader --format %i --sort i | head -n 1)")
    return both


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scheduler", choices=JOBS)
    slurm = parser.parse_args().scheduler == "slurm"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="waves-")))
        if slurm:
            stack.enter_context(cluster(folder))
        repo = folder / "repo"
        sh(f"git clone -q {ROOT} {repo}", check=True)
        for name, changes in SMALLER.items():
            text = (repo / name).read_text()
            for old, new in changes:
                assert text.count(old) == 1, old
                text = text.replace(old, new)
            (repo / name).write_text(text)
        night = Night(repo, JOBS["slurm" if slurm else "taskset"])
        night.bash("git config user.name trial; git config user.email trial@localhost")
        night.bash("git remote remove origin; git commit -q -a -m small; uv sync -q")
        night.block("Start", TAG="trial", LIMITS="9 experiments")
        for seed in (42, 43, 44):
            night.block("Run", seed=seed, job=night.alone)
            night.block("Log")
        night.check("three baselines", [row[3] for row in night.rows()] == ["keep"] * 3)

        ideas = [
            night.idea("slower matrices", "else 0.03  # Muon", "else 0.02  # Muon"),
            night.idea("faster tables", "else 0.2  # AdamW", "else 0.4  # AdamW"),
        ]
        ends, both = night.wave(ideas, meanwhile=lambda: both_running(slurm))
        night.check("two ideas ran at once", both)
        night.check("both are valid", all(end.startswith("exit_status: 0 ") for end in ends))
        bpbs = {idea: float(end.split()[5]) for idea, end in zip(ideas, ends, strict=True)}
        worse, better = sorted(ideas, key=bpbs.get, reverse=True)
        night.log(worse, verdict="discard")
        night.log(better)
        night.check("a row for each", set(ideas) <= {row[0] for row in night.rows()})

        ideas = [
            night.idea("a crash", "def main():\n", "def main():\n    1 / 0\n"),
            night.idea("a hang", "    # Training\n", "    time.sleep(10**6)\n"),
        ]
        ends, *_ = night.wave(ideas, wall=1, meanwhile=restart_controller if slurm else None)
        night.check("neither is valid", all(re.match("exit_status: [1-9]", end) for end in ends))
        for idea in ideas:
            night.log(idea, verdict="crash")

        if slurm:
            ideas = [
                night.idea("a long warmdown", "WARMDOWN_RATIO = 0.5", "WARMDOWN_RATIO = 0.9"),
                night.idea("a short warmdown", "WARMDOWN_RATIO = 0.5", "WARMDOWN_RATIO = 0.2"),
            ]
            ends, *_ = night.wave(ideas, meanwhile=cancel_one)
            valid = [end.startswith("exit_status: 0 ") for end in ends]
            night.check("one was cancelled, the other not", sorted(valid) == [False, True])
            ends, *_ = night.wave(ideas)
            night.check("the same lines again run what was cut", " ".join(ends).count(": 0 ") == 2)
            for idea in ideas:
                night.log(idea, verdict="discard")
            night.check("no job is left", not sh("squeue --noheader").strip())
        tried = [row[0] for row in night.rows() if not re.search("^(base|parent)|, seed", row[4])]
        night.check("every idea has one row", len(tried) == len(set(tried)) == (6 if slurm else 4))
        night.check("no worktree is left", len(night.bash("git worktree list").splitlines()) == 1)
        print((repo / "results.tsv").read_text())
    sys.exit(f"{night.failures} failed" if night.failures else 0)


if __name__ == "__main__":
    main()
