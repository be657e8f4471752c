"""Building: classes by name, and methods from the names and fields in a config."""
