"""Services for all other packages: files, threads, memory, progress, text for terminals."""
