"""Ready layers."""
