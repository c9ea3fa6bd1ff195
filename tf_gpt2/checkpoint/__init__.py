"""Files on disk <-> the parameter tree. Only this package knows the names in the files."""
