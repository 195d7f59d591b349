"""What the processes of a run tell each other: gathered objects and the rank watchdog."""
