"""`POST /predict`: classifies uploaded images."""
