"""One data set or kind of file per module. Import their classes from `firstlight.data`."""
