"""The terms that patterns are made of: one class a term, which says all that is known of it."""
