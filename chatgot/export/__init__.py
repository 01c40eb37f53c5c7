"""A run folder's model in the formats of other programs: transformers and llama.cpp."""
