"""Students as stock checkpoints: Hugging Face directories and GGUF files that other engines run without custom code."""
