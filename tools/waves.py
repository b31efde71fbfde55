"""Walk a night's waves through Slurm, or through a plain machine's cores, by ratchet.py's verbs.

    uv run python tools/waves.py slurm    # as root, with slurmctld, slurmd, slurm-client and munge
    uv run python tools/waves.py taskset  # two cores and a shell

By hand, about ten minutes; neither pytest nor CI runs it. For Slurm, a cluster of one node with two
devices and two cores is started on loopback, in a scratch folder. The training is the real one, but
small, eager and short, and it does not mind a busy machine. There are three waves of two ideas:
both run; one crashes and one hangs, while Slurm's controller restarts; one is cancelled, and the
other one's wave is stopped by the person. Whatever was cut off then runs again.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Thread

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = {"slurm": "srun --quiet --gpus 1 --time 2", "taskset": "taskset -c {slot}"}
SMALLER = {  # a training that starts in seconds, and shares its machine
    "prepare.py": {
        "TIME_BUDGET": 15,
        "HARD_LIMIT": 120,
        "EVAL_TOKENS": 2**13,
        "MAX_SHARE_TAKEN": 1.0,
    },
}
EAGER = ('device.type != "mps"', "False")
NO_DECISION = ("RUNNING", "BUSY")  # last words after which `wait` goes on
MAX_CALLS = 20  # of wait, for one wave
PATIENCE = 300  # seconds for what a cluster does within one or two
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


def wait_until(true):
    """Wait until true() is; return whether that came in time."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.5)
    return False


# --- Slurm ----------------------------------------------------------------------------------------


def has_ended(pid):
    """Return whether a process is gone, or is dead and nobody has asked for its status."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True
    return "\nState:\tZ" in status


def end_process(pid_file):
    """End the process that wrote this file, and wait until it has ended."""
    pid = int(pid_file.read_text())
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: has_ended(pid))


@contextlib.contextmanager
def munge():
    """Start munge, which Slurm identifies its users by, unless it is there; end it."""
    if subprocess.run("munge -n | unmunge", shell=True, capture_output=True).returncode == 0:
        yield
        return
    sh("mkdir -p /run/munge && chown munge /run/munge && runuser -u munge munged", check=True)
    try:
        yield
    finally:
        end_process(Path("/run/munge/munged.pid"))


@contextlib.contextmanager
def cluster(folder):
    """Start the controller and the node, with their files in a folder; end them."""
    host = socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    (folder / "slurm.conf").write_text(SLURM_CONF.format(host=host, folder=folder))
    devices = [f"NodeName={host} Name=gpu File=/dev/{name}\n" for name in ("null", "zero")]
    (folder / "gres.conf").write_text("".join(devices))
    with munge():
        sh("slurmctld", check=True)
        try:
            sh("slurmd", check=True)
            try:
                if not wait_until(lambda: "idle" in sh("sinfo --noheader --format %t")):
                    sys.exit(f"the node is not ready: {(folder / 'slurmd.log').read_text()}")
                yield
            finally:
                end_process(folder / "slurmd.pid")
        finally:
            end_process(folder / "slurmctld.pid")


def jobs(state="all"):
    """Return the numbers of Slurm's jobs in a state, the first one first."""
    return sh(f"squeue --noheader --states {state} --format %i --sort i").split()


def two_run():
    return len(jobs("RUNNING")) == 2


def none_left():
    return not jobs("PENDING,RUNNING,COMPLETING")


# --- A night --------------------------------------------------------------------------------------


def set_constants(path, values):
    """Give constants of a Python file other values."""
    text = path.read_text()
    for name, value in values.items():
        text, count = re.subn(rf"^{name} = .*", f"{name} = {value}", text, flags=re.M)
        assert count == 1, (path, name, count)
    path.write_text(text)


