"""Check a ledger against git, and show what a person should read of the kept changes.

Sections: git, the audit, worth a look. analysis.ipynb shows what comes out.
"""

import ast
import re
import subprocess
from collections import Counter
from pathlib import Path

from report import brief, experiments

import ratchet  # report.py has put its folder on the path

# --- Git ------------------------------------------------------------------------------------------


def git(path, *words, stdin=None):
    """Return what git says in the folder of a ledger; raise OSError or CalledProcessError."""
    command = ["git", "-C", str(Path(path).parent), *words]
    style = {"encoding": "utf-8", "errors": "replace"}
    return subprocess.run(command, input=stdin, capture_output=True, check=True, **style).stdout


def reason(error):
    """Return the first line of why git failed."""
    text = getattr(error, "stderr", "") or str(error)
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    return text.split("\n")[0]


def recipe_folder(path, branch):
    """Return the folder in git of the recipe that a ledger is of: "" or with a slash at its end.

    It is the ledger's own or the next above it that has a train.py, or else the only one that has.
    """
    prefix = git(path, "rev-parse", "--show-prefix").strip()
    listing = git(path, "ls-tree", "-r", "-z", "--full-tree", "--name-only", branch)
    names = [name for name in listing.split("\0") if name.split("/")[-1] == ratchet.CANVAS]
    folders = [name.removesuffix(ratchet.CANVAS) for name in names]
    above = [folder for folder in folders if prefix.startswith(folder)]
    if above:
        return max(above, key=len)
    return folders[0] if len(folders) == 1 else prefix


def changed_files(path, branch, lengths):
    """Return {commit: names that it changed} of a branch, under hashes of each of the lengths."""
    options = "--format=%x00%H --name-only --no-renames --diff-merges=first-parent"
    log = git(path, "log", "--no-relative", "--no-show-signature", *options.split(), branch, "--")
    files = {}
    for entry in log.split("\0")[1:]:
        commit, *names = [line for line in entry.split("\n") if line]
        for length in lengths:
            files[commit[:length]] = names
    return files


# --- The audit ------------------------------------------------------------------------------------


def audit(runs, branch):
    """Check a ledger against git; return a line for each finding, or one that all is well.

    Every kept commit is on the branch and changed train.py alone; no discarded one is on it; the
    files of the referee are those of the baseline.
    """
    path = runs.attrs["path"]
    table, _ = experiments(runs)
    base = table[table.status == "baseline"]
    if base.empty:
        return ["audit skipped: every run crashed, so there is no baseline"]
    base = base.iloc[0]
    owned = table[table.own & (table.status != "crash")].set_index("commit")
    lengths = {len(base.commit), *map(len, owned.index)}
    try:
        folder = recipe_folder(path, branch)
        files = changed_files(path, branch, lengths)
        guarded = [f":/{folder}{name}" for name in ratchet.CONTRACT]
        changed = ""
        if base.commit in files:
            options = ["diff-tree", "-r", "--name-only", base.commit, branch, "--"]
            changed = git(path, *options, *guarded)
    except (OSError, subprocess.CalledProcessError) as error:
        return [f"audit skipped: {reason(error)}"]

    lines = [f"{name} differs between the baseline and {branch}" for name in changed.split()]
    if base.own and base.commit not in files:
        lines.append(f"the baseline {base.commit} was not found on {branch}; is BRANCH right?")
    for commit, status in owned.status.items():
        names = files.get(commit)
        if status == "keep" and names is None:
            lines.append(f"{commit} is kept but not on {branch}")
        elif status == "keep" and names != [f"{folder}{ratchet.CANVAS}"]:
            names = ", ".join(names) or "nothing"
            lines.append(f"{commit} is kept but changed {names}, not {ratchet.CANVAS} alone")
        elif status == "discard" and names is not None:
            lines.append(f"{commit} is discarded but still on {branch}")
    num_kept = (owned.status == "keep").sum()
    if not lines and len(owned):
        lines.append(f"{num_kept} kept commits, all on the branch, {ratchet.CANVAS} alone")
    skipped = runs.index[~runs.own]
    if len(skipped):
        lines.append(f"rows without a commit of their own were skipped: run {brief(skipped)}")
    return [f"audit: {line}" for line in lines]


# --- Worth a look ---------------------------------------------------------------------------------

