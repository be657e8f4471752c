"""Storage: the adapter file, its codecs, and the fingerprint of the base it belongs to."""
