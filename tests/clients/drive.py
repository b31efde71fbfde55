"""Walk program.md's loop through a real coding agent, with a scripted stand-in for its model.

    uv run python tests/clients/drive.py claude             # the client on PATH, the README's line
    uv run python tests/clients/drive.py codex --worktree   # the same in a git worktree
    uv run python tests/clients/drive.py codex --seconds 420  # the first run takes this long

By hand, when a client has a new version; neither pytest nor CI runs it. The model's server is on
loopback, the key is a dummy, HOME is a scratch folder, and a client that tries to reach anything
else meets a proxy that refuses and is reported. The clone's training is a stub, its uv is real.
Sections: the night, the two protocols, the server, main.
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
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "Read program.md and begin; the tag is trial."
STUB = '''"""A stand-in for the canvas: an idea is a change of GAIN."""
import os
import time

GAIN = 0.0
seed = int(os.environ["AUTORESEARCH_SEED"])
time.sleep(SECONDS if seed == 42 and GAIN == 0 else 0)
print("---")
print(f"val_bpb:          {1 - GAIN + 0.001 * (seed % 3):.6f}")
for name in ("training_seconds", "total_seconds", "peak_vram_mb", "mfu_percent"):
    print(f"{name + ':':<18}1.0")
for name in ("total_tokens_M", "num_steps", "num_params_M", "depth"):
    print(f"{name + ':':<18}1")
'''
PYPROJECT = '[project]\nname = "stub"\nversion = "0"\nrequires-python = ">=3.11"\n[tool.uv]\npackage = false\n'


# --- The night ------------------------------------------------------------------------------------
def block(name, **variables):
    """Return the line that program.md gives for running one of its blocks."""
    settings = "".join(f"{key}={shlex.quote(value)} " for key, value in variables.items())
    return settings + f"bash -c \"$(sed -n '/^# {name}$/,/^```/{{/^```/!p;}}' program.md)\""


def night(repo, passed):
    """Yield (tool, *arguments) for each step, receive its output; report what came of it."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=repo, capture_output=True, text=True).stdout

    def ledger():
        path = repo / "results.tsv"
        return (
            [row.split("\t") for row in path.read_text().splitlines()[1:]] if path.exists() else []
        )

    def log():
        path = repo / f"run-{git('rev-parse', '--short=7', 'HEAD').strip()}.log"
        return path.read_text() if path.exists() else ""

    output = yield "read", "program.md"
    passed("read program.md", "# Start" in output, output)
    output = yield "shell", block("Start", TAG="trial", LIMITS="9 experiments")
    passed(
        "Start",
        git("branch", "--show-current") == "autoresearch/trial\n"
        and (repo / "results.tsv").exists(),
        output,
    )
    for seed in ("42", "43", "44"):
        output = yield "shell", block("Run", seed=seed)
        passed(f"Run, seed {seed}", log().count("exit_status: 0") == int(seed) - 41, output)
        output = yield "shell", block("Log", seed=seed)
        passed("Log", len(ledger()) == int(seed) - 41, output)
    kept, gain = 1, "0.0"
    for idea, value, verdict in (
        ("kept", "0.1", "keep"),
        ("discarded", "-0.1", "discard"),
        ("in between", "0.1005", "discard"),
        ("crash", "1 / 0", "crash"),
    ):
        yield "read", "train.py"
        output = yield "edit", "train.py", f"GAIN = {gain}", f"GAIN = {value}"
        passed(f"idea {idea}: edit", f"GAIN = {value}\n" in (repo / "train.py").read_text(), output)
        output = yield "shell", f'git commit -q -m "An idea: {idea}" train.py'
        passed("commit", idea in git("log", "-1", "--format=%s"), output)
        output = yield "shell", block("Run")
        passed("Run", "exit_status: " in log(), output)
        if verdict == "crash":
            output = yield (
                "shell",
                "tail -n 50 " + f"run-{git('rev-parse', '--short=7', 'HEAD').strip()}.log",
            )
            passed("tail of the log", "ZeroDivisionError" in output, output)
            output = yield "shell", block("Log", verdict="crash")
        else:
            output = yield "shell", block("Log")
        if idea == "in between":
            passed("Log: repeat", "repeat" in output, output)
            output = yield "shell", block("Repeat")
            passed("Repeat", log().count("exit_status: 0") == 3, output)
            output = yield "shell", block("Log")
        passed(f"Log: {verdict}", ledger()[-1:] and ledger()[-1][3] == verdict, output)
        if verdict == "keep":
            kept, gain = kept + 1, value
        else:
            output = yield "shell", block("Reset")
        passed(
            "Reset" if verdict != "keep" else "kept",
            f"GAIN = {gain}\n" in (repo / "train.py").read_text() and not git("status", "--short"),
            output,
        )
    output = yield "shell", block("Look")
    passed("Look", "autoresearch/trial" in output, output)
    contract = (repo / "prepare.py").read_text()
    line = contract.splitlines()[0]
    yield "read", "prepare.py"
    for way, *step in (
        ("the edit tool", "edit", "prepare.py", line, f"{line}."),
        (">>", "shell", "echo '# more' >> prepare.py"),
        ("sed -i", "shell", "sed -i s/300/900/ prepare.py"),
        ("python", "shell", """python3 -c 'open("prepare.py", "a").write("# more")'"""),
    ):
        output = yield step
        refused = (repo / "prepare.py").read_text() == contract
        passed(f"prepare.py, {way}: {'refused' if refused else 'edited'}", refused, output)
        (repo / "prepare.py").write_text(contract)


