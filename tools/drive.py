"""Walk program.md's loop through a real coding agent, on PATH, with a scripted model.

    uv run python tools/drive.py claude               # as the README starts it
    uv run python tools/drive.py codex --worktree     # the same in a git worktree
    uv run python tools/drive.py codex --seconds 420  # the first run takes this long

By hand, when a client has a new version; neither pytest nor CI runs it. Nothing leaves loopback:
the model's key is a dummy, HOME a scratch folder, and a proxy refuses and reports what a client
tries to reach. The clone is real but for a stub in place of the training; so are git and uv.
Sections: the night, the protocols, the server, main.
"""

import argparse
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
PROMPT = "Read program.md and begin, or go on; the tag is trial, the limits are 4 experiments."
STUB = '''"""A stand-in for the training: an idea is another GAIN."""
import os, time

GAIN = 0.0
seed = int(os.environ["AUTORESEARCH_SEED"])
time.sleep(SECONDS if seed == 42 and GAIN == 0 else 0)
print(f"device: stub\\ncorpus: stub\\nattention: stub, compile: no\\n---")
print(f"val_bpb:          {1 - GAIN + seed % 3 / 1000:.6f}\\npeak_vram_mb:     1024.0")
'''
IDEAS = (  # the subject of the commit, its GAIN, what becomes of it
    ("a gain", "0.1", "keep"),
    ("a loss", "-0.1", "discard"),
    ("nothing much", "0.1005", "discard"),
    ("a crash", "1 / 0", "crash"),
)
PYPROJECT = '[project]\nname = "stub"\nversion = "0"\nrequires-python = ">=3.11"\n'
CODEX_CONFIG = """model = "gpt-5.5-codex"
model_provider = "stand-in"
check_for_update_on_startup = false
analytics.enabled = false
features = {{plugins = false, apps = false}}
model_providers.stand-in = {{name = "stand-in", base_url = "{url}/v1", wire_api = "responses"}}
"""


# --- The night ------------------------------------------------------------------------------------
class Night:
    """What the stand-in calls, step by step, and what must have come of each step."""

    def __init__(self, repo, hole):
        self.repo, self.hole = repo, hole  # the way to edit prepare.py that the client leaves open
        self.output, self.failures, self.over = "", 0, False  # of the last call; so far; walked

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

    def ends(self):
        """Return the exit statuses in the log of HEAD."""
        log = self.read(f"run-{self.git('rev-parse', '--short=7', 'HEAD')}.log")
        return re.findall(r"^exit_status: (\d+)", log, re.M)

    def block(self, name, **variables):
        """Return the line by which program.md has its blocks run, for this one."""
        found = re.search(r"^    (?:\w+=\S* )*(bash .*# )Run(\b.*)", self.read("program.md"), re.M)
        settings = "".join(f"{key}={shlex.quote(value)} " for key, value in variables.items())
        return f"{settings}{found[1]}{name}{found[2]}"

    def walk(self):
        """Yield calls: (tool, argument, ...), or None to end the turn."""
        yield "read", "program.md"
        self.check("read program.md", "# Start" in self.output)
        yield "shell", self.block("Start", TAG="trial", LIMITS="4 experiments")
        self.check("Start", self.git("branch", "--show-current") == "autoresearch/trial")
        for rows, seed in enumerate(("42", "43", "44"), start=1):
            yield "shell", self.block("Run", seed=seed)
            self.check(f"Run, seed {seed}", self.ends() == ["0"] * rows)
            yield "shell", self.block("Log", seed=seed)
            self.check("Log", len(self.read("results.tsv").splitlines()) == rows + 1)
        kept = "0.0"
        for idea, gain, status in IDEAS:
            yield "read", "train.py"
            yield "edit", "train.py", f"GAIN = {kept}", f"GAIN = {gain}"
            self.check(f"edit for {idea}", f"GAIN = {gain}\n" in self.read("train.py"))
            yield "shell", f'git commit -q -m "{idea}" --no-verify --no-gpg-sign train.py'
            self.check("commit", self.git("log", "-1", "--format=%s") == idea)
            yield "shell", self.block("Run")
            self.check("Run", self.ends() == ["1" if status == "crash" else "0"])
            yield "shell", self.block("Log", verdict="crash" if status == "crash" else "rule")
            if idea == "nothing much":
                self.check("Log: repeat", "repeat" in self.output)
                yield "shell", self.block("Repeat")
                self.check("Repeat", self.ends() == ["0"] * 3)
                yield "shell", self.block("Log")
            row = self.read("results.tsv").rpartition("\n")[0].rpartition("\n")[2]
            self.check(f"Log: {status}", f"\t{status}\t{idea}" in row)
            if status == "keep":
                kept = gain
                yield None
                yield "shell", self.block("Look")
                self.check("again after a stop, Look", "autoresearch/trial" in self.output)
            else:
                yield "shell", self.block("Reset")
                self.check("Reset", f"GAIN = {kept}\n" in self.read("train.py"))
        self.check("tree clean", not self.git("status", "--short"))
        contract = self.read("prepare.py")
        first = contract.splitlines()[0]
        yield "read", "prepare.py"
        for way, *call in (
            ("the edit tool", "edit", "prepare.py", first, f"{first}."),
            (">>", "shell", "echo '# more' >> prepare.py"),
            ("sed -i", "shell", "sed -i s/300/900/ prepare.py"),
            ("python", "shell", """python3 -c 'open("prepare.py", "a").write("# more")'"""),
        ):
            yield call
            refused = self.read("prepare.py") == contract
            what = "refused" if refused else "edited" + ", as known" * (way == self.hole)
            self.check(f"prepare.py through {way}: {what}", refused or way == self.hole)
            (self.repo / "prepare.py").write_text(contract)
        self.over = True


