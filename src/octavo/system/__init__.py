"""What every other room uses: files, threads, memory, progress, text for terminals."""
