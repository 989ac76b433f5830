"""The commands of `tintc`: each module runs one and prints its result."""
