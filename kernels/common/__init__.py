"""What operations share: Triton helpers, the choice of an implementation, the interpreter."""
