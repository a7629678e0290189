"""How much of a model is left: encoding, scoring and the field's own harness."""
