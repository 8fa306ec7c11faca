"""Problems, prompts, tokenizers and training corpora."""
