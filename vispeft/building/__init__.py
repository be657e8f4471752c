"""Building: classes by their names, and methods from the names and fields a config gives."""
