"""The life of adapters on a model: attaching, switching, checking, merging, and the bank that does it."""
