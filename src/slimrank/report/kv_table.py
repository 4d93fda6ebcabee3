"""The table of what caches of keys and values take: the same in reports and in the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from slimrank.report.number_format import megabytes

TITLES = {
    "dynamic": "keys and values",
    "latent": "latents",
    "latent-int8": "latents, int8",
    "int8": "keys and values, int8",
    "int4": "keys and values, int4",
}
KV_NOTE = (
    "Of one text, by formula. Before compression, and after it in generate, keys and values are kept as they are; "
    "slimrank.latent_cache keeps latents."
)
KvBytes = Mapping[str, Mapping[int, int]]  # cache -> tokens -> bytes


def kv_headings(found: KvBytes) -> tuple[str, ...]:
    """Return the headings: the cache, one token, and the other lengths."""
    return ("cache", *(_length(int(tokens)) for tokens in found["dynamic"]))


def kv_rows(found: KvBytes) -> list[tuple[str, ...]]:
    """Return a row for each cache; one of latents only where it is smaller than the ordinary one."""
    whole = found["dynamic"]
    kept = {name: sizes for name, sizes in found.items() if name == "dynamic" or sizes != whole}
    return [(TITLES[name], *(_size(int(tokens), sizes[tokens]) for tokens in sizes)) for name, sizes in kept.items()]


def _length(tokens: int) -> str:
    return "a token" if tokens == 1 else f"{tokens // 1024}k tokens"


def _size(tokens: int, size: int) -> str:
    return f"{size:,} bytes" if tokens == 1 else megabytes(size)
