"""The backbone, its embeddings and heads, and one file per family of attention."""
