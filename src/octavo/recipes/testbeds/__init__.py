"""Models, data and measures of single studies: what is compressed there, and how it is judged."""