# --- The two protocols ----------------------------------------------------------------------------
class Claude:
    path = "/v1/messages"

    @staticmethod
    def is_main(body):
        return any(tool["name"] == "Bash" for tool in body.get("tools", ()))

    @staticmethod
    def output(body):
        """Return the text of the newest tool result, None if there is none."""
        content = body["messages"][-1]["content"]
        results = [
            part for part in content if isinstance(part, dict) and part["type"] == "tool_result"
        ]
        if not results:
            return None
        text = results[-1].get("content") or ""
        return text if isinstance(text, str) else "\n".join(part.get("text", "") for part in text)

    @staticmethod
    def call(repo, tool, *arguments):
        if tool == "shell":
            return "Bash", {"command": arguments[0], "description": "a step of program.md"}
        path = str(repo / arguments[0])
        if tool == "read":
            return "Read", {"file_path": path}
        return "Edit", dict(file_path=path, old_string=arguments[1], new_string=arguments[2])

    @staticmethod
    def events(number, call):
        if call:
            start = {"type": "tool_use", "id": f"toolu_{number}", "name": call[0], "input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(call[1])}
        else:
            start, delta = {"type": "text", "text": ""}, {"type": "text_delta", "text": "Done."}
        usage = {"input_tokens": 1, "output_tokens": 1}
        message = {
            "id": f"msg_{number}",
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": "stand-in",
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        yield {"type": "message_start", "message": message}
        yield {"type": "content_block_start", "index": 0, "content_block": start}
        yield {"type": "content_block_delta", "index": 0, "delta": delta}
        yield {"type": "content_block_stop", "index": 0}
        stop = {"stop_reason": "tool_use" if call else "end_turn", "stop_sequence": None}
        yield {"type": "message_delta", "delta": stop, "usage": usage}
        yield {"type": "message_stop"}


class Codex:
    path = "/v1/responses"

    @staticmethod
    def is_main(body):
        return bool(body.get("tools"))

    @staticmethod
    def output(body):
        item = body["input"][-1]
        if not item["type"].endswith("_output"):
            return None
        text = item["output"]
        return text if isinstance(text, str) else "\n".join(part.get("text", "") for part in text)

    @staticmethod
    def call(repo, tool, *arguments):
        if tool == "edit":
            path, old, new = arguments
            lines = f"*** Update File: {path}\n@@\n-{old}\n+{new}\n"
            return "apply_patch", f"*** Begin Patch\n{lines}*** End Patch\n"
        return "exec_command", {"cmd": arguments[0] if tool == "shell" else f"cat {arguments[0]}"}

    @staticmethod
    def events(number, call):
        if not call:
            text = [{"type": "output_text", "text": "Done."}]
            item = {"type": "message", "role": "assistant", "content": text}
        elif isinstance(call[1], str):
            item = {"type": "custom_tool_call", "name": call[0], "input": call[1]}
        else:
            item = {"type": "function_call", "name": call[0], "arguments": json.dumps(call[1])}
        item |= {"id": f"item_{number}"} | ({"call_id": f"call_{number}"} if call else {})
        response = {"id": f"resp_{number}"}
        usage = {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
        yield {"type": "response.created", "response": response}
        yield {"type": "response.output_item.done", "item": item}
        yield {"type": "response.completed", "response": response | {"usage": usage}}


# --- The server -----------------------------------------------------------------------------------
class Model(BaseHTTPRequestHandler):
    """The stand-in: answer each request of the main loop with the night's next step."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.path.startswith(self.server.protocol.path):
            return self.send_error(404)
        call = self.server.next_call(body) if self.server.protocol.is_main(body) else None
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for event in self.server.protocol.events(self.server.calls, call):
            self.wfile.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())

    def do_CONNECT(self):
        self.server.outside.add(self.path)
        self.send_error(403)

    def do_GET(self):
        if not self.path.startswith("/"):
            self.server.outside.add(self.path)
        self.send_error(404)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, protocol, repo, steps):
        super().__init__(("127.0.0.1", 0), Model)
        self.protocol, self.repo, self.steps = protocol, repo, steps
        self.calls, self.outside = 0, set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def next_call(self, body):
        output = self.protocol.output(body)
        self.calls += 1
        if output and (session := re.search(r"Process running with session ID (\d+)", output)):
            return "write_stdin", {"session_id": int(session[1]), "yield_time_ms": 300_000}
        try:
            return self.protocol.call(
                self.repo, *self.steps.send(output if self.calls > 1 else None)
            )
        except StopIteration:
            return None


# --- Main -----------------------------------------------------------------------------------------
def readme_line(client):
    """Return the README's first command line that starts this client."""
    lines = (ROOT / "README.md").read_text().replace("\\\n", " ")
    found = re.search(rf"^    ((?:\w+=\S+ )*{client} .*)", lines, re.MULTILINE)
    return found[1] if found else sys.exit(f"README.md has no line that starts {client}")


def prepare(scratch, options):
    """Make the clone with its stub, and return it and the environment of the client."""
    home, repo = scratch / "home", scratch / "clone"
    home.mkdir()
    env = {key: os.environ[key] for key in ("PATH", "LANG", "TERM") if key in os.environ}
    if options.path:
        env["PATH"] = f"{options.path}{os.pathsep}{env['PATH']}"
    # Codex runs login shells, whose PATH begins anew
    (home / ".profile").write_text(f"export PATH={shlex.quote(env['PATH'])}\n")
    env |= {"HOME": str(home), "UV_PYTHON": os.path.realpath(sys.executable), "UV_OFFLINE": "1"}

    def run(*words):
        subprocess.run(words, cwd=repo if repo.exists() else scratch, env=env, check=True)

    run("git", "config", "--global", "user.name", "Trial")
    run("git", "config", "--global", "user.email", "trial@example.invalid")
    run("git", "clone", "-q", str(ROOT), str(repo))
    shutil.copy(ROOT / "program.md", repo)
    (repo / "train.py").write_text(STUB.replace("SECONDS", str(options.seconds)))
    (repo / "pyproject.toml").write_text(PYPROJECT)
    run("git", "commit", "-q", "-a", "-m", "Put a stub in place of the training")
    if options.worktree:
        run("git", "worktree", "add", "-q", "--detach", str(scratch / "tree"))
        repo = scratch / "tree"
    run("uv", "sync", "-q")
    return repo, home, env


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("client", choices=("claude", "codex"))
    parser.add_argument("--path", help="folder of the client, put before PATH")
    parser.add_argument("--line", help="the line that starts the client; default: the README's")
    parser.add_argument("--worktree", action="store_true", help="walk in a git worktree")
    parser.add_argument("--seconds", type=int, default=0, help="how long the first run takes")
    parser.add_argument("--verbose", action="store_true", help="show every step's output")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="night-", dir="/var/tmp"))  # /tmp is open under Codex
    repo, home, env = prepare(scratch, options)
    failures = []

    def passed(label, ok, output):
        print(f"{'ok  ' if ok else 'FAIL'}  {label}", flush=True)
        if not ok or options.verbose:
            print("\n".join(f"      | {line}" for line in (output or "").splitlines()[-20:]))
        if not ok:
            failures.append(label)

    server = Server({"claude": Claude, "codex": Codex}[options.client], repo, night(repo, passed))
    url = f"http://127.0.0.1:{server.server_port}"
    env |= {name: url for name in ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy")}
    env |= {
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        "STAND_IN_KEY": "dummy",
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_API_KEY": "dummy",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    (home / ".codex").mkdir()
    (home / ".codex" / "config.toml").write_text(f"""
model = "gpt-5.5-codex"
model_provider = "stand-in"
check_for_update_on_startup = false
analytics.enabled = false
features = {{plugins = false, apps = false}}
[model_providers.stand-in]
name = "stand-in"
base_url = "{url}/v1"
wire_api = "responses"
env_key = "STAND_IN_KEY"
""")
    line = options.line or readme_line(options.client)
    line += (" -p " if options.client == "claude" else " exec ") + shlex.quote(PROMPT)
    version = subprocess.check_output([options.client, "--version"], env=env, text=True).strip()
    print(f"{version}\n{line}\n")
    client = subprocess.run(
        ["bash", "-c", line],
        cwd=repo,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if client.returncode or not server.calls or options.verbose:
        print(client.stdout[-2000:], client.stderr[-2000:])
    print(f"\n{server.calls} calls, {len(failures)} failed; exit status {client.returncode}")
    print("tried to reach:", ", ".join(sorted(server.outside)) or "nothing but loopback")
    print("kept for a look:" if failures else "removed:", scratch)
    if not failures:
        shutil.rmtree(scratch)
    sys.exit(bool(failures or client.returncode))


if __name__ == "__main__":
    main()
