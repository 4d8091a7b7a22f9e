"""GGUF files for llama.cpp: architectures, vocabularies, writing, and measuring by llama.cpp itself."""
