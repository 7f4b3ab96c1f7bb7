"""Stands in for Lightning: what is imported from here is fulmen."""

from fulmen.compat.foreign import serve_instead

serve_instead(__name__)
