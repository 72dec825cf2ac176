"""Which tokens a step sees, and in what form."""
