"""What is compressed: folders, files, modules; the sites in them; texts and batches."""
