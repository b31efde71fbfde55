"""Corpora, downloads, tokenizer, shards, packing, clock."""

import prepare


def test_smoke(cache, tokenizer):
    rows = sum(len(x) for x, _ in prepare.make_dataloader(tokenizer, 7, 512, "test", "cpu"))
    assert rows == prepare.EVAL_TOKENS // 512
