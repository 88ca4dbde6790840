"""What one attention layer computes in a call: one file for each kind."""