# What is worth a look where a kept change brings it; honest ideas use some of it, too
MODULES = {  # by the first part of an imported name
    "files": "shutil tempfile glob pickle sqlite3 mmap h5py",
    "ctypes": "ctypes cffi",
    "other programs": "subprocess multiprocessing pty",
    "network": "socket urllib http requests ssl",
    "threads": "threading concurrent asyncio _thread signal",
    "inner parts of Python": "inspect gc importlib builtins",
}
CALLS = {  # by the last part of the name that is called
    "files": "open read_text read_bytes write_text write_bytes unlink rename mkdir touch fromfile "
    "tofile memmap from_file rmtree remove makedirs listdir scandir",
    "other programs": "system popen fork execv execve execvp spawnv Popen",
    "threads": "Thread Timer ThreadPoolExecutor ProcessPoolExecutor",
    "inner parts of Python": "__import__ globals _getframe settrace setprofile",
    "eval mode": "is_grad_enabled is_inference_mode_enabled is_inference",
}
TEXT_AS_CODE = ("exec", "eval")  # these of Python itself: model.eval() is another
SAVE_OR_LOAD = ("save", "savez", "load", "loadtxt", "dump", "dumps", "loads")  # of a module
ENVIRONMENT = ("environ", "getenv", "putenv")
HOOK = re.compile(r"_?register_\w*hook\w*|__torch_function__|__torch_dispatch__|Torch\w+Mode")
GUARDED = ("prepare", "torch")


def dotted(node):
    """Return "a.b.c" of such an expression, or "" where it is another."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([node.id, *reversed(names)])


def imports_of(tree):
    """Return {name in this file: what it stands for, dotted} of all imports."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                names[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module or ''}.{alias.name}"
    return names


def guarded_names(tree, imports):
    """Return the names of prepare and torch, of parts of them, and of what prepare returned.

    `loader = prepare.make_dataloader(...)` makes `loader` prepare's; a tensor is not torch's.
    """
    owners = {name: full.split(".")[0] for name, full in imports.items()}
    owners = {name: owner for name, owner in owners.items() if owner in GUARDED}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        is_call = isinstance(node.value, ast.Call)
        root = dotted(node.value.func if is_call else node.value).split(".")[0]
        if root in owners and not (is_call and owners[root] == "torch"):
            owners.setdefault(node.targets[0].id, owners[root])
    return set(owners)


class Finder(ast.NodeVisitor):
    """Collect in `found` what a file has that is worth a look: (kind, code, line number)."""

    def __init__(self, tree):
        self.imports = imports_of(tree)
        self.guarded = guarded_names(tree, self.imports)
        self.found = []
        self.visit(tree)

    def add(self, kind, node):
        self.found.append((kind, ast.unparse(node).split("\n")[0], node.lineno))

    def full_name(self, node):
        """Return the dotted name that an expression stands for, "os.environ" for `environ`."""
        root, dot, rest = dotted(node).partition(".")
        return self.imports.get(root, root) + dot + rest

    def is_guarded(self, node):
        """Tell whether an expression reaches into prepare or torch."""
        inside = [one.id for one in ast.walk(node) if isinstance(one, ast.Name)]
        return any(name in self.guarded for name in inside)

    def check_module(self, node, module):
        for kind, names in MODULES.items():
            if module.split(".")[0] in names.split():
                self.add(kind, node)

    def visit_Import(self, node):
        for alias in node.names:
            self.check_module(node, alias.name)

    def visit_ImportFrom(self, node):
        self.check_module(node, node.module or "")

    def visit_Call(self, node):
        full = self.full_name(node.func)
        last = node.func.attr if isinstance(node.func, ast.Attribute) else full.split(".")[-1]
        for kind, names in CALLS.items():
            if last in names.split():
                self.add(kind, node)
        if dotted(node.func) in TEXT_AS_CODE:
            self.add("inner parts of Python", node)
        if dotted(node.func).split(".")[0] in self.imports:
            self.check_module(node, full)
            if last in SAVE_OR_LOAD:
                is_torch = full.split(".")[0] == "torch"
                self.add("torch.save and load" if is_torch else "files", node)
        if last in ("setattr", "delattr") and node.args and self.is_guarded(node.args[0]):
            self.add("assigned in prepare or torch", node)
        self.generic_visit(node)

    def visit_Name(self, node):
        if self.full_name(node).split(".")[-1] in ENVIRONMENT:
            self.add("environment", node)
        self.check_prepare(node)

    def visit_Attribute(self, node):
        if node.attr in ENVIRONMENT:
            self.add("environment", node)
        if node.attr == "training" and isinstance(node.ctx, ast.Load):
            self.add("eval mode", node)
        if HOOK.fullmatch(node.attr):
            self.add("hooks", node)
        if self.full_name(node) == "sys.modules":
            self.add("inner parts of Python", node)
        if node.attr == "__dict__" and self.is_guarded(node.value):
            self.add("assigned in prepare or torch", node)
        self.check_prepare(node)
        self.generic_visit(node)

    def check_prepare(self, node):
        if self.full_name(node).startswith("prepare."):
            self.add("prepare", node)

    def visit_FunctionDef(self, node):
        if node.name in ("train", "eval"):
            self.add("eval mode", node)
        if HOOK.fullmatch(node.name):
            self.add("hooks", node)
        self.generic_visit(node)

    def check_targets(self, node, targets):
        for target in targets:
            if isinstance(target, (ast.Tuple, ast.List)):
                self.check_targets(node, target.elts)
                continue
            is_part = isinstance(target, (ast.Attribute, ast.Subscript))
            if is_part and self.is_guarded(target.value):
                self.add("assigned in prepare or torch", target)

    def visit_Assign(self, node):
        self.check_targets(node, node.targets)
        self.generic_visit(node)

    visit_Delete = visit_Assign

    def visit_AugAssign(self, node):
        self.check_targets(node, [node.target])
        self.generic_visit(node)

    visit_AnnAssign = visit_For = visit_AugAssign


