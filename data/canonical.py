"""When two captions are the same caption."""

import unicodedata

from xxhash import xxh3_64_intdigest

__all__ = ["canonical_caption", "caption_hash"]


def canonical_caption(caption: str) -> str:
    """What makes two captions the same: Unicode NFC, single spaces, lower case."""
    return " ".join(unicodedata.normalize("NFC", caption).split()).lower()


def caption_hash(caption: str) -> int:
    """64-bit hash of the canonical caption, as a signed integer."""
    digest = xxh3_64_intdigest(canonical_caption(caption).encode("utf-8", "surrogatepass"))
    return digest - (1 << 64) if digest >> 63 else digest
