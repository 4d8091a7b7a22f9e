"""Sources: folders, files and modules, their sites, and texts and batches."""
