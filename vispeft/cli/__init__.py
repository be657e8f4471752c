"""What the scripts in ``tools/`` call: one module per command, each with a ``main``."""
