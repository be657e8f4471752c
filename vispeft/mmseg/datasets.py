"""Data sets of this project for mmsegmentation."""
