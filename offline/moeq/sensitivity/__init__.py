"""How much errors of each expert cost the model."""