# --- The protocols --------------------------------------------------------------------------------
def text(content):
    """Return the text of what a tool gave: a string, or parts."""
    return content if isinstance(content, str) else "\n".join(p.get("text", "") for p in content)


class Claude:
    path, shell, prompt_option, hole = "/v1/messages", "Bash", "-p", "python"

    @staticmethod
    def output(request):
        """Return what the last call gave, "" at the start of a session."""
        parts = [p for p in request["messages"][-1]["content"] if isinstance(p, dict)]
        results = [part for part in parts if part["type"] == "tool_result"]
        return text(results[-1].get("content", "")) if results else ""

    @staticmethod
    def tool(tool, *arguments):
        if tool == "shell":
            return "Bash", {"command": arguments[0], "description": "A step of program.md"}
        names = ("file_path", "old_string", "new_string")
        return tool.capitalize(), dict(zip(names, arguments, strict=False))

    @staticmethod
    def events(number, call):
        start, delta = {"type": "text", "text": ""}, {"type": "text_delta", "text": "Done."}
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
    path, shell, prompt_option, hole = "/v1/responses", "exec_command", "exec", None

    @staticmethod
    def output(request):
        last = request["input"][-1]
        return text(last["output"]) if last["type"].endswith("_output") else ""

    @staticmethod
    def tool(tool, *arguments):
        if tool == "poll":
            return "write_stdin", {"session_id": arguments[0], "yield_time_ms": 300_000}
        if tool == "edit":
            path, old, new = arguments
            hunk = f"*** Update File: {path}\n@@\n-{old}\n+{new}\n"
            return "apply_patch", f"*** Begin Patch\n{hunk}*** End Patch\n"
        return "exec_command", {"cmd": arguments[0] if tool == "shell" else f"cat {arguments[0]}"}

    @staticmethod
    def events(number, call):
        if not call:
            item = {"type": "message", "role": "assistant"}
            item["content"] = [{"type": "output_text", "text": "Done."}]
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
        server, protocol = self.server, self.server.protocol
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.path.startswith(protocol.path):
            return self.send_error(404)
        call, server.turns = None, server.turns + 1
        if protocol.shell in [tool.get("name") for tool in request.get("tools", ())]:
            server.night.output = output = protocol.output(request)
            running = re.search(r"Process running with session ID (\d+)", output)
            call = ("poll", int(running[1])) if running else next(server.steps, None)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for event in protocol.events(server.turns, call and protocol.tool(*call)):
            self.wfile.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())

    def refuse(self):
        if not self.path.startswith("/"):
            self.server.outside.add(self.path)
        self.send_error(403)

    do_CONNECT = do_GET = do_HEAD = refuse

    def log_message(self, *_):
        pass


