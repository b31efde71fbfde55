"""Walk a short night through a real coding agent, on PATH, with a scripted model.

    uv run python tools/drive.py claude               # by the commands of docs/agents/README.md
    uv run python tools/drive.py codex --worktree     # the same in a git worktree
    uv run python tools/drive.py claude --goal        # by the client's own way to go on

By hand, when a client has a new version; neither pytest nor CI runs it. Nothing leaves loopback:
the model's key is a dummy, HOME a scratch folder, and a proxy refuses and reports what a client
tries to reach. The clone is real but for a stub in place of the training; so are ratchet.py, git
and uv. Sections: the clone, the night, what must be refused, the protocols, the server, main.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/agents/README.md"
RATCHET = "uv run ratchet.py"
STUB = '''"""A stand-in for the training: an idea is another GAIN."""
import os
import time

seed = int(os.environ["AUTORESEARCH_SEED"])
GAIN = 0.0
SECONDS = 0
with open(STARTS, "a") as starts:
    starts.write(f"{GAIN} seed {seed}\\n")
time.sleep(SECONDS)
print("device: stub\\ncorpus: stub\\nattention: stub, compile: no\\n---")
print(f"val_bpb:          {1 - GAIN + seed % 3 / 1000:.6f}\\npeak_vram_mb:     1024.0")
'''
PYPROJECT = '[project]\nname = "stub"\nversion = "0"\nrequires-python = ">=3.11"\n'
CODEX_CONFIG = """model = "gpt-5.5-codex"
model_provider = "stand-in"
check_for_update_on_startup = false
analytics.enabled = false
features = {{plugins = false, apps = false}}
model_providers.stand-in = {{name = "stand-in", base_url = "{url}/v1", wire_api = "responses"}}
"""


# --- The clone ------------------------------------------------------------------------------------
def make_clone(scratch, worktree):
    """Return a clone, or a worktree of one, with the stub in it; and an environment of its own."""
    home = scratch / "home"
    repo = scratch / "clone"
    temporary = scratch / "tmp"  # the ratchet's lock of the device is here: not shared with others
    home.mkdir()
    temporary.mkdir()
    env = {key: os.environ[key] for key in ("PATH", "LANG", "TERM") if key in os.environ}
    (home / ".profile").write_text(f"PATH={shlex.quote(env['PATH'])}\n")  # for login shells
    env |= {"HOME": str(home), "TMPDIR": str(temporary)}
    env |= {"UV_PYTHON": os.path.realpath(sys.executable), "UV_OFFLINE": "1"}
    (home / ".gitconfig").write_text("[user]\nname = Trial\nemail = trial@example.invalid\n")
    subprocess.check_call(["git", "clone", "-q", str(ROOT), str(repo)], env=env)
    for name in ("program.md", "ratchet.py"):
        shutil.copy(ROOT / name, repo)
    shutil.copytree(ROOT / "docs/agents", repo / "docs/agents", dirs_exist_ok=True)
    (repo / "train.py").write_text(STUB.replace("STARTS", repr(str(scratch / "starts"))))
    (repo / "pyproject.toml").write_text(PYPROJECT)
    tree = "git worktree add -q --detach ../tree; cd ../tree;" if worktree else ""
    command = f"set -e; git add -A; git commit -q -m stub; {tree} uv sync -q"
    subprocess.check_call(command, cwd=repo, env=env, shell=True)
    return scratch / "tree" if worktree else repo, env


def commands_of(section):
    """Return the commands of a section of docs/agents/README.md, in order, a line each."""
    text = PAGE.read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^    (\S.*)", text.replace("\\\n", ""), re.M)


# --- The night ------------------------------------------------------------------------------------
class Night:
    """What the scripted model calls, step by step, and what must have come of each step."""

    def __init__(self, repo, protocol, goal=False):
        self.repo = repo
        self.protocol = protocol
        self.goal = goal  # the client goes on by itself, in one session
        self.output = ""  # of the last call
        self.failures = 0
        self.walked = False

    def check(self, label, ok):
        self.failures += not ok
        print("ok  " if ok else "FAIL", label, flush=True)
        if not ok:
            print("\n".join(f"     | {line}" for line in self.output.splitlines()[-20:]))

    def git(self, *words):
        command = ["git", "-C", str(self.repo), *words]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.strip()

    def read(self, name):
        path = self.repo / name
        return path.read_text() if path.exists() else ""

    def rows(self):
        return self.read("results.tsv").splitlines()[1:]

    def starts(self):
        """Return the trainings so far, a line each."""
        path = self.repo.parent / "starts"
        return path.read_text().splitlines() if path.exists() else []

    def answer(self):
        """Return the word that begins the ratchet's last line."""
        lines = self.output.strip().splitlines()
        return lines[-1].partition(" ")[0] if lines else ""

    def over(self):
        command = [sys.executable, "ratchet.py", "look"]
        look = subprocess.run(command, cwd=self.repo, stdout=subprocess.PIPE, text=True).stdout
        return look.strip().rpartition("\n")[2].startswith("OVER")

    def state(self):
        """Return what no refused command may change: {file: digest}, and the refs."""
        files = {"refs": self.git("for-each-ref") + self.git("rev-parse", "HEAD")}
        for path in self.repo.rglob("*"):
            name = str(path.relative_to(self.repo))
            if path.is_file() and not re.match(r"\.git(/|$)|\.venv/|.*__pycache__/", name):
                files[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return files

    def idea(self, gain, words, seconds=0, options=""):
        """Yield the calls of one experiment: edit train.py and try it."""
        text = self.read("train.py")
        old = re.search(r"^GAIN = .*\nSECONDS = .*$", text, re.M)[0].splitlines()
        yield "read", "train.py"
        if old[0] != f"GAIN = {gain}":
            yield "edit", "train.py", old[0], f"GAIN = {gain}"
            self.check(f"edit for {words}", f"GAIN = {gain}\n" in self.read("train.py"))
        if old[1] != f"SECONDS = {seconds}":
            yield "edit", "train.py", old[1], f"SECONDS = {seconds}"
        yield "shell", f"{RATCHET} try '{words}'{options}"
        if self.goal:
            yield from self.rest()

    def rest(self):
        """End the turn as an agent would that thinks that it is done; keep the last output."""
        output = self.output
        yield None
        self.output = output

    def walk(self):
        """Yield calls: (tool, argument, ...), or None to end the turn."""
        yield "read", "program.md"
        self.check("read program.md", "# " in self.output)
        yield "shell", f"{RATCHET} start trial --experiments 7"
        self.check("start", self.git("branch", "--show-current") == "autoresearch/trial")
        self.check("start: three rows of the baseline", len(self.rows()) == 3)
        base = self.git("rev-parse", "HEAD")

        yield from self.idea("0.1", "optimizer: a gain")
        self.check("try: KEEP", self.answer() == "KEEP")
        kept = self.git("rev-parse", "HEAD")
        self.check("its commit is on the branch", kept != base and "\tkeep\t" in self.rows()[-1])

        yield from self.rest()
        yield "read", "program.md"
        yield "shell", f"{RATCHET} look"
        self.check("look, after the agent stopped early", "a gain" in self.output)

        yield from self.idea("-0.1", "loss: a loss")
        self.check("try: DISCARD", self.answer() == "DISCARD")
        self.check("train.py is put back", "GAIN = 0.1\n" in self.read("train.py"))

        before = len(self.starts())
        lucky = "0.1005 - (seed - 42) / 100"  # unclear under the first seed, a loss under the next
        yield from self.idea(lucky, "data order: lucky")
        self.check("try: DISCARD, after a second run", self.answer() == "DISCARD")
        self.check("two trainings or more", len(self.starts()) >= before + 2)

        yield from self.idea("1 / 0", "attention: a crash")
        self.check("try: CRASH", self.answer() == "CRASH" and "ZeroDivision" in self.output)
        yield "shell", f"{RATCHET} drop 'no such attention'"
        self.check("drop: a row, put back", "\tcrash\t" in self.rows()[-1])
        self.check("HEAD is the kept commit", self.git("rev-parse", "HEAD") == kept)

        rows = len(self.rows())
        yield from self.idea("0.0", "optimizer: slow", seconds=9, options=" --seconds 1")
        self.check("try: RUNNING, as the call ends first", self.answer() == "RUNNING")
        yield "shell", f"{RATCHET} wait"
        self.check("wait: DISCARD", self.answer() == "DISCARD" and len(self.rows()) > rows)

        yield from self.refused()

        if not self.goal:
            yield from self.cut_off()

        yield from self.edit("GAIN = 0.1", "GAIN = 0.04")
        words = "loss: it has $(x), `y`, > and | in it"
        yield "shell", f"{RATCHET} try '{words}'"
        self.check("an idea in single quotes", self.rows()[-1].endswith(words))
        self.check("tree clean", not self.git("status", "--short"))

        if self.goal:
            yield from self.edit("GAIN = 0.1", "GAIN = 0.03")
            yield "shell", f"{RATCHET} try 'optimizer: the last'"
        yield from self.edit("GAIN = 0.1", "GAIN = 0.2")
        yield "shell", f"{RATCHET} try 'optimizer: past the limit'"
        self.check("try after the last experiment: OVER", self.answer() == "OVER")
        self.walked = True

    def cut_off(self):
        """Yield a call that the client ends, and the end of the session after it.

        The training goes on, or it is run once more; nothing is lost.
        """
        rows = len(self.rows())
        before = len(self.starts())
        yield from self.edit("GAIN = 0.1", "GAIN = 0.05")
        yield from self.edit("SECONDS = 0", "SECONDS = 25")
        yield self.protocol.cut(f"{RATCHET} try 'optimizer: cut off'")
        self.check("the client gives the call up", self.protocol.is_cut(self.output))
        yield None
        yield "shell", f"{RATCHET} wait"
        while self.answer() == "RUNNING":
            yield "shell", f"{RATCHET} wait"
        booked = self.rows()[rows:]  # by wait, or before it where the client had waited itself
        self.check("booked in the next session", [r.split("\t")[3] for r in booked] == ["discard"])
        count = len(self.starts()) - before
        print(f"     the training that outlived its call ran {count} time(s)")

    def edit(self, old, new):
        yield "read", "train.py"
        yield "edit", "train.py", old, new
        self.check(f"edit: {new}", f"{new}\n" in self.read("train.py"))

    # --- What must be refused ---------------------------------------------------------------------
    def refused(self):
        """Yield what neither client may do; each call would leave a trace if it were done."""
        yield from self.edit("GAIN = 0.1", "GAIN = 0.3")  # so that a try would have something to do
        attempt = f"{RATCHET} try 'bypass: it ran'"
        python = """-c 'open("trace", "w")'"""
        shell = {
            "a redirection": f"{RATCHET} look > trace",
            "a pipe": f"{RATCHET} look | tee trace",
            "&&": f"{RATCHET} look && touch trace",
            ";": f"{RATCHET} look; touch trace",
            "&": f"{RATCHET} look & touch trace",
            "a second line": f"{RATCHET} look\ntouch trace",
            "$( ) in the idea": f'{RATCHET} try "bypass: $(touch trace)"',
            "a backtick in the idea": f'{RATCHET} try "bypass: `touch trace`"',
            "a variable in front": f"X=1 {attempt}",
            "another variable": f"CUDA_VISIBLE_DEVICES=1 {attempt}",
            "env": f"env X=1 {attempt}",
            "an option of uv": "uv run --no-sync ratchet.py try 'bypass: it ran'",
            "uv run python": f"uv run python {python}",
            "uv run python ratchet.py": "uv run python ratchet.py try 'bypass: it ran'",
            "python": f"python3 {python}",
            "git commit": "git commit -q -a -m bypass --no-verify --no-gpg-sign",
            "git tag": "git tag bypass",
            "git switch": "git switch -q -c bypass",
            "touch": "touch trace",
            "a folder's train.py": "cp train.py docs/train.py",
            "rm": "rm results.tsv",
        }
        names = ("prepare.py", "ratchet.py", "program.md", "pyproject.toml", "results.tsv")
        for name in names:
            shell[f"{name} by >>"] = f"echo '# more' >> {name}"
            shell[f"{name} by sed"] = f"sed -i 1d {name}"
        calls = {label: ("shell", command) for label, command in shell.items()}
        for name in (*names, "docs/agents/claude.json"):
            first = self.read(name).splitlines()[0]
            calls[f"{name} by the edit tool"] = ("edit", name, first, f"{first} # more")
        calls |= self.protocol.bypasses()
        for label, call in calls.items():
            if call[0] == "edit":
                yield "read", call[1]
            before = self.state()
            yield call
            after = self.state()
            changed = [n for n in before | after if before.get(n) != after.get(n)]
            self.check(f"refused: {label}", not changed)
            self.restore(changed)
            if "in the idea" in label:
                print("     the client says:", " ".join(self.output.split())[:150])
        yield "shell", f"{RATCHET} final"
        self.check("refused: final, before the ratchet answers", not self.answer().isupper())
        yield "shell", f"{RATCHET} drop 'it was to be refused'"
        self.check("train.py is as kept", "GAIN = 0.1\n" in self.read("train.py"))

    def restore(self, changed):
        """Undo what should have been refused, so that the rest can be walked."""
        for name in set(changed) - {"refs", "results.tsv"}:
            if self.git("ls-files", name):
                self.git("checkout", "--", name)
            else:
                (self.repo / name).unlink(missing_ok=True)


# --- The protocols --------------------------------------------------------------------------------
def text(content):
    """Return the text of what a tool gave: a string, or parts."""
    return content if isinstance(content, str) else "\n".join(p.get("text", "") for p in content)


class Claude:
    section = "Claude Code"
    path = "/v1/messages"
    shell = "Bash"

    @staticmethod
    def output(request):
        """Return what the last call gave, "" at the start of a session."""
        parts = []
        for message in request["messages"]:
            if message["role"] == "user" and not isinstance(message["content"], str):
                parts += message["content"]
        results = [part for part in parts if part["type"] == "tool_result"]
        return text(results[-1].get("content", "")) if results else ""

    @staticmethod
    def tool(tool, *arguments):
        if tool == "raw":
            return arguments
        if tool == "shell":
            return "Bash", {"command": arguments[0], "description": "A step of program.md"}
        names = ("file_path", "old_string", "new_string")
        return tool.capitalize(), dict(zip(names, arguments, strict=False))

    @staticmethod
    def bypasses():
        write = {"file_path": "trace", "content": "x"}
        create = {"file_path": "trace", "old_string": "", "new_string": "x"}
        return {
            "a new file": ("raw", "Write", write),
            "a new file by an edit": ("raw", "Edit", create),
            "no sandbox": (
                "raw",
                "Bash",
                {"command": "touch trace", "dangerouslyDisableSandbox": True},
            ),
        }

    @staticmethod
    def cut(command):
        """Return a call that the client ends, or moves to the background, after three seconds."""
        return "raw", "Bash", {"command": command, "description": "Train", "timeout": 3000}

    @staticmethod
    def is_cut(output):
        return "background" in output

    @staticmethod
    def events(number, call, words):
        start = {"type": "text", "text": ""}
        delta = {"type": "text_delta", "text": words}
        if call:
            start = {"type": "tool_use", "id": f"toolu_{number}", "name": call[0], "input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(call[1])}
        usage = {"input_tokens": 1, "output_tokens": 1}
        message = {"id": f"msg_{number}", "role": "assistant", "content": [], "usage": usage}
        stop = {"stop_reason": "tool_use" if call else "end_turn"}
        yield {"type": "message_start", "message": message}
        yield {"type": "content_block_start", "index": 0, "content_block": start}
        yield {"type": "content_block_delta", "index": 0, "delta": delta}
        yield {"type": "content_block_stop", "index": 0}
        yield {"type": "message_delta", "delta": stop, "usage": usage}
        yield {"type": "message_stop"}


class Codex:
    section = "Codex"
    path = "/v1/responses"
    shell = "exec_command"

    @staticmethod
    def output(request):
        last = request["input"][-1]
        return text(last["output"]) if last["type"].endswith("_output") else ""

    @staticmethod
    def tool(tool, *arguments):
        if tool == "raw":
            return arguments
        if tool == "poll":
            return "write_stdin", {"session_id": arguments[0], "yield_time_ms": 300_000}
        if tool == "edit":
            path, old, new = arguments
            hunk = f"*** Update File: {path}\n@@\n-{old}\n+{new}\n"
            return "apply_patch", f"*** Begin Patch\n{hunk}*** End Patch\n"
        return "exec_command", {"cmd": arguments[0] if tool == "shell" else f"cat {arguments[0]}"}

    @staticmethod
    def bypasses():
        patch = "*** Begin Patch\n*** Add File: trace\n+x\n*** End Patch\n"
        escalated = {"cmd": "touch trace", "sandbox_permissions": "require_escalated"}
        return {
            "a new file": ("raw", "apply_patch", patch),
            "no sandbox": ("raw", "exec_command", escalated),
        }

    @staticmethod
    def cut(command):
        """Return a call that the client hands back after three seconds; nothing polls it."""
        return "raw", "exec_command", {"cmd": command, "yield_time_ms": 3000}

    @staticmethod
    def is_cut(output):
        return "Process running with session ID" in output

    @staticmethod
    def events(number, call, words):
        if not call:
            item = {"type": "message", "role": "assistant"}
            item["content"] = [{"type": "output_text", "text": words}]
        elif call[0] == "apply_patch":
            item = {"type": "custom_tool_call", "name": call[0], "input": call[1]}
        else:
            item = {"type": "function_call", "name": call[0], "arguments": json.dumps(call[1])}
        item["call_id" if call else "id"] = f"item_{number}"
        yield {"type": "response.created", "response": {}}
        yield {"type": "response.output_item.done", "item": item}
        yield {"type": "response.completed", "response": {"id": f"response_{number}"}}


# --- The server -----------------------------------------------------------------------------------
class Model(BaseHTTPRequestHandler):
    """Answer each turn with the night's next call; refuse to be a way out."""

    def do_POST(self):
        server = self.server
        protocol = server.night.protocol
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.path.startswith(protocol.path):
            return self.send_error(404)
        server.turns += 1
        call = None
        words = "Done."
        schema = request.get("output_config", {}).get("format", {}).get("schema", {})
        if "ok" in schema.get("properties", {}):  # Claude Code asks whether its goal is reached
            server.judged += 1
            words = json.dumps({"ok": server.night.over(), "reason": "the last answer of look"})
        elif protocol.shell in [tool.get("name") for tool in request.get("tools", ())]:
            server.night.output = output = protocol.output(request)
            running = re.search(r"Process running with session ID (\d+)", output)
            if running and not server.cut:
                call = ("poll", int(running[1]))
            else:
                call = next(server.steps, None)
            server.cut = bool(call) and call == protocol.cut(shell_of(call))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for event in protocol.events(server.turns, call and protocol.tool(*call), words):
            self.wfile.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())

    def refuse(self):
        if not self.path.startswith("/"):
            self.server.outside.add(self.path)
        self.send_error(403)

    do_CONNECT = do_GET = do_HEAD = refuse

    def log_message(self, *_):
        pass


def shell_of(call):
    """Return the command of a raw call of a shell, "" of any other call."""
    words = call[-1] if isinstance(call[-1], dict) else {}
    return words.get("command", words.get("cmd", ""))


# --- Main -----------------------------------------------------------------------------------------
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("client", choices=("claude", "codex"))
    parser.add_argument("--worktree", action="store_true", help="walk in a git worktree")
    parser.add_argument("--goal", action="store_true", help="by the command with /goal")
    options = parser.parse_args()
    protocol = {"claude": Claude, "codex": Codex}[options.client]
    lines = commands_of(protocol.section)
    wanted = "/goal" if options.goal else "night.sh"
    places = [place for place, line in enumerate(lines) if wanted in line]
    if not places:
        parser.error(f"{PAGE.relative_to(ROOT)}, section {protocol.section}: no {wanted} to run")
    first = [line for line in lines[: places[0]] if "night.sh" not in line]  # what it needs
    commands = [*first, lines[places[0]]]

    scratch = Path(tempfile.mkdtemp(prefix="night-", dir="/var/tmp"))
    repo, env = make_clone(scratch, options.worktree)
    night = Night(repo, protocol, options.goal)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    server.night = night
    server.steps = night.walk()
    server.turns = 0
    server.judged = 0  # questions whether the goal is reached
    server.cut = False  # the last call was one to be cut off
    server.outside = set()
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    env |= dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"), url)
    env |= {"NO_PROXY": "127.0.0.1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
    env |= {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": "dummy"}
    (scratch / "home/.codex").mkdir()
    (scratch / "home/.codex/config.toml").write_text(CODEX_CONFIG.format(url=url))

    print(subprocess.check_output([options.client, "--version"], env=env, text=True), end="")
    print("\n".join(commands), flush=True)
    status = 0
    with (scratch / "client.log").open("w") as log:
        for command in commands:
            words = ["timeout", "900", "bash", "-c", command]
            status = status or subprocess.call(words, cwd=repo, env=env, stdout=log, stderr=log)
    night.output = (scratch / "client.log").read_text()
    night.check("every step was walked", night.walked)
    night.check("the night is over, and so is the loop", night.over() and status == 0)
    if options.goal:
        print(f"     the client asked {server.judged} times whether the goal is reached")
    print("tried to reach:", *(sorted(server.outside) or ["loopback alone"]))
    print(f"{server.turns} turns, {night.failures} failures")
    print("kept, for a look:" if night.failures else "removed:", scratch)
    if not night.failures:
        shutil.rmtree(scratch)
    sys.exit(bool(night.failures))


if __name__ == "__main__":
    main()
