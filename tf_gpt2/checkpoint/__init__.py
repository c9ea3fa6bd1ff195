"""Converts between files on disk and the parameter tree. Only this package knows the names in the files."""
