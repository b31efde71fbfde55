"""The drill of edits (test_edits.py) on the CUDA path: each compiles whole, and none late.

Run by hand, five minutes, as pytest does not collect this file by itself:

    uv run pytest tests/null_gpu/drill.py
"""

import pytest
from test_cuda_path import CONTEXT, library, null_cache, pytestmark, run, server  # noqa: F401
from test_edits import EDITS

SIZES = {"TOTAL_BATCH_SIZE": 8 * CONTEXT, "DEVICE_BATCH_SIZE": 4}
OWN_SIZES = {"half_the_batch": {"DEVICE_BATCH_SIZE": 4}}  # where the edit is of these constants


@pytest.mark.parametrize("name", EDITS)
def test_edit_is_compiled_before_the_clock_starts(run, name):  # noqa: F811
    sizes = OWN_SIZES.get(name, SIZES)
    seen = run(edit=name, train=sizes, batches=8)
    assert "compile: yes" in seen.log
    assert seen.compiled.count("GPT.trunk") == 1
    assert seen.late == []
    assert seen.warnings == []
