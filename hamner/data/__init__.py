"""The package reads documents and conversations, tokenizes, mixes and packs them into batches."""
