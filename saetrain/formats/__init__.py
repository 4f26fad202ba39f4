"""Checkpoint families of the field, each read and written by one file."""
