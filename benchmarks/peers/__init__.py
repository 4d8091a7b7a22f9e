"""Other tools, one file each: which packages they need, the settings that are run, and how one is run."""
