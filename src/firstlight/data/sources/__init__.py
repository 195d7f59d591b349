"""Data sources: one data set or kind of file a module."""
