"""A digest names everything a block depends on: all tokens up to its end, tenant, adapter, KV group, key."""

from __future__ import annotations

from kvpage.cache.prefix import PrefixHasher, full_hit, window_hit

TOKENS = list(range(12))


def digests(
    hasher: PrefixHasher,
    tokens: list[int],
    salt: str | None = None,
    adapter: str | None = None,
    group: int = 0,
    kind: str = "full",
) -> list[bytes]:
    chain: list[bytes] = []
    hasher.extend(hasher.root(salt, adapter, group, kind), chain, tokens, len(tokens) // 4)
    return chain


def test_equal_tokens_have_equal_digests_and_a_change_shows_in_every_block_after_it() -> None:
    hasher = PrefixHasher(b"key", 4)
    plain = digests(hasher, TOKENS)
    changed = digests(hasher, [*TOKENS[:5], 99, *TOKENS[6:]])
    assert digests(hasher, TOKENS) == plain
    assert changed[0] == plain[0]
    assert changed[1] != plain[1]
    assert changed[2] != plain[2]


def test_whatever_else_differs_gives_other_digests() -> None:
    hasher = PrefixHasher(b"key", 4)
    variants = [
        digests(hasher, TOKENS),
        digests(hasher, TOKENS, salt="a"),
        digests(hasher, TOKENS, salt="b"),
        digests(hasher, TOKENS, salt=""),
        digests(hasher, TOKENS, adapter="a"),
        digests(hasher, TOKENS, salt="a", adapter="b"),
        digests(hasher, TOKENS, salt="ab"),
        digests(hasher, TOKENS, group=1),
        digests(hasher, TOKENS, kind="window"),
        digests(PrefixHasher(b"other", 4), TOKENS),
    ]
    for block in range(3):
        assert len({chain[block] for chain in variants}) == len(variants)


def test_a_chain_may_grow_bit_by_bit() -> None:
    hasher = PrefixHasher(b"key", 4)
    root = hasher.root(None, None, 0, "full")
    chain: list[bytes] = []
    hasher.extend(root, chain, TOKENS[:6], 1)
    hasher.extend(root, chain, TOKENS, 3)
    assert chain == digests(hasher, TOKENS)


def test_a_full_hit_ends_at_the_first_missing_block() -> None:
    chain = [b"a", b"b", b"c"]
    assert full_hit({b"a", b"b", b"c"}, chain, 3) == 3
    assert full_hit({b"a", b"c"}, chain, 3) == 1
    assert full_hit({b"a", b"b", b"c"}, chain, 2) == 2


def test_a_window_hit_needs_only_the_blocks_that_the_next_token_sees() -> None:
    chain = [b"a", b"b", b"c", b"d"]
    assert window_hit({b"d"}, chain, 4, reach=4, size=4) == 4
    assert window_hit({b"d"}, chain, 4, reach=5, size=4) == 0
    assert window_hit({b"c", b"d"}, chain, 4, reach=5, size=4) == 4
    assert window_hit({b"b", b"c"}, chain, 4, reach=8, size=4) == 3
    assert window_hit({b"a"}, chain, 4, reach=100, size=4) == 1
    assert window_hit(set(), chain, 4, reach=0, size=4) == 4
