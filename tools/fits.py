"""Print which sizes of train.py fit on which GPU, on a machine without one: the table in the docs.

    uv run python tools/fits.py           # about ten minutes: every line compiles the model
    uv run python tools/fits.py 8 24      # cards of so many GB only

A card is a null GPU (tests/null_gpu) of that memory: train.py warms up on it as it would on a real
one, and torch's allocator tells the peak. Sizes are those of climbmix; a GB is 1e9 bytes.
"""

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "null_gpu")]

import null_gpu  # noqa: E402

CARDS = [8, 12, 16, 24, 40, 80]  # GB
VOCAB_SIZE = 8192  # of climbmix
SIZES = {  # what the docs advise: constants of train.py
    "as shipped": {},
    "small": {"DEPTH": 4, "TOTAL_BATCH_SIZE": 2**17, "WINDOW_PATTERN": "L"},
    "smallest": {
        "DEPTH": 2,
        "TOTAL_BATCH_SIZE": 2**15,
        "DEVICE_BATCH_SIZE": 16,
        "WINDOW_PATTERN": "L",
    },
}


class WarmedUp(Exception):
    """Ends main() where training would begin."""


def warm_up(constants, flash):
    """Run train.py up to its training; print the rows a pass and the peak in MB as JSON."""
    null_gpu.trust_no_values()
    import torch

    import prepare
    import train

    for name, value in constants.items():
        assert hasattr(train, name), name
        setattr(train, name, value)
    if flash:
        train.flash_attention_3 = null_gpu.flash_attention_3
    peaks = []
    free_gpu_memory = train.free_gpu_memory

    def noted():
        peaks.append(torch.cuda.max_memory_allocated())
        free_gpu_memory()

    def stop(*args):
        raise WarmedUp

    train.free_gpu_memory = noted
    prepare.make_dataloader = stop
    prepare.Tokenizer.from_directory = lambda: SimpleNamespace(vocab_size=VOCAB_SIZE)
    log = io.StringIO()
    rows = None
    with contextlib.redirect_stdout(log):
        try:
            seen = []
            warm = train.warm_up

            def watched(model, optimizers, rows, *more):
                seen.append(rows)
                return warm(model, optimizers, rows, *more)

            train.warm_up = watched
            train.main()
        except WarmedUp:
            rows = seen[-1]
        except SystemExit as error:
            if "out of memory" not in str(error):
                raise
            rows = 0
    print(json.dumps([rows, peaks[-1] / 2**20 if peaks else 0, log.getvalue()]))


def ask(library, gigabytes, constants, flash, cache):
    """Return (rows, MB) of a card and a size: rows is 0 where nothing fits."""
    more = {"NULL_GPU_GB": gigabytes, "AUTORESEARCH_CACHE": cache, "AUTORESEARCH_CORPUS": "python"}
    done = subprocess.run(
        [sys.executable, __file__, "--inside", json.dumps([constants, flash])],
        env=null_gpu.environment(library, **more),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"fits.py: {done.stderr.strip().splitlines()[-1]}")
    rows, peak, log = json.loads(done.stdout.splitlines()[-1])
    if re.search("compile failed", log):
        sys.exit(f"fits.py: {log}")
    return rows, peak


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cards", nargs="*", type=float, default=CARDS, metavar="GB")
    parser.add_argument("--flex", action="store_true", help="without FlashAttention-3")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        return warm_up(*json.loads(args.inside))
    if reason := null_gpu.why_not():
        sys.exit(f"fits.py: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        library = null_gpu.build(Path(folder))
        cache = Path(folder) / "cache"
        cache.mkdir()
        print(f"| card | {' | '.join(SIZES)} |\n| --- {'| --- ' * len(SIZES)}|")
        for gigabytes in args.cards:
            cells = [f"{gigabytes:g} GB"]
            for constants in SIZES.values():
                rows, peak = ask(library, gigabytes, constants, not args.flex, cache)
                cells.append(f"{rows} rows, {peak / 1000:.1f} GB" if rows else "does not fit")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
