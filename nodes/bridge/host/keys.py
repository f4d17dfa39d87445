"""Names under which a system's wrappers and attachments lie on a MODEL, where another one asks."""

CACHING = "nibble_cache"