def replace_once(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


class Night:
    """A night in a scratch clone, one step after the other."""

    def __init__(self, folder):
        self.repo = folder / "repo"
        self.train = self.repo / "train.py"
        self.failures = 0
        sh(f"git clone -q {ROOT} {self.repo}", check=True)
        self.git("remote", "remove", "origin")
        self.git("config", "user.name", "trial")
        self.git("config", "user.email", "trial@localhost")
        for name, values in SMALLER.items():
            set_constants(self.repo / name, values)
        replace_once(self.train, *EAGER)
        self.git("commit", "-q", "-a", "-m", "small")
        subprocess.run([sys.executable, "prepare.py"], cwd=self.repo, check=True)

    def check(self, label, ok):
        self.failures += not ok
        print("ok  " if ok else "FAIL", label, flush=True)

    def git(self, *words):
        done = subprocess.run(
            ["git", *words], cwd=self.repo, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout.strip()

    def ratchet(self, *words):
        """Run a verb, print its last line, and return that line's first word."""
        done = subprocess.run(
            [sys.executable, "ratchet.py", *words],
            cwd=self.repo,
            stdout=subprocess.PIPE,
            text=True,
        )
        last = (done.stdout.strip() or "nothing").splitlines()[-1]
        print(f"     {words[0]}: {last}", flush=True)
        return last.split()[0]

    def until_decided(self, *words):
        """Run a verb, then `wait` while the answer is no decision; return the last word."""
        word = self.ratchet(*words)
        for _ in range(MAX_CALLS):
            if word not in NO_DECISION:
                return word
            word = self.ratchet("wait")
        return word

    def idea(self, subject, values=None, before=None, insert=""):
        """Commit an idea on the kept commit, go back, and return its hash."""
        set_constants(self.train, values or {})
        if before:
            replace_once(self.train, before, before + insert)
        self.git("commit", "-q", "--no-verify", "-m", f"trial: {subject}", "train.py")
        commit = self.git("rev-parse", "--short=7", "HEAD")
        self.git("reset", "-q", "--keep", "HEAD~1")
        return commit

    def rows(self, commit=None):
        """Return the ledger's rows, of one commit or all, as lists of five fields."""
        lines = (self.repo / "results.tsv").read_text().splitlines()[1:]
        rows = [line.split("\t") for line in lines]
        return [row for row in rows if commit in (None, row[0])]

    def runs(self, commit):
        """Return (job, result) of each run of a commit, in order of time; {} for no result."""
        found = []
        for path in (self.repo / "runs").glob(f"{commit}-*/job.json"):
            result = path.with_name("result.json")
            result = json.loads(result.read_text()) if result.exists() else {}
            found.append((json.loads(path.read_text()), result))
        return sorted(found, key=lambda run: run[0]["started"])

    def words(self, commit):
        """Return what came of each run of a commit: valid, crash, killed, ..."""
        return [result.get("word", "no result") for _, result in self.runs(commit)]

    def overlap(self, one, other):
        """Return whether the first runs of two commits went on at the same time."""
        (job, result), (other_job, other_result) = self.runs(one)[0], self.runs(other)[0]
        return job["started"] < other_result["ended"] and other_job["started"] < result["ended"]


@contextlib.contextmanager
def meanwhile(action):
    """Run an action beside the block; give a list that holds what it returned after the block."""
    returned = []
    thread = Thread(target=lambda: returned.append(action()))
    thread.start()
    try:
        yield returned
    finally:
        thread.join()


def walk_two_ideas(night, slurm):
    """Two ideas run at once, and each gets its row."""
    ideas = [
        night.idea("a slower head", {"UNEMBEDDING_LR": 0.002}),
        night.idea("less weight decay", {"WEIGHT_DECAY": 0.1}),
    ]
    with meanwhile(lambda: wait_until(two_run) if slurm else True) as two_ran:
        word = night.until_decided("wave", *ideas, "--jobs", "2")
    night.check("the wave was decided", word in ("KEEP", "DISCARD"))
    night.check("two ideas ran at once", two_ran == [True] and night.overlap(*ideas))
    night.check("each has a valid run", all("valid" in night.words(idea) for idea in ideas))
    night.check("each has a row", all(night.rows(idea) for idea in ideas))
    return ideas


def walk_crash_and_hang(night, slurm, folder):
    """One idea crashes and one hangs; both are booked as that, and the night goes on."""
    start = "def main():\n"
    loop = "    for inputs, targets in loader:\n"
    sleep = "time.sleep(10**6)\n"
    hang = night.idea("a hang", before=loop, insert=f"        {sleep}")
    if slurm:  # before prepare.py's own wall is armed: Slurm's limit ends it
        hang = night.idea("a hang", before=start, insert=f"    {sleep}")
    ideas = [night.idea("a crash", before=start, insert="    1 / 0\n"), hang]

    def restart_controller():
        """Wait for a job, then take the controller away for a while."""
        seen = wait_until(lambda: jobs("RUNNING"))
        end_process(folder / "slurmctld.pid")
        time.sleep(10)
        sh("slurmctld", check=True)
        return seen

    with meanwhile(restart_controller if slurm else lambda: True) as seen:
        word = night.until_decided("wave", *ideas, "--jobs", "2")
    night.check("the wave was decided", word == "DISCARD" and seen == [True])
    night.check("neither has a valid run", all("valid" not in night.words(i) for i in ideas))
    statuses = [row[3] for idea in ideas for row in night.rows(idea)]
    night.check("each is booked as a crash", statuses == ["crash", "crash"])
    return ideas


def walk_cancelled(night):
    """A cancelled job, and a wave that is stopped, run again and get their rows."""
    ideas = [
        night.idea("a long warmdown", {"WARMDOWN_RATIO": 0.9}),
        night.idea("a short warmdown", {"WARMDOWN_RATIO": 0.2}),
    ]

    def cancel_one():
        both = wait_until(two_run)
        sh(f"scancel {jobs('RUNNING')[0]}", check=True)
        return both

    with meanwhile(cancel_one) as both:
        word = night.ratchet("wave", *ideas, "--jobs", "2")
    night.check("the cancelled run is no crash", word == "BUSY" and both == [True])
    night.check("nothing is booked yet", not any(night.rows(idea) for idea in ideas))

    def stop_it():
        seen = wait_until(lambda: jobs("RUNNING"))
        night.ratchet("stop")
        return seen

    with meanwhile(stop_it) as seen:
        word = night.ratchet("wait")
    night.check("a stopped run books nothing", word == "BUSY" and seen == [True])
    night.check("a stopped run leaves no job", wait_until(none_left))
    word = night.until_decided("wait")
    night.check("what was cut off ran again", word in ("KEEP", "DISCARD"))
    night.check("each has a valid run", all("valid" in night.words(idea) for idea in ideas))
    night.check("each has a row", all(night.rows(idea) for idea in ideas))
    return ideas


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scheduler", choices=LAUNCH)
    scheduler = parser.parse_args().scheduler
    slurm = scheduler == "slurm"
    programs = ["slurmctld", "slurmd", "srun", "munged"] if slurm else ["taskset"]
    missing = [name for name in programs if not shutil.which(name)]
    if missing:
        parser.error(f"{', '.join(missing)} cannot be found: install the packages named in --help")
    os.environ["AUTORESEARCH_CORPUS"] = "python"
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="waves-")))
        night = Night(folder)
        if slurm:
            stack.enter_context(cluster(folder))
        word = night.until_decided("start", "trial", "--launch", LAUNCH[scheduler])
        if word != "NEXT" or [row[3] for row in night.rows()] != ["keep"] * 3:
            sys.exit("FAIL the night did not begin with three baselines")
        ideas = walk_two_ideas(night, slurm)
        ideas += walk_crash_and_hang(night, slurm, folder)
        if slurm:
            ideas += walk_cancelled(night)
            night.check("no job is left", wait_until(none_left))
        seeds = [(row[0], row[4]) for idea in ideas for row in night.rows(idea)]
        night.check("no row stands twice", len(seeds) == len(set(seeds)))
        night.check("no worktree is left", len(night.git("worktree", "list").splitlines()) == 1)
        print((night.repo / "results.tsv").read_text())
    sys.exit(f"{night.failures} failed" if night.failures else 0)


if __name__ == "__main__":
    main()