# --- Main -----------------------------------------------------------------------------------------
def make_clone(scratch, seconds, worktree):
    """Return a clone, or a worktree of one, with the stub in it; and an environment of its own."""
    home, repo = scratch / "home", scratch / "clone"
    home.mkdir()
    env = {key: os.environ[key] for key in ("PATH", "LANG", "TERM") if key in os.environ}
    (home / ".profile").write_text(f"PATH={shlex.quote(env['PATH'])}\n")  # for login shells
    env |= {"HOME": str(home), "UV_PYTHON": os.path.realpath(sys.executable), "UV_OFFLINE": "1"}
    (home / ".gitconfig").write_text("[user]\nname = Trial\nemail = trial@example.invalid\n")
    subprocess.check_call(["git", "clone", "-q", str(ROOT), str(repo)], env=env)
    shutil.copy(ROOT / "program.md", repo)
    (repo / "train.py").write_text(STUB.replace("SECONDS", str(seconds)))
    (repo / "pyproject.toml").write_text(PYPROJECT)
    tree = "git worktree add -q --detach ../tree; cd ../tree;" * worktree
    command = f"set -e; git commit -q -a -m stub; {tree} uv sync -q"
    subprocess.check_call(command, cwd=repo, env=env, shell=True)
    return scratch / "tree" if worktree else repo, env


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("client", choices=("claude", "codex"))
    parser.add_argument("--line", help="what starts the client, in place of the README's line")
    parser.add_argument("--worktree", action="store_true", help="walk in a git worktree")
    parser.add_argument("--seconds", type=int, default=0, help="what the first run takes")
    options = parser.parse_args()
    protocol = {"claude": Claude, "codex": Codex}[options.client]
    readme = (ROOT / "README.md").read_text().replace("\\\n", " ")
    found = re.search(rf"^    ((?:\w+=\S+ )*{options.client} .*)", readme, re.M)
    line = options.line or (found and found[1]) or parser.error("no line in README.md: give --line")
    scratch = Path(tempfile.mkdtemp(prefix="night-", dir="/var/tmp"))  # Codex may write in /tmp
    repo, env = make_clone(scratch, options.seconds, options.worktree)
    night = Night(repo, protocol.hole)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Model)
    server.protocol, server.night, server.steps = protocol, night, night.walk()
    server.turns, server.outside = 0, set()
    Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    env |= dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"), url)
    env |= {"NO_PROXY": "127.0.0.1", "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1"}
    env |= {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": "dummy"}
    (scratch / "home/.codex").mkdir()
    (scratch / "home/.codex/config.toml").write_text(CODEX_CONFIG.format(url=url))

    session = f"{line} {protocol.prompt_option} {shlex.quote(PROMPT)}"
    loop = f"while {session}; {night.block('Look')}; do sleep 1; done < /dev/null"
    print(subprocess.check_output([options.client, "--version"], env=env, text=True) + loop)
    with (scratch / "client.log").open("w") as log:
        command = ["timeout", str(900 + 2 * options.seconds), "bash", "-c", loop]
        status = subprocess.call(command, cwd=repo, env=env, stdout=log, stderr=subprocess.STDOUT)
    night.output = (scratch / "client.log").read_text()
    night.check("the night is over, and Look has ended the loop", night.over and status == 0)
    print("tried to reach:", *(sorted(server.outside) or ["loopback alone"]))
    print(f"{server.turns} turns, {night.failures} failures")
    print("kept, for a look:" if night.failures else "removed:", scratch)
    if not night.failures:
        shutil.rmtree(scratch)
    sys.exit(bool(night.failures))


if __name__ == "__main__":
    main()