def added_by(before, after):
    """Return (line number, kind, line) of what is worth a look in `after` and was not in `before`.

    Both are the text of a train.py. Of prepare, only what the file did not use before is new.
    """
    old = Counter((kind, code) for kind, code, _ in Finder(ast.parse(before)).found)
    old_lines = {line.strip() for line in before.split("\n")}
    lines = [line.strip() for line in after.split("\n")]
    numbers_of = {}
    for kind, code, number in Finder(ast.parse(after)).found:
        numbers_of.setdefault((kind, code), []).append(number)
    added = set()
    for (kind, code), numbers in numbers_of.items():
        num_new = len(numbers) - old[kind, code]
        if num_new <= 0 or (kind == "prepare" and old[kind, code]):
            continue
        numbers.sort(key=lambda number: lines[number - 1] in old_lines)  # new lines first
        added |= {(number, kind, lines[number - 1]) for number in numbers[:num_new]}
    return sorted(added)


def read_versions(path, names):
    """Return the text of each name as git knows it ("abc1234:train.py"), None where it has none."""
    command = ["git", "-C", str(Path(path).parent), "cat-file", "--batch"]
    stdin = "".join(f"{name}\n" for name in names).encode()
    output = subprocess.run(command, input=stdin, capture_output=True, check=True).stdout
    texts = []
    for _ in names:
        head, _, output = output.partition(b"\n")
        if head.split()[-2:-1] != [b"blob"]:
            texts.append(None)
            continue
        size = int(head.split()[-1])
        texts.append(output[:size].decode("utf-8", errors="replace"))
        output = output[size + 1 :]
    return texts


def worth_a_look(runs, branch):
    """Return what a person should read of the kept changes, a line each, by the syntax tree.

    Only what the change added is told: files, environment, other programs, threads, network, what
    is assigned in prepare or torch, hooks, questions for the eval mode, and what of prepare was not
    used before.
    """
    path = runs.attrs["path"]
    table, _ = experiments(runs)
    commits = table.commit[(table.status == "keep") & table.own].tolist()
    try:
        folder = recipe_folder(path, branch)
        names = [f"{commit}{up}:{folder}{ratchet.CANVAS}" for commit in commits for up in ("^", "")]
        texts = read_versions(path, names)
    except (OSError, subprocess.CalledProcessError) as error:
        return [f"worth a look: skipped: {reason(error)}"]
    lines = []
    for commit, before, after in zip(commits, texts[::2], texts[1::2], strict=True):
        if before is None or after is None:
            lines.append(f"{commit}: git has no {ratchet.CANVAS} of it")
            continue
        try:
            added = added_by(before, after)
        except SyntaxError as error:
            lines.append(f"{commit}: {ratchet.CANVAS} is no Python: {error}")
            continue
        lines += [f"{commit} line {n}, {kind}: {line[:90]}" for n, kind, line in added]
    if not lines:
        lines.append(f"nothing in {len(commits)} kept changes")
    return [f"worth a look: {line}" for line in lines]
