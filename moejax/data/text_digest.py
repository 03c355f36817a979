"""The digest by which a text is known."""

import hashlib


def digest_of_text(text: str) -> str:
  """Returns 32 hex digits."""
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
